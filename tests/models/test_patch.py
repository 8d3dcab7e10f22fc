"""patch_model and unpatch_model: patched and plain side by side, what is refused, what keeps its promise when layers
are recomputed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import sap_hf
from sap_hf.models import interface
from sap_hf.runtime.group import CpGroup
from tests.dist import run_ranks
from tests.models import families
from tests.models.matrix import EXACT, anatomy, layout_for, router_loss_alone
from tests.models.tiny import config_of

# One layer runs several times in a forward, or its block keeps keyword arguments from it, or it passes something on to
# the next rank.
RECOMPUTED = (
    *("llama", "hrm_text", "dory", "nemotron", "stablelm", "qwen2_moe"),
    *("bamba", "jamba", "lfm2", "mamba2", "qwen3_next", "zamba2", "zaya"),
)
OTHER = (4, 20, 3)


@families.only_float64()
def side_by_side(rank: int, world: int) -> dict[str, Any]:
    row = families.pack()
    patched, plain = families.build("llama"), families.build("llama")
    first = plain(**row, use_cache=False).logits
    sap_hf.patch_model(patched)
    shared = patched(**row).logits
    same = torch.equal(first, plain(**row, use_cache=False).logits)
    implementations = (patched.config._attn_implementation, plain.config._attn_implementation)
    sap_hf.unpatch_model(patched)
    again = torch.equal(first, patched(**row, use_cache=False).logits)
    sap_hf.unpatch_model(patched)
    return {
        "plain": same,
        "again": again,
        "implementations": implementations,
        "shared": shared.detach(),
    }


def test_a_patched_and_a_plain_model_live_in_one_process() -> None:
    with families.only_float64():
        truth = families.documents_alone(families.build_plain("llama"), families.pack(), families.LENGTHS)
    for results in run_ranks(side_by_side, 2):
        assert results["plain"] and results["again"]
        assert results["implementations"] == ("sap", "sdpa")
        assert float((results["shared"][0] - truth.logits).abs().max()) < EXACT


def recomputed(rank: int, world: int, reentrant: bool) -> dict[str, tuple[float, dict[str, torch.Tensor]]]:
    """Loss and gradients under gradient checkpointing, with another batch's forward before the backward."""
    found = {}
    for name in RECOMPUTED:
        with families.only_float64():
            model: Any = families.build(name)
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            sap_hf.patch_model(model, layout=layout_for(model, "zigzag"))
            model.train()
            loss = model(**families.pack()).loss
            model(**families.pack(OTHER))
            loss.backward()
            for parameter in model.parameters():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= world
            sap_hf.unpatch_model(model)
            found[name] = (loss.item(), families.gradients(model))
    return found


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputed_layers_find_their_own_batch(reentrant: bool) -> None:
    results = run_ranks(recomputed, 2, reentrant)
    for name in RECOMPUTED:
        with families.only_float64():
            model = families.build_plain(name).train()
            truth = families.documents_alone(model, families.pack(), families.LENGTHS)
        largest = max(float(gradient.abs().max()) for gradient in truth.gradients.values())
        for found in results:
            loss, gradients = found[name]
            assert abs(loss - truth.loss) / truth.loss < EXACT, name
            error, where = families.worst(gradients, truth.gradients)
            assert error / largest < EXACT, f"{name}: {where}"


def counted(rank: int, world: int) -> tuple[float, dict[str, torch.Tensor]]:
    """This rank's loss and the gradients of all, as Trainer does it: the number of targets is passed."""
    with families.only_float64():
        model: Any = families.build("mixtral").train()
        sap_hf.patch_model(model)
        row = families.pack()
        targets = int((row["labels"] != families.IGNORED).sum())
        loss = model(**row, output_router_logits=True, num_items_in_batch=targets).loss
        loss.backward()
        for parameter in model.parameters():
            torch.distributed.all_reduce(parameter.grad)
        sap_hf.unpatch_model(model)
    return loss.item(), families.gradients(model)


def test_router_losses_of_all_ranks_add_up_when_targets_are_counted() -> None:
    found = run_ranks(counted, 2)
    with families.only_float64():
        truth = router_loss_alone(families.build_plain("mixtral"), families.pack(), families.LENGTHS)
        tokens = families.documents_alone(families.build_plain("mixtral"), families.pack(), families.LENGTHS)
    assert truth.loss - tokens.loss > 0.1
    assert abs(sum(loss for loss, _ in found) - truth.loss) / truth.loss < EXACT
    largest = max(float(gradient.abs().max()) for gradient in truth.gradients.values())
    for _, gradients in found:
        error, where = families.worst(gradients, truth.gradients)
        assert error / largest < EXACT, where


def test_experts_are_left_alone() -> None:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_config(config_of("mixtral"))
    experts = model.model.layers[0].mlp.experts
    before = (model.config._experts_implementation, vars(experts).get("forward"), type(experts).forward)
    sap_hf.patch_model(model)
    after = (model.config._experts_implementation, vars(experts).get("forward"), type(experts).forward)
    sap_hf.unpatch_model(model)
    assert before == after


@pytest.mark.parametrize(
    "name, field",
    [
        ("llama", "attention_dropout"),
        ("bert", "attention_probs_dropout_prob"),
        ("gpt2", "attn_pdrop"),
        ("opt", "attention_dropout"),
        ("bloom", "attention_dropout"),
    ],
)
def test_attention_dropout_is_refused_before_training(name: str, field: str) -> None:
    model = families.build(name, **{field: 0.1})
    before = anatomy(model)
    with pytest.raises(sap_hf.errors.UnsupportedAttention, match=r"attention_dropout=0\.1"):
        sap_hf.patch_model(model)
    assert anatomy(model) == before


@pytest.mark.parametrize(
    "name, changes, reason",
    [
        ("gemma3_text", {"use_bidirectional_attention": True}, "both directions"),
        (
            "minimax_m3_vl_text",
            {"layer_types": ["full_attention", "full_attention", "minimax_m3_sparse"]},
            r"layers\.2\.self_attn.* second look",
        ),
        ("bert", {"is_decoder": False}, "both directions"),
    ],
)
def test_a_config_that_makes_a_family_inexact_is_refused(
    name: str, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(sap_hf.errors.UnsupportedAttention, match=reason):
        sap_hf.patch_model(families.build(name, **changes))


def test_a_layer_that_never_calls_us_is_an_error() -> None:
    """The check of the first forward: a layer whose forward was replaced would train on something else."""
    model: Any = families.build("llama")
    layer = model.model.layers[1].self_attn
    layer.forward = lambda hidden_states, *args, **kwargs: (torch.zeros_like(hidden_states), None)
    sap_hf.patch_model(model)
    with pytest.raises(sap_hf.errors.UnsupportedAttention, match=r"model\.layers\.1\.self_attn"):
        model(**families.pack())
    sap_hf.unpatch_model(model)


def test_the_oracle_sees_a_window_and_a_softcap() -> None:
    """The families whose attention is special really differ from their plain form on this pack."""
    for name, plain in (
        ("mistral", {"sliding_window": None}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"sliding_window": 64}),
        ("gemma3_text", {"sliding_window": 64}),
        ("smollm3", {"no_rope_layers": [1, 1, 1]}),
        ("granite", {"attention_multiplier": 0.35}),
        ("llama4_text", {"attention_chunk_size": 64}),
        ("llama4_text", {"attn_temperature_tuning": False}),
        ("phimoe", {"sliding_window": 64}),
    ):
        row = families.pack()
        special = families.documents_alone(families.build_plain(name), row, families.LENGTHS)
        other = families.documents_alone(families.build_plain(name, **plain), row, families.LENGTHS)
        assert float((special.logits - other.logits).abs().max()) > 1e-3, (name, plain)


def test_a_refusal_leaves_the_model_as_it_was() -> None:
    model = families.build("llama")
    before, group = model.config._attn_implementation, CpGroup(None, None, None, size=2, rank=0)
    with pytest.raises(sap_hf.errors.LayoutError, match="ulysses_size=3"):
        sap_hf.patch_model(model, group=group, ulysses_size=3)
    assert model.config._attn_implementation == before
    assert not model._forward_pre_hooks and not model._forward_hooks


@pytest.mark.parametrize("name", ["llama", "stablelm", "lfm2"])
@pytest.mark.parametrize("first", ["forward", "unpatch the copy", "unpatch the model"])
def test_a_copy_of_a_patched_model_is_a_plain_one(name: str, first: str) -> None:
    row = families.pack()
    model: Any = families.build(name)
    plain, before = model(**row, use_cache=False).logits, anatomy(model)
    sap_hf.patch_model(model)
    shared = model(**row).logits
    copied = copy.deepcopy(model)
    if first == "unpatch the copy":
        sap_hf.unpatch_model(copied)
    elif first == "unpatch the model":
        sap_hf.unpatch_model(model)
    assert torch.equal(copied(**row, use_cache=False).logits, plain)
    if first != "unpatch the model":
        assert torch.equal(model(**row).logits, shared)
        sap_hf.unpatch_model(model)
    assert anatomy(copied) == anatomy(model) == before


@pytest.mark.parametrize("name", ["falcon", "gpt_bigcode", "laguna", "qwen3"])
def test_plans_are_made_for_the_heads_that_travel(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: set[tuple[int, int]] = set()
    original = interface.attention

    def attention(q: torch.Tensor, k: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        asked.add((q.shape[1], k.shape[1]))
        return original(q, k, *args, **options)

    monkeypatch.setattr(interface, "attention", attention)
    model: Any = families.build(name)
    shape = sap_hf.patch_model(model).sharding.shape
    model(**families.pack())
    sap_hf.unpatch_model(model)
    # Where layers differ, the fewest query heads.
    assert (shape.num_heads, shape.num_kv_heads) == min(asked)
