"""sap-hf verify: exact models pass, broken ones fail by the name of the tensor, and what cannot be run is refused."""

from __future__ import annotations

import dataclasses
import json
import os
import types
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
import transformers

from sap_hf.cli import main
from sap_hf.errors import ConfigError
from sap_hf.hf import verify as module
from sap_hf.hf.clone import VOCABULARY, WINDOW, affordable, clone, find_config, outline
from tests import dist

dist.PRELOAD += [name for name in ("transformers.modeling_utils",) if name not in dist.PRELOAD]

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def small(**changes: Any) -> Any:
    return transformers.Qwen2Config(**{**SMALL, **changes})


def save(config: Any, folder: Path) -> str:
    config.save_pretrained(folder)
    return str(folder)


# ---- verdicts ---------------------------------------------------------------------------------------


def test_a_config_is_verified_by_a_clone_of_each_kind_of_its_layers(capsys, tmp_path):
    windows = {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 2}
    assert main(["verify", save(small(**windows), tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "Qwen2ForCausalLM, a tiny random clone: 2 of 3 layers, 6:2 heads" in printed
    assert "patched: Qwen2Attention x2: via interface" in printed
    assert "1 x full attention: sdpa: fastest exact" in printed and f"1 x window {WINDOW}: sdpa:" in printed
    for plan in ("sap contiguous", "sap zigzag", "ulysses ", "auto: "):
        assert f"\n{plan}" in printed
    assert printed.splitlines()[-1].startswith("EXACT: ")


def test_weights_are_those_of_the_folder(capsys, tmp_path):
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(
        small(use_sliding_window=True, sliding_window=64, max_window_layers=0)
    )
    model.save_pretrained(tmp_path)
    assert main(["verify", str(tmp_path), "--weights"]) == 0
    printed = capsys.readouterr().out
    assert "its weights, all 3 layers; float64" in printed
    assert "window 64 (longer than every document here" in printed
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.save_pretrained(tmp_path)
    assert main(["verify", str(tmp_path), "--weights"]) == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("NOT TESTED: ")


def broken_rank(rank: int, world: int, how: str) -> module.Verdict:
    """The verdict on a model that one mistake makes inexact."""
    from sap_hf.kernels import sdpa
    from sap_hf.models import batch, sharding

    forward, backward, whole = sdpa.Sdpa.forward, sdpa.Sdpa.backward, sharding.Sharding._whole
    if how == "one document":
        batch._from_positions = lambda positions, lengths: batch.Documents.from_lengths(lengths)
    elif how == "half of dk":

        def halved(self: Any, *args: Any, **options: Any) -> Any:
            dq, dk, dv = backward(self, *args, **options)
            return dq, dk / 2, dv

        sdpa.Sdpa.backward = halved
    elif how == "a NaN on rank 1":
        sharding.Sharding._whole = lambda self, tensor, plan, batch: (
            whole(self, tensor, plan, batch) * (torch.nan if rank == 1 else 1)
        )
    elif how == "no window":
        sdpa.Sdpa.forward = lambda self, q, k, v, segments, scoring, place=None: forward(
            self, q, k, v, segments, dataclasses.replace(scoring, window=None), place
        )
    return module.check(clone(small(use_sliding_window=how == "no window", max_window_layers=1)))


@pytest.mark.parametrize(
    ("how", "last_line"),
    [
        ("one document", "1e-11 is allowed. The first document moves the logits of the others by"),
        ("half of dk", "the gradient of model."),
        ("a NaN on rank 1", "logits is off by inf; 1e-11 is allowed."),
        ("no window", "is off by"),
    ],
)
def test_a_mistake_ends_with_code_1_and_the_name_of_what_is_wrong(capsys, monkeypatch, how, last_line):
    verdict = module.worst_of(dist.run_ranks(broken_rank, 2, how))
    assert not verdict.exact
    monkeypatch.setattr(module, "verify", lambda *asked: verdict)
    assert main(["verify", "qwen2"]) == 1
    printed = capsys.readouterr().out.splitlines()[-1]
    assert printed.startswith("NOT EXACT: ") and last_line in printed
    assert ("moves the logits" in printed) == (how == "one document")


def without_float64(rank: int, world: int) -> module.Verdict:
    """The verdict on a model whose forward cannot be run in float64, by more ranks than it has heads."""
    alone = module.documents_alone

    def only_float32(model: Any, *args: Any) -> module.Answer:
        if next(model.parameters()).dtype == torch.float64:
            raise RuntimeError("expected scalar type Float but found Double")
        return alone(model, *args)

    module.documents_alone = only_float32
    return module.check(small(num_attention_heads=2, num_key_value_heads=1))


def test_what_is_compared_otherwise_or_left_out_is_said():
    verdict = dist.run_ranks(without_float64, 3)[0]
    assert verdict.exact and verdict.dtype == "float32"
    assert verdict.tolerance == module.TOLERANCES[torch.float32]
    first, second = verdict.notes
    assert "expected scalar type Float but found Double" in first
    assert second == "ulysses left out: 2 heads for 3 ranks"
    assert [trial.plan.split()[0] for trial in verdict.trials] == ["sap", "sap", "auto:"]
    assert max(trial.error for trial in verdict.trials) > module.TOLERANCES[torch.float64]


def test_a_pack_of_which_nothing_moves_proves_nothing():
    trial = module.Trial(
        plan="sap",
        rows_moved=0,
        logits=0,
        loss=0,
        gradients=0,
        second_document=0,
        leak=0,
        response=1,
        worst="loss",
    )
    verdict = module.Verdict(
        model="", patched="", kernels=[], dtype="float64", tolerance=1e-11, notes=[], trials=[trial]
    )
    assert not verdict.exact
    moved = dataclasses.replace(trial, rows_moved=1)
    assert dataclasses.replace(verdict, trials=[trial, moved]).exact
    assert not dataclasses.replace(verdict, trials=[moved, dataclasses.replace(moved, loss=1e-10)]).exact


# ---- the oracle -------------------------------------------------------------------------------------


def test_transformers_stays_in_float64_and_nobody_else():
    torch.manual_seed(0)
    theirs = types.FunctionType(
        (lambda x: torch.nn.functional.softmax(x.float(), dim=-1, dtype=torch.float32)).__code__,
        {"torch": torch, "__name__": "transformers.models.any"},
    )
    x = torch.randn(4, 7, dtype=torch.float64)
    with module.WholeFloat64():
        assert theirs(x).dtype == torch.float64
        assert torch.equal(theirs(x), x.softmax(-1))
        assert theirs(x.to(torch.bfloat16)).dtype == torch.float32
        assert x.float().dtype == x.to(torch.float32).dtype == torch.float32
    assert theirs(x).dtype == torch.float32


def test_documents_alone_are_those_of_one_batch_each():
    config = clone(small())
    with module.WholeFloat64():
        model = module.build(config, None, torch.float64)
        pack = module.make_pack(VOCABULARY)
        found = module.documents_alone(model, pack, module.LENGTHS)
        # transformers' own loss over a padded batch: no label and no attention beyond a document's end.
        rows = [
            torch.nn.utils.rnn.pad_sequence(pack[name][0].split(module.LENGTHS), True, value)
            for name, value in (("input_ids", 0), ("labels", -100))
        ]
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones(n) for n in module.LENGTHS], True)
        out = model(input_ids=rows[0], labels=rows[1], attention_mask=mask.long())
        out.loss.backward()
    assert found.loss.item() == pytest.approx(out.loss.item(), rel=1e-13)
    assert torch.allclose(found.logits, out.logits[mask.bool()], rtol=0, atol=1e-12)
    for name, parameter in model.named_parameters():
        assert torch.allclose(found.gradients[name], parameter.grad, rtol=0, atol=1e-13), name


# ---- clones -----------------------------------------------------------------------------------------


# Special in what a clone must keep: windows, chunks, layers without positions, experts, groups of them, heads of other
# widths, layers that use others' keys, one key for all heads, fields with other names.
TYPES = (
    "codegen deepseek_v3 exaone_moe falcon gemma2 gemma3_text gemma3n_text gemma4_text gpt_oss granite llama "
    "llama4_text mimo_v2_flash mistral mixtral mpt phi3 qwen2_moe smollm3 starcoder2"
)


@pytest.mark.parametrize("name", TYPES.split())
def test_clones_are_small_and_mean_the_same_attention(name):
    config = find_config(name, False)
    tiny = clone(config)
    model = outline(tiny)
    assert tiny.num_hidden_layers <= min(6, config.num_hidden_layers)
    assert sum(parameter.numel() for parameter in model.parameters()) < 1e8
    assert tiny.vocab_size == VOCABULARY
    sizes = [one.to_dict() for one in (config, tiny)]
    width, tiny_width = (
        one.get("head_dim") or c.hidden_size // c.num_attention_heads for one, c in zip(sizes, (config, tiny))
    )
    assert tiny_width == width
    groups, tiny_groups = (
        c.num_attention_heads // (one.get("num_key_value_heads") or c.num_attention_heads)
        for one, c in zip(sizes, (config, tiny))
    )
    assert tiny_groups == min(groups, 4) and tiny.num_attention_heads >= 4
    for field in ("layer_types", "no_rope_layers"):
        kinds = sizes[0].get(field) or []
        assert set(sizes[1].get(field) or []) == set(kinds)
    for field in (
        "attn_logit_softcapping",
        "query_pre_attn_scalar",
        "attention_multiplier",
        "rope_parameters",
    ):
        assert sizes[1].get(field) == sizes[0].get(field)
    for field in ("sliding_window", "attention_chunk_size"):
        window = sizes[0].get(field)
        assert sizes[1].get(field) == (window and min(window, WINDOW))


def test_lists_for_and_of_layers_are_cut_with_the_layers():
    config = transformers.Llama4TextConfig(
        num_hidden_layers=8, interleave_moe_layer_step=2, no_rope_layers=[1, 1, 1, 0] * 2
    )
    # Local and dense, local with experts, global with experts.
    assert config.moe_layers == [1, 3, 5, 7]
    tiny = clone(config)
    assert tiny.no_rope_layers == [1, 1, 0]
    assert tiny.moe_layers == [1, 2]
    assert tiny.layer_types == ["chunked_attention", "chunked_attention", "full_attention"]
    shared = clone(find_config("gemma3n_text", False))
    assert shared.layer_types[-shared.num_kv_shared_layers :] == ["sliding_attention", "full_attention"]
    assert {"sliding_attention", "full_attention"} <= set(shared.layer_types[: -shared.num_kv_shared_layers])


def test_a_config_without_a_small_clone_is_refused():
    config = small()
    config.mystery_layers = [1, 2]
    assert clone(config).mystery_layers == [1]
    config = transformers.Qwen2Config(**{**SMALL, "hidden_act": "unheard-of"})
    with pytest.raises(ConfigError, match="qwen2: a small clone of this config cannot be built"):
        clone(config)


# ---- refusals ---------------------------------------------------------------------------------------


def test_what_cannot_be_verified_is_refused(capsys, tmp_path, monkeypatch):
    def refusal(*arguments: str) -> str:
        assert main(["verify", *arguments]) == 2
        return capsys.readouterr().err

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    folder = save(small(), tmp_path / "config")
    assert refusal("rwkv").startswith("sap-hf: rwkv: ")
    assert "without attention has no heads" in refusal("mamba")
    assert "dropout" in refusal(save(small(attention_dropout=0.1), tmp_path / "dropout"))
    assert "no causal language model for T5Config" in refusal("t5")
    assert "Did you mean the model type 'llama'?" in refusal("lama")
    assert "no such folder; the model of a hub was not read" in refusal("nobody/nothing")
    (tmp_path / "empty").mkdir()
    assert "empty: the folder was not read" in refusal(str(tmp_path / "empty"))
    assert "--ranks 1: at least 2" in refusal(folder, "--ranks", "1")
    assert "--weights: qwen2 has none" in refusal("qwen2", "--weights")
    quantized = json.loads((tmp_path / "config" / "config.json").read_text())
    quantized["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (tmp_path / "config" / "config.json").write_text(json.dumps(quantized))
    assert "is quantized" in refusal(folder, "--weights")


def test_a_folder_without_weights_is_refused_by_all_ranks(capsys, tmp_path):
    assert main(["verify", save(small(), tmp_path), "--weights"]) == 2
    assert capsys.readouterr().err.startswith(f"sap-hf: --weights: {tmp_path} was not loaded")


def test_weights_give_up_float64_before_they_are_refused_for_lack_of_memory(monkeypatch):
    def with_memory(size: int) -> tuple[torch.dtype, list[str]]:
        monkeypatch.setattr(os, "sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": size}.__getitem__)
        return affordable(2**30, 2)

    # Weights, gradients and their truth, on two ranks.
    assert with_memory(48 * 2**30) == (torch.float64, [])
    dtype, (note,) = with_memory(48 * 2**30 - 1)
    assert dtype == torch.float32 and "48 GiB in float64" in note
    assert with_memory(24 * 2**30)[0] == torch.float32
    with pytest.raises(ConfigError, match="24 GiB with gradients in float32; this machine has 23"):
        with_memory(23 * 2**30)
