"""Program: a schedule compiled for one rank, down to buffer offsets.

(Plan, window, rank) -> Program. The K/V buffer of a rank holds its own C rows first and what it receives behind them.
A Program says which rows are sent and where received ones land (Exchange), which rows attend to which (Call), and in
which order all of it happens (operations). The executor does exactly that list. numpy only: `sap-hf plan --program
RANK` prints it.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from sap_hf.planning.documents import Int64
from sap_hf.planning.layout import cut
from sap_hf.planning.plan import Plan, Window
from sap_hf.planning.schedule import (
    DESTINATION,
    K_START,
    K_STOP,
    Q_START,
    Q_STOP,
    RANK,
    SOURCE,
    START,
    STOP,
    Step,
)

Kind = Literal["post", "wait", "attend", "post_return", "wait_return"]


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a buffer, in the order in which a call reads them.

    Attributes:
        index: (n,) int64.
        start: where they begin if they are start, start+1, ...; else None and they must be gathered.
        rounds: positions in `index` such that no row repeats within a round; one round unless a row repeats.
    """

    index: Int64
    start: int | None
    rounds: tuple[Int64, ...]

    @classmethod
    def of(cls, index: Int64) -> Rows:
        """Rows with `start` and `rounds` derived from `index`."""
        together = len(index) > 0 and bool((np.diff(index) == 1).all())
        if together or len(np.unique(index)) == len(index):
            return cls(index, int(index[0]) if together else None, (np.arange(len(index)),))
        order = np.argsort(index, kind="stable")
        ordered = index[order]
        first = np.flatnonzero(np.concatenate([[True], np.diff(ordered) != 0]))
        sizes = np.diff(np.append(first, len(index)))
        turn = np.empty_like(index)
        turn[order] = np.arange(len(index)) - np.repeat(first, sizes)
        return cls(index, None, tuple(np.flatnonzero(turn == t) for t in range(int(turn.max()) + 1)))


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """One kernel call: segment i lets q rows [cu_q[i], cu_q[i+1]) read k rows [cu_k[i], cu_k[i+1])."""

    causal: bool
    q: Rows
    k: Rows
    cu_q: Int64
    cu_k: Int64


@dataclasses.dataclass(frozen=True)
class Message:
    """Rows that travel together: own rows [start, stop), or buffer rows [start, stop) where they land."""

    peer: int
    start: int
    stop: int


@dataclasses.dataclass(frozen=True, eq=False)
class Exchange:
    """What one step moves to and from this rank.

    Attributes:
        sends: own rows per peer. With all_to_all, ranges of `packed` instead.
        receives: buffer rows per peer.
        packed: own rows to gather before sending (all_to_all), or None when the ranges are sent as they lie (p2p).
    """

    sends: tuple[Message, ...]
    receives: tuple[Message, ...]
    packed: Int64 | None


@dataclasses.dataclass(frozen=True)
class Operation:
    """post / wait: exchange `at`. attend: call `at`. post_return / wait_return: dK/dV of exchange `at` go home."""

    kind: Kind
    at: int

    def __str__(self) -> str:
        return f"{self.kind} {self.at}"


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """All that one rank does for one attention layer, forward and backward.

    Attributes:
        own_rows: C. buffer_rows: C plus the rows received.
        forward, backward: the order of operations; `backward` fetches remote K/V again, `backward_kept` has it still.
    """

    rank: int
    cp_size: int
    window: Window
    delivery: str
    own_rows: int
    buffer_rows: int
    exchanges: tuple[Exchange, ...]
    calls: tuple[Call, ...]
    forward: tuple[Operation, ...]
    backward: tuple[Operation, ...]
    backward_kept: tuple[Operation, ...]

    def __str__(self) -> str:
        lines = [
            f"rank {self.rank} of {self.cp_size}: {self.own_rows} own rows, "
            f"{self.buffer_rows - self.own_rows} received, delivery {self.delivery}, window {self.window}"
        ]
        for i, exchange in enumerate(self.exchanges):
            for word, messages in (("send", exchange.sends), ("receive", exchange.receives)):
                for m in messages:
                    way = "to" if word == "send" else "from"
                    lines.append(f"exchange {i}: {word} rows [{m.start}, {m.stop}) {way} rank {m.peer}")
        for i, call in enumerate(self.calls):
            kind = "causal" if call.causal else "full"
            lines.append(
                f"call {i}: {kind}, {len(call.cu_q) - 1} segments, {call.cu_q[-1]} q rows, {call.cu_k[-1]} k rows"
            )
        lines.append("forward:  " + ", ".join(map(str, self.forward)))
        lines.append("backward: " + ", ".join(map(str, self.backward)))
        return "\n".join(lines)


def compile_program(plan: Plan, rank: int, window: Window = None) -> Program:
    """The program of `rank` for layers with this window."""
    schedule = plan.schedule(window)
    pieces = cut(plan.documents, plan.placement)
    mine = pieces.rank == rank
    held = np.stack([pieces.start[mine], pieces.stop[mine], pieces.local[mine]], axis=1)
    local_of = np.zeros(plan.cp_size, dtype=object)
    for source in range(plan.cp_size):
        theirs = pieces.rank == source
        local_of[source] = (pieces.start[theirs], pieces.local[theirs])

    exchanges: list[Exchange] = []
    calls: list[Call] = []
    stages: list[tuple[int | None, list[int]]] = []
    size = plan.rows_per_rank
    for step in schedule.steps:
        at = None
        if len(step.transfers):
            exchange, arrived, size = _exchange(step, rank, plan.cp_size, plan.delivery, local_of, size)
            held = np.concatenate([held, arrived])
            exchanges.append(exchange)
            at = len(exchanges) - 1
        held = held[np.argsort(held[:, 0], kind="stable")]
        made = _calls(step, rank, held)
        stages.append((at, list(range(len(calls), len(calls) + len(made)))))
        calls.extend(made)
    forward, backward, kept = _order(stages)
    return Program(
        rank=rank,
        cp_size=plan.cp_size,
        window=schedule.window,
        delivery=plan.delivery,
        own_rows=plan.rows_per_rank,
        buffer_rows=size,
        exchanges=tuple(exchanges),
        calls=tuple(calls),
        forward=forward,
        backward=backward,
        backward_kept=kept,
    )


def _exchange(
    step: Step, rank: int, cp_size: int, delivery: str, local_of: Int64, size: int
) -> tuple[Exchange, Int64, int]:
    """This rank's messages, where received rows land [(start, stop, buffer row)], and the buffer's new size."""
    packed = delivery == "all_to_all"
    transfers = step.transfers
    incoming = transfers[transfers[:, DESTINATION] == rank]
    # In row order a tile's remote keys lie side by side and are read as they came; a packed message is one per source.
    keys = (incoming[:, START], incoming[:, SOURCE]) if packed else (incoming[:, START],)
    incoming = incoming[np.lexsort(keys)]
    rows = incoming[:, STOP] - incoming[:, START]
    slots = size + np.cumsum(rows) - rows
    arrived = np.stack([incoming[:, START], incoming[:, STOP], slots], axis=1)
    outgoing = transfers[transfers[:, SOURCE] == rank]
    outgoing = outgoing[np.lexsort((outgoing[:, START], outgoing[:, DESTINATION]))]
    own = _local(local_of, np.full(len(outgoing), rank), outgoing[:, START])
    sizes = outgoing[:, STOP] - outgoing[:, START]
    far = _local(local_of, incoming[:, SOURCE], incoming[:, START])
    if packed:
        at = np.cumsum(sizes) - sizes
        sends = _merge(outgoing[:, DESTINATION], at, at, sizes)
        receives = _merge(incoming[:, SOURCE], slots, slots, rows)
        index = _spans(own, sizes)
        return Exchange(sends, receives, index), arrived, size + int(rows.sum())
    # Sender and receiver must cut runs alike: a run ends where rows are no longer neighbours on either side. The
    # receiver's slots are neighbours exactly where its sorted rows are, so both can be told from the transfers.
    sends = _runs(transfers, rank, local_of, cp_size)
    receives = _merge(incoming[:, SOURCE], slots, far, rows)
    return Exchange(sends, receives, None), arrived, size + int(rows.sum())


def _runs(transfers: Int64, rank: int, local_of: Int64, cp_size: int) -> tuple[Message, ...]:
    """The messages that `rank` sends, cut and ordered as each receiver cuts and orders its receives."""
    sends: list[Message] = []
    for peer in range(cp_size):
        incoming = transfers[transfers[:, DESTINATION] == peer]
        if not (incoming[:, SOURCE] == rank).any():
            continue
        incoming = incoming[np.lexsort((incoming[:, START],))]
        rows = incoming[:, STOP] - incoming[:, START]
        slots = np.cumsum(rows) - rows
        own = _local(local_of, incoming[:, SOURCE], incoming[:, START])
        mine = incoming[:, SOURCE] == rank
        runs = _merge(incoming[mine, SOURCE], own[mine], slots[mine], rows[mine])
        sends += [dataclasses.replace(run, peer=peer) for run in runs]
    return tuple(sends)


def _merge(peer: Int64, start: Int64, other: Int64, rows: Int64) -> tuple[Message, ...]:
    """Messages from consecutive ranges, joined where the peer is the same and both sides continue."""
    messages: list[Message] = []
    next_other = -1
    for p, a, b, n in zip(peer.tolist(), start.tolist(), other.tolist(), rows.tolist(), strict=True):
        if messages and messages[-1].peer == p and messages[-1].stop == a and next_other == b:
            messages[-1] = Message(p, messages[-1].start, a + n)
        else:
            messages.append(Message(p, a, a + n))
        next_other = b + n
    return tuple(messages)


def _local(local_of: Int64, owner: Int64, start: Int64) -> Int64:
    """Where each row `start` lies among the rows of its owner."""
    local = np.zeros(len(start), np.int64)
    for source in np.unique(owner):
        chosen = owner == source
        starts, offsets = local_of[source]
        piece = np.searchsorted(starts, start[chosen], side="right") - 1
        local[chosen] = offsets[piece] + start[chosen] - starts[piece]
    return local


def _spans(start: Int64, sizes: Int64) -> Int64:
    """Concatenation of [start, start + size) over all ranges."""
    before = np.cumsum(sizes) - sizes
    index: Int64 = np.arange(int(sizes.sum())) + np.repeat(start - before, sizes)
    return index


def _lookup(held: Int64, start: Int64, stop: Int64) -> tuple[Int64, Int64]:
    """Buffer rows of the row ranges [start, stop), concatenated, and the size of each range."""
    first = np.searchsorted(held[:, 0], start, side="right") - 1
    last = np.searchsorted(held[:, 0], stop, side="left")
    count = last - first
    which = np.repeat(np.arange(len(start)), count)
    piece = np.arange(len(which)) - np.repeat(np.cumsum(count) - count, count) + np.repeat(first, count)
    low = np.maximum(held[piece, 0], start[which])
    high = np.minimum(held[piece, 1], stop[which])
    index = _spans(held[piece, 2] + low - held[piece, 0], high - low)
    sizes = stop - start
    assert len(index) == sizes.sum(), "a tile reads rows that its rank does not hold"
    return index, sizes


def _calls(step: Step, rank: int, held: Int64) -> list[Call]:
    """Kernel calls of one step: the causal tiles in one, the full ones in another."""
    tiles = step.tiles[step.tiles[:, RANK] == rank]
    full = tiles[:, K_STOP] <= tiles[:, Q_START]
    calls = []
    for causal, chosen in ((True, tiles[~full]), (False, tiles[full])):
        if not len(chosen):
            continue
        if causal:
            assert (chosen[:, K_STOP] == chosen[:, Q_STOP]).all(), (
                "a causal tile's keys must end where its queries do"
            )
            chosen = chosen[np.argsort(chosen[:, Q_START], kind="stable")]
        else:
            # Tiles that read the same keys become one segment: every K row is then read once per call.
            chosen = chosen[np.lexsort((chosen[:, Q_START], chosen[:, K_START]))]
        q, q_sizes = _lookup(held, chosen[:, Q_START], chosen[:, Q_STOP])
        new = np.ones(len(chosen), bool)
        if not causal:
            new[1:] = (np.diff(chosen[:, K_START]) != 0) | (np.diff(chosen[:, K_STOP]) != 0)
        k, k_sizes = _lookup(held, chosen[new, K_START], chosen[new, K_STOP])
        q_sizes = np.add.reduceat(q_sizes, np.flatnonzero(new))
        calls.append(Call(causal, Rows.of(q), Rows.of(k), _borders(q_sizes), _borders(k_sizes)))
    return calls


def _borders(sizes: Int64) -> Int64:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])


def _order(stages: list[tuple[int | None, list[int]]]) -> tuple[tuple[Operation, ...], ...]:
    """Forward, backward with a second fetch, backward with remote K/V kept.

    Forward: everything is posted first, each step's calls run as soon as its rows are there. Backward: the steps that
    received run first, so that dK/dV travel home while the local calls run; a first part of the local calls hides the
    second fetch.
    """
    posts = [at for at, _ in stages if at is not None]
    forward: list[Operation] = [Operation("post", at) for at in posts]
    for at, calls in stages:
        forward += [Operation("wait", at)] if at is not None else []
        forward += [Operation("attend", call) for call in calls]
    local = [Operation("attend", call) for at, calls in stages if at is None for call in calls]
    early, late = (local[1:], local[:1]) if posts else ([], local)

    def backward(fetch: bool) -> tuple[Operation, ...]:
        order = [Operation("post", at) for at in posts] if fetch else []
        order += early
        for at, calls in stages:
            if at is None:
                continue
            order += [Operation("wait", at)] if fetch else []
            order += [Operation("attend", call) for call in calls]
            order += [Operation("post_return", at)]
        return (*order, *late, *(Operation("wait_return", at) for at in posts))

    return tuple(forward), backward(True), backward(False)
