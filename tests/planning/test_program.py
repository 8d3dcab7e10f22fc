"""Programs of all ranks, run together on row numbers instead of tensors."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sap_hf
from sap_hf.errors import ConfigError
from sap_hf.planning import compile_program
from sap_hf.planning.program import rows_in
from tests import oracles
from tests.planning.cases import CORNERS, LAYOUTS, both, packs, ranks, windows

EMPTY = -1


class Ranks:
    """Every rank's program and its buffer, which holds row numbers."""

    def __init__(self, plan, window):
        self.total = plan.documents.rows
        self.programs = [compile_program(plan, rank, window) for rank in range(plan.cp_size)]
        self.buffers = []
        for rank, program in enumerate(self.programs):
            assert program.rows == len(plan.rows(rank))
            buffer = np.full(program.buffer_rows, EMPTY)
            buffer[program.own] = plan.rows(rank)[program.kept.index]
            self.buffers.append(buffer)
        self.rows = [plan.rows(rank) for rank in range(plan.cp_size)]
        assert len({len(program.exchanges) for program in self.programs}) == 1, "not every rank takes part"

    def sent(self, rank, at):
        """{peer: rows}, each message as [(first own row, rows)] in the order of sending."""
        program = self.programs[rank]
        exchange = program.exchanges[at]
        source = np.arange(program.buffer_rows) if exchange.packed is None else exchange.packed
        messages = {}
        for message in exchange.sends:
            assert message.stop > message.start
            rows = source[message.start : message.stop]
            assert ((rows >= program.own.start) & (rows < program.own.stop)).all(), (
                "sent by who does not own it"
            )
            messages.setdefault(message.peer, []).append(rows)
        return messages

    def exchange(self, at):
        """Deliver exchange `at` everywhere and hold each message to its counterpart."""
        waiting = {
            (rank, peer): messages
            for rank in range(len(self.programs))
            for peer, messages in self.sent(rank, at).items()
        }
        before = [buffer.copy() for buffer in self.buffers]
        for rank, program in enumerate(self.programs):
            landed = np.zeros(program.buffer_rows, bool)
            landed[program.own] = True
            for message in program.exchanges[at].receives:
                rows = waiting[message.peer, rank].pop(0)
                assert len(rows) == message.stop - message.start, (
                    "sender and receiver cut a message differently"
                )
                place = slice(message.start, message.stop)
                assert not landed[place].any(), "two messages land on one another, or on own rows"
                assert at >= program.slots or (self.buffers[rank][place] == EMPTY).all()
                landed[place] = True
                self.buffers[rank][place] = before[message.peer][rows]
        assert not any(waiting.values()), "a message is sent and never received"

    def attend(self, rank, at, window, attended):
        """Paint the query-key pairs of one call."""
        call = self.programs[rank].calls[at]
        queries = self.rows[rank][call.q.index]
        keys = (self.rows[rank] if call.local else self.buffers[rank])[call.k.index]
        assert (queries >= 0).all() and (keys >= 0).all(), (
            "a call reads a buffer row that nothing has reached"
        )
        assert (queries < self.total).all() and (keys < self.total).all(), "a call reads padding"
        assert (
            len(call.cu_q) == len(call.cu_k) and call.cu_q[-1] == len(queries) and call.cu_k[-1] == len(keys)
        )
        for i in range(len(call.cu_q) - 1):
            q, k = queries[call.cu_q[i] : call.cu_q[i + 1]], keys[call.cu_k[i] : call.cu_k[i + 1]]
            assert len(q) and len(k), "a segment is empty"
            if call.causal:
                # Bottom-right: the last query reads the last key.
                behind = np.arange(len(q))[:, None] + (len(k) - len(q)) - np.arange(len(k))[None, :]
                seen = (behind >= 0) & (True if window is None else behind < window)
            else:
                seen = np.ones((len(q), len(k)), dtype=bool)
            assert seen.any(axis=1).all(), "a query of a segment reads nothing"
            np.add.at(attended, (q[:, None], k[None, :]), seen)


def together(everyone, window, name):
    """Run one of the lists of all ranks; the pairs attended to. An exchange moves once all ranks have posted it."""
    total = everyone.total
    lists = [getattr(program, name) for program in everyone.programs]
    attended = np.zeros((total, total), dtype=np.int64)
    delivered = 0
    places = [0] * len(lists)
    while any(place < len(operations) for place, operations in zip(places, lists)):
        before = (list(places), delivered)
        for rank, operations in enumerate(lists):
            while places[rank] < len(operations):
                operation = operations[places[rank]]
                if operation.kind == "wait" and operation.at >= delivered:
                    break
                if operation.kind == "attend":
                    everyone.attend(rank, operation.at, window, attended)
                places[rank] += 1
        # At once, however early it was posted: rows that are overwritten while they are needed show.
        posted = [
            {op.at for op in operations[:place] if op.kind == "post"}
            for place, operations in zip(places, lists)
        ]
        while all(delivered in each for each in posted):
            everyone.exchange(delivered)
            delivered += 1
        assert (places, delivered) != before, "the ranks wait for each other"
    return attended


def hold(lengths, cp_size, window, stages=1, **options):
    plan = sap_hf.plan(lengths=lengths, cp_size=cp_size, window=window, **options)
    plans = (dataclasses.replace(plan, stages=stages, whole=whole) for whole in (True, False))
    whole, _ = (hold_one(plan, lengths, window) for plan in plans)
    return whole


def hold_one(plan, lengths, window):
    right = oracles.mask(lengths, window).astype(np.int64)
    everyone = Ranks(plan, window)
    np.testing.assert_array_equal(together(everyone, window, "forward"), right)
    for rank, program in enumerate(everyone.programs):
        if "all_gather" not in plan.deliveries:
            assert (everyone.buffers[rank] != EMPTY).all(), "a buffer row stays empty"
        hold_order(program)
        for operations in (program.backward, program.backward_kept):
            hold_gradients(program, operations, plan.rows(rank) < plan.documents.rows)
    if everyone.programs[0].slots >= len(everyone.programs[0].exchanges):
        np.testing.assert_array_equal(together(everyone, window, "backward_kept"), right)
    np.testing.assert_array_equal(together(Ranks(plan, window), window, "backward"), right)
    for name in ("forward", "backward", "backward_kept"):
        orders = {
            tuple((op.kind, op.at) for op in getattr(program, name) if op.kind.startswith("post"))
            for program in everyone.programs
        }
        assert len(orders) == 1, "ranks use the communicator in different orders"
    return everyone


def hold_order(program):
    """Each exchange is posted, then waited for; gradients return after every call that adds to them."""
    count = len(program.exchanges)
    for operations, fetches in (
        (program.forward, True),
        (program.backward, True),
        (program.backward_kept, False),
    ):
        seen = [(operation.kind, operation.at) for operation in operations]
        assert len(seen) == len(set(seen)), "an operation runs twice"
        expected = set(range(count)) if fetches else set()
        assert (
            {at for kind, at in seen if kind == "post"}
            == {at for kind, at in seen if kind == "wait"}
            == expected
        )
        for at in expected:
            assert seen.index(("post", at)) < seen.index(("wait", at))
        returns = set() if operations is program.forward else set(range(count))
        assert {at for kind, at in seen if kind == "post_return"} == returns
        assert {at for kind, at in seen if kind == "wait_return"} == returns
        for at in returns:
            assert seen.index(("post_return", at)) < seen.index(("wait_return", at))
            if at >= program.slots:
                assert seen.index(("wait_return", at - program.slots)) < seen.index(("post_return", at))
        if returns:
            hold_reads(program, seen)


def hold_gradients(program, operations, real):
    """Gradients of a row of K are added up in one place, or there is one alone and it is nowhere else."""
    buffer = np.full(program.buffer_rows, EMPTY)
    buffer[program.own] = program.kept.index
    parts = np.zeros(program.rows, np.int64)
    for operation in operations:
        if operation.kind != "attend":
            continue
        call = program.calls[operation.at]
        picked, sums = (rows.index for rows in call.added)
        alone = np.delete(call.k.index, picked)
        if call.local:
            np.testing.assert_array_equal(buffer[sums], call.k.index[picked])
            np.add.at(parts, alone, 1)
        else:
            np.testing.assert_array_equal(sums, call.k.index[picked])
            assert not len(alone)
    assert not parts[program.kept.index].any()
    parts[program.kept.index] = 1
    np.testing.assert_array_equal(parts[real], 1)


def hold_reads(program, seen):
    """Every call that reads received rows runs while their exchange is the one whose gradients that slot gathers."""
    called = [number for kind, number in seen if kind == "attend" and not program.calls[number].local]
    for number in called:
        read = set(program.calls[number].k.index.tolist()) - set(range(program.own.start, program.own.stop))
        turn = seen.index(("attend", number))
        for at, exchange in enumerate(program.exchanges):
            landed = {row for message in exchange.receives for row in range(message.start, message.stop)}
            before = at - program.slots
            opened = before < 0 or seen.index(("post_return", before)) < turn
            if opened and turn < seen.index(("post_return", at)):
                read -= landed
        assert not read, "gradients of received rows are added when nobody will send them home"


ways = st.sampled_from(
    [
        {"strategy": "sap", "delivery": "p2p"},
        {"strategy": "sap", "delivery": "all_to_all"},
        {"strategy": "sap", "delivery": "p2p", "stages": 2},
        {"strategy": "sap", "delivery": "all_to_all", "stages": 3},
        {"strategy": "sap", "max_remote_rows": 40},
        {"strategy": "all_gather", "delivery": "p2p"},
        {"strategy": "all_gather", "delivery": "all_to_all"},
        {"strategy": "all_gather", "delivery": "all_gather"},
        {"strategy": "ring", "delivery": "p2p"},
        {"strategy": "ring", "delivery": "all_to_all"},
    ]
)


@given(packs, ranks, st.sampled_from(LAYOUTS), ways, windows)
def test_programs_of_all_ranks_fit_together(lengths, cp_size, layout, way, window):
    hold(lengths, cp_size, window, layout=layout, **way)


@pytest.mark.parametrize("delivery", ["p2p", "all_to_all", "all_gather"])
@pytest.mark.parametrize("strategy", ["sap", "all_gather"])
def test_programs_of_corner_packs_fit_together(strategy, delivery):
    if strategy == "sap" and delivery == "all_gather":
        with pytest.raises(ConfigError, match="moves every row"):
            sap_hf.plan(lengths=[8], cp_size=2, strategy=strategy, delivery=delivery)
        return
    for lengths, cp_size in CORNERS:
        for layout in ("contiguous", "zigzag"):
            for window in (None, 1, 3):
                hold(lengths, cp_size, window, strategy=strategy, layout=layout, delivery=delivery)


@given(packs, ranks, st.sampled_from(LAYOUTS), st.integers(2, 60))
def test_a_budget_of_remote_rows_is_kept(lengths, cp_size, layout, limit):
    options = {"lengths": lengths, "cp_size": cp_size, "strategy": "sap", "layout": layout}
    free = sap_hf.plan(**options)
    plan = sap_hf.plan(**options, max_remote_rows=limit)
    np.testing.assert_array_equal(plan.rows_moved, free.rows_moved)
    for rank in range(cp_size):
        program = compile_program(plan, rank)
        assert program.buffer_rows - len(program.kept.index) <= limit


def test_a_budget_that_cannot_be_kept_is_refused_with_the_rows_that_it_would_need():
    with pytest.raises(ConfigError, match=r"max_remote_rows=3: .* 12 rows of others"):
        sap_hf.plan(lengths=[16], cp_size=4, strategy="all_gather", max_remote_rows=3)
    with pytest.raises(ConfigError, match="window 9"):
        sap_hf.plan(lengths=[16], cp_size=4, layout="contiguous", window=9, max_remote_rows=3)
    with pytest.raises(ConfigError, match="max_remote_rows=1 must be"):
        sap_hf.plan(lengths=[16], cp_size=4, max_remote_rows=1)


@pytest.mark.parametrize("stages", [2, 3, 7])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_stages_move_the_same_rows_in_equal_parts(layout, stages):
    plan = sap_hf.plan(lengths=[40, 3, 21], cp_size=4, strategy="sap", layout=layout)
    wholes, parts = (dataclasses.replace(plan, stages=stages, whole=whole) for whole in (True, False))
    np.testing.assert_array_equal(wholes.rows_moved, plan.rows_moved)
    np.testing.assert_array_equal(parts.rows_moved, plan.rows_moved)
    received = plan.rows_moved.sum(axis=0)
    for rank in range(4):
        sizes = [rows_in(exchange.receives) for exchange in compile_program(parts, rank).exchanges]
        assert max(sizes) == -(-received[rank] // stages)


@given(packs, ranks, both, windows)
def test_local_work_runs_while_rows_are_in_flight(lengths, cp_size, names, window):
    plan = sap_hf.plan(lengths=lengths, cp_size=cp_size, strategy=names[0], layout=names[1], window=window)
    if "all_gather" in plan.deliveries:
        plan = dataclasses.replace(plan, delivery="p2p")
    for rank in range(cp_size):
        program = compile_program(plan, rank, window)
        kinds = [operation.kind for operation in program.forward]
        if "post" not in kinds:
            continue
        first_post, first_wait = kinds.index("post"), kinds.index("wait")
        for operation in program.forward[:first_post]:
            assert operation.kind == "post", "work runs before the first exchange is under way"
        local = {i for i, call in enumerate(program.calls) if call.local}
        before = {operation.at for operation in program.forward[:first_wait] if operation.kind == "attend"}
        local &= {operation.at for operation in program.forward if operation.kind == "attend"}
        assert local <= before, "a local call waits for remote rows"


def test_a_rank_whose_documents_are_its_own_takes_part_in_no_message():
    # Documents on ranks 0 and 1 together, on 2, and on 3.
    plan = sap_hf.plan([14, 2, 8, 5, 3], cp_size=4, strategy="sap", layout="contiguous", delivery="p2p")
    alone = [compile_program(plan, rank).alone for rank in range(4)]
    assert alone == [False, False, True, True]
    together = dataclasses.replace(plan, delivery="all_to_all")
    assert not any(compile_program(together, rank).alone for rank in range(4)), (
        "a collective needs every rank"
    )
