"""The K and V that a layer's calls read, and in the backward what their gradients come together in.

A rank's own K and V stay where the model left them. The buffer has what the rank receives and, of its own rows, those
that `Program.kept` names, K and V token by token: a run of rows is one message.
"""

from __future__ import annotations

import dataclasses

import torch

from sap_hf.runtime.arena import Arena
from sap_hf.runtime.device_program import DeviceCall, DeviceProgram
from sap_hf.runtime.parts import Pieces


@dataclasses.dataclass(frozen=True, eq=False)
class Keys:
    """k (C, K, D) and v (C, K, Dv) of this rank, and the buffer (rows, K, D + Dv)."""

    k: torch.Tensor
    v: torch.Tensor
    buffer: torch.Tensor

    @classmethod
    def of(cls, k: torch.Tensor, v: torch.Tensor, loaded: DeviceProgram, space: Arena | None) -> Keys:
        """With the kept rows in a buffer in `space`, or in one of its own."""
        width = k.shape[2]
        shape = (loaded.program.buffer_rows, k.shape[1], width + v.shape[2])
        buffer = k.new_empty(shape) if space is None else space.take(shape, k.dtype)
        own = buffer[loaded.program.own]
        loaded.kept.copy_to(own[..., :width], k)
        loaded.kept.copy_to(own[..., width:], v)
        return cls(k, v, buffer)

    def read_by(self, call: DeviceCall) -> tuple[torch.Tensor, torch.Tensor]:
        """K and V of the call's keys, in order: views where they lie together."""
        if call.local:
            return call.k.take(self.k), call.k.take(self.v)
        rows, width = call.k.take(self.buffer), self.k.shape[2]
        return rows[..., :width], rows[..., width:]


class KeySums:
    """dk (C, K, D) and dv (C, K, Dv) of a backward.

    A gradient of one part is written where it belongs, in the wire's dtype. The others are added up in `sums`, those of
    received rows among them, until these are sent home.
    """

    def __init__(self, k: torch.Tensor, v: torch.Tensor, sums: torch.Tensor, loaded: DeviceProgram) -> None:
        self.sums = sums.zero_()
        self._width, self._loaded = k.shape[2], loaded
        self._dk, self._dv = (Pieces(x, x.shape, x.dtype, loaded.program.filled) for x in (k, v))

    def places(self, call: DeviceCall) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Where a call may write its dk and dv."""
        return (self._dk.place(call.k), self._dv.place(call.k)) if call.local else (None, None)

    def add(
        self,
        call: DeviceCall,
        part_k: torch.Tensor,
        part_v: torch.Tensor,
        places: tuple[torch.Tensor | None, torch.Tensor | None],
    ) -> None:
        """Add a call's dk (n, K, D) and dv (n, K, Dv), which may lie in its `places`."""
        picked, rows = call.added
        # A GPU would be called for no rows too.
        if not isinstance(rows.at, slice) or rows.at.start < rows.at.stop:
            rows.add_to(self.sums[..., : self._width], picked.take(part_k))
            rows.add_to(self.sums[..., self._width :], picked.take(part_v))
        if call.local:
            # Where there are other parts it is overwritten in the end.
            self._dk.put(call.k, part_k, places[0])
            self._dv.put(call.k, part_v, places[1])

    def all(self) -> tuple[torch.Tensor, torch.Tensor]:
        """dk and dv, once what other ranks have computed is in `sums`."""
        own = self.sums[self._loaded.program.own]
        self._dk.put(self._loaded.kept, own[..., : self._width], lent=True)
        self._dv.put(self._loaded.kept, own[..., self._width :], lent=True)
        return self._dk.all(), self._dv.all()
