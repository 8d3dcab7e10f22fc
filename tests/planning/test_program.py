"""Programs of all ranks, run together on row numbers instead of tensors."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import sap_hf
from sap_hf.planning import compile_program
from tests import oracles
from tests.planning.cases import CORNERS, both, packs, ranks, windows

EMPTY = -1
deliveries = st.sampled_from(["p2p", "all_to_all"])


class Ranks:
    """Every rank's program and its buffer, which holds row numbers."""

    def __init__(self, plan, window):
        self.total = plan.documents.rows
        self.programs = [compile_program(plan, rank, window) for rank in range(plan.cp_size)]
        self.buffers = []
        for rank, program in enumerate(self.programs):
            assert program.own_rows == len(plan.rows(rank))
            buffer = np.full(program.buffer_rows, EMPTY)
            buffer[: program.own_rows] = plan.rows(rank)
            self.buffers.append(buffer)
        assert len({len(program.exchanges) for program in self.programs}) == 1, "not every rank takes part"

    def sent(self, rank, at):
        """{peer: rows}, each message as [(first own row, rows)] in the order of sending."""
        program = self.programs[rank]
        exchange = program.exchanges[at]
        source = np.arange(program.own_rows) if exchange.packed is None else exchange.packed
        messages = {}
        for message in exchange.sends:
            assert message.stop > message.start
            messages.setdefault(message.peer, []).append(source[message.start : message.stop])
        return messages

    def exchange(self, at):
        """Deliver exchange `at` everywhere and hold each message to its counterpart."""
        waiting = {
            (rank, peer): messages
            for rank in range(len(self.programs))
            for peer, messages in self.sent(rank, at).items()
        }
        for rank, program in enumerate(self.programs):
            for message in program.exchanges[at].receives:
                rows = waiting[message.peer, rank].pop(0)
                assert len(rows) == message.stop - message.start, (
                    "sender and receiver cut a message differently"
                )
                assert message.start >= program.own_rows
                place = slice(message.start, message.stop)
                assert (self.buffers[rank][place] == EMPTY).all(), "two messages land on one another"
                self.buffers[rank][place] = self.buffers[message.peer][rows]
        assert not any(waiting.values()), "a message is sent and never received"

    def attend(self, rank, at, window, attended):
        """Paint the query-key pairs of one call."""
        call = self.programs[rank].calls[at]
        queries, keys = self.buffers[rank][call.q.index], self.buffers[rank][call.k.index]
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


def together(plan, window):
    """Run the forward of all ranks, one exchange after the other; the pairs attended to."""
    everyone = Ranks(plan, window)
    total = everyone.total
    attended = np.zeros((total, total), dtype=np.int64)
    delivered = 0
    places = [0] * len(everyone.programs)
    # Every rank runs until it waits for an exchange that has not been delivered; then that one is.
    while any(place < len(p.forward) for place, p in zip(places, everyone.programs)):
        before = list(places)
        posted = []
        for rank, program in enumerate(everyone.programs):
            while places[rank] < len(program.forward):
                operation = program.forward[places[rank]]
                if operation.kind == "wait" and operation.at >= delivered:
                    break
                if operation.kind == "attend":
                    everyone.attend(rank, operation.at, window, attended)
                places[rank] += 1
            posted.append({op.at for op in program.forward[: places[rank]] if op.kind == "post"})
        if delivered < len(everyone.programs[0].exchanges):
            assert all(delivered in each for each in posted), "a rank waits before all have posted"
            everyone.exchange(delivered)
            delivered += 1
        assert places != before or delivered
    return everyone, attended


def hold(lengths, cp_size, strategy, layout, delivery, window):
    plan = sap_hf.plan(lengths=lengths, cp_size=cp_size, strategy=strategy, layout=layout, window=window)
    plan = dataclasses.replace(plan, delivery=delivery)
    everyone, attended = together(plan, window)
    np.testing.assert_array_equal(attended, oracles.mask(lengths, window).astype(np.int64))
    for rank, program in enumerate(everyone.programs):
        assert (everyone.buffers[rank] != EMPTY).all(), "a buffer row stays empty"
        hold_order(program)


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
        assert {at for kind, at in seen if kind == "attend"} == set(range(len(program.calls)))
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
            hold_reads(program, seen, at)


def hold_reads(program, seen, at):
    """No call that reads rows of exchange `at` runs after their gradients left."""
    landed = {row for message in program.exchanges[at].receives for row in range(message.start, message.stop)}
    for number, call in enumerate(program.calls):
        if landed & set(call.k.index.tolist()):
            assert seen.index(("attend", number)) < seen.index(("post_return", at))


@given(packs, ranks, both, deliveries, windows)
def test_programs_of_all_ranks_fit_together(lengths, cp_size, names, delivery, window):
    hold(lengths, cp_size, *names, delivery, window)


@pytest.mark.parametrize("delivery", ["p2p", "all_to_all"])
@pytest.mark.parametrize("strategy", ["sap", "all_gather"])
def test_programs_of_corner_packs_fit_together(strategy, delivery):
    for lengths, cp_size in CORNERS:
        for layout in ("contiguous", "zigzag"):
            for window in (None, 1, 3):
                hold(lengths, cp_size, strategy, layout, delivery, window)


@given(packs, ranks, both, windows)
def test_local_work_runs_while_rows_are_in_flight(lengths, cp_size, names, window):
    plan = sap_hf.plan(lengths=lengths, cp_size=cp_size, strategy=names[0], layout=names[1], window=window)
    for rank in range(cp_size):
        program = compile_program(plan, rank, window)
        kinds = [operation.kind for operation in program.forward]
        if "post" not in kinds:
            continue
        first_post, first_wait = kinds.index("post"), kinds.index("wait")
        for operation in program.forward[:first_post]:
            assert operation.kind == "post", "work runs before the first exchange is under way"
        local = {i for i, call in enumerate(program.calls) if (call.k.index < program.own_rows).all()}
        before = {operation.at for operation in program.forward[:first_wait] if operation.kind == "attend"}
        assert local <= before, "a local call waits for remote rows"
