"""Mamba layers on ranks give what every document alone gives through transformers' own layer."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

import sap_hf
from sap_hf.models import mamba
from sap_hf.models.bypass import Call
from sap_hf.models.interface import Shard
from sap_hf.models.mamba import MIXERS
from sap_hf.runtime.group import ALONE, world
from tests.dist import run_ranks
from tests.models import families, stand_in_mamba

EXACT = 1e-10
CHUNK = 8
# Groups that serve several heads, and steps that a limit cuts.
MAMBA2 = {
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_n_groups": 2,
    "mamba_d_state": 5,
    "mamba_chunk_size": CHUNK,
    "time_step_limit": (0.5, 1.0),
}
FALCON = {
    **MAMBA2,
    "mamba_d_ssm": 64,
    "ssm_in_multiplier": 0.7,
    "ssm_multipliers": [0.5, 1.5, 0.8, 1.2, 0.9],
}
MAMBA1 = {"mamba_d_state": 5, "mamba_dt_rank": 3}


@dataclasses.dataclass(frozen=True)
class Layer:
    """A mixer's class, the type of model that has it, and the fields of its config."""

    name: str
    family: str
    fields: dict[str, Any]


LAYERS = {
    "bamba": Layer("BambaMixer", "bamba", MAMBA2),
    "falcon_h1": Layer("FalconH1Mixer", "falcon_h1", FALCON),
    "falcon_h1-norm": Layer("FalconH1Mixer", "falcon_h1", {**FALCON, "mamba_rms_norm": True}),
    "granitemoehybrid": Layer(
        "GraniteMoeHybridMambaLayer", "granitemoehybrid", {**MAMBA2, "mamba_conv_bias": False}
    ),
    "mamba2": Layer("Mamba2Mixer", "mamba2", {"n_groups": 2, "state_size": 5, "chunk_size": CHUNK}),
    "nemotron_h": Layer(
        "NemotronHMamba2Mixer",
        "nemotron_h",
        {
            "mamba_num_heads": 4,
            "mamba_head_dim": 6,
            "n_groups": 2,
            "ssm_state_size": 5,
            "chunk_size": CHUNK,
            "time_step_min": 0.8,
        },
    ),
    "zamba2": Layer(
        "Zamba2MambaMixer",
        "zamba2",
        {"mamba_ngroups": 2, "mamba_d_state": 5, "chunk_size": CHUNK, "time_step_min": 0.8},
    ),
    "mamba": Layer("MambaMixer", "mamba", {"state_size": 5, "time_step_rank": 3}),
    "falcon_mamba": Layer("FalconMambaMixer", "falcon_mamba", {"state_size": 5, "time_step_rank": 3}),
    "jamba": Layer("JambaMambaMixer", "jamba", MAMBA1),
    "zamba": Layer("ZambaMambaMixer", "zamba", {**MAMBA1, "n_mamba_heads": 2}),
}
PACKS = {
    "a document over all ranks": (61,),
    "a rank inside a document": (7, 43, 9),
    "one token each": (1, 1, 1, 20, 1, 1, 1),
    "ends at the borders": (12, 6, 6, 12),
    "whole chunks": (CHUNK, 2 * CHUNK, 3 * CHUNK),
    "padding": (5, 24, 3),
    "hardly any": (2, 3, 4),
}
WORLDS = (1, 2, 3)
# Mamba-2, for which mamba_ssm's kernel may scan.
FUSED = ("bamba", "falcon_h1", "falcon_h1-norm", "granitemoehybrid", "mamba2", "nemotron_h", "zamba2")
# Many chunks in each.
LONG = (300, 5, 411, 1, 90)
ROUNDING = {"float32": torch.float32, "bfloat16": torch.bfloat16, "autocast": torch.float32}


@dataclasses.dataclass
class Found:
    """(rows, E) of outputs and of gradients of what goes in, and the gradients of the parameters."""

    out: Tensor
    x: Tensor
    parameters: dict[str, Tensor]


def layer_of(case: str, dtype: torch.dtype) -> Any:
    """The layer as its model made it, with large random weights."""
    kind = LAYERS[case]
    model = families.build(kind.family, **kind.fields)
    layer: Any = next(each for each in model.modules() if type(each).__name__ == kind.name)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
        # Slow to forget: a rank's last row sees its first one.
        layer.A_log.sub_(3.0)
    return layer.to(dtype)


def inputs(rows: int, width: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    # Row by row: padding at the end changes nothing before it.
    both = torch.randn(rows, 2, width, generator=generator, dtype=torch.float64)
    return both[:, 0], both[:, 1]


def found(layer: Any, x: Tensor, out: Tensor) -> Found:
    parameters = {name: each.grad.double() for name, each in layer.named_parameters()}
    return Found(out.detach().double(), x.grad.double(), parameters)


def alone(case: str, lengths: Sequence[int], dtype: torch.dtype) -> Found:
    """Every document through the layer by itself."""
    layer = layer_of(case, dtype)
    x, wanted = (each.to(dtype) for each in inputs(sum(lengths), layer.hidden_size))
    x.requires_grad_()
    out = torch.cat([layer(document[None])[0] for document in x.split(list(lengths))])
    out.backward(wanted)
    return found(layer, x, out)


@functools.cache
def truth_of(case: str, lengths: tuple[int, ...]) -> Any:
    return attempt("float64", alone, case, lengths)


def shared(rank: int, size: int, case: str, lengths: Sequence[int], dtype: torch.dtype) -> Found:
    layer = layer_of(case, dtype)
    plan = sap_hf.plan(lengths, cp_size=size, layout="contiguous")
    rows = torch.from_numpy(plan.rows(rank))
    x, wanted = (each.to(dtype) for each in inputs(plan.rows_per_rank * size, layer.hidden_size))
    x = x[rows].requires_grad_()
    shard = Shard(plan, world() if size > 1 else ALONE, sap_hf.SapConfig())
    call = Call(layer, shard, type(layer).forward)
    out = MIXERS[LAYERS[case].name](call, hidden_states=x[None], cache=None, unknown=1)[0]
    out.backward(wanted[rows] * (rows < sum(lengths))[:, None])
    return found(layer, x, out)


def fused(rank: int, size: int, case: str, lengths: Sequence[int], dtype: torch.dtype) -> Found:
    """As shared, with a stand-in for mamba_ssm's kernel; it is to run once, in the layer's chunks."""
    calls: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mamba, "_kernel", lambda layer, x: stand_in_mamba.mamba_chunk_scan_combined)
        patch.setattr(stand_in_mamba, "CALLS", calls)
        result = shared(rank, size, case, lengths, dtype)
    assert calls == [layer_of(case, dtype).chunk_size]
    return result


def on_rank(rank: int, size: int) -> dict[tuple[Any, str, str], Any]:
    labels = {**PACKS, **dict.fromkeys(ROUNDING if size == 2 else (), LONG)}
    return {
        (way, case, label): attempt(label, way, rank, size, case, lengths)
        for way, cases in WAYS.items()
        for case in cases
        for label, lengths in labels.items()
    }


# By which scan -> the layers that it is for.
WAYS = {shared: tuple(LAYERS), fused: FUSED}
EACH = pytest.mark.parametrize(
    "way, case", [pytest.param(way, case, id=f"{way.__name__}-{case}") for way in WAYS for case in WAYS[way]]
)


def attempt(label: str, function: Any, *args: Any) -> Any:
    """In float64 throughout, or as one of ROUNDING."""
    contexts = {**dict.fromkeys(ROUNDING, contextlib.nullcontext()), "autocast": torch.autocast("cpu")}
    try:
        with contexts.get(label, families.only_float64()):
            return function(*args, ROUNDING.get(label, torch.float64))
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
def on_ranks() -> dict[int, list[dict[tuple[Any, str, str], Any]]]:
    return {size: run_ranks(on_rank, size, poison=True) if size > 1 else [on_rank(0, 1)] for size in WORLDS}


def differences(left: Found, right: Found, mean: bool = False) -> dict[str, float]:
    """The largest of each as a part of the largest entry, or the mean."""

    def far(one: Tensor, other: Tensor) -> float:
        error = (one - other).abs()
        return float(error.mean() if mean else error.max() / other.abs().max())

    each = {name: far(left.parameters[name], right.parameters[name]) for name in right.parameters}
    return {"out": far(left.out, right.out), "x": far(left.x, right.x), **each}


def test_the_table_has_the_classes_that_are_tested() -> None:
    assert {kind.name for kind in LAYERS.values()} == MIXERS.keys()


@pytest.mark.parametrize("size", WORLDS)
@pytest.mark.parametrize("label", PACKS)
@EACH
def test_documents_on_ranks_equal_documents_alone(
    on_ranks: Any, way: Any, case: str, label: str, size: int
) -> None:
    lengths = PACKS[label]
    truth = truth_of(case, lengths)
    result = together([each[way, case, label] for each in on_ranks[size]], sum(lengths))
    for what, error in differences(result, truth).items():
        assert error < EXACT, what


@pytest.mark.parametrize("label", ROUNDING)
@EACH
def test_rounding_is_no_worse_than_twice_as_without_us(
    on_ranks: Any, way: Any, case: str, label: str
) -> None:
    truth = truth_of(case, LONG)
    usual = differences(attempt(label, alone, case, LONG), truth, mean=True)
    result = together([each[way, case, label] for each in on_ranks[2]], sum(LONG))
    errors = differences(result, truth, mean=True)
    for what in ("out", "x", "in_proj.weight", "out_proj.weight"):
        assert errors[what] < 2 * usual[what], what


@pytest.mark.parametrize(
    "device, dtype, installed, sizes, runs",
    [
        ("cuda", torch.bfloat16, True, {}, True),
        ("cuda", torch.float16, True, {}, True),
        ("cuda", torch.float32, True, {}, False),
        ("cpu", torch.bfloat16, True, {}, False),
        ("cuda", torch.bfloat16, False, {}, False),
        ("cuda", torch.bfloat16, True, {"conv_dim": 2**31 // 100}, True),
        ("cuda", torch.bfloat16, True, {"conv_dim": 2**31 // 100 + 1}, False),
        ("cuda", torch.bfloat16, True, {"ssm_state_size": 2**31}, False),
        ("cuda", torch.bfloat16, True, {"chunk_size": 2**16}, False),
    ],
)
def test_the_kernel_runs_where_it_takes_what_it_gets(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    dtype: torch.dtype,
    installed: bool,
    sizes: dict[str, int],
    runs: bool,
) -> None:
    layer = layer_of("bamba", dtype)
    for name, size in sizes.items():
        monkeypatch.setattr(layer, name, size)
    monkeypatch.setattr(mamba, "is_mamba_2_ssm_available", lambda: installed)
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.triton.ssd_combined", stand_in_mamba)
    with FakeTensorMode():
        x = torch.empty(100, 2, 2, layer.head_dim, dtype=dtype, device=device)
        kernel = mamba._kernel(layer, x)
    assert kernel is (stand_in_mamba.mamba_chunk_scan_combined if runs else None)
