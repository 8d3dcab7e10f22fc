"""Same data, same seed, same trajectory: whatever the ranks, the strategy, the layout or the delivery."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest

from tests.float64 import whole_float64
from tests.hf import material, oracle
from tests.hf.scenarios import Case, parity
from tests.hf.together import Together

EXACT = 1e-12
CHOICES = [
    {"strategy": strategy, "layout": layout, "delivery": delivery, "remote_kv": remote_kv}
    for (strategy, layout, delivery), remote_kv in zip(
        itertools.product(("sap", "all_gather"), ("contiguous", "zigzag"), ("p2p", "all_to_all")),
        itertools.cycle(("refetch", "keep", "keep", "refetch")),
    )
]


def name_of(options: dict[str, Any]) -> str:
    return "-".join(options.values())


# Everything on 2 ranks; on 3 and 4, each value beside each other one.
RUNS = {1: CHOICES[:1], 2: CHOICES, 3: CHOICES[::3], 4: CHOICES[1::2]}


def case_of(world: int, options: dict[str, Any]) -> Case:
    return Case(cp_size=world, packs=material.PACKS[:3], options=options)


def run(folder: str, case: Case) -> dict[str, Any]:
    with whole_float64():
        return parity(folder, case)


@functools.cache
def truth() -> oracle.Run:
    with whole_float64():
        return case_of(1, CHOICES[0]).truth()[0]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Together]:
    return {
        world: Together(
            tmp_path_factory.mktemp(f"trajectory-{world}"),
            world,
            {name_of(options): (run, {"case": case_of(world, options)}) for options in choices},
        )
        for world, choices in RUNS.items()
    }


@pytest.mark.parametrize(
    "options, world",
    [
        pytest.param(options, world, id=f"{name_of(options)}-W{world}")
        for world, choices in RUNS.items()
        for options in choices
    ],
)
def test_parameters_are_those_of_documents_run_alone(
    runs: dict[int, Together], options: dict[str, Any], world: int
) -> None:
    for result in runs[world][name_of(options)]:
        assert oracle.worst(result["parameters"], truth().parameters) < EXACT
        assert oracle.worst(result["grad_norms"], truth().grad_norms) < EXACT
        # Trainer adds losses up in a float32 tensor.
        assert oracle.worst(result["losses"], truth().losses) < material.EXACT
