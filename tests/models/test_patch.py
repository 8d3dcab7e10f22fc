"""patch_model and unpatch_model: what changes, what comes back, who is refused; generation stays the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.dist import run_ranks
from tests.models import families

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")


def anatomy(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that patching could replace, by identity."""
    found: dict[str, Any] = {
        "implementation": model.config._attn_implementation,
        "use_cache": model.config.use_cache,
        "config": model.config.to_json_string(),
        "class": type(model),
        "attributes": set(vars(model)),
    }
    for name, module in model.named_modules():
        found[f"{name} forward"] = (vars(module).get("forward"), id(type(module).forward), type(module))
        found[f"{name} hooks"] = [list(getattr(module, kind)) for kind in HOOKS]
    return found


def everything(rank: int, world: int) -> dict[str, Any]:
    """All scenarios of this file that need ranks, in one start of them."""
    import sap_hf

    row = families.pack()
    results: dict[str, Any] = {"identity": {}}
    for name in ("llama", "gemma2"):
        model = families.build(name)
        before, logits = anatomy(model), model(**row, use_cache=False).logits
        sap_hf.patch_model(model)
        patched = anatomy(model)
        model(**row)
        sap_hf.unpatch_model(model)
        again = model(**row, use_cache=False).logits
        results["identity"][name] = {
            "changed": [key for key in before if before[key] != patched[key]],
            "left": [key for key in before if before[key] != anatomy(model)[key]],
            "same": torch.equal(logits, again),
        }
        sap_hf.unpatch_model(model)

    patched_model, plain = families.build("llama"), families.build("llama")
    sap_hf.patch_model(patched_model)
    first = plain(**row, use_cache=False).logits
    shared = patched_model(**row).logits
    results["plain beside patched"] = torch.equal(first, plain(**row, use_cache=False).logits)
    results["implementations"] = (
        patched_model.config._attn_implementation,
        plain.config._attn_implementation,
    )
    results["shared"] = shared.detach()

    results["generate"] = {}
    for name in ("llama", "mistral", "gemma3_text"):
        plain, model = families.build(name), families.build(name)
        sap_hf.patch_model(model)
        model(**row)
        if rank == 0:
            # One rank generates by itself: a collective in there would hang.
            results["generate"][name] = [generate(plain, model, pad) for pad in (0, 4)]
    return results


def generate(plain: nn.Module, model: nn.Module, left_padding: int) -> tuple[bool, float]:
    ids = torch.randint(3, families.VOCAB, (2, 12), generator=torch.Generator().manual_seed(9))
    mask = torch.ones_like(ids)
    ids[0, :left_padding], mask[0, :left_padding] = 0, 0
    options = {
        "max_new_tokens": 8,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    expected = plain.generate(ids, attention_mask=mask, **options)
    found = model.generate(ids, attention_mask=mask, **options)
    error = (torch.stack(found.logits) - torch.stack(expected.logits)).abs().max()
    return torch.equal(found.sequences, expected.sequences), float(error)


@pytest.fixture(scope="module")
def on_2() -> list[dict[str, Any]]:
    return run_ranks(everything, 2, timeout=120)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_unpatch_restores_the_model(on_2: list[dict[str, Any]], name: str) -> None:
    for results in on_2:
        result = results["identity"][name]
        assert result["changed"], "patching changed nothing that this test can see"
        assert result["left"] == []
        assert result["same"]


def test_a_patched_and_a_plain_model_live_in_one_process(on_2: list[dict[str, Any]]) -> None:
    truth = families.documents_alone(families.build_dense("llama"), families.pack(), families.LENGTHS)
    for results in on_2:
        assert results["plain beside patched"]
        assert results["implementations"] == ("sap", "sdpa")
        assert float((results["shared"][0] - truth.logits).abs().max()) < 1e-8


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text"])
def test_generation_on_one_rank_equals_the_plain_model(on_2: list[dict[str, Any]], name: str) -> None:
    for same, error in on_2[0]["generate"][name]:
        assert same
        assert error < 1e-10


@pytest.mark.parametrize(
    "family, attention",
    [
        ("falcon", "FalconAttention"),
        ("bloom", "BloomAttention"),
        ("mpt", "MptAttention"),
        ("stablelm", "StableLmAttention"),
        ("llama4_text", "Llama4TextAttention"),
    ],
)
def test_a_model_that_is_not_exact_is_refused_by_name(family: str, attention: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    import sap_hf

    # Every family has other names for its sizes; what a config does not know it keeps aside.
    fields = {name: value for name, value in families.COMMON.items() if name != "head_dim"}
    fields |= {"n_layer": 2, "n_head": 4, "n_embd": 32, "rotary_dim": 4, "num_local_experts": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields))
    before = anatomy(model)
    with pytest.raises(sap_hf.errors.UnsupportedAttention) as caught:
        sap_hf.patch_model(model)
    assert family in str(caught.value) and attention in str(caught.value)
    assert anatomy(model) == before


def test_attention_dropout_is_refused_by_name() -> None:
    import sap_hf

    model = families.build("llama", attention_dropout=0.1)
    with pytest.raises(sap_hf.errors.UnsupportedAttention, match="attention_dropout"):
        sap_hf.patch_model(model)


def test_a_layer_that_never_calls_us_is_an_error() -> None:
    """The check of the first forward: a layer whose forward was replaced would train on something else."""
    import sap_hf

    model = families.build("llama")
    layer = model.model.layers[1].self_attn
    layer.forward = lambda hidden_states, *args, **kwargs: (torch.zeros_like(hidden_states), None)
    sap_hf.patch_model(model)
    with pytest.raises(sap_hf.errors.UnsupportedAttention, match=r"model\.layers\.1\.self_attn"):
        model(**families.pack())


def test_something_that_is_no_transformers_model_is_refused() -> None:
    import sap_hf

    with pytest.raises(sap_hf.errors.UnsupportedAttention, match="Linear"):
        sap_hf.patch_model(nn.Linear(2, 2))
