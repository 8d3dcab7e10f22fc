"""Exchanged heads in turns: beside each turn the next one's heads and the last one's results are on the way."""

import dataclasses

import pytest
import torch

from sap_hf.planning import compile_program
from sap_hf.planning.heads import split_turns
from tests.dist import run_ranks
from tests.runtime.parity import Case, attend, inputs
from tests.runtime.test_issued import record

WORLD, SIZE = 4, 2
BASE = Case(
    lengths=(5, 3, 14, 1, 9),
    layout="zigzag",
    delivery="p2p",
    heads=6,
    kv_heads=6,
    dtype="float32",
    ulysses_size=SIZE,
)
CASES = [
    dataclasses.replace(BASE, **change)
    for change in (
        {"turns": 1},
        {"turns": 2},
        {"turns": 3},
        {"turns": 2, "stages": 3, "whole": False},
        {"turns": 2, "remote_kv": "keep"},
        {"turns": 2, "max_remote_rows": 6},
        {"turns": 2, "heads": 9, "kv_heads": 3},
        {"turns": 2, "lengths": (8,) * 4, "layout": "contiguous"},
    )
]


class Expected:
    """The log that a layer must leave on one rank."""

    def __init__(self, case, plan, rank):
        self.case, self.plan, self.rank = case, plan, rank
        self.program = compile_program(plan, rank)
        self.turns = split_turns(case.heads, case.kv_heads, SIZE, case.turns)
        self.log, self.posts = [], 0

    def post(self, sends, receives):
        self.log.append(("post", sorted(sends), sorted(receives)))
        self.posts += 1
        return self.posts - 1

    def wait(self, number):
        self.log.append(("wait", number))

    def heads(self, turn, arrives, keys):
        """The exchange of a turn's query heads, with the kv heads where `keys`, or of what goes home."""
        me, split, first = self.rank % SIZE, self.turns[turn], self.rank - self.rank % SIZE
        sizes = [
            self.plan.rows_per_rank * 4 * self.case.head_dim * (its.q_count + 2 * keys * its.kv_count)
            for its in split
        ]
        others = [peer for peer in range(SIZE) if peer != me]
        theirs, mine = (
            [(first + peer, size[peer]) for peer in others] for size in (sizes, [sizes[me]] * SIZE)
        )
        return self.post(*((theirs, mine) if arrives else (mine, theirs)))

    def rows(self, operations, row_bytes, meanwhile):
        """A turn's program; `meanwhile` follows the messages that it begins with."""
        posted, begun = {}, False
        if self.program.alone:
            # One kernel call, which nobody watches.
            operations = ()
        for operation in operations:
            if operation.kind != "post" and not begun:
                begun = True
                meanwhile()
            if operation.kind == "attend":
                self.log.append(("attend", operation.at))
                continue
            home = operation.kind.endswith("return")
            if operation.kind.startswith("wait"):
                self.wait(posted[home, operation.at])
                continue
            exchange = self.program.exchanges[operation.at]
            sides = (exchange.receives, exchange.sends) if home else (exchange.sends, exchange.receives)
            messages = [[(m.peer, (m.stop - m.start) * row_bytes) for m in side] for side in sides]
            posted[home, operation.at] = self.post(*messages)
        if not begun:
            meanwhile()

    def layer(self, operations, backward):
        self.log, self.posts = [], 0
        coming, home = [self.heads(0, True, not backward)], []
        for turn, split in enumerate(self.turns):
            self.wait(coming[turn])

            def meanwhile(turn=turn):
                if turn:
                    home.append(self.heads(turn - 1, False, backward))
                if turn + 1 < len(self.turns):
                    coming.append(self.heads(turn + 1, True, not backward))

            row_bytes = split[self.rank % SIZE].kv_count * 2 * self.case.head_dim * 4
            self.rows(operations, row_bytes, meanwhile)
        home.append(self.heads(len(self.turns) - 1, False, backward))
        for number in home:
            self.wait(number)
        return self.log


@pytest.fixture(scope="module")
def issued():
    return dict(zip(CASES, zip(*run_ranks(record, WORLD, CASES)), strict=True))


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_what_is_issued_is_each_turn_s_program_with_its_neighbours_heads_on_the_way(issued, case):
    plan = case.plan(WORLD)
    for rank in range(WORLD):
        expected = Expected(case, plan, rank)
        assert len(expected.turns) == case.turns
        program = expected.program
        ways = (program.forward, program.backward_kept if case.remote_kv == "keep" else program.backward)
        for backward, (operations, found) in enumerate(zip(ways, issued[case][rank], strict=True)):
            assert found == expected.layer(operations, bool(backward))


def test_out_of_a_turn_leaves_before_the_next_one_is_computed(issued):
    case = CASES[1]
    for rank in range(WORLD):
        forward, _ = issued[case][rank]
        expected = Expected(case, case.plan(WORLD), rank)
        expected.heads(0, False, False)
        home = forward.index(expected.log[0])
        attends = [at for at, entry in enumerate(forward) if entry[0] == "attend"]
        in_a_turn = len(attends) // 2
        assert attends[in_a_turn - 1] < home < attends[in_a_turn]


def backwards(rank, world):
    """Gradients of two backwards of one forward; the second one frees what was saved."""
    case = CASES[1]
    given, plan = inputs(case, world), case.plan(world)
    rows = torch.from_numpy(plan.rows(rank))
    leaves = [tensor[rows].requires_grad_() for tensor in (given.q, given.k, given.v)]
    out = attend(*leaves, plan, case, None)
    found = [
        torch.autograd.grad(out, leaves, given.dout[rows], retain_graph=first) for first in (True, False)
    ]
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(out, leaves, given.dout[rows])
    return found


def test_what_was_saved_serves_as_many_backwards_as_were_asked_for():
    for first, second in run_ranks(backwards, WORLD):
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
