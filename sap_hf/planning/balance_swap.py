"""Even out work and rows by swapping whole items between ranks.

Documents' lengths, ranks, windows -> Problem; items with their ranks -> items with other ranks. Rounds are counted, not
timed, and whatever decides is a whole number, so that every rank finds the same placement.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from math import isqrt

import numpy as np

from sap_hf.planning.documents import Int64
from sap_hf.planning.layout import pairs_upto, rows_each

# One rank's equal share of the work, or of the rows, in the units that the searches compare.
SHARE = 1 << 20
# Items of each rank that a round of swaps looks at.
LOOKED_AT = 10
# Rounds that look at the same items.
PAIRINGS = 2
# Work is harder to even out than rows: rows are filled up to the last one afterwards.
WORK_WEIGHT = 4
# Larger items, and gaps between ranks, count as this large.
LARGE = 1 << 22
FAR = 1 << 27


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """What has to be shared: documents, ranks, and the layers that make the work.

    Attributes:
        lengths: (N,) rows of each document.
        windows: {window: number of layers}; the work of a row is the keys it sees, summed over the layers.
        multiple: C is a multiple of it.
        node: neighbouring ranks whose links to each other are faster than others, if not all are alike.
        rows_per_rank: C.
        work: (N,) of each document.
        share: the mean work of a rank.
        full: layers, where all of them have full attention; else 0.
    """

    lengths: Int64
    cp_size: int
    windows: Mapping[int | None, int]
    multiple: int = 1
    node: int = 1 << 62
    rows_per_rank: int = dataclasses.field(init=False)
    work: Int64 = dataclasses.field(init=False)
    share: int = dataclasses.field(init=False)
    full: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        rows = int(self.lengths.sum())
        object.__setattr__(self, "rows_per_rank", rows_each(rows, self.cp_size, self.multiple))
        object.__setattr__(self, "work", self.upto(self.lengths))
        object.__setattr__(self, "share", max(1, int(self.work.sum()) // self.cp_size))
        object.__setattr__(self, "full", self.windows[None] if list(self.windows) == [None] else 0)

    @functools.cached_property
    def near(self) -> list[range]:
        """Of each rank, the ranks of its node."""
        firsts = (rank - rank % self.node for rank in range(self.cp_size))
        return [range(first, min(first + self.node, self.cp_size)) for first in firsts]

    @property
    def reach(self) -> int | None:
        """Rows before its own first one that a run reads at most; None for all of its document."""
        return None if None in self.windows else max(w for w in self.windows if w is not None) - 1

    @functools.cached_property
    def scaled(self) -> tuple[Int64, Int64]:
        """(N,) work and rows of each document, in units of SHARE."""
        return self.shares(self.work, self.lengths)

    @functools.cached_property
    def by_work(self) -> Int64:
        """(N,) documents, those with most work first."""
        return np.argsort(-self.work, kind="stable")

    def upto(self, rows: Int64) -> Int64:
        """Work of a document's first `rows` rows."""
        return pairs_upto(rows, self.windows)

    def upto_one(self, rows: int) -> int:
        """`upto` for one number."""
        if self.full:
            return self.full * (rows * (rows + 1) // 2)
        total = 0
        for window, layers in self.windows.items():
            near = rows if window is None or window > rows else window
            total += layers * (near * (near + 1) // 2 + (rows - near) * (window or 0))
        return total

    def keys(self, row: int) -> int:
        """Work of one row, counted from its document's first one."""
        if self.full:
            return self.full * (row + 1)
        return sum(
            layers * (row + 1 if window is None else min(row + 1, window))
            for window, layers in self.windows.items()
        )

    def rows_with(self, work: int) -> int:
        """The most rows at a document's start whose work is at most `work`."""
        if self.full:
            return (isqrt(8 * (work // self.full) + 1) - 1) // 2
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


def swap(p: Problem, rank: Int64, work: Int64, rows: Int64, rounds: int) -> Int64:
    """Move or swap whole items between pairs of ranks, a loaded one with a spare one, all pairs at once.

    Args:
        rank: (m,) of each item. work, rows: (m,) in units of SHARE.

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
    held_by = np.array([np.bincount(rank[:n], of, p.cp_size) for of in (work, rows)]).T.copy()
    # No two ranks are further apart than all there is.
    far = bool((held_by.sum(axis=0) > FAR).any())
    np.minimum(size, LARGE, out=size)
    weight = np.array([WORK_WEIGHT, 1.0])
    given, taken = np.ones((n + 1, 4)), np.ones((n + 1, 4))
    given[:, 0] = taken[:, 1] = size**2 @ weight
    given[:, 2:], taken[:, 2:] = -2 * weight * size, size
    between = np.zeros((half, 4, 4))
    between[:] = np.eye(4)
    index = np.arange(half)
    for turn in range(rounds):
        if turn % PAIRINGS == 0:
            held = _sample(rank, p.cp_size, turn)
            width = held.shape[1]
            first = index * (width * width)
        key = held_by[:, turn % 3] if turn % 3 < 2 else held_by[:, 0] + held_by[:, 1]
        by_key = key.argsort(kind="stable")
        low, high = by_key[:half], by_key[: -half - 1 : -1]
        if turn % 4 == 3:
            low = low[index - (turn // 4 + 1) % half]
        mine, theirs = held.take(high, axis=0), held.take(low, axis=0)
        # How the sum of squared loads changes, halved: of work and rows (give - take) * (give - take - gap).
        gap = held_by.take(high, axis=0) - held_by.take(low, axis=0)
        if far:
            gap.clip(-FAR, FAR, out=gap)
        between[:, 2:, 0], between[:, 1, 2:] = gap / 2, weight * gap
        gain = given.take(mine, axis=0) @ between @ taken.take(theirs, axis=0).transpose(0, 2, 1)
        chosen = gain.reshape(half, -1).argmin(axis=1)
        good = (gain.take(chosen + first) < 0).nonzero()[0]
        if not len(good):
            continue
        low, high, chosen = low.take(good), high.take(good), chosen.take(good)
        i = chosen // width
        j = chosen - i * width
        gone, come = mine[good, i], theirs[good, j]
        held[high, i], held[low, j] = come, gone
        # The last entry stands for "nothing" and is written along with the others.
        rank[gone], rank[come] = low, high
        moved = size.take(gone, axis=0) - size.take(come, axis=0)
        # No rank is in two pairs: this is `held_by[high] -= moved`, in half the time.
        np.subtract.at(held_by, high, moved)
        np.add.at(held_by, low, moved)
    return rank[:n]


def _sample(rank: Int64, ranks: int, turn: int) -> Int64:
    """(ranks, k) items of each rank, spread evenly over their order, others in another turn; and "nothing"."""
    n = len(rank) - 1
    # Sorting 16 bits is several times as fast, and there are fewer ranks than that.
    order = rank[:n].astype(np.uint16).argsort(kind="stable")
    sizes = np.bincount(rank[:n], minlength=ranks)
    width = min(int(sizes.max()), LOOKED_AT)
    held = np.full((ranks, width + 1), n)
    first, sizes = (sizes.cumsum() - sizes)[:, None], sizes[:, None]
    column = np.arange(width)
    at = first + (column * np.maximum(sizes, width) // width + turn) % np.maximum(sizes, 1)
    held[:, :width] = np.where(column < sizes, order.take(at, mode="clip"), n)
    return held
