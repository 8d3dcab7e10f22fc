"""Documents: where each packed example starts and ends in a pack.

cu_seqlens, lengths or resetting position_ids -> Documents. numpy only; no ranks, no devices.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sap_hf.errors import DocumentError

Int64 = NDArray[np.int64]


@dataclasses.dataclass(frozen=True, eq=False)
class Documents:
    """The documents of one pack, in row order, without gaps.

    Attributes:
        cu_seqlens: (N+1,) int64, from 0 to T: document i is the rows [cu_seqlens[i], cu_seqlens[i+1]).
    """

    cu_seqlens: Int64

    @classmethod
    def from_lengths(cls, lengths: Sequence[int] | Int64) -> Documents:
        """Documents of the given lengths (rows each), one after the other.

        Raises:
            DocumentError: no document, or a length below 1.
        """
        rows = _whole_numbers("lengths", lengths)
        if rows.size == 0:
            raise DocumentError("lengths is empty: a pack holds at least one document.")
        if rows.min() < 1:
            at = int(rows.argmin())
            raise DocumentError(
                f"lengths[{at}]={rows[at]}: a document has at least one row. Leave empty ones out."
            )
        return cls(np.concatenate([np.zeros(1, np.int64), np.cumsum(rows)]))

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: Sequence[int] | Int64, rows: int | None = None) -> Documents:
        """Documents whose borders are `cu_seqlens`, as the varlen kernels take them.

        Args:
            rows: rows of the pack that the borders must cover, or None to take the last border.

        Raises:
            DocumentError: borders that do not start at 0, do not rise, or do not end at `rows`.
        """
        borders = _whole_numbers("cu_seqlens", cu_seqlens)
        if borders.size < 2 or borders[0] != 0:
            raise DocumentError(
                f"cu_seqlens={_short(borders)} must start at 0 and have one border more than there are documents."
            )
        steps = np.diff(borders)
        if steps.min() < 1:
            at = int(steps.argmin())
            raise DocumentError(
                f"cu_seqlens must rise: entry {at + 1} is {borders[at + 1]} after {borders[at]}. "
                "Leave out empty documents."
            )
        if rows is not None and borders[-1] != rows:
            raise DocumentError(
                f"cu_seqlens ends at {borders[-1]} but the pack has {rows} rows. Give borders that cover the whole row."
            )
        return cls(borders)

    @classmethod
    def from_position_ids(cls, position_ids: Sequence[int] | Int64) -> Documents:
        """Documents from positions (T,) that count 0, 1, 2, ... inside each document and restart at 0.

        Raises:
            DocumentError: positions that start above 0, skip, or restart anywhere but at 0.
        """
        positions = _whole_numbers("position_ids", position_ids)
        if positions.size == 0:
            raise DocumentError("position_ids is empty: a pack holds at least one row.")
        starts = np.concatenate([np.ones(1, bool), np.diff(positions) != 1])
        wrong = np.flatnonzero(starts & (positions != 0))
        if wrong.size:
            at = int(wrong[0])
            before = "" if at == 0 else f" after {positions[at - 1]}"
            raise DocumentError(
                f"position_ids[{at}]={positions[at]}{before}: inside a document positions rise by 1, and each document "
                "restarts at 0. Rebuild them per document, e.g. with DataCollatorForPacking."
            )
        return cls(np.append(np.flatnonzero(starts), positions.size).astype(np.int64))

    @property
    def rows(self) -> int:
        """T, the rows of all documents."""
        return int(self.cu_seqlens[-1])

    @functools.cached_property
    def lengths(self) -> Int64:
        """(N,) rows of each document."""
        return np.diff(self.cu_seqlens)

    def __len__(self) -> int:
        return len(self.cu_seqlens) - 1

    def index_of(self, rows: Int64) -> Int64:
        """The document of each row; N for rows at or beyond T."""
        return np.searchsorted(self.cu_seqlens, rows, side="right") - 1

    def pairs(self, window: int | None = None) -> int:
        """Query-key pairs of all documents, causal, at most `window` keys per query."""
        lengths = self.lengths
        short = lengths if window is None else np.minimum(lengths, window)
        return int((short * (short + 1) // 2 + (lengths - short) * short).sum())


def _whole_numbers(name: str, values: Sequence[int] | Int64) -> Int64:
    array = np.asarray(values)
    if array.ndim != 1:
        raise DocumentError(f"{name} has shape {array.shape}; one dimension is needed.")
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise DocumentError(f"{name} holds {array.dtype} values; whole numbers are needed.")
    return array.astype(np.int64)


def _short(values: Int64) -> str:
    return str(values.tolist()) if values.size <= 6 else f"[{', '.join(map(str, values[:6]))}, ...]"
