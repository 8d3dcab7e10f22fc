"""Sequence-aware: a rank receives exactly the rows that its tiles read.

Documents, Layout -> Schedule of two steps: local tiles while the remote rows travel, then the tiles that read them.
The idea of the HSAP paper (arXiv:2606.30460): devices exchange only what their documents share.
"""

from __future__ import annotations

import numpy as np

from sap_hf.planning.documents import Documents, Int64
from sap_hf.planning.layout import Layout, Pieces, cut
from sap_hf.planning.schedule import NO_TRANSFERS, Schedule, Step


def sap(documents: Documents, layout: Layout, window: int | None = None) -> Schedule:
    """Move the rows that are read, each once per reader."""
    pieces = cut(documents, layout)
    local, remote, needed = tiles(documents, pieces, window)
    return Schedule(window, (Step(NO_TRANSFERS, local), Step(_send(pieces, needed), remote)))


def tiles(documents: Documents, pieces: Pieces, window: int | None) -> tuple[Int64, Int64, Int64]:
    """The tiles of every rank, and the row ranges that they need from others.

    Returns:
        local (m, 5): tiles that read only the rank's own rows. remote (n, 5): the others.
        needed (k, 3): columns rank, start, stop: ranges that the rank does not hold, disjoint per rank.
    """
    # All pieces of one document on one rank, in row order, next to each other.
    order = np.lexsort((pieces.start, pieces.document, pieces.rank))
    mine = pieces.select(order)
    if window is None:
        return _causal_tiles(documents, mine)
    return _window_tiles(documents, mine, window)


def _causal_tiles(documents: Documents, mine: Pieces) -> tuple[Int64, Int64, Int64]:
    first, group = _groups(mine)
    # The gap before a piece: rows of its document, after the rank's previous piece, that other ranks hold.
    previous_stop = np.where(first, documents.cu_seqlens[mine.document], np.roll(mine.stop, 1))
    gap = np.stack([mine.rank, previous_stop, mine.start], axis=1)
    # Piece i of a group reads pieces and gaps j <= i of the same group.
    q, k = _lower_pairs(group)
    ranges = [mine.rank[q], mine.start[q], mine.stop[q]]
    local = np.stack([*ranges, mine.start[k], mine.stop[k]], axis=1)
    remote = np.stack([*ranges, gap[k, 1], gap[k, 2]], axis=1)
    return local, remote[gap[k, 2] > gap[k, 1]], gap[gap[:, 2] > gap[:, 1]]


def _window_tiles(documents: Documents, mine: Pieces, window: int) -> tuple[Int64, Int64, Int64]:
    first, _ = _groups(mine)
    document_start = documents.cu_seqlens[mine.document]
    reach = np.maximum(document_start, mine.start - window + 1)
    # Rows whose window reaches past the piece's start wait for remote rows; the tail of the piece does not.
    head = np.where(reach < mine.start, np.minimum(mine.stop, mine.start + window - 1), mine.start)
    local = np.stack([mine.rank, head, mine.stop, mine.start, mine.stop], axis=1)
    remote = np.stack([mine.rank, mine.start, head, reach, head], axis=1)
    previous_stop = np.where(first, document_start, np.roll(mine.stop, 1))
    # What lies before the rank's previous piece, that piece has asked for already: its window reached further back.
    needed = np.stack([mine.rank, np.maximum(previous_stop, reach), mine.start], axis=1)
    return local[mine.stop > head], remote[head > mine.start], needed[needed[:, 2] > needed[:, 1]]


def _groups(mine: Pieces) -> tuple[Int64, Int64]:
    """Whether a piece is the first of its (rank, document), and the index of that group."""
    first = np.ones(len(mine.rank), bool)
    first[1:] = (np.diff(mine.rank) != 0) | (np.diff(mine.document) != 0)
    return first, np.cumsum(first) - 1


def _lower_pairs(group: Int64) -> tuple[Int64, Int64]:
    """All (i, j) with j <= i inside one group of consecutive pieces."""
    sizes = np.bincount(group)
    start = np.repeat(np.cumsum(sizes) - sizes, sizes)
    index = np.arange(len(group))
    count = index - start + 1
    q = np.repeat(index, count)
    k = np.arange(len(q)) - np.repeat(np.cumsum(count) - count, count) + np.repeat(start, count)
    return q, k


def _send(pieces: Pieces, needed: Int64) -> Int64:
    """Transfers that bring `needed` from the owners of its rows."""
    rank, start, stop = needed.T
    first = np.searchsorted(pieces.start, start, side="right") - 1
    last = np.searchsorted(pieces.start, stop, side="left")
    count = last - first
    which = np.repeat(np.arange(len(needed)), count)
    owner = np.arange(len(which)) - np.repeat(np.cumsum(count) - count, count) + np.repeat(first, count)
    return np.stack(
        [
            pieces.rank[owner],
            rank[which],
            np.maximum(start[which], pieces.start[owner]),
            np.minimum(stop[which], pieces.stop[owner]),
        ],
        axis=1,
    )
