"""What travels: only rows that are read, counted in bytes at the transport, and no collective beside it."""

import dataclasses
import functools

import numpy as np
import pytest
import torch
import torch.distributed as dist

import sap_hf
from sap_hf.planning.hardware import PRESETS
from sap_hf.planning.heads import head_bytes, rank_shapes
from sap_hf.runtime import transport
from sap_hf.runtime.profile import Meter
from tests import oracles
from tests.dist import run_ranks
from tests.runtime.doubles import CountingTransport
from tests.runtime.parity import Case, attend, inputs

WORLD = 4
BASE = Case(lengths=(5, 3, 8, 1, 6), heads=4, kv_heads=2, head_dim=8, value_dim=5, dtype="float32")
BYTES_PER_ROW = BASE.kv_heads * (BASE.head_dim + BASE.value_dim) * 4

CASES = [
    dataclasses.replace(BASE, strategy=strategy, layout=layout, delivery=delivery, remote_kv=remote_kv)
    for strategy in ("sap", "all_gather")
    for layout in ("contiguous", "zigzag")
    for delivery in ("p2p", "all_to_all")
    for remote_kv in ("refetch", "keep")
]
ALIGNED = dataclasses.replace(BASE, lengths=(4, 2, 2, 1, 3, 4))


def count(rank, world, cases):
    """Bytes that arrive in the forward and in the backward of each case."""
    counted = []
    with transport.using(CountingTransport()) as counting:
        for case in cases:
            given, plan = inputs(case, world), case.plan(world)
            rows = torch.from_numpy(plan.rows(rank))
            q, k, v = (tensor[rows].requires_grad_() for tensor in (given.q, given.k, given.v))
            out = attend(q, k, v, plan, case, None)
            forward = counting.take()
            out.backward(given.dout[rows])
            counted.append((forward, counting.take()))
    return counted


@pytest.fixture(scope="module")
def received():
    cases = [*CASES, ALIGNED]
    return dict(zip(cases, zip(*run_ranks(count, WORLD, cases))))


def rows_that_travel(case):
    """(W, W) rows from source to destination, from the mask."""
    plan = case.plan(WORLD)
    total = sum(case.lengths)
    owner = np.empty(-(-total // WORLD) * WORLD, dtype=int)
    for rank in range(WORLD):
        owner[plan.rows(rank)] = rank
    seen = oracles.mask(case.lengths) if case.strategy == "sap" else np.ones((total, total), dtype=bool)
    moved = np.zeros((WORLD, WORLD), dtype=int)
    for rank in range(WORLD):
        for row in oracles.rows_needed(seen, owner[:total], rank):
            moved[owner[row], rank] += 1
    return moved


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case.strategy}-{case.layout}-{case.delivery}-{case.remote_kv}"
)
def test_every_rank_receives_exactly_the_rows_that_its_documents_need(received, case):
    moved = rows_that_travel(case)
    for rank, (forward, backward) in enumerate(received[case]):
        fetched = moved[:, rank].sum() * BYTES_PER_ROW
        # dK/dV of each row that this rank sent comes back from each reader.
        returned = moved[rank].sum() * BYTES_PER_ROW
        assert forward == fetched
        assert backward == returned + (fetched if case.remote_kv == "refetch" else 0)


def test_contiguous_sap_receives_the_straddling_documents_and_all_gather_everything(received):
    case = dataclasses.replace(BASE, delivery="p2p")
    # 23 rows, 6 to a rank: ranks 1, 2, 3 begin at rows 6, 12, 18; documents at rows 0, 5, 8, 16 and 17.
    assert [forward // BYTES_PER_ROW for forward, _ in received[case]] == [0, 6 - 5, 12 - 8, 18 - 17]
    gathered = dataclasses.replace(case, strategy="all_gather")
    assert [forward // BYTES_PER_ROW for forward, _ in received[gathered]] == [17, 17, 17, 18]


def test_documents_that_end_where_ranks_end_move_nothing(received):
    assert received[ALIGNED] == ((0, 0),) * WORLD


# Ranks of the run, and of each node.
NODES = {4: 2, 8: 4}
WINDOW = (("window", 4),)
LEVELS = dataclasses.replace(BASE, value_dim=BASE.head_dim)
# One document has more rows than a node holds.
LONG = dataclasses.replace(LEVELS, lengths=(3, 19, 2))
ULYSSES_IN_A_NODE = {
    4: [
        dataclasses.replace(
            LONG, heads=heads, kv_heads=kv_heads, layout=layout, options=window, ulysses_size=2
        )
        for heads, kv_heads in ((4, 2), (8, 4))
        for layout in ("contiguous", "zigzag", "balanced")
        for window in ((), WINDOW)
    ],
    8: [
        dataclasses.replace(LONG, heads=8, kv_heads=4, ulysses_size=4, layout=layout)
        for layout in ("contiguous", "zigzag", "balanced")
    ],
}
BY_LEVEL = {
    4: [
        *(
            dataclasses.replace(
                LEVELS, strategy=strategy, layout=layout, delivery=delivery, options=window, ulysses_size=size
            )
            for strategy in ("sap", "all_gather", "ring")
            for layout in ("contiguous", "zigzag", "balanced")
            for delivery in ("p2p", "all_to_all")
            for window in ((), WINDOW)
            for size in (1, 2)
        ),
        dataclasses.replace(LEVELS, strategy="ulysses", ulysses_size=4),
        dataclasses.replace(LEVELS, strategy="ulysses", ulysses_size=4, heads=6, options=WINDOW),
        dataclasses.replace(LEVELS, heads=9, kv_heads=3, ulysses_size=2, layout="zigzag"),
        dataclasses.replace(LEVELS, strategy="all_gather", delivery="all_gather"),
        dataclasses.replace(LEVELS, strategy="all_gather", delivery="all_gather", remote_kv="keep"),
        dataclasses.replace(LEVELS, layout="zigzag", remote_kv="keep"),
        dataclasses.replace(LEVELS, layout="zigzag", remote_kv="keep", ulysses_size=2),
        dataclasses.replace(LEVELS, layout="zigzag", stages=3, dtype="bfloat16"),
        dataclasses.replace(LEVELS, layout="balanced", max_remote_rows=4),
        *ULYSSES_IN_A_NODE[4],
    ],
    8: [
        *(
            dataclasses.replace(
                LEVELS, heads=8, kv_heads=4, strategy=strategy, layout="zigzag", ulysses_size=size
            )
            for strategy in ("sap", "all_gather", "ring")
            for size in (1, 2, 4)
        ),
        dataclasses.replace(LEVELS, heads=8, kv_heads=4, strategy="ulysses", ulysses_size=8),
        dataclasses.replace(LEVELS, strategy="all_gather", delivery="all_gather"),
        *ULYSSES_IN_A_NODE[8],
    ],
}
EACH_CASE = pytest.mark.parametrize(
    ("world", "case"),
    [(world, case) for world, cases in BY_LEVEL.items() for case in cases],
    ids=lambda given: (
        f"W{given}" if isinstance(given, int) else f"{given.strategy}-{given.layout}-{given.delivery}"
    ),
)


def on_nodes(case, world):
    """The case's plan for NODES, of the size that its tensors have."""
    plan = case.plan(world)
    return dataclasses.replace(
        plan,
        shape=dataclasses.replace(plan.shape, bytes_per_element=getattr(torch, case.dtype).itemsize),
        hardware=dataclasses.replace(PRESETS["cpu"], ranks_per_node=NODES[world]),
    )


class Received(CountingTransport):
    """Counts what comes from other ranks: heads are exchanged with oneself, too."""

    def post_all_to_all(self, send, receive, send_rows, receive_rows, group):
        own = receive_rows[dist.get_rank(group)]
        self.bytes_received -= own * receive[:1].nbytes
        return super().post_all_to_all(send, receive, send_rows, receive_rows, group)


def count_by_level(rank, world, cases):
    """Bytes sent inside the node, between nodes, and received by another count, in each forward and backward."""
    counted = []
    received = Received()
    with transport.using(Meter(received, NODES[world])) as meter:

        def take():
            reading = meter.take()
            return reading.bytes_inside_node, reading.bytes_between_nodes, received.take()

        for case in cases:
            given, plan = inputs(case, world), on_nodes(case, world)
            rows = torch.from_numpy(plan.rows(rank))
            q, k, v = (tensor[rows].requires_grad_() for tensor in (given.q, given.k, given.v))
            out = attend(q, k, v, plan, case, None)
            forward = take()
            out.backward(given.dout[rows])
            counted.append((forward, take()))
    return counted


@functools.cache
def counted_by_level(world):
    cases = BY_LEVEL[world]
    return dict(zip(cases, zip(*run_ranks(count_by_level, world, cases), strict=True), strict=True))


def planned_bytes(plan, keep=False):
    """(W, W) bytes from source to destination in a layer's forward and in its backward, as the plan says."""
    size, groups = plan.ulysses_size, plan.cp_size // plan.ulysses_size
    rows = plan.rows_moved
    if "all_gather" in plan.deliveries:
        # The collective has no way to leave padding out. Its library relays rows along a ring of the ranks: what is
        # counted is that each rank's rows reach each other one.
        rows = plan.rows_per_rank * (1 - np.eye(plan.cp_size, dtype=int))
    row_bytes = [shape.bytes_per_row for shape in rank_shapes(plan.shape, size)]
    kv = rows * np.tile(row_bytes, groups)[:, None]
    heads = planned_heads(plan)
    # What was sent in the forward comes home as gradients.
    home = kv.T + heads.T
    return kv + heads, home if keep else kv + home


def planned_heads(plan):
    """(W, W) bytes of the heads that a layer's forward exchanges."""
    size = plan.ulysses_size
    sent = np.zeros((1, 1))
    if size > 1:
        sent = sum(way.sum(axis=0) for way in head_bytes(plan.shape, size, plan.rows_per_rank, plan.turns))
    return np.kron(np.eye(plan.cp_size // size), sent)


@EACH_CASE
def test_bytes_of_each_level_are_those_of_the_plan(world, case):
    plan, node = on_nodes(case, world), np.arange(world) // NODES[world]
    near = node[:, None] == node
    found = counted_by_level(world)[case]
    for at, planned in enumerate(planned_bytes(plan, case.remote_kv == "keep")):
        assert planned.any(), "a case that moves nothing shows nothing"
        for rank in range(world):
            inside, between, _ = found[rank][at]
            assert inside == (planned * near)[rank].sum()
            assert between == (planned * ~near)[rank].sum()


@EACH_CASE
def test_what_all_ranks_sent_is_what_all_ranks_received(world, case):
    for at in range(2):
        found = [rank[at] for rank in counted_by_level(world)[case]]
        assert sum(inside + between for inside, between, _ in found) == sum(got for *_, got in found)


@pytest.mark.parametrize(
    ("world", "case"),
    [(world, case) for world, cases in ULYSSES_IN_A_NODE.items() for case in cases],
    ids=lambda given: f"W{given}" if isinstance(given, int) else f"{given.layout}-kv{given.kv_heads}",
)
def test_with_heads_split_inside_the_node_a_row_crosses_once_to_each_node_that_reads_it(world, case):
    plan, per_node = on_nodes(case, world), NODES[world]
    assert plan.ulysses_size == per_node <= case.kv_heads
    seen = oracles.mask(case.lengths, dict(case.options).get("window"))
    holder = np.empty(world * plan.rows_per_rank, dtype=int)
    for rank in range(world):
        holder[plan.rows(rank)] = rank // per_node
    crossing = [oracles.rows_needed(seen, holder[: len(seen)], at) for at in range(world // per_node)]
    found = [forward for forward, _ in counted_by_level(world)[case]]
    row_bytes = case.kv_heads * (case.head_dim + case.value_dim) * 4
    assert sum(between for _, between, _ in found) == sum(map(len, crossing)) * row_bytes > 0


def test_without_heads_split_a_row_crosses_once_for_each_rank_that_reads_it():
    whole = dataclasses.replace(LEVELS, layout="zigzag", delivery="p2p")
    split = dataclasses.replace(whole, ulysses_size=2)
    between = [sum(forward[1] for forward, _ in counted_by_level(4)[case]) for case in (whole, split)]
    assert between[0] > between[1]


COLLECTIVES = [
    "all_reduce",
    "all_gather",
    "all_gather_object",
    "all_gather_into_tensor",
    "barrier",
    "broadcast",
    "broadcast_object_list",
    "new_group",
    "reduce_scatter_tensor",
    "scatter",
    "send",
    "recv",
]


def calls_of_torch_distributed(rank, world):
    called = []

    def watched(name):
        original = getattr(dist, name)

        def watch(*args, **kwargs):
            called.append(name)
            return original(*args, **kwargs)

        return watch

    originals = {name: getattr(dist, name) for name in COLLECTIVES}
    for name in COLLECTIVES:
        setattr(dist, name, watched(name))
    try:
        for lengths in ((5, 3, 8), (9, 7), (5, 3, 8)):
            case = Case(lengths=lengths)
            given, plan = inputs(case, world), sap_hf.plan(lengths=list(lengths), cp_size=world)
            rows = torch.from_numpy(plan.rows(rank))
            q, k, v = (tensor[rows].requires_grad_() for tensor in (given.q, given.k, given.v))
            sap_hf.attention(q, k, v, plan).sum().backward()
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)
    return called


def test_beside_its_rows_a_group_only_runs_one_all_reduce_ever():
    assert run_ranks(calls_of_torch_distributed, 2) == [["all_reduce"]] * 2
