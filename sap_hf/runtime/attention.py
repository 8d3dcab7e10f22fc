"""The one differentiable operation: attention over a pack that several ranks hold together, for any plan.

This rank's q, k, v and a Plan -> this rank's out. The executor runs the plan's Program operation by operation:
forward, it receives remote K/V while local tiles run and merges by log-sum-exp; backward, it runs every tile with the
final out and lse and sends dK/dV straight to their owners.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import torch
import torch.distributed as dist

from sap_hf.errors import ConfigError, TensorError
from sap_hf.kernels import Kernel, Scoring, Uneven, pick
from sap_hf.planning import Plan
from sap_hf.runtime import transport
from sap_hf.runtime.arena import arena
from sap_hf.runtime.device_program import DeviceCall, DeviceProgram, load
from sap_hf.runtime.exchange import collect, fetch, send_home
from sap_hf.runtime.group import resolve, warm
from sap_hf.runtime.heads import HeadExchange, Kept
from sap_hf.runtime.keys import Keys, KeySums
from sap_hf.runtime.parts import Parts, QuerySums

# The answer is the same for every layer and batch; looking for installed kernels is not free.
_pick = functools.cache(pick)


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """What one attention layer needs beside its tensors."""

    loaded: DeviceProgram
    kernel: Kernel
    group: dist.ProcessGroup | None
    scoring: Scoring
    keep_remote_kv: bool
    kept: Kept | None


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: Plan,
    *,
    group: dist.ProcessGroup | None = None,
    softmax_scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    kernel: str = "auto",
    remote_kv: str = "refetch",
    kept: Kept | None = None,
) -> torch.Tensor:
    """Causal attention inside every document of a pack that the ranks of `group` share.

    Args:
        q: (C, H, D), this rank's rows in the order of `plan.rows(rank)`.
        k, v: (C, K, D) and (C, K, Dv), the same rows. H is a multiple of K.
        group: the ranks that share the pack; None is the attached cp group, else all ranks. Its first use runs one
            all-reduce over all its ranks.
        softmax_scale: factor on q . k; None is 1 / sqrt(D).
        window: keys a query sees, itself included; None is its whole document.
        softcap: logits become softcap * tanh(logits / softcap).
        sinks: (H,) one logit per head that takes part in the softmax and has no value.
        kernel: auto | reference | sdpa | varlen | flash | flex.
        remote_kv: refetch | keep, in the backward receive remote K/V again or hold it since the forward.
        kept: for a layer under gradient checkpointing, where its out and lse wait for the recompute: the forward
            leaves them there, the recompute takes them instead of computing, and fetching rows, again. Heads it
            exchanges again, unless remote_kv is keep.

    Returns:
        out (C, H, Dv) in q's dtype (under autocast: the autocast dtype). Padding rows and their gradients are 0.

    Raises:
        TensorError: shapes, dtypes or devices that the plan cannot use.
        LayoutError: a group whose size is not `plan.cp_size`.
    """
    if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
        # Before the exchange: float32 from a norm or a rotary embedding would double what travels.
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    _check(q, k, v, sinks, plan)
    if window is not None and window < 1:
        raise ConfigError(f"window={window}: a query sees at least itself. Use None for full attention.")
    if remote_kv not in ("refetch", "keep"):
        raise ConfigError(f"remote_kv={remote_kv!r} is not one of refetch, keep.")
    process_group, rank = resolve(group, plan.cp_size)
    if process_group is not None and plan.cp_size > 1:
        warm(process_group, q.device)
    chosen, _ = _pick(
        kernel,
        device_type=q.device.type,
        dtype=q.dtype,
        head_dim=q.shape[-1],
        value_dim=v.shape[-1],
        softcap=softcap,
        window=window,
    )
    loaded = load(plan, rank, window, q.device)
    if remote_kv == "keep" and loaded.program.slots < len(loaded.program.exchanges):
        raise ConfigError(
            f"remote_kv='keep' holds all remote rows, but this plan ({plan.strategy}, max_remote_rows="
            f"{plan.max_remote_rows}) has room for {loaded.program.slots} of {len(loaded.program.exchanges)} stages.\n"
            "  Use remote_kv='refetch', or strategy sap or all_gather without max_remote_rows."
        )
    heads = held = None
    if plan.ulysses_size > 1:
        assert process_group is not None, "heads are exchanged within a process group"
        heads = HeadExchange.of(q, k, process_group, rank, plan.ulysses_size)
        if not heads.mine.even:
            chosen = Uneven(chosen, heads.mine.readers)
        held = kept if remote_kv == "keep" else None
        q, k, v = heads.scatter(q, k, v, held)
        sinks = None if sinks is None else sinks[heads.mine.q]
    scale = 1 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale
    layer = Layer(
        loaded=loaded,
        kernel=chosen,
        group=process_group,
        scoring=Scoring(scale, loaded.program.window, softcap),
        keep_remote_kv=remote_kv == "keep",
        kept=kept,
    )
    out: torch.Tensor = _Attention.apply(q, k, v, sinks, layer)  # type: ignore[no-untyped-call]
    return out if heads is None else heads.gather(out, held)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, layer: Layer
    ) -> torch.Tensor:
        kept, buffer = layer.kept, None
        # Under checkpointing the recompute has no buffer to keep: it must save what the forward saved.
        keep = layer.keep_remote_kv and kept is None and len(layer.loaded.program.exchanges) > 0
        if kept is not None and kept.tensors is not None:
            (out, lse), kept.tensors = kept.tensors, None
        else:
            with torch.autocast(q.device.type, enabled=False):
                out, lse, buffer = _forward(q, k, v, layer, keep)
                if sinks is not None:
                    # A sink is one more part with out = 0: merging it only shrinks what is there.
                    with_sink = torch.logaddexp(lse, sinks.to(lse.dtype))
                    out *= torch.exp(lse - with_sink).unsqueeze(-1)
                    lse = with_sink
                out = out.to(q.dtype)
            if kept is not None:
                kept.tensors = (out.detach(), lse)
        ctx.save_for_backward(q, k, v, out, lse, sinks, buffer)
        ctx.layer = layer
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse, sinks, buffer = ctx.saved_tensors
        with torch.autocast(q.device.type, enabled=False):
            dout = dout.contiguous()
            dq, dk, dv = _backward(dout, q, k, v, out, lse, buffer, ctx.layer)
            dsinks = None
            if sinks is not None:
                delta = (out.to(lse.dtype) * dout.to(lse.dtype)).sum(-1)
                dsinks = -(torch.exp(sinks.to(lse.dtype) - lse) * delta).sum(0).to(sinks.dtype)
        return dq, dk, dv, dsinks, None


def _forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: Layer, keep: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """out (C, H, Dv) and lse (C, H), and the K/V buffer with what was received, if kept."""
    loaded, program = layer.loaded, layer.loaded.program
    if program.alone:
        return *layer.kernel.forward(q, k, v, loaded.calls[0].segments, layer.scoring), None
    row = k.shape[1] * (k.shape[2] + v.shape[2])
    space = arena(q, {k.dtype: (sum(program.packed_rows) + (0 if keep else program.buffer_rows)) * row})
    keys = Keys.of(k, v, loaded, None if keep else space)
    rooms = [space.take((rows, *keys.buffer.shape[1:]), k.dtype) for rows in program.packed_rows]
    parts = Parts(q, v.shape[-1], program)
    pending: dict[int, transport.Pending] = {}
    for operation in program.forward:
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dq, dk, dv of this rank's own rows."""
    loaded, program = layer.loaded, layer.loaded.program
    if program.alone:
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
    for operation in operations:
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


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, plan: Plan) -> None:
    """Refuse tensors that the plan cannot use."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 3:
        raise TensorError(f"{shapes}: each must have the dimensions (rows, heads, width).")
    rows = plan.rows_per_rank
    if not len(q) == len(k) == len(v) == rows:
        raise TensorError(
            f"{shapes}: the plan gives every rank {rows} rows ({plan.documents.rows} rows over {plan.cp_size} ranks, "
            "padded alike).\n  Pass the rows plan.rows(rank), in that order."
        )
    if q.shape[2] != k.shape[2] or k.shape[1] != v.shape[1] or q.shape[1] % k.shape[1]:
        raise TensorError(
            f"{shapes}: q and k need the same width, k and v the same heads, and q a multiple of k's heads."
        )
    if not q.dtype == k.dtype == v.dtype or not q.is_floating_point():
        raise TensorError(
            f"q is {q.dtype}, k {k.dtype}, v {v.dtype}: outside autocast they must share one floating dtype."
        )
    if not q.device == k.device == v.device:
        raise TensorError(f"q is on {q.device}, k on {k.device}, v on {v.device}: one device is needed.")
    if sinks is not None and sinks.shape != (q.shape[1],):
        raise TensorError(
            f"sinks {tuple(sinks.shape)}: one logit for each of the {q.shape[1]} heads is needed."
        )
