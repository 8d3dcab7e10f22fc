"""What the calls of a layer return, put together: out and lse, and in the backward dq.

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
            self._whole = (
                _room(out, (self._rows, *out.shape[1:]), dtype, self._program, 0),
                _room(lse, (self._rows, *lse.shape[1:]), lse.dtype, self._program, -math.inf),
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
        self._dq = q.new_zeros(q.shape, dtype=wide) if program.merges else None

    def add(self, rows: DeviceRows, part: torch.Tensor) -> None:
        """Add a part (n, H, D) to its rows."""
        if self._dq is None:
            if rows.are_first(len(self._q)):
                self._dq = part
                return
            self._dq = _room(part, self._q.shape, part.dtype, self._program, 0)
        if self._program.merges:
            rows.add_to(self._dq, part)
        else:
            rows.put(self._dq, part)

    def all(self) -> torch.Tensor:
        """dq of all parts, in q's dtype."""
        return torch.zeros_like(self._q) if self._dq is None else self._dq.to(self._q.dtype)


def _room(
    like: torch.Tensor, shape: Sequence[int], dtype: torch.dtype, program: Program, empty: float
) -> torch.Tensor:
    """For parts to be written to; `empty` where nothing will be written, or not yet."""
    if program.filled and not program.merges:
        return like.new_empty(shape, dtype=dtype)
    return like.new_full(shape, empty, dtype=dtype)
