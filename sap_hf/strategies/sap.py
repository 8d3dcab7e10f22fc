"""Sequence-aware: a rank receives exactly the rows that its tiles read.

Documents, Layout -> Schedule: local tiles while the remote rows travel, then, in one stage or several, the tiles that
read them. The idea of the HSAP paper (arXiv:2606.30460): devices exchange only what their documents share.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import numpy as np
from numpy.typing import NDArray

from sap_hf.planning.documents import Documents, Int64
from sap_hf.planning.layout import Layout, Pieces, cut
from sap_hf.planning.schedule import (
    DESTINATION,
    K_START,
    K_STOP,
    NO_TRANSFERS,
    RANK,
    START,
    STOP,
    Schedule,
    Step,
    columns,
    ends,
)


def sap(
    documents: Documents, layout: Layout, window: int | None = None, stages: int = 1, whole: bool = False
) -> Schedule:
    """Move the rows that are read, each once per reader.

    Args:
        stages: parts of about the same number of rows in which every reader receives: a part travels while the one
            before it is computed. Nearer sources come first, counted around the ring, so that senders take turns. Under
            a window all that a reader needs of one document comes in one part.
        whole: compute a query at once, when all its keys are there, so that nothing is merged: only queries that read
            no remote rows hide the way. A part is then what the reader's next queries need. Windows always do so.
    """
    pieces = cut(documents, layout)
    local, remote, needed, group = tiles(documents, pieces, window, whole)
    transfers, which = _transfers(documents, pieces, window)
    if stages == 1 or not len(needed):
        steps = [Step(transfers, remote)]
    elif window is None and not whole:
        steps = _stages(transfers, remote, layout.cp_size, stages)
    else:
        when, when_read = _group_stages(needed, group, layout.cp_size, stages)
        steps = _steps(transfers, when[which], remote, when_read, stages)
    steps = [step for step in steps if len(step.transfers)]
    return Schedule(window, (Step(NO_TRANSFERS, local), *steps), whole=whole and window is None)


def _stages(transfers: Int64, remote: Int64, cp_size: int, stages: int) -> list[Step]:
    """Cut transfers so that every reader receives in `stages` equal parts, and the tiles that read them alike."""
    source, destination, start, stop = transfers.T
    near = destination * cp_size + (destination - source) % cp_size
    # No two are equal, here and in `split`, but much is in order already: a stable sort is the fastest.
    order = np.argsort(near * (int(start.max()) + 1) + start, kind="stable")
    source, destination, start, stop = transfers.T.take(order, axis=1)
    upto, total = _running(destination, stop - start, cp_size)
    part = np.maximum(-(-total // stages), 1)[destination]
    # Rows [upto - size, upto) of what the reader receives lie in the parts first .. last.
    begin = upto - (stop - start)
    first, last = begin // part, (upto - 1) // part
    which, nth = _repeat(last - first + 1)
    stage = first[which] + nth
    low = start[which] + np.maximum(stage * part[which] - begin[which], 0)
    high = start[which] + np.minimum((stage + 1) * part[which], upto[which]) - begin[which]
    return split(columns(source[which], destination[which], low, high), stage, remote, stages)


def split(sent: Int64, stage: Int64, remote: Int64, stages: int) -> list[Step]:
    """Steps of the transfers whose stage is given, and of the tiles that read them, cut where their keys arrive.

    Args:
        sent: (n, 4) transfers. stage: (n,) of each. remote: (m, 5) tiles whose keys are all of other ranks.
    """
    if not len(sent):
        return []
    # What lies side by side and arrives in one stage is one run of keys, whoever sent it.
    reader, low, high = sent[:, DESTINATION], sent[:, START], sent[:, STOP]
    scale = int(max(high.max(initial=0), remote[:, K_STOP].max(initial=0))) + 1
    at, end = reader * scale + low, reader * scale + high
    order = np.argsort(at, kind="stable")
    at, end, when = at[order], end[order], stage[order]
    new = np.ones(len(order), bool)
    new[1:] = (at[1:] != end[:-1]) | (when[1:] != when[:-1])
    opens, closes = ends(new)
    at, end, when = at[opens], end[closes], when[opens]
    base = remote[:, RANK] * scale
    first = np.searchsorted(end, base + remote[:, K_START], side="right")
    which, nth = _repeat(np.searchsorted(at, base + remote[:, K_STOP]) - first)
    run = first[which] + nth
    tiles = remote.take(which, axis=0)
    base = base[which]
    tiles[:, K_START] = np.maximum(tiles[:, K_START], at[run] - base)
    tiles[:, K_STOP] = np.minimum(tiles[:, K_STOP], end[run] - base)
    return _steps(sent, stage, tiles, when[run], stages)


def _steps(sent: Int64, stage: Int64, tiles: Int64, of_tile: Int64, stages: int) -> list[Step]:
    """The transfers and tiles of each stage, in their order."""
    return list(map(Step, _parts(sent, stage, stages), _parts(tiles, of_tile, stages)))


def _parts(rows: Int64, part: Int64, parts: int) -> list[Int64]:
    # Sorting few bits is several times as fast.
    order = part.astype(np.min_scalar_type(parts)).argsort(kind="stable")
    in_order = rows.T.take(order, axis=1).T
    borders = [0, *np.bincount(part, minlength=parts).cumsum().tolist()]
    return [in_order[start:stop] for start, stop in itertools.pairwise(borders)]


def _group_stages(
    needed: Int64, group: tuple[Int64, Int64], cp_size: int, stages: int
) -> tuple[Int64, Int64]:
    """The stage of each needed range, and of each tile: a reader receives in `stages` parts of about the same size."""
    of_tile, of_need = group
    upto, total = _running(needed[:, 0], needed[:, 2] - needed[:, 1], cp_size)
    middle = upto - (needed[:, 2] - needed[:, 1] + 1) // 2
    stage_of = np.zeros(int(of_tile.max(initial=-1)) + 1, np.int64)
    np.maximum.at(
        stage_of, of_need, np.minimum(middle * stages // np.maximum(total, 1)[needed[:, 0]], stages - 1)
    )
    return stage_of[of_need], stage_of[of_tile]


def _running(rank: Int64, rows: Int64, cp_size: int) -> tuple[Int64, Int64]:
    """Running total of `rows` per rank, whose entries lie together, and (W,) the totals."""
    total = np.zeros(cp_size, np.int64)
    np.add.at(total, rank, rows)
    return np.cumsum(rows) - (np.cumsum(total) - total)[rank], total


def _repeat(count: Int64) -> tuple[Int64, Int64]:
    """i repeated count[i] times, and which repetition it is."""
    which = np.arange(len(count)).repeat(count)
    return which, np.arange(len(which)) - (count.cumsum() - count)[which]


@functools.lru_cache(maxsize=16)
def tiles(
    documents: Documents, pieces: Pieces, window: int | None, whole: bool = False
) -> tuple[Int64, Int64, Int64, tuple[Int64, Int64]]:
    """The tiles of every rank, and the row ranges that they need from others.

    Returns:
        local (m, 5): tiles that read only the rank's own rows. remote (n, 5): the others.
        needed (k, 3): columns rank, start, stop: ranges that the rank does not hold, disjoint per rank.
        group (n,), (k,): the (rank, document) of each remote tile and needed range, numbered by rank; of `whole` tiles
            the last range that they read, and of a range itself.
    """
    held = _held(documents, pieces)
    if window is not None:
        return _window_tiles(held, window)
    return _whole_tiles(held) if whole else _causal_tiles(held)


def _causal_tiles(held: Held) -> tuple[Int64, Int64, Int64, tuple[Int64, Int64]]:
    mine, group, gap, some = held.pieces, held.group, held.gap, held.some
    # Piece i of a group reads pieces and gaps j <= i of the same group.
    q, k = _lower_pairs(group)
    ranges = [mine.rank[q], mine.start[q], mine.stop[q]]
    local = columns(*ranges, mine.start[k], mine.stop[k])
    # Of each tile's gap, those that are not empty.
    reads = some[k]
    q, k = q[reads], k[reads]
    remote = columns(mine.rank[q], mine.start[q], mine.stop[q], gap[k, 1], gap[k, 2])
    return local, remote, gap[some], (group[q], group[some])


def _whole_tiles(held: Held) -> tuple[Int64, Int64, Int64, tuple[Int64, Int64]]:
    mine, some = held.pieces, held.some
    made = columns(mine.rank, mine.start, mine.stop, held.begin, mine.stop)
    # Ranges that the pieces up to this one, and those before its group, need.
    upto = np.cumsum(some)
    before: Int64 = (upto - some)[held.first][held.group]
    reads = upto > before
    return made[~reads], made[reads], held.gap[some], (upto[reads] - 1, np.arange(int(upto[-1])))


def _window_tiles(held: Held, window: int) -> tuple[Int64, Int64, Int64, tuple[Int64, Int64]]:
    mine, group = held.pieces, held.group
    reach = np.maximum(held.begin, mine.start - window + 1)
    # Rows whose window reaches past the piece's start wait for remote rows; the tail of the piece does not.
    head = np.where(reach < mine.start, np.minimum(mine.stop, mine.start + window - 1), mine.start)
    local = columns(mine.rank, head, mine.stop, mine.start, mine.stop)
    remote = columns(mine.rank, mine.start, head, reach, head)
    # What lies before the rank's previous piece, that piece has asked for already: its window reached further back.
    needed = columns(mine.rank, np.maximum(held.gap[:, 1], reach), mine.start)
    some, reads = needed[:, 2] > needed[:, 1], head > mine.start
    return local[mine.stop > head], remote[reads], needed[some], (group[reads], group[some])


@dataclasses.dataclass(frozen=True, eq=False)
class Held:
    """All pieces of one document on one rank, in row order, next to each other.

    Attributes:
        begin: (n,) the first row of each one's document.
        first: (n,) whether a piece is the first of its (rank, document). group: (n,) the index of that.
        gap: (n, 3) rank, start, stop: before a piece, after the previous one of its group: rows of other ranks.
        some: (n,) whether the gap has any.
    """

    pieces: Pieces
    begin: Int64
    first: NDArray[np.bool_]
    group: Int64
    gap: Int64
    some: NDArray[np.bool_]


@functools.lru_cache(maxsize=16)
def _held(documents: Documents, pieces: Pieces) -> Held:
    # They are in row order already.
    mine = pieces.select(pieces.rank.argsort(kind="stable"))
    first = np.ones(len(mine.rank), bool)
    first[1:] = (mine.rank[1:] != mine.rank[:-1]) | (mine.document[1:] != mine.document[:-1])
    begin = documents.cu_seqlens[mine.document]
    previous_stop = begin.copy()
    again = ~first[1:]
    previous_stop[1:][again] = mine.stop[:-1][again]
    gap = columns(mine.rank, previous_stop, mine.start)
    return Held(mine, begin, first, np.cumsum(first) - 1, gap, mine.start > previous_stop)


def _lower_pairs(group: Int64) -> tuple[Int64, Int64]:
    """All (i, j) with j <= i inside one group of consecutive pieces."""
    sizes = np.bincount(group)
    start = (np.cumsum(sizes) - sizes)[group]
    q, nth = _repeat(np.arange(len(group)) - start + 1)
    return q, start[q] + nth


@functools.lru_cache(maxsize=16)
def _transfers(documents: Documents, pieces: Pieces, window: int | None) -> tuple[Int64, Int64]:
    """The transfers of all that `tiles` need, whole or in parts, in however many stages."""
    return _send(pieces, tiles(documents, pieces, window, False)[2])


def _send(pieces: Pieces, needed: Int64) -> tuple[Int64, Int64]:
    """Transfers that bring `needed` from the owners of its rows, and the range that each one is for."""
    rank, start, stop = needed.T
    first = np.searchsorted(pieces.start, start, side="right") - 1
    last = np.searchsorted(pieces.start, stop, side="left")
    which, nth = _repeat(last - first)
    owner = first[which] + nth
    low, high = np.maximum(start[which], pieces.start[owner]), np.minimum(stop[which], pieces.stop[owner])
    return columns(pieces.rank[owner], rank[which], low, high), which
