"""What the calls of a layer return, put together: out and lse, and in the backward the gradients.

Parts, call by call -> the whole. Where no query row has two parts, a part is written where it belongs, in the kernel's
own dtype, and one that has all rows is the whole. Else parts are merged, or added up, in float32 (float64 for float64).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from sap_hf.planning import Program
from sap_hf.runtime.device_program import DeviceRows


class Parts:
    """out (C, H, Dv) and lse (C, H) of a forward. Rows that no call has are padding: out 0, lse -inf."""

    def __init__(self, rows: int, program: Program) -> None:
        self._rows, self._program = rows, program
        self._whole: tuple[torch.Tensor, torch.Tensor] | None = None

    def add(self, rows: DeviceRows, out: torch.Tensor, lse: torch.Tensor) -> None:
        """Merge a part, out (n, H, Dv) and lse (n, H), into its rows."""
        first = self._whole is None
        if self._whole is None:
            dtype = lse.dtype if self._program.merges else out.dtype
            if rows.are_first(self._rows):
                self._whole = out.to(dtype), lse
                return
            filled = self._program.filled and not self._program.merges
            self._whole = (
                _room(out, (self._rows, *out.shape[1:]), dtype, filled, 0),
                _room(lse, (self._rows, *lse.shape[1:]), lse.dtype, filled, -math.inf),
            )
        if not self._program.merges or (first and not rows.rounds):
            for whole, part in zip(self._whole, (out, lse)):
                rows.put(whole, part)
        else:
            rows.merge_into(*self._whole, out, lse)

    def all(self, q: torch.Tensor, value_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """out and lse of all parts of q (C, H, D); of none, where all rows are padding."""
        if self._whole is None:
            wide = torch.float64 if q.dtype == torch.float64 else torch.float32
            return q.new_zeros(*q.shape[:2], value_dim), q.new_full(q.shape[:2], -math.inf, dtype=wide)
        return self._whole


class QuerySums:
    """dq (C, H, D) of a backward."""

    def __init__(self, q: torch.Tensor, wide: torch.dtype, program: Program) -> None:
        self._q, self._program = q, program
        self._sums = q.new_zeros(q.shape, dtype=wide) if program.merges else None
        self._whole = Pieces(q, program)

    def add(self, rows: DeviceRows, part: torch.Tensor) -> None:
        """Add a part (n, H, D) to its rows."""
        if self._sums is None:
            self._whole.put(rows, part)
        else:
            rows.add_to(self._sums, part)

    def all(self) -> torch.Tensor:
        """dq of all parts, in q's dtype."""
        return self._whole.all() if self._sums is None else self._sums.to(self._q.dtype)


class Pieces:
    """A gradient of `of` (C, ...) that is put together from pieces, in its dtype; 0 in padding."""

    def __init__(self, of: torch.Tensor, program: Program) -> None:
        self._of, self._program = of, program
        self._whole: torch.Tensor | None = None

    def put(self, rows: DeviceRows, piece: torch.Tensor, lent: bool = False) -> None:
        """Write a piece (n, ...) to its rows. The first one that has all rows is the whole, unless it is only lent."""
        if self._whole is None:
            if rows.are_first(len(self._of)):
                self._whole = piece.to(self._of.dtype, copy=lent)
                return
            self._whole = _room(self._of, self._of.shape, self._of.dtype, self._program.filled, 0)
        rows.put(self._whole, piece)

    def all(self) -> torch.Tensor:
        """All pieces."""
        return torch.zeros_like(self._of) if self._whole is None else self._whole


def _room(
    like: torch.Tensor, shape: Sequence[int], dtype: torch.dtype, filled: bool, empty: float
) -> torch.Tensor:
    """For parts to be written to; `empty` where nothing will be written, or not yet, unless all will be `filled`."""
    if filled:
        return like.new_empty(shape, dtype=dtype)
    return like.new_full(shape, empty, dtype=dtype)
