"""What the calls of a layer return, put together: out and lse, and in the backward the gradients.

Parts, call by call -> the whole. Where no query row has two parts, a call is told the place of its part, and writes it
there if it can; one that has all rows is the whole. Else parts are merged, or added up, in float32 (float64 for
float64).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from sap_hf.planning import Program
from sap_hf.runtime.device_program import DeviceRows


class Pieces:
    """A tensor of this shape (C, ...) and dtype that is put together from pieces.

    filled: whether pieces will cover all rows; else rows that none covers are `empty`.
    """

    def __init__(
        self, like: torch.Tensor, shape: Sequence[int], dtype: torch.dtype, filled: bool, empty: float = 0
    ) -> None:
        self._like, self._shape, self._dtype = like, shape, dtype
        self._filled, self._empty = filled, empty
        self._whole: torch.Tensor | None = None

    def place(self, rows: DeviceRows) -> torch.Tensor | None:
        """Where a piece of these rows belongs, for a kernel to write it there; None where it is to be put."""
        if not isinstance(rows.at, slice) or self._are_all(rows):
            return None
        return self.all()[rows.at]

    def put(
        self, rows: DeviceRows, piece: torch.Tensor, place: torch.Tensor | None = None, lent: bool = False
    ) -> None:
        """Write a piece (n, ...) to its rows, unless it lies in their `place`.

        The first one that has all rows is the whole, unless it is only lent.
        """
        if piece is place:
            return
        if self._are_all(rows):
            self._whole = piece.to(self._dtype, copy=lent)
        else:
            rows.put(self.all(), piece)

    def all(self) -> torch.Tensor:
        """All pieces so far."""
        if self._whole is None and self._filled:
            self._whole = self._like.new_empty(self._shape, dtype=self._dtype)
        elif self._whole is None:
            self._whole = self._like.new_full(self._shape, self._empty, dtype=self._dtype)
        return self._whole

    def _are_all(self, rows: DeviceRows) -> bool:
        return self._whole is None and rows.are_first(self._shape[0])


class Parts:
    """out (C, H, Dv) and lse (C, H) of a forward. Rows that no call has are padding: out 0, lse -inf."""

    def __init__(self, q: torch.Tensor, value_dim: int, program: Program) -> None:
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        self._merges = program.merges
        # A merge reads what is there.
        filled = program.filled and not program.merges
        shape = (*q.shape[:2], value_dim)
        self._out = Pieces(q, shape, wide if program.merges else q.dtype, filled)
        self._lse = Pieces(q, q.shape[:2], wide, filled, -math.inf)
        self._begun = False

    def place(self, rows: DeviceRows) -> torch.Tensor | None:
        """Where a call may write the out of these rows."""
        return None if self._merges else self._out.place(rows)

    def add(self, rows: DeviceRows, out: torch.Tensor, lse: torch.Tensor, place: torch.Tensor | None) -> None:
        """Merge a part, out (n, H, Dv) and lse (n, H), into its rows; out may lie in the `place` of these rows."""
        if self._merges and (self._begun or rows.rounds):
            rows.merge_into(self._out.all(), self._lse.all(), out, lse)
        else:
            self._out.put(rows, out, place)
            self._lse.put(rows, lse)
        self._begun = True

    def all(self) -> tuple[torch.Tensor, torch.Tensor]:
        """out and lse of all parts."""
        return self._out.all(), self._lse.all()


class QuerySums:
    """dq (C, H, D) of a backward."""

    def __init__(self, q: torch.Tensor, wide: torch.dtype, program: Program) -> None:
        self._dtype = q.dtype
        self._sums = q.new_zeros(q.shape, dtype=wide) if program.merges else None
        self._whole = Pieces(q, q.shape, q.dtype, program.filled)

    def place(self, rows: DeviceRows) -> torch.Tensor | None:
        """Where a call may write the dq of these rows."""
        return self._whole.place(rows) if self._sums is None else None

    def add(self, rows: DeviceRows, part: torch.Tensor, place: torch.Tensor | None) -> None:
        """Add a part (n, H, D) to its rows; it may lie in the `place` of these rows."""
        if self._sums is None:
            self._whole.put(rows, part, place)
        else:
            rows.add_to(self._sums, part)

    def all(self) -> torch.Tensor:
        """dq of all parts, in q's dtype."""
        return self._whole.all() if self._sums is None else self._sums.to(self._dtype)
