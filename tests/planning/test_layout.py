"""Which rank holds which row: plan.rows, for every layout."""

import numpy as np
import pytest
from hypothesis import given

import sap_hf
from tests.planning.cases import CORNERS, LAYOUTS, STRATEGIES, both, owners, packs, ranks


def rows_of(lengths, cp_size, strategy, layout):
    plan = sap_hf.plan(lengths=lengths, cp_size=cp_size, strategy=strategy, layout=layout)
    return plan, [plan.rows(rank) for rank in range(cp_size)]


@given(packs, ranks, both)
def test_every_row_has_exactly_one_owner(lengths, cp_size, names):
    total = sum(lengths)
    share = -(-total // cp_size)
    plan, held = rows_of(lengths, cp_size, *names)
    for rows in held:
        assert isinstance(rows, np.ndarray) and rows.dtype == np.int64
        assert rows.shape == (share,), "ranks hold different numbers of rows"
    owners(plan, lengths, cp_size)
    everything = np.sort(np.concatenate(held))
    # The pack is padded, never cut: ids from T on are padding.
    assert everything.tolist() == list(range(share * cp_size))


@pytest.mark.parametrize("lengths, cp_size", CORNERS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_corner_packs_have_one_owner_per_row(lengths, cp_size, layout, strategy):
    _, held = rows_of(lengths, cp_size, strategy, layout)
    assert np.sort(np.concatenate(held)).tolist() == list(range(-(-sum(lengths) // cp_size) * cp_size))


@given(packs, ranks)
def test_contiguous_rank_r_holds_rows_rC_to_rC_plus_C(lengths, cp_size):
    share = -(-sum(lengths) // cp_size)
    for strategy in STRATEGIES:
        _, held = rows_of(lengths, cp_size, strategy, "contiguous")
        for rank, rows in enumerate(held):
            assert rows.tolist() == list(range(rank * share, (rank + 1) * share))


@given(packs, ranks)
def test_zigzag_rank_r_holds_chunks_r_and_2W_minus_1_minus_r(lengths, cp_size):
    share = -(-sum(lengths) // cp_size)
    large, small = share - share // 2, share // 2
    starts = [chunk * large for chunk in range(cp_size)]
    starts += [cp_size * large + chunk * small for chunk in range(cp_size)]
    stops = [*starts[1:], cp_size * share]
    chunks = [list(range(start, stop)) for start, stop in zip(starts, stops)]
    for strategy in STRATEGIES:
        _, held = rows_of(lengths, cp_size, strategy, "zigzag")
        for rank, rows in enumerate(held):
            assert rows.tolist() == chunks[rank] + chunks[2 * cp_size - 1 - rank]


def test_rows_of_a_rank_that_does_not_exist_are_refused():
    plan = sap_hf.plan(lengths=[4, 4], cp_size=2)
    for rank in (2, -1):
        with pytest.raises((sap_hf.errors.SapError, IndexError)):
            plan.rows(rank)
