"""Heads exchanged among neighbours, rows among groups of them: still what each document gives alone, for any degree."""

import functools
import itertools

import numpy as np
import pytest

import sap_hf
from sap_hf.errors import ConfigError, LayoutError
from sap_hf.planning.heads import split_turns
from tests.dist import run_ranks
from tests.runtime.parity import Case, judge, run_cases
from tests.runtime.test_parity import FEATURES, FLOAT64, HEADS, LAYOUTS, PACKS

STRATEGIES = ("sap", "all_gather", "ring")
# Ranks, and of these the ones that exchange heads.
SIZES = [(world, size) for world in (2, 3, 4, 6, 8) for size in (1, 2, 3, 4) if world % size == 0]
WORLDS = sorted({world for world, _ in SIZES})
DELIVERIES = ("p2p", "all_to_all")


@functools.cache
def cases_of(world):
    """Every combination of strategy, layout and heads with each degree; packs, features and deliveries take turns."""
    packs, features, deliveries = map(itertools.cycle, (PACKS, FEATURES, DELIVERIES))
    return [
        Case(
            lengths=next(packs),
            strategy=strategy,
            layout=layout,
            heads=heads,
            kv_heads=kv_heads,
            ulysses_size=size,
            turns=1 + number // 3 % 3,
            delivery=next(deliveries),
            heads_first=number % 3 == 0,
            remote_kv="keep" if number % 4 == 1 and strategy != "ring" else "refetch",
            seed=number,
            **next(features),
        )
        for number, (size, strategy, layout, (heads, kv_heads)) in enumerate(
            itertools.product([size for ranks, size in SIZES if ranks == world], STRATEGIES, LAYOUTS, HEADS)
        )
        if size <= heads
    ]


@functools.cache
def answers(world):
    return list(zip(*run_ranks(run_cases, world, cases_of(world), poison=True, timeout=240), strict=True))


@pytest.mark.parametrize("heads", HEADS, ids=lambda heads: f"heads{heads[0]}over{heads[1]}")
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(("world", "size"), SIZES, ids=[f"W{world}U{size}" for world, size in SIZES])
def test_out_and_gradients_match_documents_run_alone(world, size, strategy, heads):
    chosen = [
        (case, found)
        for case, found in zip(cases_of(world), answers(world), strict=True)
        if (case.ulysses_size, case.strategy, case.heads, case.kv_heads) == (size, strategy, *heads)
    ]
    assert len(chosen) == len(LAYOUTS)
    for case, found in chosen:
        judge(case, world, found, FLOAT64)


def test_the_cases_meet_every_pack_and_every_feature_with_several_groups():
    cases = [case for world in (4, 6, 8) for case in cases_of(world) if case.ulysses_size < world]
    assert {case.lengths for case in cases} == set(PACKS)
    assert len({(case.options, case.sinks, case.value_dim) for case in cases}) == len(FEATURES)
    assert any(not case.heads % case.kv_heads and case.heads % case.ulysses_size for case in cases)
    met = {(len(turns_of(case)), case.strategy, case.remote_kv) for case in cases}
    assert met >= {(n, "sap", kv) for n in (1, 2) for kv in ("keep", "refetch")} | {(3, "sap", "refetch")}
    assert met >= {(2, strategy, "refetch") for strategy in STRATEGIES}
    # A kv head that two ranks compute in different turns.
    assert any(
        len({number for number, turn in enumerate(turns_of(case)) for its in turn if its.kv == slice(1, 2)})
        > 1
        for case in cases
        if case.kv_heads == 3
    )


def turns_of(case):
    return split_turns(case.heads, case.kv_heads, case.ulysses_size, case.turns)


def test_a_group_of_neighbours_holds_what_one_rank_of_the_outer_plan_would():
    lengths = (5, 3, 8, 1, 6)
    for layout in LAYOUTS:
        whole = sap_hf.plan(lengths, cp_size=4, ulysses_size=2, layout=layout, strategy="sap", num_heads=8)
        assert whole.rows_per_rank == 6
        rows = np.concatenate([whole.rows(rank) for rank in range(4)])
        assert sorted(rows) == list(range(24))
        assert np.array_equal(np.concatenate([whole.rows(0), whole.rows(1)]), whole.placement.rows(0))
        # A row goes to the one rank of a group that has the same heads.
        moved = whole.rows_moved
        assert all(moved[a, b] == 0 for a in range(4) for b in range(4) if a % 2 != b % 2)
        assert np.array_equal(moved[::2, ::2], moved[1::2, 1::2])


def test_one_long_document_wants_heads_exchanged_and_many_short_ones_do_not():
    assert sap_hf.plan([131_072], cp_size=16, ulysses_size="auto").ulysses_size > 1
    assert sap_hf.plan([512] * 256, cp_size=16, ulysses_size="auto").ulysses_size == 1


def test_auto_is_never_slower_than_a_degree_that_was_asked_for():
    rng = np.random.default_rng(0)
    for _ in range(6):
        lengths = rng.integers(1, 20_000, rng.integers(1, 12))
        best = sap_hf.plan(lengths, cp_size=8, ulysses_size="auto").seconds
        assert best == min(
            sap_hf.plan(lengths, cp_size=8, ulysses_size=size).seconds for size in (1, 2, 4, 8)
        )


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        ({"ulysses_size": 3}, LayoutError, "Use one of 1, 2, 4"),
        ({"ulysses_size": 4, "num_heads": 2, "num_kv_heads": 1}, LayoutError, "at most 2"),
        ({"ulysses_size": 0}, ConfigError, "from 1 on"),
        (
            {"ulysses_size": 2, "delivery": "all_gather", "strategy": "all_gather"},
            ConfigError,
            "delivery='auto'",
        ),
        ({"ulysses_size": 2, "strategy": "ulysses"}, ConfigError, "all cp_size=4"),
        ({"strategy": "ulysses", "num_heads": 3, "num_kv_heads": 3}, LayoutError, "at most 3"),
    ],
)
def test_a_degree_that_cannot_be_is_refused(options, error, reason):
    with pytest.raises(error, match=reason):
        sap_hf.plan([8, 8], cp_size=4, **{"ulysses_size": "auto", **options})
