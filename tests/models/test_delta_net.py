"""Gated delta nets on ranks give what every document alone gives through transformers' own layer."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import sap_hf
from sap_hf.errors import UnsupportedAttention
from sap_hf.models import delta_net
from sap_hf.models.bypass import Call
from sap_hf.models.delta_net import BLOCK, CHUNK, MIXERS
from sap_hf.models.interface import Shard
from sap_hf.models.mixers import Line
from sap_hf.runtime.chain import Chain
from sap_hf.runtime.group import ALONE
from tests.models import mixers
from tests.models.mixers import (
    Case,
    OnRanks,
    assert_exact,
    assert_rounds_as_usual,
    each_case,
    rounded_cases,
    shared,
    trained_alone,
)
from tests.models.tiny import config_of

# Heads of q and k that serve several of v, and widths that differ; Kimi's layers have one of each for all.
SIZES = {
    "linear_num_heads": 3,
    "linear_head_dim": 6,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,
    "linear_value_head_dim": 5,
    "linear_conv_kernel_dim": 4,
    "kda_safe_gate": False,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
TYPES = {
    "BailingHybridDeltaAttention": "bailing_hybrid",
    "KimiLinearDeltaAttention": "kimi_linear",
    "LaraMiniGatedDeltaNet": "lara_mini",
    "OlmoHybridGatedDeltaNet": "olmo_hybrid",
    "Qwen3NextGatedDeltaNet": "qwen3_next",
    "Qwen3_5GatedDeltaNet": "qwen3_5_text",
    "Qwen3_5MoeGatedDeltaNet": "qwen3_5_moe_text",
    "Qwen4ExpTextGatedDeltaNet": "qwen4_exp_text",
}
PACKS = {
    "a rank inside a document": (30, 2 * CHUNK + 9, 31),
    "a document over all ranks, longer than a chunk on each": (3 * CHUNK + 11,),
    "one token each": (1, 1, 1, 40, 1, 1, 1),
    "whole chunks": (CHUNK, CHUNK - 1, CHUNK + 1),
    "ends at the borders": (60, 30, 30, 60),
    "padding": (5, 71, 3),
    "hardly any": (2, 3, 4),
    "longer than a block": (2 * BLOCK + 9, 30),
}
OVER_ALL = PACKS["a document over all ranks, longer than a chunk on each"]
# One of each rule, of which `make test` runs more, and the one whose state may grow.
KINDS = ("Qwen3NextGatedDeltaNet", "KimiLinearDeltaAttention")
GROWING = "OlmoHybridGatedDeltaNet"


@functools.cache
def layer_of(name: str, dtype: torch.dtype) -> Any:
    config = config_of(TYPES[name], **SIZES)
    module = importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
    torch.manual_seed(3)
    layer = getattr(module, name)(config, 0).double()
    with torch.no_grad():
        for key, parameter in layer.named_parameters():
            # Decays so slow that a state lasts for a whole rank.
            parameter.copy_(0.5 * torch.randn_like(parameter) - (5 if key.endswith("A_log") else 0))
    return layer.to(dtype)


@pytest.fixture(scope="module")
def on_ranks(request: pytest.FixtureRequest) -> OnRanks:
    return mixers.on_ranks(request, layer_of, {"shared": shared, "trained alone": trained_alone})


def test_the_table_has_the_classes_that_are_tested() -> None:
    assert TYPES.keys() == MIXERS.keys()


@pytest.mark.parametrize(
    "case, size",
    [
        *each_case(MIXERS, PACKS, KINDS),
        *each_case(KINDS, {"frozen": PACKS["a rank inside a document"]}, (), way="trained alone"),
    ],
)
def test_documents_on_ranks_equal_documents_alone(on_ranks: OnRanks, case: Case, size: int) -> None:
    assert_exact(on_ranks, layer_of, case, size)


@pytest.mark.parametrize("name", MIXERS)
def test_the_oracle_sees_a_state_that_goes_through_a_rank(name: str) -> None:
    assert mixers.seen_through_a_rank(layer_of(name, torch.float64), sum(OVER_ALL)) > 1e-3


@pytest.mark.parametrize(
    "case, size", rounded_cases((*KINDS, GROWING), OVER_ALL, ("bfloat16", "autocast"), (*KINDS, GROWING))
)
def test_bfloat16_is_no_worse_than_twice_as_without_us(on_ranks: OnRanks, case: Case, size: int) -> None:
    assert_rounds_as_usual(on_ranks, layer_of, case, size)


@dataclasses.dataclass(frozen=True, eq=False)
class Watched(Line):
    """A line that writes down what is done in which order, and passes nothing on."""

    events: list[str] = dataclasses.field(default_factory=list)

    def receive(self, anchor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        self.events.append("receive")
        return anchor.new_zeros(shape, dtype=dtype)

    def send(self, out: Tensor, state: Tensor) -> Tensor:
        self.events.append("send")
        return out


@pytest.mark.parametrize(
    "cu_seqlens, earlier, expected",
    [
        ((0, 3, 8), 0, ["rule", "send"]),
        ((0, 8), 5, ["rule", "receive", "send"]),
        ((0, 3, 8), 5, ["rule", "rule", "send", "receive"]),
    ],
    ids=["begins here", "goes through", "ends here"],
)
def test_no_rank_waits_for_the_recurrence_of_another(
    monkeypatch: pytest.MonkeyPatch, cu_seqlens: tuple[int, ...], earlier: int, expected: list[str]
) -> None:
    layer = layer_of("Qwen3NextGatedDeltaNet", torch.float32)
    line = Watched(cu_seqlens, earlier, True, Chain(None, None, None))
    module = sys.modules[type(layer).__module__]
    rule = module.torch_chunk_gated_delta_rule

    def watched(*args: Any, **kwargs: Any) -> Any:
        line.events.append("rule")
        return rule(*args, **kwargs)

    monkeypatch.setattr(module, "torch_chunk_gated_delta_rule", watched)
    monkeypatch.setattr(delta_net, "line_of", lambda shard, device: line)
    shard = Shard(sap_hf.plan([8], cp_size=1), ALONE, sap_hf.SapConfig())
    MIXERS[type(layer).__name__](
        Call(layer, shard, type(layer).forward), torch.randn(1, 8, layer.hidden_size)
    )
    assert line.events == expected


def test_a_class_that_is_written_otherwise_is_refused_by_name() -> None:
    layer = layer_of("Qwen3NextGatedDeltaNet", torch.float32)

    def forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Any:
        return self.chunk_gated_delta_rule(hidden_states)

    shard = Shard(sap_hf.plan([8], cp_size=1), ALONE, sap_hf.SapConfig())
    with pytest.raises(UnsupportedAttention, match=r"(?s)Qwen3NextGatedDeltaNet .*transformers 5\.24"):
        delta_net.delta_net(Call(layer, shard, forward), torch.randn(1, 8, layer.hidden_size))
