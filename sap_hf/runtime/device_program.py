"""A Program whose indices live on the device, so that no layer copies one from the host.

Program, device -> DeviceProgram. Made once per batch, rank, window and device; shared by all layers, the recompute
and the backward.
"""

from __future__ import annotations

import dataclasses

import torch

from sap_hf.kernels import Segments, merge_into
from sap_hf.planning import Plan, Program, compile_program
from sap_hf.planning.program import Call, Rows


@dataclasses.dataclass(frozen=True, eq=False)
class DeviceRows:
    """Rows of a buffer: a slice where they lie together, else int64 indices on the device."""

    at: slice | torch.Tensor
    rounds: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    """(rows, positions) such that no row repeats within a round; empty when no row repeats at all."""

    def take(self, buffer: torch.Tensor) -> torch.Tensor:
        """The rows, in order: a view where they lie together."""
        return buffer[self.at] if isinstance(self.at, slice) else buffer.index_select(0, self.at)

    def copy_to(self, there: torch.Tensor, buffer: torch.Tensor) -> None:
        """Write the rows of `buffer`, in order, to all of `there`."""
        if isinstance(self.at, slice):
            there.copy_(buffer[self.at])
        else:
            torch.index_select(buffer, 0, self.at, out=there)

    def add_to(self, buffer: torch.Tensor, part: torch.Tensor) -> None:
        """Add part to the rows, in place and always in the same order."""
        if isinstance(self.at, slice):
            buffer[self.at].add_(part)
            return
        # No row repeats within one index_add_: its result does not depend on the order of atomic adds.
        for rows, positions in self.rounds or ((self.at, None),):
            # Nothing of a round is held while the next is picked.
            buffer.index_add_(
                0, rows, (part if positions is None else part.index_select(0, positions)).to(buffer.dtype)
            )

    def put(self, buffer: torch.Tensor, part: torch.Tensor) -> None:
        """Write part to the rows, none of which repeats."""
        if isinstance(self.at, slice):
            buffer[self.at] = part
        else:
            buffer.index_copy_(0, self.at, part.to(buffer.dtype))

    def are_first(self, rows: int) -> bool:
        """Whether these are the first `rows` rows, in order."""
        return self.at == slice(0, rows) if isinstance(self.at, slice) else False

    def merge_into(
        self,
        out: torch.Tensor,
        lse: torch.Tensor,
        part_out: torch.Tensor,
        part_lse: torch.Tensor,
    ) -> None:
        """Merge partial attentions of the rows into out and lse, in place."""
        if not self.rounds:
            merge_into(out, lse, self.at, part_out, part_lse)
            return
        for rows, positions in self.rounds:
            merge_into(
                out, lse, rows, part_out.index_select(0, positions), part_lse.index_select(0, positions)
            )


@dataclasses.dataclass(frozen=True, eq=False)
class DeviceCall:
    """One kernel call: a `Call` on the device, and its segments."""

    local: bool
    q: DeviceRows
    k: DeviceRows
    added: tuple[DeviceRows, DeviceRows]
    segments: Segments


@dataclasses.dataclass(frozen=True, eq=False)
class DeviceProgram:
    """A Program with its calls and its indices on the device."""

    program: Program
    kept: DeviceRows
    calls: tuple[DeviceCall, ...]
    packed: tuple[torch.Tensor | None, ...]


def compiled(plan: Plan, rank: int, window: int | None) -> Program:
    """The plan's program for this rank and window, made in the first call; numpy alone, for any thread."""
    key = ("compiled", rank, window)
    made = plan.derived.get(key)
    if made is None:
        made = plan.derived[key] = compile_program(plan, rank, window)
    assert isinstance(made, Program)
    return made


def load(plan: Plan, rank: int, window: int | None, device: torch.device) -> DeviceProgram:
    """The plan's program for this rank and window on `device`; compiled and copied once."""
    key = ("program", rank, window, device)
    made = plan.derived.get(key)
    if made is None:
        program = compiled(plan, rank, window)
        made = plan.derived[key] = DeviceProgram(
            program,
            _rows(program.kept, device),
            tuple(_call(call, device) for call in program.calls),
            tuple(
                None if e.packed is None else torch.from_numpy(e.packed).to(device) for e in program.exchanges
            ),
        )
    assert isinstance(made, DeviceProgram)
    return made


def _call(call: Call, device: torch.device) -> DeviceCall:
    picked, sums = call.added
    return DeviceCall(
        call.local,
        _rows(call.q, device),
        _rows(call.k, device),
        (_rows(picked, device), _rows(sums, device)),
        Segments.build(call.cu_q.tolist(), call.cu_k.tolist(), call.causal, device),
    )


def _rows(rows: Rows, device: torch.device) -> DeviceRows:
    if rows.start is not None:
        return DeviceRows(slice(rows.start, rows.start + len(rows.index)), ())
    rounds: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()
    if len(rows.rounds) > 1:
        rounds = tuple(
            (torch.from_numpy(rows.index[turn]).to(device), torch.from_numpy(turn).to(device))
            for turn in rows.rounds
        )
    return DeviceRows(torch.from_numpy(rows.index).to(device), rounds)
