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
from numpy.typing import NDArray

from sap_hf.planning.documents import Int64
from sap_hf.planning.layout import pairs_upto, rows_each
from sap_hf.planning.schedule import sum_by

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
MARGIN = 9
TURNS = 4
# Larger items, and gaps between ranks, count as this large in a swap.
LARGE = 1 << 22
FAR = 1 << 27

# rank, document, and the rows [start, stop) counted from the document's first row.
Run = tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """What has to be shared: documents, ranks, and the layers that make the work.

    Attributes:
        lengths: (N,) rows of each document.
        windows: {window: number of layers}; the work of a row is the keys it sees, summed over the layers.
        multiple: C is a multiple of it.
        rows_per_rank: C.
        work: (N,) of each document.
        share: the mean work of a rank.
    """

    lengths: Int64
    cp_size: int
    windows: Mapping[int | None, int]
    multiple: int = 1
    rows_per_rank: int = dataclasses.field(init=False)
    work: Int64 = dataclasses.field(init=False)
    share: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        rows = int(self.lengths.sum())
        object.__setattr__(self, "rows_per_rank", rows_each(rows, self.cp_size, self.multiple))
        object.__setattr__(self, "work", self.upto(self.lengths))
        object.__setattr__(self, "share", max(1, int(self.work.sum()) // self.cp_size))

    @property
    def reach(self) -> int | None:
        """Rows before its own first one that a run reads at most; None for all of its document."""
        return None if None in self.windows else max(w for w in self.windows if w is not None) - 1

    def upto(self, rows: Int64) -> Int64:
        """Work of a document's first `rows` rows."""
        return pairs_upto(rows, self.windows)

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


def swap(
    p: Problem,
    rank: Int64,
    work: Int64,
    rows: Int64,
    rounds: int,
    most: int | None = None,
    fixed: NDArray[np.bool_] | None = None,
) -> Int64:
    """Move or swap whole items between pairs of ranks, a loaded one with a spare one, all pairs at once.

    Args:
        rank: (m,) of each item. work, rows: (m,) in units of SHARE.
        most: None evens out work and rows. Else only rows, where no rank's work grows above `most`.
        fixed: (m,) items that stay where they are; None for none.

    Returns:
        (m,) the new ranks.
    """
    n, half = len(rank), p.cp_size // 2
    if not half:
        return rank
    # Item n is "nothing": swapping with it is a move.
    rank, size = np.append(rank, 0), np.zeros((n + 1, 2))
    size[:n, 0], size[:n, 1] = work, rows
    # Whole numbers below 2**53 all along: products and sums are exact, in whatever order a machine takes them.
    held_by = np.stack([sum_by(rank[:n], of, p.cp_size) for of in (work, rows)], axis=1).astype(np.float64)
    np.minimum(size, LARGE, out=size)
    weight = np.array([WORK_WEIGHT if most is None else 0, 1.0])
    given, taken = np.ones((n + 1, 4)), np.ones((n + 1, 4))
    given[:, 0] = taken[:, 1] = size**2 @ weight
    given[:, 2:], taken[:, 2:] = -2 * weight * size, size
    between = np.tile(np.eye(4), (half, 1, 1))
    for turn in range(rounds):
        if turn % PAIRINGS == 0:
            held = _sample(rank, p.cp_size, turn, fixed)
            width = held.shape[1]
            first = np.arange(half) * width * width
        key = held_by[:, 1] if most is not None or turn % 3 == 1 else held_by[:, 0]
        if most is None and turn % 3 == 2:
            key = key + held_by[:, 1]
        by_key = key.argsort(kind="stable")
        low, high = by_key[:half], by_key[: -half - 1 : -1]
        if turn % 4 == 3:
            low = np.roll(low, turn // 4 + 1)
        mine, theirs = held.take(high, axis=0), held.take(low, axis=0)
        rich, poor = held_by.take(high, axis=0), held_by.take(low, axis=0)
        # How the sum of squared loads changes, halved: of work and rows (give - take) * (give - take - gap).
        gap = np.minimum(rich - poor, FAR)
        between[:, 2:, 0], between[:, 1, 2:] = gap / 2, weight * gap
        gain = given.take(mine, axis=0) @ between @ taken.take(theirs, axis=0).transpose(0, 2, 1)
        if most is not None:
            limit = np.maximum(np.maximum(rich[:, 0], poor[:, 0]), most)
            more = size[:, 0].take(mine)[:, :, None] - size[:, 0].take(theirs)[:, None, :]
            gain *= (more <= (limit - poor[:, 0])[:, None, None]) & (
                more >= (rich[:, 0] - limit)[:, None, None]
            )
        chosen = gain.reshape(half, -1).argmin(axis=1)
        good = (gain.take(chosen + first) < 0).nonzero()[0]
        low, high, chosen = low[good], high[good], chosen[good]
        i = chosen // width
        j = chosen - i * width
        gone, come = mine[good, i], theirs[good, j]
        held[high, i], held[low, j] = come, gone
        # The last entry stands for "nothing" and is written along with the others.
        rank[gone], rank[come] = low, high
        moved = size.take(gone, axis=0) - size.take(come, axis=0)
        held_by[high] -= moved
        held_by[low] += moved
    return rank[:n]


def _sample(rank: Int64, ranks: int, turn: int, fixed: NDArray[np.bool_] | None) -> Int64:
    """(ranks, k) items of each rank, spread evenly over their order, others in another turn; and "nothing"."""
    n = len(rank) - 1
    # Sorting 16 bits is several times as fast, and there are fewer ranks than that.
    order = np.argsort(rank[:n].astype(np.uint16), kind="stable")
    if fixed is not None:
        order = order[~fixed[order]]
    sizes = np.bincount(rank[order], minlength=ranks)
    width = min(int(sizes.max()), LOOKED_AT)
    held = np.full((ranks, width + 1), n)
    if width:
        first, sizes = (sizes.cumsum() - sizes)[:, None], sizes[:, None]
        column = np.arange(width)
        at = first + (column * np.maximum(sizes, width) // width + turn) % np.maximum(sizes, 1)
        held[:, :width] = np.where(column < sizes, order.take(at, mode="clip"), n)
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
        self.work: list[int] = sum_by(runs[:, 0], high - low, p.cp_size).tolist()
        self.rows: list[int] = sum_by(runs[:, 0], runs[:, 3] - runs[:, 2], p.cp_size).tolist()
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

    def prices(self, document: int, to: int, start: int, stop: int, rows: int) -> tuple[int, int]:
        """Rows that must move in addition if `to` takes the first `rows` rows of that run, and the last ones."""
        end = self.end.get((document, to), 0)
        left = rows if rows < stop - start else 0
        return left - rows if end > start else left + start - end, stop - rows - end if end < stop else -rows

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
                price = ranks.prices(document, idle, start, stop, rows)[not head] + rows
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
            # Of the ranks that can take half of it, the one with least work.
            half = (wanted + 1) // 2
            to = min((r for r in everyone if ranks.rows[r] + half <= room), key=ranks.work.__getitem__)
            wanted = min(wanted, room - ranks.rows[to])
            mine = ranks.runs[source]
            spare = max(most - ranks.work[to], 0)
            best: tuple[int, int, int, bool] | None = None
            for at in range(len(mine)):
                document, start, stop, low, high = mine[at]
                rows = min(wanted, stop - start)
                prices = ranks.prices(document, to, start, stop, rows)
                if best is not None and min(prices) + wanted - rows >= best[0]:
                    continue
                for head, price in zip((True, False), prices):
                    price += wanted - rows
                    if best is not None and price >= best[0]:
                        continue
                    if head:
                        work = (high if rows == stop - start else p.upto_one(start + rows)) - low
                        if work > spare:
                            # Two short heads weigh less than a long one.
                            few = p.rows_with(low + spare) - start
                            if 4 * few > rows:
                                price = ranks.prices(document, to, start, stop, few)[0] + wanted - few
                                if best is None or price < best[0]:
                                    best = (price, at, few, head)
                                continue
                    else:
                        work = high - (low if rows == stop - start else p.upto_one(stop - rows))
                    over = max(ranks.work[to] + work - most, 0) + max(ranks.work[source] - work - most, 0)
                    price += 4 * room * over // p.share
                    if best is None or price < best[0]:
                        best = (price, at, rows, head)
            assert best is not None
            _, at, rows, head = best
            ranks.give(source, at, to, rows, head)


def trade(ranks: Ranks, most: int, budget: int) -> None:
    """Trade rows of the busiest rank for as many lighter ones of the idlest until no rank has more than `most` work."""
    p = ranks.p
    for _ in range(budget):
        busy = max(range(p.cp_size), key=ranks.work.__getitem__)
        idle = min(range(p.cp_size), key=ranks.work.__getitem__)
        if ranks.work[busy] <= most:
            return
        amount = min(ranks.work[busy] - p.share, p.share - ranks.work[idle])
        mine, theirs = ranks.runs[busy], ranks.runs[idle]
        deep = sorted(range(len(mine)), key=lambda i: -mine[i][2])[:CUT_AMONG]
        light = sorted(range(len(theirs)), key=lambda i: theirs[i][1])[:CUT_AMONG]
        best: tuple[int, int, int, int, bool, bool] | None = None
        for at, back, head, other_head in itertools.product(deep, light, (True, False), (True, False)):
            document, start, stop, _, _ = mine[at]
            other, first, last, _, _ = theirs[back]
            # How much deeper in its document a row at this end is: about the keys that it sees in addition.
            deeper = (start if head else stop) - (first if other_head else last)
            rows = min(amount // deeper, stop - start, last - first) if deeper > 0 else 0
            if rows < 1:
                continue
            price = ranks.prices(document, idle, start, stop, rows)[not head]
            price += ranks.prices(other, busy, first, last, rows)[not other_head]
            # What is left to trade will cost as much again.
            price = (price + rows) * amount // (rows * deeper)
            if best is None or price < best[0]:
                best = (price, rows, at, back, head, other_head)
        if best is None:
            return
        _, rows, at, back, head, other_head = best
        ranks.give(busy, at, idle, rows, head)
        ranks.give(idle, back, busy, rows, other_head)


def improve(p: Problem, runs: Int64, item: Int64, rank: Int64, limit: int) -> Int64:
    """Make a placement exact in rows and even in work.

    Args:
        runs: (n, 3) document, start, stop. item: (n,) runs of one item stay together at first. rank: (m,) of items.
        limit: work that no rank should exceed, in thousandths of the mean.

    Returns:
        (k, 4) runs: rank, document, start, stop.
    """
    rounds = min(16, 4 + p.cp_size // 2)
    work, rows = _sizes(p, runs, item, len(rank))
    rank = swap(p, rank, work, rows, rounds)
    placed = np.concatenate([rank[item][:, None], runs], axis=1)
    for turn in range(TURNS):
        # Each turn aims lower, so that what the filling adds ends below the limit.
        most = p.share * (limit - MARGIN - 5 * turn) // 1000
        work, rows = _sizes(p, placed[:, 1:], np.arange(len(placed)), len(placed))
        if most * SHARE // p.share < np.bincount(placed[:, 0], weights=work).max():
            ranks = Ranks(p, placed)
            cut_work(ranks, most, 2 * p.cp_size)
            placed = ranks.array()
            work, rows = _sizes(p, placed[:, 1:], np.arange(len(placed)), len(placed))
        # Only whole documents from the second turn on: a cut one has found its place by then.
        cut = placed[:, 3] - placed[:, 2] < p.lengths[placed[:, 1]] if turn else None
        placed[:, 0] = swap(p, placed[:, 0], work, rows, rounds // 3, most * SHARE // p.share, cut)
        ranks = Ranks(p, placed)
        fill(ranks, most)
        if max(ranks.work) * 1000 > p.share * (limit - 1):
            trade(ranks, p.share * (limit - 1) // 1000, p.cp_size)
        placed = ranks.array()
        if max(ranks.work) * 1000 <= p.share * (limit - 1):
            break
    return placed


def _sizes(p: Problem, runs: Int64, item: Int64, items: int) -> tuple[Int64, Int64]:
    work = sum_by(item, p.upto(runs[:, 2]) - p.upto(runs[:, 1]), items)
    return p.shares(work, sum_by(item, runs[:, 2] - runs[:, 1], items))
