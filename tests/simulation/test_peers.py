"""Peers: what they compute is the mask, what they move is what their papers say."""

import dataclasses

import numpy as np
import pytest

from sap_hf.planning.cost import Shape
from sap_hf.planning.documents import Documents
from sap_hf.planning.hardware import PRESETS
from sap_hf.simulation.compare import PEERS, compare, packs, runs
from sap_hf.simulation.fit import FITTED, machine_of
from sap_hf.simulation.hybrid import batches, needed
from sap_hf.simulation.peers import heap_of_chunks
from sap_hf.simulation.rings import _hops
from sap_hf.simulation.scheduled import _once_per_node, executed, load, planned
from sap_hf.simulation.timing import EXACT, Machine
from sap_hf.strategies import Request, make_plan, sap

SHAPE = Shape(num_heads=16, num_kv_heads=4, head_dim=8, bytes_per_element=2)
NODE = 4


def lengths(seed, count=23, most=4000):
    drawn = np.random.default_rng(seed).integers(1, most, count)
    # A pack that every number of ranks here divides.
    return [*drawn.tolist(), -int(drawn.sum()) % 64 + 64]


@pytest.mark.parametrize("ranks", [2, 4, 8, 16])
@pytest.mark.parametrize("name", PEERS)
def test_every_pair_of_the_mask_is_computed_once(name, ranks):
    for seed in range(3):
        documents = Documents.from_lengths(lengths(seed))
        done = PEERS[name](documents, ranks, SHAPE, NODE, kernel=EXACT)
        assert done.pairs().sum() == pytest.approx(documents.pairs() * SHAPE.num_heads, rel=1e-12)


@pytest.mark.parametrize("name", PEERS)
def test_tiles_compute_more_than_the_mask_and_not_less(name):
    documents = Documents.from_lengths(lengths(0))
    tiled = PEERS[name](documents, 8, SHAPE, NODE).pairs()
    exact = PEERS[name](documents, 8, SHAPE, NODE, kernel=EXACT).pairs()
    assert (tiled >= exact).all()
    assert tiled.sum() > exact.sum()


ROWS = 64
KV = SHAPE.bytes_per_row
Q = SHAPE.num_heads * SHAPE.head_dim * SHAPE.bytes_per_element


def one(ranks):
    return Documents.from_lengths([ROWS * ranks])


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_gather_brings_all_other_rows_to_every_rank(ranks):
    wire = PEERS["ring_allgather"](one(ranks), ranks, SHAPE, NODE).there
    assert wire.inside.tolist() == [[ROWS * (ranks - 1) * KV] * ranks]
    assert not wire.outside.any()


def test_a_gather_brings_every_row_to_a_node_once():
    wire = PEERS["ring_allgather"](one(16), 16, SHAPE, NODE).there
    # 12 other ranks' rows over the 4 links of a node.
    assert wire.outside.tolist() == [[ROWS * 12 * KV / 4] * 16]


def test_a_ring_passes_all_rows_on_at_every_rank():
    ring = PEERS["ring_p2p"](one(4), 4, SHAPE, NODE)
    assert ring.there.inside.sum(axis=0).tolist() == [3 * ROWS * KV] * 4
    assert ring.back.inside.sum(axis=0).tolist() == [3 * ROWS * KV] * 4
    far = PEERS["ring_p2p"](one(8), 8, SHAPE, NODE).there.outside.sum(axis=0)
    # Ranks 3 and 7 send to the other node, ranks 0 and 4 receive from it.
    assert far.tolist() == [7 * ROWS * KV if rank in (0, 3, 4, 7) else 0 for rank in range(8)]


def test_both_directions_between_two_places_share_the_way():
    ring = PEERS["ring_p2p"](one(2), 2, SHAPE, NODE)
    assert ring.there.inside.sum(axis=0).tolist() == [2 * ROWS * KV] * 2


def test_heads_exchange_all_but_the_own_part_of_q_k_v_and_out():
    inside = PEERS["ulysses"](one(4), 4, SHAPE, NODE).heads
    assert inside.inside.tolist() == [[ROWS * (2 * Q + KV) * 3 / 4] * 4]
    # 8 ranks, 4 kv heads: every one of them travels twice.
    across = PEERS["ulysses"](one(8), 8, SHAPE, NODE).heads
    assert across.inside.tolist() == [[ROWS * (2 * Q + 2 * KV) * 3 / 8] * 8]
    assert across.outside.tolist() == [[ROWS * (2 * Q + 2 * KV) * 4 / 8] * 8]


def test_neighbours_need_what_lies_before_them():
    wire = PEERS["contiguous"](one(4), 4, SHAPE, NODE).there
    # Rank r receives r shares and sends 3 - r: the busier direction counts.
    assert wire.inside.sum(axis=0).tolist() == [ROWS * KV * max(r, 3 - r) for r in range(4)]


def test_a_group_cast_sends_a_row_to_a_node_once():
    steps = sap(one(8), heap_of_chunks(one(8), 8, ROWS)).steps
    transfers = np.concatenate([step.transfers for step in steps])
    sent = _once_per_node(transfers, 8, NODE)
    for source in range(8):
        for node in range(2):
            mine = transfers[(transfers[:, 0] == source) & (transfers[:, 1] // NODE == node)]
            rows = {row for _, _, start, stop in mine for row in range(start, stop)}
            assert sent[source, node] == (len(rows) if source // NODE != node else 0)


def test_usp_and_loongtrain_inside_one_node_are_the_same():
    documents, machine = Documents.from_lengths(lengths(1)), machine_of(FITTED)
    usp, double = (PEERS[name](documents, 4, SHAPE, NODE).seconds(machine) for name in ("usp", "loongtrain"))
    assert np.array_equal(usp, double)


def test_a_double_ring_makes_hops_that_nothing_hides():
    there, back = _hops(8, None)
    assert there.sum() == back.sum() == 7
    there, back = _hops(8, 2)
    # Windows of 4: 3 hops in each; the way between the two windows is shared by both directions, and 4 steps long.
    assert there[:, 0].tolist() == [0, 1, 1, 1, 2 / 4, 1, 1, 1, 0, 0]
    # After each window dK and dV go on once more inside it and once to the other, while nothing is computed.
    assert back[:, 0].tolist() == [1, 1, 1, 0, 1, 1, 1, 0, 3, 3]


def test_a_double_ring_returns_gradients_later():
    documents, machine = Documents.from_lengths([64 * 1024]), machine_of(FITTED)
    usp, double = (PEERS[name](documents, 32, SHAPE, NODE).seconds(machine) for name in ("usp", "loongtrain"))
    assert double[1].max() > usp[1].max()


@pytest.mark.parametrize("ranks", [3, 8, 16])
def test_every_row_lies_in_one_chunk_of_one_rank(ranks):
    documents = Documents.from_lengths(lengths(2))
    layout = heap_of_chunks(documents, ranks, 256)
    rows = np.concatenate([layout.rows(rank) for rank in range(ranks)])
    assert sorted(rows) == list(range(ranks * layout.rows_per_rank))


def test_the_heap_gives_the_busiest_chunk_to_the_idlest_rank():
    # Four chunks of 8 rows: [0, 8) of a document of 16, [8, 16) of it, and two of single rows.
    layout = heap_of_chunks(Documents.from_lengths([16] + [1] * 16), 2, 8)
    # The second half (100 pairs) goes first, then the first (36) to the other rank, then 8 pairs each.
    assert sorted(layout.rows(0).tolist()) == [*range(8, 16), *range(24, 32)]


@pytest.mark.parametrize("ranks", [4, 8, 24])
def test_hybrid_batches_hold_every_document_once_and_use_every_rank(ranks):
    drawn = np.random.default_rng(ranks).integers(1, 40_000, 60).tolist()
    made = batches(drawn, ranks)
    assert sorted(length for groups in made for group in groups for length in group.lengths) == sorted(drawn)
    for groups in made:
        assert sum(group.size for group in groups) == ranks
        assert all(group.size >= needed(max(group.lengths), ranks, 8192) for group in groups)


def test_a_document_gets_the_power_of_two_of_ranks_that_its_rows_need():
    assert [needed(length, 64, 8192) for length in (1, 8192, 8193, 16384, 16385, 10**9)] == [
        1,
        1,
        2,
        2,
        4,
        64,
    ]


@pytest.mark.parametrize(
    "strategy,delivery,limit,stages",
    [
        ("sap", "p2p", None, 1),
        ("sap", "p2p", None, 4),
        ("sap", "p2p", 3000, 1),
        ("sap", "all_to_all", None, 4),
        ("sap", "all_to_all", 3000, 1),
        ("all_gather", "all_gather", None, 1),
        ("ring", "p2p", None, 1),
    ],
)
@pytest.mark.parametrize("slower", [1, 30, 1000])
def test_a_plan_takes_what_its_own_model_says_where_the_simulation_adds_nothing(
    strategy, delivery, limit, stages, slower
):
    h100 = PRESETS["h100"]
    # Links that kernels hide, that they hide in part, and that hide kernels.
    names = ("node_bytes_per_s", "network_bytes_per_s", "network_alone_bytes_per_s")
    links = {name: getattr(h100, name) / slower for name in names}
    hardware = dataclasses.replace(h100, call_seconds=1e-20, ranks_per_node=NODE, **links)
    documents = Documents.from_lengths(lengths(3))
    asked = Request(documents, 8, layout="contiguous", shape=SHAPE, hardware=hardware, max_remote_rows=limit)
    plan = make_plan(dataclasses.replace(asked, strategy=strategy, delivery=delivery))
    plan = dataclasses.replace(plan, stages=stages)
    expected = plan.layer_seconds
    machine = Machine(hardware, eager_bytes_per_s=hardware.copy_bytes_per_s)
    forward, backward = executed(plan.schedule(None), 8, SHAPE, NODE, EXACT).seconds(machine)
    # The plan's model rounds bytes to whole ones.
    np.testing.assert_allclose(forward, expected.forward + expected.forward_exposed, rtol=1e-7)
    np.testing.assert_allclose(backward, expected.backward + expected.backward_exposed, rtol=1e-7)


@pytest.mark.parametrize("turns", [1, 2])
@pytest.mark.parametrize("slower", [1, 300])
def test_exchanged_heads_take_what_the_plans_own_model_says(slower, turns):
    h100 = PRESETS["h100"]
    # Of copies the plan's model says that nothing goes on beside them, the simulation that they are a part of kernels.
    free = {"call_seconds": 1e-20, "copy_bytes_per_s": 1e30}
    hardware = dataclasses.replace(h100, node_bytes_per_s=h100.node_bytes_per_s / slower, **free)
    shape = dataclasses.replace(SHAPE, num_heads=16, num_kv_heads=8)
    asked = Request(Documents.from_lengths(lengths(3)), 4, ulysses_size=4, shape=shape, hardware=hardware)
    plan = dataclasses.replace(make_plan(asked), turns=turns)
    expected = plan.layer_seconds
    machine = Machine(hardware, eager_bytes_per_s=hardware.copy_bytes_per_s)
    forward, backward = planned(plan, EXACT).seconds(machine)
    np.testing.assert_allclose(forward, expected.forward + expected.forward_exposed, rtol=1e-7)
    np.testing.assert_allclose(backward, expected.backward + expected.backward_exposed, rtol=1e-7)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_a_plan_that_exchanges_heads_computes_every_pair_once(size):
    hardware = dataclasses.replace(PRESETS["h100"], ranks_per_node=NODE)
    documents = Documents.from_lengths(lengths(5))
    asked = Request(documents, 8, strategy="sap", layout="balanced", shape=SHAPE, hardware=hardware)
    plan = make_plan(dataclasses.replace(asked, ulysses_size=size))
    exact = load(plan.schedule(None), 8 // size, plan.outer_shape, NODE, EXACT).spread(size)
    assert exact.pairs().sum() == pytest.approx(documents.pairs() * SHAPE.num_heads, rel=1e-12)
    made = planned(plan)
    assert (made.pairs() >= exact.pairs()).all()
    if size > 1:
        # All that leaves and all that arrives is copied once, there and back.
        groups = executed(plan.schedule(None), 8 // size, plan.outer_shape, NODE // size or 1)
        around = made.copied[0] - groups.spread(size).copied[0]
        assert around.tolist() == pytest.approx(4 * (made.heads.inside + made.heads.outside).sum(axis=0))
    forward, backward = made.seconds(machine_of(FITTED))
    assert forward.shape == backward.shape == (8,)
    if size == 8:
        # Nothing but heads travels, and of them what Ulysses moves: kv heads go to two ranks each.
        exchanged = PEERS["ulysses"](documents, 8, SHAPE, NODE).heads
        assert made.heads.inside.sum(axis=0).tolist() == exchanged.inside[0].tolist()
        assert made.heads.outside.sum(axis=0).tolist() == exchanged.outside[0].tolist()
        assert not made.there.inside.any() and not made.there.outside.any()


def test_every_constant_makes_some_tool_slower_or_faster():
    documents = Documents.from_lengths(lengths(4, most=60_000))
    loads = [peer(documents, 16, SHAPE, NODE) for peer in PEERS.values()]
    before = [way for made in loads for way in made.seconds(machine_of(FITTED))]
    for name, value in FITTED.items():
        after = [way for made in loads for way in made.seconds(machine_of({**FITTED, name: value / 2}))]
        assert not all(np.array_equal(a, b) for a, b in zip(before, after)), name


def test_compared_policies_are_those_whose_heads_last():
    row = compare("short", 24, 512, 2, SHAPE, machine_of(FITTED))
    assert set(row.tools) == set(row.bare) == {"sap_hf", *PEERS} - {"ulysses"}
    assert not runs("ulysses", 24, SHAPE, 8)
    assert all(row.bare[name][way] <= row.tools[name][way] for name in row.tools for way in (0, 1))
    assert row.ratio("sap_hf", False) == 1


def test_packs_that_are_alike_are_compared_once():
    assert len(packs("one_row", 64, 5)) == 1
    assert len(packs("short", 8192, 5)) == 5
