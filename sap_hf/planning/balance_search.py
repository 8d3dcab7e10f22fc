"""Improve a placement: even out work and rows by swapping, cutting and filling.

Problem, runs with their ranks -> runs with their ranks, exactly C rows on each. Every loop has an iteration budget
that depends on the number of ranks alone and compares integers, so that every rank finds the same placement.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from math import isqrt

import numpy as np

from sap_hf.planning.documents import Int64

# One rank's equal share of the work, or of the rows, in the units that the searches compare.
SHARE = 1 << 20
# Items of each rank that a round of swaps looks at, and runs that a cut looks at.
LOOKED_AT = 10
CUT_AMONG = 6
# Rounds that look at the same items.
PAIRINGS = 2
# Work is harder to even out than rows: rows are filled up to the last one afterwards.
WORK_WEIGHT = 4
# How far below the limit the search aims, in thousandths: filling the rows adds work where there is least choice.
MARGIN = 12
TURNS = 4

# rank, document, and the rows [start, stop) counted from the document's first row.
Run = tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """What has to be shared: documents, ranks, and the layers that make the work.

    Attributes:
        lengths: (N,) rows of each document.
        windows: {window: number of layers}; the work of a row is the keys it sees, summed over the layers.
        rows_per_rank: C.
        work: (N,) of each document.
        share: the mean work of a rank.
    """

    lengths: Int64
    cp_size: int
    windows: Mapping[int | None, int]
    rows_per_rank: int = dataclasses.field(init=False)
    work: Int64 = dataclasses.field(init=False)
    share: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        rows = int(self.lengths.sum())
        object.__setattr__(self, "rows_per_rank", -(-rows // self.cp_size))
        object.__setattr__(self, "work", self.upto(self.lengths))
        object.__setattr__(self, "share", max(1, int(self.work.sum()) // self.cp_size))

    @property
    def reach(self) -> int | None:
        """Rows before its own first one that a run reads at most; None for all of its document."""
        return None if None in self.windows else max(w for w in self.windows if w is not None) - 1

    def upto(self, rows: Int64) -> Int64:
        """Work of a document's first `rows` rows."""
        total = np.zeros_like(rows)
        for window, layers in self.windows.items():
            near = rows if window is None else np.minimum(rows, window)
            total += layers * (near * (near + 1) // 2 + (rows - near) * (window or 0))
        return total

    def upto_one(self, rows: int) -> int:
        """`upto` for one number."""
        total = 0
        for window, layers in self.windows.items():
            near = rows if window is None or window > rows else window
            total += layers * (near * (near + 1) // 2 + (rows - near) * (window or 0))
        return total

    def rows_with(self, work: int) -> int:
        """The most rows at a document's start whose work is at most `work`."""
        if len(self.windows) == 1 and None in self.windows:
            return (isqrt(8 * (work // self.windows[None]) + 1) - 1) // 2
        low, high = 0, int(self.lengths.max())
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.upto_one(middle) <= work else (low, middle - 1)
        return low

    def shares(self, work: Int64, rows: Int64) -> tuple[Int64, Int64]:
        """Work and rows in units of SHARE."""
        # Shifted first: work * SHARE could pass 2**63.
        shift = max(0, self.share.bit_length() - 40)
        return (work >> shift) * SHARE // max(1, self.share >> shift), rows * SHARE // self.rows_per_rank


def swap(p: Problem, rank: Int64, work: Int64, rows: Int64, rounds: int, most: int | None = None) -> Int64:
    """Move or swap whole items between pairs of ranks, a loaded one with a spare one, all pairs at once.

    Args:
        rank: (m,) of each item. work, rows: (m,) in units of SHARE.
        most: None evens out work and rows. Else only rows, where no rank's work grows above `most`.

    Returns:
        (m,) the new ranks.
    """
    n, half = len(rank), p.cp_size // 2
    if not half:
        return rank
    # Item n is "nothing": swapping with it is a move.
    rank, work, rows = np.append(rank, 0), np.append(work, 0), np.append(rows, 0)
    pairs = np.arange(half)
    load, full = np.zeros(p.cp_size, np.int64), np.zeros(p.cp_size, np.int64)
    np.add.at(load, rank, work)
    np.add.at(full, rank, rows)
    for turn in range(rounds):
        if turn % PAIRINGS == 0:
            held = _sample(rank, p.cp_size, turn)
            width = held.shape[1]
        key = full if most is not None or turn % 3 == 1 else load if turn % 3 == 0 else load + full
        by_key = np.argsort(key, kind="stable")
        low, high = by_key[:half], by_key[::-1][:half]
        if turn % 4 == 3:
            low = np.roll(low, turn // 4 + 1)
        mine, theirs = held[high], held[low]
        # The change of the sum of squared loads, halved, term by term: few operations on the large array.
        give, take, gap = rows[mine], rows[theirs], (full[high] - full[low])[:, None]
        alone, other = give * (give - gap), take * (take + gap)
        both = give[:, :, None] * (2 * take)[:, None, :]
        give, take, gap = work[mine], work[theirs], (load[high] - load[low])[:, None]
        if most is None:
            alone += WORK_WEIGHT * give * (give - gap)
            other += WORK_WEIGHT * take * (take + gap)
            both += give[:, :, None] * (2 * WORK_WEIGHT * take)[:, None, :]
        gain = alone[:, :, None] + other[:, None, :] - both
        if most is not None:
            limit = np.maximum(np.maximum(load[high], load[low]), most)
            more = give[:, :, None] - take[:, None, :]
            gain[more > (limit - load[low])[:, None, None]] = 0
            gain[more < (load[high] - limit)[:, None, None]] = 0
        flat = gain.reshape(half, -1)
        chosen = flat.argmin(axis=1)
        good = np.flatnonzero(flat[pairs, chosen] < 0)
        low, high, chosen = low[good], high[good], chosen[good]
        i, j = chosen // width, chosen % width
        gone, come = held[high, i], held[low, j]
        held[high, i], held[low, j] = come, gone
        # The last entry stands for "nothing" and is written along with the others.
        rank[gone], rank[come] = low, high
        more_work, more_rows = work[gone] - work[come], rows[gone] - rows[come]
        load[high] -= more_work
        load[low] += more_work
        full[high] -= more_rows
        full[low] += more_rows
    return rank[:n]


def _sample(rank: Int64, ranks: int, turn: int) -> Int64:
    """(ranks, k) items of each rank, spread evenly over their order, others in another turn; and "nothing"."""
    n = len(rank) - 1
    order = np.argsort(rank[:n], kind="stable")
    sizes = np.bincount(rank[:n], minlength=ranks)
    width = min(int(sizes.max()), LOOKED_AT)
    first, sizes = (np.cumsum(sizes) - sizes)[:, None], sizes[:, None]
    column = np.arange(width)
    at = np.where(sizes <= width, column, (column * sizes // width + turn) % np.maximum(sizes, 1))
    held = np.full((ranks, width + 1), n)
    held[:, :width] = np.where(column < sizes, order[np.minimum(first + at, n - 1)], n)
    return held


class Ranks:
    """The runs of every rank, with its work and rows, while they are cut one at a time."""

    def __init__(self, p: Problem, runs: Int64) -> None:
        self.p = p
        runs = runs[np.argsort(runs[:, 0], kind="stable")]
        low, high = p.upto(runs[:, 2]), p.upto(runs[:, 3])
        border = np.searchsorted(runs[:, 0], np.arange(p.cp_size + 1)).tolist()
        table = list(zip(*runs[:, 1:].T.tolist(), low.tolist(), high.tolist()))
        self.runs: list[list[tuple[int, int, int, int, int]]] = [
            table[a:b] for a, b in itertools.pairwise(border)
        ]
        work, rows = np.zeros(p.cp_size, np.int64), np.zeros(p.cp_size, np.int64)
        np.add.at(work, runs[:, 0], high - low)
        np.add.at(rows, runs[:, 0], runs[:, 3] - runs[:, 2])
        self.work, self.rows = work.tolist(), rows.tolist()
        # Where the last run of (document, rank) stops: that rank receives every row before it. Cut documents only.
        self.end: dict[tuple[int, int], int] = {}
        for rank, document, _, stop in runs[runs[:, 3] - runs[:, 2] < p.lengths[runs[:, 1]]].tolist():
            self.end[document, rank] = max(self.end.get((document, rank), 0), stop)

    def add(self, rank: int, document: int, start: int, stop: int, low: int, high: int) -> None:
        """Rows [start, stop) with the work of the document up to either."""
        self.runs[rank].append((document, start, stop, low, high))
        self.work[rank] += high - low
        self.rows[rank] += stop - start
        if self.end.get((document, rank), 0) < stop:
            self.end[document, rank] = stop

    def give(self, source: int, at: int, to: int, rows: int, head: bool) -> None:
        """Move the first or last `rows` rows of a run to another rank."""
        document, start, stop, low, high = self.runs[source].pop(at)
        self.work[source] -= high - low
        self.rows[source] -= stop - start
        if rows == stop - start:
            self.add(to, document, start, stop, low, high)
            return
        cut = start + rows if head else stop - rows
        middle = self.p.upto_one(cut)
        one, other = (to, source) if head else (source, to)
        self.add(one, document, start, cut, low, middle)
        self.add(other, document, cut, stop, middle, high)

    def price(self, document: int, to: int, start: int, stop: int, rows: int, head: bool) -> int:
        """Rows that must move in addition if `to` takes the first or last `rows` rows of that run."""
        end = self.end.get((document, to), 0)
        if not head:
            return stop - rows - end if end < stop else -rows
        left = rows if rows < stop - start else 0
        return left - rows if end > start else left + start - end

    def array(self) -> Int64:
        """(n, 4) runs: rank, document, start, stop."""
        document, start, stop, _, _ = zip(*itertools.chain.from_iterable(self.runs))
        rank = np.repeat(np.arange(self.p.cp_size), [len(runs) for runs in self.runs])
        return np.stack([rank, np.array(document), np.array(start), np.array(stop)], axis=1)


def cut_work(ranks: Ranks, most: int, budget: int) -> None:
    """Cut runs of the busiest rank for the idlest until no rank has more than `most` work."""
    p = ranks.p
    aim = (most + p.share) // 2
    for _ in range(budget):
        busy = max(range(p.cp_size), key=ranks.work.__getitem__)
        idle = min(range(p.cp_size), key=ranks.work.__getitem__)
        amount = min(ranks.work[busy] - aim, aim - ranks.work[idle])
        if ranks.work[busy] <= most or amount <= 0:
            return
        mine = ranks.runs[busy]
        best: tuple[int, int, int, bool] | None = None
        for at in sorted(range(len(mine)), key=lambda i: mine[i][3] - mine[i][4])[:CUT_AMONG]:
            document, start, stop, low, high = mine[at]
            if high - low <= amount:
                break
            for head in (True, False):
                rows = p.rows_with(low + amount) - start if head else stop - p.rows_with(high - amount) - 1
                if not 0 < rows < stop - start:
                    continue
                # As many rows will have to come back.
                price = ranks.price(document, idle, start, stop, rows, head) + rows
                if best is None or price < best[0]:
                    best = (price, at, rows, head)
        if best is None:
            return
        _, at, rows, head = best
        ranks.give(busy, at, idle, rows, head)


def fill(ranks: Ranks, most: int) -> None:
    """Move heads, tails and whole runs from ranks with more than C rows to the emptiest, until none has more."""
    p = ranks.p
    room = p.rows_per_rank
    everyone = range(p.cp_size)
    for source in sorted(everyone, key=lambda r: -ranks.rows[r]):
        while ranks.rows[source] > room:
            wanted = min(ranks.rows[source] - room, room - min(ranks.rows))
            # Of the ranks that can take it all, the one with least work.
            to = min((r for r in everyone if ranks.rows[r] + wanted <= room), key=ranks.work.__getitem__)
            mine = ranks.runs[source]
            best: tuple[int, int, int, bool] | None = None
            for at in range(len(mine)):
                document, start, stop, low, high = mine[at]
                rows = min(wanted, stop - start)
                for head in (True, False):
                    price = ranks.price(document, to, start, stop, rows, head) + wanted - rows
                    if best is not None and price >= best[0]:
                        continue
                    if head:
                        work = (high if rows == stop - start else p.upto_one(start + rows)) - low
                    else:
                        work = high - (low if rows == stop - start else p.upto_one(stop - rows))
                    over = max(ranks.work[to] + work - most, 0) + max(ranks.work[source] - work - most, 0)
                    price += 4 * room * over // p.share
                    if best is None or price < best[0]:
                        best = (price, at, rows, head)
            assert best is not None
            _, at, rows, head = best
            ranks.give(source, at, to, rows, head)


def improve(p: Problem, runs: Int64, item: Int64, rank: Int64, limit: int) -> Int64:
    """Make a placement exact in rows and even in work.

    Args:
        runs: (n, 3) document, start, stop. item: (n,) runs of one item stay together at first. rank: (m,) of items.
        limit: work that no rank should exceed, in thousandths of the mean.

    Returns:
        (k, 4) runs: rank, document, start, stop.
    """
    rounds = min(24, 8 + p.cp_size // 4)
    work, rows = _sizes(p, runs, item, len(rank))
    rank = swap(p, rank, work, rows, rounds)
    placed = np.concatenate([rank[item][:, None], runs], axis=1)
    for turn in range(TURNS):
        # Each turn aims lower, so that what the filling adds ends below the limit.
        most = p.share * (limit - MARGIN - 5 * turn) // 1000
        work, rows = _sizes(p, placed[:, 1:], np.arange(len(placed)), len(placed))
        if most * SHARE // p.share < np.bincount(placed[:, 0], weights=work).max():
            ranks = Ranks(p, placed)
            cut_work(ranks, most - p.share // 100, 2 * p.cp_size)
            placed = ranks.array()
            work, rows = _sizes(p, placed[:, 1:], np.arange(len(placed)), len(placed))
        placed[:, 0] = swap(p, placed[:, 0], work, rows, rounds // 3, most * SHARE // p.share)
        ranks = Ranks(p, placed)
        fill(ranks, most)
        placed = ranks.array()
        if max(ranks.work) * 1000 <= p.share * (limit - 1):
            break
    return placed


def _sizes(p: Problem, runs: Int64, item: Int64, items: int) -> tuple[Int64, Int64]:
    work, rows = np.zeros(items, np.int64), np.zeros(items, np.int64)
    np.add.at(work, item, p.upto(runs[:, 2]) - p.upto(runs[:, 1]))
    np.add.at(rows, item, runs[:, 2] - runs[:, 1])
    return p.shares(work, rows)
