"""Improve a placement: even out work and rows by swapping, cutting, filling and trading.

Problem, runs with their ranks -> runs with their ranks, exactly C rows on each. Every loop has an iteration budget
that depends on the number of ranks alone and compares integers, so that every rank finds the same placement.
"""

from __future__ import annotations

import itertools

import numpy as np

from sap_hf.planning.balance_nodes import into_nodes
from sap_hf.planning.balance_swap import Problem, swap
from sap_hf.planning.documents import Int64
from sap_hf.planning.schedule import columns, sum_by

# Runs that a cut and a trade look at.
CUT_AMONG = 6
# Rounds of cutting, filling and trading.
TURNS = 4


class Ranks:
    """The runs of every rank, with its work and rows, while they are cut one at a time."""

    def __init__(self, p: Problem, runs: Int64) -> None:
        self.p = p
        runs = runs[np.argsort(runs[:, 0], kind="stable")]
        low, high = p.upto(runs[:, 2:].T)
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
        # Documents that have been cut, or moved: the others are whole, and `end` has nothing of them.
        self.cut = {document for document, _ in self.end}

    def add(self, rank: int, document: int, start: int, stop: int, low: int, high: int) -> None:
        """Rows [start, stop) with the work of the document up to either."""
        self.runs[rank].append((document, start, stop, low, high))
        self.work[rank] += high - low
        self.rows[rank] += stop - start
        self.cut.add(document)
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
        return columns(rank, *(np.fromiter(of, np.int64, len(rank)) for of in (document, start, stop)))


def cut_work(ranks: Ranks, most: int, budget: int) -> None:
    """Cut runs of the busiest rank for the idlest until no rank has more than `most` work."""
    p, work = ranks.p, ranks.work
    aim = (most + p.share) // 2
    for _ in range(budget):
        busy = work.index(max(work))
        idle = _idlest(ranks, busy, aim)
        amount = min(work[busy] - aim, aim - work[idle])
        if work[busy] <= most or amount <= 0:
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


def _idlest(ranks: Ranks, busy: int, aim: int) -> int:
    """The rank with least work: of the busy one's node, if that can take half of what is above `aim`."""
    work = ranks.work
    near = min(ranks.p.near[busy], key=work.__getitem__)
    return near if 2 * (aim - work[near]) >= work[busy] - aim else work.index(min(work))


def fill(ranks: Ranks, most: int) -> None:
    """Move heads, tails and whole runs from ranks with more than C rows to the emptiest, until none has more."""
    p = ranks.p
    room, penalty = p.rows_per_rank, 4 * p.rows_per_rank
    work_of, rows_of, cut = ranks.work, ranks.rows, ranks.cut
    # Nobody falls below C rows here: only those with fewer from the beginning have room.
    roomy = [rank for rank, held in enumerate(rows_of) if held < room]
    for source in sorted(range(p.cp_size), key=lambda r: -rows_of[r]):
        while rows_of[source] > room:
            # Ranks of other nodes only when none of this one has room.
            near = p.near[source]
            some = [rank for rank in roomy if rank in near] or roomy
            emptiest = min([rows_of[rank] for rank in some])
            wanted = min(rows_of[source] - room, room - emptiest)
            # Of the ranks that can take half of it, the one with least work.
            fits = room - (wanted + 1) // 2
            to = min([rank for rank in some if rows_of[rank] <= fits], key=work_of.__getitem__)
            wanted = min(wanted, room - rows_of[to])
            spare, burden = most - work_of[to], work_of[source] - most
            mine = ranks.runs[source]
            # What a run costs at least: rows that must come back, or that stay too many.
            least = [
                wanted - 2 * min(wanted, stop - start) if document in cut else abs(stop - wanted)
                for document, start, stop, _, _ in mine
            ]
            # Heads of whole documents cost the same: only the first one counts, where that is more than a head.
            for at, (document, _, stop, _, _) in enumerate(mine):
                if stop > wanted and document not in cut:
                    least[at] = min(least[at], wanted)
                    break
            uneven = penalty * max(0, -spare) // p.share
            # The price, which run, whether it is the run's tail, and how many rows: the first run on a tie.
            best: tuple[int, int, bool, int] | None = None
            for at in sorted(range(len(mine)), key=least.__getitem__):
                if best is not None and least[at] + uneven > best[0]:
                    break
                document, start, stop, low, high = mine[at]
                rows = min(wanted, stop - start)
                head, tail = ranks.prices(document, to, start, stop, rows)
                head, tail, few = head + wanted - rows, tail + wanted - rows, rows
                if best is None or head <= best[0]:
                    work = (high if rows == stop - start else p.upto_one(start + rows)) - low
                    over = max(work - spare, 0) + max(burden - work, 0)
                    # A quarter of a head's rows works at least a sixteenth.
                    if spare < work < 16 * spare:
                        # Two short heads weigh less than a long one.
                        fewer = p.rows_with(low + spare) - start
                        if 4 * fewer > rows:
                            few, over = fewer, 0
                            head = ranks.prices(document, to, start, stop, few)[0] + wanted - few
                    head += penalty * over // p.share
                    if best is None or (head, at) < best[:2]:
                        best = (head, at, False, few)
                if tail <= best[0]:
                    work = high - (low if rows == stop - start else p.upto_one(stop - rows))
                    tail += penalty * (max(work - spare, 0) + max(burden - work, 0)) // p.share
                    if (tail, at, True) < best[:3]:
                        best = (tail, at, True, rows)
            assert best is not None
            _, at, is_tail, rows = best
            ranks.give(source, at, to, rows, not is_tail)
            if rows_of[to] == room:
                roomy.remove(to)


def trade(ranks: Ranks, most: int, budget: int) -> None:
    """Trade rows of the busiest rank for as many lighter ones of the idlest until no rank has more than `most` work."""
    p, work = ranks.p, ranks.work
    for _ in range(budget):
        busy = work.index(max(work))
        if work[busy] <= most:
            return
        idle = _idlest(ranks, busy, p.share)
        amount = min(work[busy] - p.share, p.share - work[idle])
        mine, theirs = ranks.runs[busy], ranks.runs[idle]
        deep = sorted(range(len(mine)), key=lambda i: -mine[i][2])[:CUT_AMONG]
        light = sorted(range(len(theirs)), key=lambda i: theirs[i][1])[:CUT_AMONG]
        other_ends = _ends(ranks, idle, light, busy)
        best: tuple[int, int, int, int, bool, bool] | None = None
        for keys, at, head, size, fixed, each, cut, done in _ends(ranks, busy, deep, idle):
            for other in other_ends:
                if keys <= other[0]:
                    continue
                other_keys, back, other_head, other_size, other_fixed, other_each, other_cut, other_done = (
                    other
                )
                rows = min(amount // (keys - other_keys), size, other_size)
                if not rows:
                    continue
                price = fixed + other_fixed + (1 + each + other_each) * rows
                if head and rows < size:
                    price += rows
                if other_head and rows < other_size:
                    price += rows
                if best is not None and price >= max(best[0], 0):
                    continue
                moved = p.upto_one(cut + rows) - done if head else done - p.upto_one(cut - rows)
                if other_head:
                    moved -= p.upto_one(other_cut + rows) - other_done
                else:
                    moved -= other_done - p.upto_one(other_cut - rows)
                if not 0 < moved <= 2 * amount:
                    continue
                # What is left to trade will cost as much again.
                price = price * max(amount, moved) // moved
                if best is None or price < best[0]:
                    best = (price, rows, at, back, head, other_head)
        if best is None:
            return
        _, rows, at, back, head, other_head = best
        ranks.give(busy, at, idle, rows, head)
        ranks.give(idle, back, busy, rows, other_head)


def _ends(
    ranks: Ranks, rank: int, some: list[int], to: int
) -> list[tuple[int, int, bool, int, int, int, int, int]]:
    """The two ends of some runs of a rank, for giving rows to another.

    Returns:
        The work of the row there; which run; whether it is the run's head; its rows; what giving some of them costs,
        apart from the rows that a head leaves to be read: so much, and so much for each; the border of the run, and the
        work of the document up to it.
    """
    ends = []
    for at in some:
        document, start, stop, low, high = ranks.runs[rank][at]
        size, end = stop - start, ranks.end.get((document, to), 0)
        fixed, each = (0, -1) if end > start else (start - end, 0)
        ends.append((ranks.p.keys(start), at, True, size, fixed, each, start, low))
        ends.append((ranks.p.keys(stop - 1), at, False, size, max(stop - end, 0), -1, stop, high))
    return ends


def improve(p: Problem, runs: Int64, item: Int64, rank: Int64, limit: int) -> Int64:
    """Make a placement exact in rows and even in work.

    Args:
        runs: (n, 3) document, start, stop. item: (n,) runs of one item stay together at first. rank: (m,) of items.
        limit: work that no rank should exceed, in thousandths of the mean.

    Returns:
        (k, 4) runs: rank, document, start, stop.
    """
    low, high = p.upto(runs[:, 1:].T)
    work = sum_by(item, high - low, len(rank))
    rows = sum_by(item, runs[:, 2] - runs[:, 1], len(rank))
    rank = swap(p, rank, *p.shares(work, rows), min(16, 4 + p.cp_size // 2))
    owner = rank[item]
    if p.node < p.cp_size:
        # Before anything is cut: rows are then given to ranks of the same node first.
        owner = into_nodes(p, runs, owner)[owner]
    ranks = Ranks(p, columns(owner, *runs.T))
    allowed = p.share * (limit - 1) // 1000
    for turn in range(TURNS):
        # Each turn aims lower, so that what the filling adds ends below the limit.
        most = allowed - (turn + 1) * p.share // 250
        cut_work(ranks, most, 2 * p.cp_size)
        fill(ranks, most)
        trade(ranks, allowed, p.cp_size)
        if max(ranks.work) <= allowed:
            break
    return ranks.array()
