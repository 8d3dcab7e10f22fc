"""Every supported type, single and packed, on 2 and 4 ranks: what its documents give when run alone.

`make test` runs one of each kind, `make matrix` all of them, which also writes docs/models.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sap_hf.models import delta_net, mamba, short_conv
from sap_hf.models.table import MIXERS, TABLE
from tests.dist import run_ranks
from tests.models import page
from tests.models.matrix import EXACT, SHARD, WORLDS, Errors, Result, cases, compare, is_exact

CASES = cases()
# Cases in one start of ranks: their answers are in memory together.
TOGETHER = 16
NAMES = [pytest.param(name, marks=[] if name in SHARD else pytest.mark.matrix) for name in CASES]
EVERY_CASE = pytest.mark.parametrize("name", NAMES)
BOTH_WORLDS = pytest.mark.parametrize("world", WORLDS)


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Iterator[dict[int, dict[str, Any]]]:
    """{world: {name: Result or traceback}} of the cases that were asked for."""
    here = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    asked = {item.callspec.params["name"] for item in here}
    some = [case for name, case in CASES.items() if name in asked]
    found: dict[int, dict[str, Any]] = {}
    for world in WORLDS:
        found[world] = {}
        for start in range(0, len(some), TOGETHER):
            for part in run_ranks(compare, world, some[start : start + TOGETHER], timeout=300):
                found[world].update(part)
    yield found
    if len(some) == len(CASES):
        page.write(Path("docs/models.md"), CASES, found)


def result_of(results: dict[int, dict[str, Any]], name: str, world: int) -> Result:
    result = results[world][name]
    assert isinstance(result, Result), result
    return result


@BOTH_WORLDS
@EVERY_CASE
def test_model_equals_documents_run_alone(results: dict[int, dict[str, Any]], name: str, world: int) -> None:
    for row, errors in result_of(results, name, world).rows.items():
        assert errors.worst < EXACT, f"{row}: {errors}"


@BOTH_WORLDS
@EVERY_CASE
def test_a_leak_would_show(results: dict[int, dict[str, Any]], name: str, world: int) -> None:
    result = result_of(results, name, world)
    assert result.apart > 1e-4, "one document or several is the same to this model"
    for row, errors in result.rows.items():
        assert errors.moved > 1e-4, f"{row}: other tokens give the same logits"


@EVERY_CASE
def test_unpatch_restores_model_classes_and_registries(results: dict[int, dict[str, Any]], name: str) -> None:
    result = result_of(results, name, 2)
    assert result.changed, "patching changed nothing that this test can see"
    assert result.left == []


@EVERY_CASE
def test_generation_on_one_rank_equals_the_plain_model(results: dict[int, dict[str, Any]], name: str) -> None:
    same, error = result_of(results, name, 2).generated
    assert same
    assert error < EXACT


@pytest.mark.matrix
def test_at_least_146_types_are_exact(results: dict[int, dict[str, Any]]) -> None:
    types = {name for name, case in CASES.items() if name == case.model_type}
    exact = {name for name in types if all(is_exact(results[world][name]) for world in WORLDS)}
    assert len(exact) >= 146
    assert exact == types


def test_errors_without_a_number_are_infinite() -> None:
    assert Errors(0.0, float("nan"), 0.0, "", 0.0, 1.0).worst == float("inf")


def test_the_shard_has_one_of_each_kind(results: dict[int, dict[str, Any]]) -> None:
    seen = {feature for name in SHARD for feature in result_of(results, name, 2).features}
    assert seen == {"window", "softcap", "sinks", "other width of v", "shared keys"}
    assert any("router" in result_of(results, name, 2).rows for name in SHARD)
    reports = " ".join(result_of(results, name, 2).report for name in SHARD)
    assert any(name in reports for name in TABLE if name not in MIXERS)
    for module in (delta_net, mamba, short_conv):
        assert any(name in reports for name in module.MIXERS)
