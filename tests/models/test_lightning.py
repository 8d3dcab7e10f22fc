"""Lightning attention on ranks give what every document alone gives through transformers' own layer."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from sap_hf.models.lightning import MIXERS
from tests.models import families, mixers
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

NAME = "MiniMaxLightningAttention"
BLOCK = 8
PACKS = {
    "a rank inside a document": (7, 43, 9),
    "a document over all ranks": (61,),
    "one token each": (1, 1, 1, 20, 1, 1, 1),
    "ends at the borders": (12, 6, 6, 12),
    "whole blocks": (BLOCK, 2 * BLOCK, 3 * BLOCK),
    "padding": (5, 24, 3),
    "hardly any": (2, 3, 4),
}
LONG = (300, 5, 411, 1, 90)


@functools.cache
def layer_of(name: str, dtype: torch.dtype) -> Any:
    # It has the same decays in four buffers, which are as near to each other as the default dtype is exact.
    torch.set_default_dtype(torch.float64)
    try:
        model = families.build(
            "minimax", num_hidden_layers=5, layer_types=["linear_attention"] * 5, block_size=BLOCK
        )
    finally:
        torch.set_default_dtype(torch.float32)
    # Of the layers in between: heads of all rates.
    layer: Any = [each for each in model.modules() if type(each).__name__ == name][3]
    return layer.to(dtype)


@pytest.fixture(scope="module")
def on_ranks(request: pytest.FixtureRequest) -> OnRanks:
    return mixers.on_ranks(request, layer_of, {"shared": shared, "trained alone": trained_alone})


def test_the_table_has_the_classes_that_are_tested() -> None:
    assert {NAME} == MIXERS.keys()


@pytest.mark.parametrize(
    "case, size",
    [
        *each_case([NAME], PACKS, [NAME]),
        *each_case([NAME], {"frozen": PACKS["a rank inside a document"]}, [], way="trained alone"),
    ],
)
def test_documents_on_ranks_equal_documents_alone(on_ranks: OnRanks, case: Case, size: int) -> None:
    assert_exact(on_ranks, layer_of, case, size)


def test_the_oracle_sees_a_state_that_goes_through_a_rank() -> None:
    assert mixers.seen_through_a_rank(layer_of(NAME, torch.float64), 61) > 1e-3


@pytest.mark.parametrize(
    "case, size", rounded_cases([NAME], LONG, ("float32", "bfloat16", "autocast"), [NAME])
)
def test_rounding_is_no_worse_than_twice_as_without_us(on_ranks: OnRanks, case: Case, size: int) -> None:
    assert_rounds_as_usual(on_ranks, layer_of, case, size)
