"""Mamba layers on ranks give what every document alone gives through transformers' own layer."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

from sap_hf.models import mamba
from sap_hf.models.mamba import MIXERS
from tests.models import families, mixers, stand_in_mamba
from tests.models.mixers import (
    Case,
    Found,
    OnRanks,
    assert_exact,
    assert_rounds_as_usual,
    each_case,
    rounded_cases,
    shared,
    trained_alone,
)

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
# One of every function, which `make test` runs more of.
KINDS = ("bamba", "falcon_h1", "mamba", "falcon_mamba", "zamba")
PACKS = {
    "a rank inside a document": (7, 43, 9),
    "a document over all ranks": (61,),
    "one token each": (1, 1, 1, 20, 1, 1, 1),
    "ends at the borders": (12, 6, 6, 12),
    "whole chunks": (CHUNK, 2 * CHUNK, 3 * CHUNK),
    "padding": (5, 24, 3),
    "hardly any": (2, 3, 4),
}
# Mamba-2, for which mamba_ssm's kernel may scan.
FUSED = ("bamba", "falcon_h1", "falcon_h1-norm", "granitemoehybrid", "mamba2", "nemotron_h", "zamba2")
# Many chunks in each.
LONG = (300, 5, 411, 1, 90)
ROUNDING = ("float32", "bfloat16", "autocast")


@functools.cache
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


def fused(layer: Any, lengths: Sequence[int], rank: int, size: int) -> Found:
    """As shared, with a stand-in for mamba_ssm's kernel; it is to run once, in the layer's chunks."""
    calls: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mamba, "_kernel", lambda layer, x: stand_in_mamba.mamba_chunk_scan_combined)
        patch.setattr(stand_in_mamba, "CALLS", calls)
        result = shared(layer, lengths, rank, size)
    assert calls == [layer.chunk_size]
    return result


WAYS = {"shared": shared, "trained alone": trained_alone, "fused": fused}


@pytest.fixture(scope="module")
def on_ranks(request: pytest.FixtureRequest) -> OnRanks:
    return mixers.on_ranks(request, layer_of, WAYS)


def test_the_table_has_the_classes_that_are_tested() -> None:
    assert {kind.name for kind in LAYERS.values()} == MIXERS.keys()


@pytest.mark.parametrize(
    "case, size",
    [
        *each_case(LAYERS, PACKS, KINDS),
        *each_case(FUSED, PACKS, ("bamba",), way="fused"),
        *each_case(KINDS, {"frozen": PACKS["a rank inside a document"]}, (), way="trained alone"),
    ],
)
def test_documents_on_ranks_equal_documents_alone(on_ranks: OnRanks, case: Case, size: int) -> None:
    assert_exact(on_ranks, layer_of, case, size)


@pytest.mark.parametrize(
    "case, size",
    [
        *rounded_cases(LAYERS, LONG, ROUNDING, ("bamba", "mamba")),
        *rounded_cases(FUSED, LONG, ROUNDING, ("bamba",), way="fused"),
    ],
)
def test_rounding_is_no_worse_than_twice_as_without_us(on_ranks: OnRanks, case: Case, size: int) -> None:
    assert_rounds_as_usual(on_ranks, layer_of, case, size)


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
