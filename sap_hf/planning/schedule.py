"""Schedule: what moves, and what is computed once it has arrived.

A Schedule is a sequence of Steps. A Step's transfers are received, then its tiles are computed; a Step that receives
is also called a stage. Both are plain int64 arrays, so that a plan for a thousand ranks is still a few megabytes and a
hash of its bytes is its identity.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sap_hf.planning.documents import Int64

# Columns of the two arrays.
SOURCE, DESTINATION, START, STOP = range(4)
RANK, Q_START, Q_STOP, K_START, K_STOP = range(5)

NO_TRANSFERS: Int64 = np.zeros((0, 4), np.int64)
NO_TILES: Int64 = np.zeros((0, 5), np.int64)


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """Transfers, then the tiles that read what they brought.

    Attributes:
        transfers: (n, 4) int64 columns source, destination, start, stop: these rows go from rank to rank.
        tiles: (m, 5) int64 columns rank, q_start, q_stop, k_start, k_stop, inside one document: on `rank`, query
            row q reads key row k iff k <= q and, with a window, q - k < window. Either all keys lie before the
            queries (a full tile) or both end at the same row (a causal tile). The keys are the rank's own rows and
            those that this step's transfers bring, or, in a `whole` schedule, earlier ones'.
        delivery: how the transfers travel: p2p (a group of messages, one per run of rows), all_to_all (one uneven
            collective, rows packed per peer) or all_gather (every row to every rank).
    """

    transfers: Int64
    tiles: Int64
    delivery: str = "p2p"


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """The steps of one attention layer.

    Attributes:
        window: keys that a query sees, itself included; None for all of its document.
        slots: stages whose received rows are held at once; stage i + slots overwrites stage i. None holds all.
        whole: every query has one tile with all its keys, which earlier stages may have brought: all are held.
    """

    window: int | None
    steps: tuple[Step, ...]
    slots: int | None = None
    whole: bool = False

    @property
    def stages(self) -> int:
        """Steps that receive something."""
        return sum(len(step.transfers) > 0 for step in self.steps)

    @property
    def transfers(self) -> Int64:
        """(n, 4) transfers of all steps."""
        return np.concatenate([step.transfers for step in self.steps])

    @property
    def tiles(self) -> Int64:
        """(m, 5) tiles of all steps."""
        return np.concatenate([step.tiles for step in self.steps])

    def rows_moved(self, cp_size: int) -> Int64:
        """(W, W) int64 rows sent [source, destination] in the forward."""
        source, destination, start, stop = self.transfers.T
        moved = sum_by(source * cp_size + destination, stop - start, cp_size * cp_size)
        return moved.reshape(cp_size, cp_size)

    def pairs(self, cp_size: int) -> Int64:
        """(W,) int64 query-key pairs computed on each rank."""
        tiles = self.tiles
        return sum_by(tiles[:, RANK], tile_pairs(tiles, self.window), cp_size)


@dataclasses.dataclass(frozen=True, eq=False)
class Bundle:
    """V schedules of the same ranks, window and rows that move, as one array, so that all are weighed at once.

    Attributes:
        stages: S, of the schedule that has most.
        tiles: (5, m) columns of all tiles. tile_number, tile_step: (m,) the schedule of each, and its step: 0 receives
            nothing, i + 1 is stage i.
        transfers: (4, n) columns of all transfers. transfer_number, transfer_step: (n,) alike.
    """

    schedules: tuple[Schedule, ...]
    cp_size: int
    stages: int
    tiles: Int64
    tile_number: Int64
    tile_step: Int64
    transfers: Int64
    transfer_number: Int64
    transfer_step: Int64

    @classmethod
    def of(cls, schedules: Sequence[Schedule], cp_size: int) -> Bundle:
        """The tiles and transfers of all schedules, one behind the other."""
        steps, numbers, places = [], [], []
        for number, schedule in enumerate(schedules):
            stage = 0
            for step in schedule.steps:
                stage += len(step.transfers) > 0
                steps.append(step)
                numbers.append(number)
                places.append(stage if len(step.transfers) else 0)
        columns = []
        for parts in ([step.tiles for step in steps], [step.transfers for step in steps]):
            which = np.repeat(np.array((numbers, places)), [len(part) for part in parts], axis=1)
            columns += [np.ascontiguousarray(np.concatenate(parts).T), *which]
        return cls(tuple(schedules), cp_size, max(places), *columns)

    @property
    def window(self) -> int | None:
        """Of all schedules."""
        return self.schedules[0].window


def columns(*of: Int64) -> Int64:
    """(n, k) of k columns (n,), which lie together in memory: they are read far more often than rows."""
    return np.array(of).T


def ends(new: NDArray[np.bool_]) -> tuple[Int64, Int64]:
    """The first and the last index of each run, of which `new` marks the first one."""
    first = new.nonzero()[0]
    last = np.empty_like(first)
    last[:-1], last[-1:] = first[1:] - 1, len(new) - 1
    return first, last


def sum_by(index: Int64, amount: Int64, size: int) -> Int64:
    """(size,) sums of `amount` over equal `index`; exact below 2**53, many times as fast as np.add.at."""
    return np.bincount(index, weights=amount, minlength=size).astype(np.int64)


def is_full(tiles: Int64) -> NDArray[np.bool_]:
    """(m,) whether all keys of a tile lie before its queries."""
    full: NDArray[np.bool_] = tiles[:, K_STOP] <= tiles[:, Q_START]
    return full


def tile_pairs(tiles: Int64, window: int | None) -> Int64:
    """(m,) query-key pairs of each tile."""
    _, q_start, q_stop, k_start, k_stop = tiles.T
    queries = q_stop - q_start
    # Row q sees the keys [max(k_start, q - window + 1), min(k_stop, q + 1)).
    last = _sum_of_min(q_start + 1, q_stop + 1, k_stop)
    if window is None:
        first = queries * k_start
    else:
        low, high = q_start - window + 1, q_stop - window + 1
        # max(x, y) = x + y - min(x, y)
        first = _sum_of_range(low, high) + queries * k_start - _sum_of_min(low, high, k_start)
    pairs: Int64 = last - first
    return pairs


def _sum_of_min(first: Int64, end: Int64, limit: Int64) -> Int64:
    """Sum of min(x, limit) over x in [first, end)."""
    turn = np.clip(limit, first, end)
    return _sum_of_range(first, turn) + (end - turn) * limit


def _sum_of_range(first: Int64, end: Int64) -> Int64:
    """Sum of x over [first, end)."""
    total: Int64 = (first + end - 1) * (end - first) // 2
    return total


def reverse(transfers: Int64) -> Int64:
    """The transfers that bring dK/dV home: source and destination swapped. reverse(reverse(t)) == t."""
    return transfers[:, [DESTINATION, SOURCE, START, STOP]]
