"""The executor issues exactly what the program lists: operation by operation, with peers, offsets and bytes."""

import dataclasses

import pytest
import torch

import sap_hf
from sap_hf.planning import compile_program
from sap_hf.runtime import transport
from sap_hf.runtime.device_program import load
from tests.dist import run_ranks
from tests.runtime.parity import Case, inputs

WORLD = 4
BASE = Case(
    lengths=(5, 3, 14, 1, 9), layout="zigzag", heads=4, kv_heads=2, head_dim=8, value_dim=8, dtype="float32"
)
CASES = [
    dataclasses.replace(BASE, **change)
    for change in (
        {},
        {"delivery": "p2p", "stages": 3},
        {"delivery": "p2p", "stages": 3, "whole": False},
        {"delivery": "all_to_all", "remote_kv": "keep"},
        {"delivery": "p2p", "max_remote_rows": 6},
        {"delivery": "all_to_all", "max_remote_rows": 4, "layout": "contiguous"},
        {"strategy": "all_gather", "delivery": "all_gather"},
        {"strategy": "ring", "delivery": "p2p"},
        {"delivery": "p2p", "options": (("window", 4),), "layout": "balanced"},
    )
]
ROW_BYTES = BASE.kv_heads * 2 * BASE.head_dim * 4


class Recorder(transport.Transport):
    """Notes what is posted, and when it is waited for, among the kernel calls that `calls` sees."""

    def __init__(self, log):
        self.log = log

    def _note(self, kind, sends, receives, pending):
        self.log.append((kind, sends, receives))
        wait, log, number = pending.wait, self.log, sum(entry[0].startswith("post") for entry in self.log) - 1

        def noted():
            log.append(("wait", number))
            wait()

        pending.wait = noted
        return pending

    def post(self, sends, receives, group):
        pending = super().post(sends, receives, group)
        return self._note(
            "post", *(sorted((p, t.nbytes) for p, t in side) for side in (sends, receives)), pending
        )

    def post_all_to_all(self, send, receive, send_rows, receive_rows, group):
        pending = super().post_all_to_all(send, receive, send_rows, receive_rows, group)
        sides = (
            [(peer, n * ROW_BYTES) for peer, n in enumerate(rows) if n] for rows in (send_rows, receive_rows)
        )
        return self._note("post_all_to_all", *sides, pending)

    def post_all_gather(self, send, receive, group):
        pending = super().post_all_gather(send, receive, group)
        peers = [
            peer for peer, part in enumerate(receive.split(len(send))) if part.data_ptr() != send.data_ptr()
        ]
        sides = [(peer, send.nbytes) for peer in peers]
        return self._note("post_all_gather", sides, sides, pending)


def record(rank, world, cases):
    """What each case's forward and backward did on this rank, next to what its program says."""
    import importlib

    layer = importlib.import_module("sap_hf.runtime.layer")
    found = []
    for case in cases:
        given, plan = inputs(case, world), case.plan(world)
        rows = torch.from_numpy(plan.rows(rank))
        q, k, v = (tensor[rows].requires_grad_() for tensor in (given.q, given.k, given.v))
        log = []
        originals = layer._attend, layer._attend_backward

        def watched(name, log=log, originals=originals):
            original = originals[name == "_attend_backward"]

            def watch(*args):
                call = next(x for x in args if type(x).__name__ == "DeviceCall")
                log.append(("attend", call))
                return original(*args)

            return watch

        for name in ("_attend", "_attend_backward"):
            setattr(layer, name, watched(name))
        try:
            with transport.using(Recorder(log)):
                options = dict(case.options)
                out = sap_hf.attention(q, k, v, plan, remote_kv=case.remote_kv, **options)
                issued = [list(log)]
                log.clear()
                out.backward(given.dout[rows])
                issued.append(list(log))
        finally:
            layer._attend, layer._attend_backward = originals
        calls = load(plan, rank, options.get("window"), q.device).calls
        found.append([[_plain(entry, calls) for entry in part] for part in issued])
    return found


def _plain(entry, calls):
    if entry[0] == "attend":
        return ("attend", next(i for i, call in enumerate(calls) if call is entry[1]))
    return tuple(entry)


def listed(case, rank, program, operations):
    """The log that the operations of a program must leave."""
    name = {"p2p": "post", "all_to_all": "post_all_to_all", "all_gather": "post_all_gather"}
    log, posted = [], {}
    for operation in operations:
        if operation.kind == "attend":
            log.append(("attend", operation.at))
            continue
        if operation.kind in ("wait", "wait_return"):
            log.append(("wait", posted[operation.kind == "wait_return", operation.at]))
            continue
        exchange = program.exchanges[operation.at]
        home = operation.kind == "post_return"
        # dK/dV take the way of K/V backwards; what an all-gather brought goes home in an all-to-all.
        way = "all_to_all" if home and exchange.delivery == "all_gather" else exchange.delivery
        sides = (exchange.receives, exchange.sends) if home else (exchange.sends, exchange.receives)
        joined = []
        for side in sides:
            messages = [(m.peer, (m.stop - m.start) * ROW_BYTES) for m in side]
            if way == "all_to_all":
                messages = [
                    (p, sum(n for peer, n in messages if peer == p)) for p in {p for p, _ in messages}
                ]
            joined.append(sorted(messages))
        posted[home, operation.at] = sum(entry[0].startswith("post") for entry in log)
        log.append((name[way], *joined))
    return log


@pytest.fixture(scope="module")
def issued():
    return dict(zip(CASES, zip(*run_ranks(record, WORLD, CASES)), strict=True))


@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_what_is_issued_is_the_program(issued, case):
    plan = case.plan(WORLD)
    for rank in range(WORLD):
        program = compile_program(plan, rank, dict(case.options).get("window"))
        backward = program.backward_kept if case.remote_kv == "keep" else program.backward
        assert len(program.exchanges) > 0, "a case that moves nothing shows nothing"
        for operations, found in zip((program.forward, backward), issued[case][rank], strict=True):
            assert found == listed(case, rank, program, operations)
