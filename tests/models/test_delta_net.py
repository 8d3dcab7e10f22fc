"""Gated delta nets on ranks give what every document alone gives through transformers' own layer."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import sys
import traceback
from collections.abc import Iterator, Sequence
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
from sap_hf.runtime.group import ALONE, world
from tests.dist import run_ranks
from tests.models import families
from tests.models.tiny import config_of

EXACT = 1e-10
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
OVER_ALL = "one document, longer than a chunk on every rank"
PACKS = {
    OVER_ALL: (3 * CHUNK + 11,),
    "a rank inside a document": (30, 2 * CHUNK + 9, 31),
    "one token each": (1, 1, 1, 40, 1, 1, 1),
    "whole chunks": (CHUNK, CHUNK - 1, CHUNK + 1),
    "ends at the borders": (60, 30, 30, 60),
    "padding": (5, 71, 3),
    "hardly any": (2, 3, 4),
    "longer than a block": (2 * BLOCK + 9, 30),
}
WORLDS = (1, 2, 3)
# One of each rule, and the one whose state may grow.
NARROW = ("Qwen3NextGatedDeltaNet", "KimiLinearDeltaAttention", "OlmoHybridGatedDeltaNet")


@dataclasses.dataclass
class Found:
    """(rows, E) of outputs and of gradients of what goes in, and the gradients of the parameters."""

    out: Tensor
    x: Tensor
    parameters: dict[str, Tensor]


def layer_of(name: str) -> Any:
    config = config_of(TYPES[name], **SIZES)
    module = importlib.import_module(type(config).__module__.replace("configuration_", "modeling_"))
    torch.manual_seed(3)
    layer = getattr(module, name)(config, 0).double()
    with torch.no_grad():
        for key, parameter in layer.named_parameters():
            # Decays so slow that a state lasts for a whole rank.
            parameter.copy_(0.5 * torch.randn_like(parameter) - (5 if key.endswith("A_log") else 0))
    return layer


def inputs(rows: int, width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    both = torch.randn(rows, 2, width, generator=generator, dtype=torch.float64)
    return both[:, 0], both[:, 1]


def found(layer: Any, x: Tensor, out: Tensor) -> Found:
    parameters = {name: each.grad for name, each in layer.named_parameters()}
    return Found(out.detach(), x.grad, parameters)


def alone(name: str, lengths: Sequence[int], dtype: torch.dtype = torch.float64) -> Found:
    """Every document through the layer by itself."""
    layer = layer_of(name).to(dtype)
    x, wanted = (each.to(dtype) for each in inputs(sum(lengths), layer.hidden_size))
    x.requires_grad_()
    out = torch.cat([layer(document[None])[0] for document in x.split(list(lengths))])
    out.backward(wanted)
    return found(layer, x, out)


def shared(rank: int, size: int, name: str, lengths: Sequence[int], dtype: torch.dtype) -> Found:
    layer = layer_of(name).to(dtype)
    plan = sap_hf.plan(lengths, cp_size=size, layout="contiguous")
    rows = torch.from_numpy(plan.rows(rank))
    x, wanted = (each.to(dtype) for each in inputs(plan.rows_per_rank * size, layer.hidden_size))
    x = x[rows].requires_grad_()
    shard = Shard(plan, world() if size > 1 else ALONE, sap_hf.SapConfig())
    out = MIXERS[name](Call(layer, shard, type(layer).forward), x[None], cache=None, unknown=1)[0]
    out.backward(wanted[rows] * (rows < sum(lengths))[:, None])
    return found(layer, x, out)


def on_rank(rank: int, size: int) -> dict[tuple[str, ...], Any]:
    found: dict[tuple[str, ...], Any] = {
        (name, label): attempt(shared, rank, size, name, lengths, torch.float64)
        for name in MIXERS
        for label, lengths in PACKS.items()
    }
    for name in NARROW if size == max(WORLDS) else ():
        for kind in ("bfloat16", "autocast"):
            with narrow(kind) as dtype:
                found[name, kind] = shared(rank, size, name, PACKS[OVER_ALL], dtype)
    return found


@contextlib.contextmanager
def narrow(kind: str) -> Iterator[torch.dtype]:
    """Where layers of the dtype that is given run in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        yield torch.float32 if kind == "autocast" else torch.bfloat16


def attempt(function: Any, *args: Any) -> Any:
    try:
        with families.only_float64():
            return function(*args)
    except Exception:  # noqa: BLE001 - shown by the test of this case
        return traceback.format_exc()


def together(parts: Sequence[Any], rows: int) -> Found:
    for part in parts:
        assert isinstance(part, Found), part
    return Found(
        torch.cat([part.out for part in parts])[:rows],
        torch.cat([part.x for part in parts])[:rows],
        {name: sum(part.parameters[name] for part in parts) for name in parts[0].parameters},
    )


@pytest.fixture(scope="module")
def on_ranks() -> dict[int, list[dict[tuple[str, str], Any]]]:
    return {size: run_ranks(on_rank, size, poison=True) if size > 1 else [on_rank(0, 1)] for size in WORLDS}


def differences(left: Found, right: Found) -> dict[str, float]:
    """The largest of each, as a part of the largest entry."""

    def far(one: Tensor, other: Tensor) -> float:
        return float((one - other).abs().max() / other.abs().max())

    each = {name: far(left.parameters[name], right.parameters[name]) for name in right.parameters}
    return {"out": far(left.out, right.out), "x": far(left.x, right.x), **each}


def test_the_table_has_the_classes_that_are_tested() -> None:
    assert TYPES.keys() == MIXERS.keys()


@pytest.mark.parametrize("size", WORLDS)
@pytest.mark.parametrize("label", PACKS)
@pytest.mark.parametrize("name", MIXERS)
def test_documents_on_ranks_equal_documents_alone(on_ranks: Any, name: str, label: str, size: int) -> None:
    lengths = PACKS[label]
    with families.only_float64():
        truth = alone(name, lengths)
    result = together([each[name, label] for each in on_ranks[size]], sum(lengths))
    for what, error in differences(result, truth).items():
        assert error < EXACT, what


@pytest.mark.parametrize("name", MIXERS)
def test_the_oracle_sees_a_state_that_goes_through_a_rank(name: str) -> None:
    layer, rows = layer_of(name), sum(PACKS[OVER_ALL])
    x, _ = inputs(rows, layer.hidden_size)
    other = torch.cat([-x[: rows // 3], x[rows // 3 :]])
    with torch.no_grad(), families.only_float64():
        one, two = (layer(each[None])[0, 2 * rows // 3 :] for each in (x, other))
    assert float((one - two).abs().max() / one.abs().max()) > 1e-3


@pytest.mark.parametrize("kind", ["bfloat16", "autocast"])
@pytest.mark.parametrize("name", NARROW)
def test_bfloat16_is_no_worse_than_twice_as_without_us(on_ranks: Any, name: str, kind: str) -> None:
    lengths = PACKS[OVER_ALL]
    with families.only_float64():
        truth = alone(name, lengths)
    with narrow(kind) as dtype:
        plain = alone(name, lengths, dtype)
    result = together([each[name, kind] for each in on_ranks[max(WORLDS)]], sum(lengths))
    usual = mean_errors(plain, truth)
    for what, error in mean_errors(result, truth).items():
        assert error < 2 * usual[what], what


def mean_errors(found: Found, truth: Found) -> dict[str, float]:
    def entries(parameters: dict[str, Tensor]) -> Tensor:
        # Together: one number per head alone is off by luck.
        return torch.cat([parameters[name].flatten() for name in truth.parameters])

    pairs = {
        "out": (found.out, truth.out),
        "x": (found.x, truth.x),
        "parameters": (entries(found.parameters), entries(truth.parameters)),
    }
    return {name: float((one.double() - other).abs().mean()) for name, (one, other) in pairs.items()}


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
    layer = layer_of("Qwen3NextGatedDeltaNet").float()
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
    layer = layer_of("Qwen3NextGatedDeltaNet")

    def forward(self: Any, hidden_states: Tensor, **kwargs: Any) -> Any:
        return self.chunk_gated_delta_rule(hidden_states)

    shard = Shard(sap_hf.plan([8], cp_size=1), ALONE, sap_hf.SapConfig())
    with pytest.raises(UnsupportedAttention, match=r"(?s)Qwen3NextGatedDeltaNet .*transformers 5\.24"):
        delta_net.delta_net(Call(layer, shard, forward), torch.randn(1, 8, layer.hidden_size))
