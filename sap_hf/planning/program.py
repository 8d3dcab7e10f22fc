"""Program: a schedule compiled for one rank, down to buffer offsets.

(Plan, window, rank) -> Program. The K/V buffer of a rank holds the rows that it receives and, behind them, those of
its own that travel or are read beside received ones (an all-gather brings all ranks' rows in rank order, its own in
their midst). A Program says which rows are sent and where received ones land (Exchange), which rows attend to which
(Call), and in which order all of it happens (operations). The executor does exactly that list. numpy only:
`sap-hf plan --program RANK` prints it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import numpy as np

from sap_hf.planning.documents import Int64
from sap_hf.planning.plan import Window

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
        together = bool((np.diff(index) == 1).all())
        if together or len(np.unique(index)) == len(index):
            start = int(index[0]) if len(index) else 0
            return cls(index, start if together else None, (np.arange(len(index)),))
        order = np.argsort(index, kind="stable")
        ordered = index[order]
        first = np.flatnonzero(np.concatenate([[True], np.diff(ordered) != 0]))
        sizes = np.diff(np.append(first, len(index)))
        turn = np.empty_like(index)
        turn[order] = np.arange(len(index)) - np.repeat(first, sizes)
        return cls(index, None, tuple(np.flatnonzero(turn == t) for t in range(int(turn.max()) + 1)))


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """One kernel call: segment i lets q rows [cu_q[i], cu_q[i+1]) read k rows [cu_k[i], cu_k[i+1]).

    Attributes:
        q: among the rank's own rows.
        k: among the rank's own rows if `local`, else among those of the K/V buffer.
        added: which of the call's keys have a gradient that other parts are added to, counted in `k`, and the buffer
            rows where they are added up. A local call's other keys have no other gradient.
    """

    causal: bool
    local: bool
    q: Rows
    k: Rows
    cu_q: Int64
    cu_k: Int64
    added: tuple[Rows, Rows]


@dataclasses.dataclass(frozen=True)
class Message:
    """Rows that travel together: own rows [start, stop), or buffer rows [start, stop) where they land."""

    peer: int
    start: int
    stop: int


def rows_in(messages: tuple[Message, ...]) -> int:
    """Rows of all messages."""
    return sum(m.stop - m.start for m in messages)


@dataclasses.dataclass(frozen=True, eq=False)
class Exchange:
    """What one stage moves to and from this rank.

    Attributes:
        delivery: p2p | all_to_all | all_gather.
        sends: buffer rows per peer; with all_to_all, ranges of `packed` instead.
        receives: buffer rows per peer.
        packed: buffer rows to gather before sending (all_to_all), or None when they are sent as they lie.
    """

    delivery: str
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
        rows: C, what this rank holds.
        kept: those of its rows that are in the K/V buffer too: they travel, or are read beside received rows, or have
            a gradient of several parts. own: the buffer rows where they lie.
        buffer_rows: these and room for what is received.
        slots: exchanges whose rows are held at once; exchange i + slots overwrites exchange i.
        forward, backward: the order of operations; `backward` fetches remote K/V again, `backward_kept` has it still.
    """

    rank: int
    cp_size: int
    window: Window
    rows: int
    kept: Rows
    own: slice
    buffer_rows: int
    slots: int
    exchanges: tuple[Exchange, ...]
    calls: tuple[Call, ...]
    forward: tuple[Operation, ...]
    backward: tuple[Operation, ...]
    backward_kept: tuple[Operation, ...]

    @functools.cached_property
    def merges(self) -> bool:
        """Whether parts of one query row come from several segments; else a row's only part is its out."""
        return len(np.unique(self._queries)) < len(self._queries)

    @functools.cached_property
    def filled(self) -> bool:
        """Whether every row that this rank holds is a query of some call; the others are padding."""
        return bool(len(np.unique(self._queries)) == self.rows)

    @property
    def _queries(self) -> Int64:
        calls = [self.calls[operation.at] for operation in self.forward if operation.kind == "attend"]
        return np.concatenate([np.zeros(0, np.int64), *(call.q.index for call in calls)])

    @functools.cached_property
    def alone(self) -> bool:
        """Whether one call has all that this rank holds, and nothing comes or leaves: it takes part in no exchange."""
        shares = any(e.delivery != "p2p" or e.sends or e.receives for e in self.exchanges)
        if shares or len(self.calls) != 1 or self.merges:
            return False
        return self.filled and self.calls[0].q.start == 0

    @property
    def packed_rows(self) -> tuple[int, ...]:
        """For each slot, the most rows that are packed for one exchange."""
        return tuple(
            max(
                (0 if e.packed is None else len(e.packed) for e in self.exchanges[slot :: self.slots]),
                default=0,
            )
            for slot in range(self.slots)
        )

    @property
    def return_rows(self) -> tuple[tuple[int, int], ...]:
        """For each slot, the most rows of dK/dV that leave in one exchange, and that come home."""
        return tuple(
            (
                max((rows_in(e.receives) for e in turn), default=0),
                max((rows_in(e.sends) for e in turn), default=0),
            )
            for turn in (self.exchanges[slot :: self.slots] for slot in range(self.slots))
        )

    def __str__(self) -> str:
        lines = [
            f"rank {self.rank} of {self.cp_size}: {self.rows} rows, window {self.window}; the buffer has "
            f"{self.buffer_rows}, its own in [{self.own.start}, {self.own.stop})"
        ]
        for i, exchange in enumerate(self.exchanges):
            lines.append(f"exchange {i}: {exchange.delivery}")
            for word, messages in (("send", exchange.sends), ("receive", exchange.receives)):
                for m in messages:
                    way = "to" if word == "send" else "from"
                    lines.append(f"exchange {i}: {word} rows [{m.start}, {m.stop}) {way} rank {m.peer}")
        for i, call in enumerate(self.calls):
            kind = f"{'causal' if call.causal else 'full'}, {'own' if call.local else 'buffer'} keys"
            lines.append(
                f"call {i}: {kind}, {len(call.cu_q) - 1} segments, {call.cu_q[-1]} q rows, {call.cu_k[-1]} k rows"
            )
        lines.append("forward:  " + ", ".join(map(str, self.forward)))
        lines.append("backward: " + ", ".join(map(str, self.backward)))
        return "\n".join(lines)
