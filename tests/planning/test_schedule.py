"""What moves and what is computed: every schedule, against the mask painted row by row."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sap_hf
from sap_hf.planning import reverse
from tests import oracles
from tests.planning.cases import CORNERS, LAYOUTS, STRATEGIES, both, packs, paint, planned, ranks, windows


def hold_every_property(lengths, cp_size, strategy, layout, window):
    plan, painted = planned(lengths, cp_size, strategy, layout, window)
    seen = oracles.mask(lengths, window)
    owner = painted.owner[: painted.total]
    # Tiles cover the block-causal mask exactly once.
    np.testing.assert_array_equal(painted.attended, seen.astype(np.int64))
    for rank in range(cp_size):
        arrived = painted.received[rank]
        assert arrived.max(initial=0) <= 1, "a row is received twice"
        if strategy == "sap":
            assert set(np.flatnonzero(arrived).tolist()) == oracles.rows_needed(seen, owner, rank)
        else:
            np.testing.assert_array_equal(arrived, (owner != rank).astype(np.int64))
    moved = np.zeros((cp_size, cp_size), dtype=np.int64)
    for rank in range(cp_size):
        for source in range(cp_size):
            moved[source, rank] = painted.received[rank][owner == source].sum()
    assert plan.rows_moved.dtype == np.int64
    np.testing.assert_array_equal(plan.rows_moved, moved)
    pairs = np.array([seen[owner == rank].sum() for rank in range(cp_size)])
    assert plan.pairs.dtype == np.int64
    np.testing.assert_array_equal(plan.pairs, pairs)
    assert plan.imbalance == pytest.approx(pairs.max() / pairs.mean(), rel=1e-12)


@given(packs, ranks, both, windows)
def test_every_schedule_is_exact(lengths, cp_size, names, window):
    hold_every_property(lengths, cp_size, *names, window)


@pytest.mark.parametrize("window", [None, 1, 2, 5])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_corner_packs_are_exact(strategy, layout, window):
    for lengths, cp_size in CORNERS:
        hold_every_property(lengths, cp_size, strategy, layout, window)


@given(packs, ranks, both)
def test_pairs_sum_to_the_pairs_of_the_documents(lengths, cp_size, names):
    plan = sap_hf.plan(lengths=lengths, cp_size=cp_size, strategy=names[0], layout=names[1])
    assert plan.pairs.sum() == sum(length * (length + 1) // 2 for length in lengths)


@given(packs)
def test_one_rank_moves_nothing(lengths):
    for layout in LAYOUTS:
        for strategy in STRATEGIES:
            assert not sap_hf.plan(
                lengths=lengths, cp_size=1, strategy=strategy, layout=layout
            ).rows_moved.any()


@given(packs, ranks, both, windows)
def test_a_window_that_the_plan_was_not_made_for_is_derived(lengths, cp_size, names, window):
    plan = sap_hf.plan(lengths=lengths, cp_size=cp_size, strategy=names[0], layout=names[1])
    painted = paint(plan, lengths, cp_size, window)
    np.testing.assert_array_equal(painted.attended, oracles.mask(lengths, window).astype(np.int64))


def test_a_plan_may_hold_several_windows():
    plan = sap_hf.plan(
        lengths=[30, 3, 19], cp_size=4, strategy="sap", layout="zigzag", window={4: 2, None: 1}
    )
    for window in (4, None):
        painted = paint(plan, [30, 3, 19], 4, window)
        np.testing.assert_array_equal(painted.attended, oracles.mask([30, 3, 19], window).astype(np.int64))


transfers = st.lists(
    st.tuples(st.integers(0, 7), st.integers(0, 7), st.integers(0, 99), st.integers(100, 199)), max_size=12
)


@given(transfers)
def test_reverse_swaps_source_and_destination_and_undoes_itself(rows):
    forward = np.array(rows, dtype=np.int64).reshape(-1, 4)
    kept = forward.copy()
    backward = reverse(forward)
    assert sorted(backward.tolist()) == sorted([[to, of, start, stop] for of, to, start, stop in rows])
    np.testing.assert_array_equal(forward, kept, err_msg="reverse changed its argument")
    np.testing.assert_array_equal(reverse(backward), forward)


@given(packs, ranks, both, windows)
def test_the_reversed_plan_returns_what_arrived(lengths, cp_size, names, window):
    plan, painted = planned(lengths, cp_size, *names, window)
    for step in plan.schedule(window).steps:
        for source, destination, start, stop in reverse(step.transfers).tolist():
            assert (painted.owner[start:stop] == destination).all()
            assert painted.received[source][start:stop].all()
