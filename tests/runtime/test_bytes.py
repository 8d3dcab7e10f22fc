"""What travels: only rows that are read, counted in bytes at the transport, and no collective beside it."""

import dataclasses

import numpy as np
import pytest
import torch
import torch.distributed as dist

import sap_hf
from sap_hf.runtime import transport
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
