"""Layout: which rank holds which rows of the pack, and in which order.

(rows of the pack, ranks) -> Layout. Every rank holds C = ceil(T / W) rows; the pack is padded to W * C, nothing
is dropped. `contiguous` keeps neighbours together; `zigzag` evens out causal work (as in Llama 3's context
parallelism, arXiv:2407.21783).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import numpy as np

from sap_hf.errors import LayoutError
from sap_hf.planning.documents import Documents, Int64
from sap_hf.planning.schedule import columns, ends, sum_by


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """One owner for every row of the padded pack.

    Attributes:
        name: contiguous | zigzag | balanced.
        cp_size: W, the ranks.
        rows_per_rank: C.
        segments: (n, 3) int64 columns rank, start, stop: half-open row ranges, sorted by rank, and within a rank
            in the order in which the rank stores them. Together they are [0, W * C).
        start: of a balanced layout, what `balance.start_of` calls its origin; else empty.
    """

    name: str
    cp_size: int
    rows_per_rank: int
    segments: Int64
    start: str = ""

    def rows(self, rank: int) -> Int64:
        """(C,) ids of the rows that `rank` holds, in its order; ids at or beyond T are padding.

        Raises:
            LayoutError: no such rank.
        """
        if not 0 <= rank < self.cp_size:
            raise LayoutError(f"rank {rank}: the ranks of this layout are 0 to {self.cp_size - 1}.")
        mine = self.segments[self.segments[:, 0] == rank]
        return np.concatenate([np.arange(start, stop) for _, start, stop in mine])


def rows_each(rows: int, cp_size: int, multiple: int = 1) -> int:
    """C: the least multiple of `multiple` that lets `cp_size` ranks hold all rows."""
    return -(-rows // (cp_size * multiple)) * multiple


def contiguous(rows: int, cp_size: int, multiple: int = 1) -> Layout:
    """Rank r holds rows [rC, (r+1)C)."""
    share = rows_each(rows, cp_size, multiple)
    edges = np.arange(cp_size + 1) * share
    return Layout("contiguous", cp_size, share, columns(np.arange(cp_size), edges[:-1], edges[1:]))


def joined(rank: Int64, start: Int64, stop: Int64) -> Int64:
    """(n, 3) segments of ranges (m,), those that follow each other on one rank as one."""
    new = np.ones(len(rank), bool)
    new[1:] = (rank[1:] != rank[:-1]) | (start[1:] != stop[:-1])
    first, last = ends(new)
    return columns(rank[first], start[first], stop[last])


def zigzag(rows: int, cp_size: int, multiple: int = 1) -> Layout:
    """2W chunks, the first W of ceil(C/2) rows, the last W of floor(C/2); rank r holds chunks r and 2W-1-r."""
    share = rows_each(rows, cp_size, multiple)
    sizes = np.repeat([(share + 1) // 2, share // 2], cp_size)
    edges = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    rank = np.repeat(np.arange(cp_size), 2)
    chunk = np.where(np.arange(2 * cp_size) % 2, 2 * cp_size - 1 - rank, rank)
    start, stop = edges[chunk], edges[chunk + 1]
    some = stop > start
    return Layout("zigzag", cp_size, share, joined(rank[some], start[some], stop[some]))


LAYOUTS = {"contiguous": contiguous, "zigzag": zigzag}


@dataclasses.dataclass(frozen=True, eq=False)
class Pieces:
    """The rows of one document that lie together on one rank, for all documents and ranks; padding has none.

    Columns (n,) int64, sorted by start: `rank`, `document`, `start`, `stop` (rows of the pack) and `local`, the
    index of `start` among the rank's own rows.
    """

    rank: Int64
    document: Int64
    start: Int64
    stop: Int64
    local: Int64

    def select(self, chosen: Int64) -> Pieces:
        """The pieces at the given indices."""
        held = (self.rank, self.document, self.start, self.stop, self.local)
        return Pieces(*(column.take(chosen) for column in held))


@functools.lru_cache(maxsize=16)
def cut(documents: Documents, layout: Layout) -> Pieces:
    """Cut every rank's segments at the document borders."""
    rank, start, stop = layout.segments.T
    sizes = stop - start
    offset = np.cumsum(sizes) - sizes
    local = offset - rank * layout.rows_per_rank
    order = np.argsort(start, kind="stable")
    rank, start, local = rank[order], start[order], local[order]
    borders = np.concatenate([documents.cu_seqlens, start[start < documents.rows]])
    borders.sort()
    begin, end = borders[:-1], borders[1:]
    # Where a document and a segment begin together, one border.
    apart = end != begin
    begin, end = begin[apart], end[apart]
    segment = np.searchsorted(start, begin, side="right") - 1
    return Pieces(
        rank[segment], documents.index_of(begin), begin, end, local[segment] + begin - start[segment]
    )


def work_held(
    documents: Documents, layouts: Sequence[Layout], windows: Mapping[int | None, int]
) -> tuple[Int64, Int64]:
    """(n, W) query-key pairs over all layers of {window: number of layers}, and rows, that ranks hold in n layouts."""
    lengths, ranks = documents.lengths, layouts[0].cp_size
    segments = np.concatenate([layout.segments for layout in layouts])
    rank = segments[:, 0] + ranks * np.repeat(np.arange(len(layouts)), [len(of.segments) for of in layouts])
    # Pairs of all rows of the pack up to the borders of the segments; padding has none.
    borders = np.minimum(segments[:, 1:], documents.rows)
    document = np.minimum(documents.index_of(borders), len(lengths) - 1)
    before = np.concatenate([np.zeros(1, np.int64), np.cumsum(pairs_upto(lengths, windows))])
    upto = before[document] + pairs_upto(borders - documents.cu_seqlens[document], windows)
    pairs, rows = (sum_by(rank, of[:, 1] - of[:, 0], ranks * len(layouts)) for of in (upto, borders))
    return pairs.reshape(-1, ranks), rows.reshape(-1, ranks)


def pairs_upto(rows: Int64, windows: Mapping[int | None, int]) -> Int64:
    """Query-key pairs of a document's first `rows` rows, any shape, over all layers."""
    total = np.zeros(rows.shape, np.int64)
    for window, layers in windows.items():
        near = rows if window is None else np.minimum(rows, window)
        seen = near * (near + 1) // 2
        total += layers * (seen if window is None else seen + (rows - near) * window)
    return total
