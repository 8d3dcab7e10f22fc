"""Classes that bypass the attention interface, patched at class level: exact, also when layers are recomputed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sap_hf
from sap_hf.models.table import entry_of, install, uninstall
from tests.dist import run_ranks
from tests.float64 import whole_float64
from tests.models import families

NAMES = ("gptj", "codegen")
CLASSES = {"gptj": "GPTJAttention", "codegen": "CodeGenAttention"}
OTHER = (4, 20, 3)
EXACT = 1e-10


def build(name: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {"vocab_size": families.VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    torch.manual_seed(13)
    config = AutoConfig.for_model(name, rotary_dim=4, bos_token_id=1, eos_token_id=2, **fields)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def run(rank: int, world: int, checkpointing: bool | None) -> dict[str, Any]:
    """Loss, gradients and report of every model; with checkpointing, another batch's forward comes in between."""
    results = {}
    for name in NAMES:
        with whole_float64():
            model = build(name)
            if checkpointing is not None:
                model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
            patch = sap_hf.patch_model(model, layout="zigzag")
            model.train()
            loss = model(**families.pack()).loss
            if checkpointing is not None:
                model(**families.pack(OTHER))
            loss.backward()
            for parameter in model.parameters():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= world
            results[name] = (loss.item(), families.gradients(model), str(patch))
    return results


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "recomputed", "reentrant"])
def test_models_patched_at_class_level_equal_documents_run_alone(checkpointing):
    for results in run_ranks(run, 2, checkpointing):
        for name in NAMES:
            loss, gradients, report = results[name]
            with whole_float64():
                truth = families.documents_alone(build(name).train(), families.pack(), families.LENGTHS)
            assert abs(loss - truth.loss) < EXACT
            for parameter, gradient in truth.gradients.items():
                assert float((gradients[parameter] - gradient).abs().max()) < EXACT, parameter
            # From transformers 5.24 on the two ask the interface, and are not in the table's care any more.
            cls = type(build(name).transformer.h[0].attn)
            way = "_attn patched" if hasattr(cls, "_attn") else "interface"
            assert report == f"{CLASSES[name]} x2: via {way}"


class GPTJAttention:
    """A class of the table as transformers 5.23 has it: attention in a method of its own."""

    def _attn(self, query, key, value, attention_mask=None):
        return query + key + value, None


class CodeGenAttention(GPTJAttention):
    def _attn(self, query, key, value, attention_mask=None):
        return query - key - value, None


@pytest.mark.parametrize("cls", [GPTJAttention, CodeGenAttention])
def test_the_last_patched_model_gives_the_class_its_method_back(cls):
    original, given = vars(cls)["_attn"], torch.ones(1, 2, 3, 4)
    before = cls()._attn(given, given, given)[0]
    for _ in range(2):
        install([cls])
        assert vars(cls)["_attn"] is not original
        # No pack is sharded: the original answers.
        assert torch.equal(cls()._attn(given, given, given)[0], before)
    uninstall([cls])
    assert vars(cls)["_attn"] is not original
    uninstall([cls])
    assert vars(cls)["_attn"] is original


def test_a_class_without_the_method_is_left_to_the_interface():
    new = type("GPTJAttention", (), {})
    assert entry_of(new) is None
    assert entry_of(GPTJAttention) is not None


@pytest.mark.parametrize("name", NAMES)
def test_unpatched_models_answer_as_before(name):
    first, plain = build(name), build(name)
    ids = families.pack()["input_ids"]
    before = plain(input_ids=ids).logits
    sap_hf.patch_model(first)
    assert torch.equal(plain(input_ids=ids).logits, before)
    sap_hf.unpatch_model(first)
    assert first.config._attn_implementation == "eager"
    assert torch.equal(first(input_ids=ids).logits, before)
