"""One layer's attention on this rank, forward and backward: the program, operation by operation.

q, k, v of the rows that the program's rank holds, and a Layer -> out and lse; dout and these -> dq, dk, dv. Forward, it
receives remote K/V while local tiles run and merges by log-sum-exp; backward, it runs every tile with the final out and
lse and sends dK/dV straight to their owners.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist

from sap_hf.kernels import Kernel, Scoring, Uneven
from sap_hf.planning.program import Operation
from sap_hf.runtime import transport
from sap_hf.runtime.arena import arena
from sap_hf.runtime.device_program import DeviceCall, DeviceProgram
from sap_hf.runtime.exchange import collect, fetch, send_home
from sap_hf.runtime.keys import Keys, KeySums
from sap_hf.runtime.parts import Parts, QuerySums

Meanwhile = Callable[[], None]


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """What one attention layer needs beside its tensors."""

    loaded: DeviceProgram
    kernel: Kernel
    group: dist.ProcessGroup | None
    scoring: Scoring
    keep_remote_kv: bool

    def keeps(self, kept: Kept | None) -> bool:
        """Whether the forward leaves received rows to the backward.

        Under checkpointing the recompute has none to leave: it must save what the forward saved.
        """
        return self.keep_remote_kv and kept is None and len(self.loaded.program.exchanges) > 0


@dataclasses.dataclass(eq=False)
class Kept:
    """What one checkpointed layer holds between its forward, which leaves it here, and its recompute, which takes it.

    Attributes:
        computed: out and lse, of each turn of exchanged heads, so that nothing is computed again.
        exchanged: out of the rank's own rows, and of each turn q, k and v of all neighbours' rows, so that no heads are
            exchanged again; with remote_kv="keep" alone.
    """

    computed: list[tuple[torch.Tensor, torch.Tensor]] | None = None
    exchanged: tuple[torch.Tensor, list[tuple[torch.Tensor, ...]]] | None = None


def nothing() -> None:
    """No other messages."""


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    layer: Layer,
    keep: bool,
    meanwhile: Meanwhile = nothing,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """out (C, H, Dv) in q's dtype and lse (C, H), and the K/V buffer with what was received, if kept.

    Args:
        sinks: (H,) or None.
        meanwhile: starts other messages, behind those that this layer needs first.
    """
    with torch.autocast(q.device.type, enabled=False):
        out, lse, buffer = _forward(q, k, v, layer, keep, meanwhile)
        if sinks is not None:
            # A sink is one more part with out = 0: merging it only shrinks what is there.
            with_sink = torch.logaddexp(lse, sinks.to(lse.dtype))
            out *= torch.exp(lse - with_sink).unsqueeze(-1)
            lse = with_sink
        return out.to(q.dtype), lse, buffer


def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    sinks: torch.Tensor | None,
    buffer: torch.Tensor | None,
    layer: Layer,
    meanwhile: Meanwhile = nothing,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """dq, dk, dv of this rank's own rows, and its part of dsinks."""
    with torch.autocast(q.device.type, enabled=False):
        dq, dk, dv = _backward(dout.contiguous(), q, k, v, out, lse, buffer, layer, meanwhile)
        if sinks is None:
            return dq, dk, dv, None
        delta = (out.to(lse.dtype) * dout.to(lse.dtype)).sum(-1)
        dsinks = -(torch.exp(sinks.to(lse.dtype) - lse) * delta).sum(0).to(sinks.dtype)
        return dq, dk, dv, dsinks


def _issued(operations: tuple[Operation, ...], meanwhile: Meanwhile) -> Iterator[Operation]:
    """The operations; `meanwhile` is called behind those that post before anything is computed or waited for.

    That is at the same place on all ranks: a communicator takes messages in the order in which they are posted.
    """
    called = False
    for operation in operations:
        if operation.kind != "post" and not called:
            called = True
            meanwhile()
        yield operation
    if not called:
        meanwhile()


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: Layer, keep: bool, meanwhile: Meanwhile
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """out (C, H, Dv) and lse (C, H), and the K/V buffer with what was received, if kept."""
    loaded, program = layer.loaded, layer.loaded.program
    if program.alone:
        meanwhile()
        return *layer.kernel.forward(q, k, v, loaded.calls[0].segments, layer.scoring), None
    row = k.shape[1] * (k.shape[2] + v.shape[2])
    space = arena(q, {k.dtype: (sum(program.packed_rows) + (0 if keep else program.buffer_rows)) * row})
    keys = Keys.of(k, v, loaded, None if keep else space)
    rooms = [space.take((rows, *keys.buffer.shape[1:]), k.dtype) for rows in program.packed_rows]
    parts = Parts(q, v.shape[-1], program)
    pending: dict[int, transport.Pending] = {}
    for operation in _issued(program.forward, meanwhile):
        at = operation.at
        if operation.kind == "post":
            pending[at] = fetch(keys.buffer, loaded, at, layer.group, rooms[at % program.slots])
        elif operation.kind == "wait":
            pending.pop(at).wait()
        else:
            _attend(q, keys, parts, loaded.calls[at], layer)
    return *parts.all(), keys.buffer if keep else None


# What a call gathers and returns dies with the function: the next call must not find it alive.
def _attend(q: torch.Tensor, keys: Keys, parts: Parts, call: DeviceCall, layer: Layer) -> None:
    """Run one call."""
    place = parts.place(call.q)
    part = layer.kernel.forward(call.q.take(q), *keys.read_by(call), call.segments, layer.scoring, place)
    parts.add(call.q, *part, place)


def _backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    buffer: torch.Tensor | None,
    layer: Layer,
    meanwhile: Meanwhile,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv of this rank's own rows."""
    loaded, program = layer.loaded, layer.loaded.program
    if program.alone:
        meanwhile()
        segments = loaded.calls[0].segments
        dq, dk, dv = layer.kernel.backward(dout, q, k, v, out, lse, segments, layer.scoring)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
    operations = program.backward if buffer is None else program.backward_kept
    row = k.shape[1] * (k.shape[2] + v.shape[2])
    # Rows are packed where gradients come home later, unless the next stage is packed before they have.
    packs = program.packed_rows if program.slots < len(program.exchanges) else ()
    wire = sum(map(sum, program.return_rows)) + sum(packs) + (program.buffer_rows if buffer is None else 0)
    sizes = {k.dtype: wire * row}
    sizes[lse.dtype] = sizes.get(lse.dtype, 0) + program.buffer_rows * row
    space = arena(q, sizes)
    keys = Keys.of(k, v, loaded, space) if buffer is None else Keys(k, v, buffer)
    shape = keys.buffer.shape[1:]
    rooms = [
        (space.take((leave, *shape), k.dtype), space.take((come, *shape), k.dtype))
        for leave, come in program.return_rows
    ]
    packing = [space.take((rows, *shape), k.dtype) for rows in packs] or [come for _, come in rooms]
    sums = QuerySums(q, lse.dtype, program)
    key_sums = KeySums(k, v, space.take((program.buffer_rows, *shape), lse.dtype), loaded)
    pending: dict[int, transport.Pending] = {}
    home: dict[int, torch.Tensor] = {}
    for operation in _issued(operations, meanwhile):
        at = operation.at
        if operation.kind == "post":
            pending[at] = fetch(keys.buffer, loaded, at, layer.group, packing[at % program.slots])
        elif operation.kind == "wait":
            pending.pop(at).wait()
        elif operation.kind == "post_return":
            room = rooms[at % program.slots]
            pending[at], home[at] = send_home(key_sums.sums, loaded, at, layer.group, room)
        elif operation.kind == "wait_return":
            pending.pop(at).wait()
            collect(key_sums.sums, home.pop(at), loaded, at)
        else:
            _attend_backward(dout, q, keys, out, lse, sums, key_sums, loaded.calls[at], layer)
    return sums.all(), *key_sums.all()


def _attend_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    keys: Keys,
    out: torch.Tensor,
    lse: torch.Tensor,
    sums: QuerySums,
    key_sums: KeySums,
    call: DeviceCall,
    layer: Layer,
) -> None:
    """Add one call's gradients to those of q, k and v."""
    rows = call.q
    of_query = sums.place(rows)
    # dK and dV that the kernel sums over heads lie elsewhere: their places would only be held for longer.
    of_keys = (None, None) if isinstance(layer.kernel, Uneven) else key_sums.places(call)
    part_q, part_k, part_v = layer.kernel.backward(
        rows.take(dout),
        rows.take(q),
        *keys.read_by(call),
        rows.take(out),
        rows.take(lse),
        call.segments,
        layer.scoring,
        (of_query, *of_keys),
    )
    sums.add(rows, part_q, of_query)
    key_sums.add(call, part_k, part_v, of_keys)
