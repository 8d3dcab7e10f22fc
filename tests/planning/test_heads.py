"""Heads: every query head on one rank, with the kv heads that it reads."""

import itertools

import pytest

from sap_hf.errors import LayoutError
from sap_hf.planning.heads import split_heads

CASES = [
    (heads, kv, size)
    for heads, kv in ((8, 8), (8, 2), (9, 3), (4, 1), (64, 8), (15, 5), (1, 1))
    for size in (1, 2, 3, 4, 6, 8, 16)
    if size <= heads
]


@pytest.mark.parametrize(("heads", "kv", "size"), CASES)
def test_every_query_head_is_dealt_out_once_with_the_kv_head_it_reads(heads, kv, size):
    split = split_heads(heads, kv, size)
    assert [h for its in split for h in range(its.q.start, its.q.stop)] == list(range(heads))
    counts = [its.q_count for its in split]
    assert max(counts) - min(counts) <= 1
    for its in split:
        local = list(itertools.chain(*([i] * n for i, n in enumerate(its.readers))))
        assert [its.kv.start + i for i in local] == [
            h // (heads // kv) for h in range(its.q.start, its.q.stop)
        ]
        assert len(its.readers) == its.kv_count


def test_nine_heads_over_two_ranks_have_uneven_groups():
    first, second = split_heads(9, 3, 2)
    assert (first.readers, second.readers) == ((3, 2), (1, 3))
    assert not first.even
    assert split_heads(8, 2, 4)[1].even


def test_more_ranks_than_heads_are_refused():
    with pytest.raises(LayoutError, match="ulysses_size=4 or less"):
        split_heads(4, 1, 8)
