"""Heads: every query head on one rank, with the kv heads that it reads; what exchanging them takes, in turns."""

import dataclasses
import itertools

import numpy as np
import pytest

from sap_hf.errors import LayoutError
from sap_hf.planning import workloads
from sap_hf.planning.cost import Shape
from sap_hf.planning.documents import Documents
from sap_hf.planning.hardware import PRESETS
from sap_hf.planning.heads import split_heads, split_turns
from sap_hf.strategies.auto import Request, candidates, make_plan

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


@pytest.mark.parametrize(("heads", "kv", "size"), CASES)
@pytest.mark.parametrize("turns", [1, 2, 3])
def test_turns_are_a_rank_s_kv_heads_in_order_with_their_readers(heads, kv, size, turns):
    split, parts = split_heads(heads, kv, size), split_turns(heads, kv, size, turns)
    # No rank is left without a head in any turn.
    assert len(parts) == min(turns, *(its.kv_count for its in split))
    for rank, whole in enumerate(split):
        mine = [turn[rank] for turn in parts]
        for name in ("q", "kv"):
            ranges = [getattr(its, name) for its in mine]
            borders = [getattr(whole, name).start, *(its.stop for its in ranges)]
            assert [its.start for its in ranges] == borders[:-1] and borders[-1] == getattr(whole, name).stop
        assert sum((its.readers for its in mine), ()) == whole.readers
        assert all(sum(its.readers) == its.q_count and len(its.readers) == its.kv_count for its in mine)
        counts = [its.kv_count for its in mine]
        assert max(counts) - min(counts) <= 1


SHAPE = Shape(32, 16, 128, 2)


def plan_of(hardware, turns=1, **asked):
    machine = dataclasses.replace(PRESETS["h100"], **hardware)
    lengths = Documents.from_lengths([30_000, 2768])
    made = make_plan(Request(lengths, 8, ulysses_size=4, shape=SHAPE, hardware=machine, **asked))
    return dataclasses.replace(made, turns=turns)


def test_without_contention_two_turns_expose_half_of_the_heads_where_kernels_are_longer():
    free = {"contention": 0, "blocking_seconds": 1e-12, "call_seconds": 1e-12}
    free |= {"message_seconds": 1e-12, "step_seconds": 1e-12, "copy_bytes_per_s": 1e20}
    one, two = (plan_of(free, turns).layer_seconds for turns in (1, 2))
    bytes_of_a_rank = 3 * (8 + 2 * 4 + 8) * 4096 * 128 * 2
    # Both directions of both passes; each hides one turn's heads and one turn's results.
    saved = 2 * bytes_of_a_rank / 2 / PRESETS["h100"].node_bytes_per_s
    assert (one.total - two.total).tolist() == pytest.approx([saved] * 8, rel=1e-6)
    assert two.forward.tolist() == pytest.approx(one.forward.tolist(), rel=1e-6)


def test_two_turns_hide_no_more_than_their_kernels_last():
    slow = {"node_bytes_per_s": 1e6, "network_bytes_per_s": 1e6, "network_alone_bytes_per_s": 1e6}
    one, two = (plan_of(slow, turns, strategy="sap").layer_seconds.total.max() for turns in (1, 2))
    busy = plan_of(slow, strategy="sap").busy_seconds
    assert one - busy - 1e-2 < two < one * (1 + 1e-2)


def test_turns_cost_their_starts():
    dear = {"blocking_seconds": 1.0}
    one, two = (plan_of(dear, turns).layer_seconds.total for turns in (1, 2))
    assert (two - one).tolist() == pytest.approx([4.0] * 8, rel=1e-2)
    assert plan_of(dear).turns == 1
    assert make_plan(Request(Documents.from_lengths([1 << 17]), 8, ulysses_size=4, shape=SHAPE)).turns == 2


def test_a_recompute_exchanges_heads_once_more():
    plan = plan_of({})
    plain, again = plan.layer_seconds, dataclasses.replace(plan, recomputed=True).layer_seconds
    assert (again.forward_exposed == plain.forward_exposed).all()
    h100, sent = PRESETS["h100"], 3 * (8 + 2 * 4 + 8) * 4096 * 128 * 2
    # Put together and taken apart, read and written each time.
    moved = sent * (1 / h100.node_bytes_per_s + 4 / h100.copy_bytes_per_s)
    heads = moved + 2 * (h100.blocking_seconds + 3 * h100.message_seconds)
    assert (again.backward_exposed - plain.backward_exposed).tolist() == pytest.approx([heads] * 8)
    # A degree that is worth its heads twice may not be worth them three times.
    lengths = workloads.pack("magi", 1 << 15, np.random.default_rng(0))
    asked = Request(Documents.from_lengths(lengths), 8, ulysses_size="auto", shape=SHAPE)
    best = make_plan(dataclasses.replace(asked, recomputed=True))
    assert best.seconds == min(
        plan.seconds for plan in candidates(dataclasses.replace(asked, recomputed=True))
    )
