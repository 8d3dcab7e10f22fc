"""The one differentiable operation: attention over a pack that several ranks hold together, for any plan.

This rank's q, k, v and a Plan -> this rank's out. `runtime.layer` runs the plan's program; where ranks exchange heads,
`runtime.turns` runs it on some heads after the other.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.distributed as dist

from sap_hf.errors import ConfigError, TensorError
from sap_hf.kernels import Scoring, pick
from sap_hf.planning import Plan
from sap_hf.runtime.device_program import load
from sap_hf.runtime.group import resolve, warm
from sap_hf.runtime.layer import Kept, Layer, backward, forward
from sap_hf.runtime.turns import attend_in_turns

# The answer is the same for every layer and batch; looking for installed kernels is not free.
_pick = functools.cache(pick)


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
    scale = 1 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale
    layer = Layer(
        loaded=loaded,
        kernel=chosen,
        group=process_group,
        scoring=Scoring(scale, loaded.program.window, softcap),
        keep_remote_kv=remote_kv == "keep",
    )
    if plan.ulysses_size > 1:
        return attend_in_turns(q, k, v, sinks, plan, rank, layer, kept)
    out: torch.Tensor = _Attention.apply(q, k, v, sinks, layer, kept)  # type: ignore[no-untyped-call]
    return out


class _Attention(torch.autograd.Function):
    """Of rows that this rank holds alone, all heads."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
        layer: Layer,
        kept: Kept | None,
    ) -> torch.Tensor:
        buffer = None
        if kept is not None and kept.computed is not None:
            ((out, lse),), kept.computed = kept.computed, None
        else:
            out, lse, buffer = forward(q, k, v, sinks, layer, layer.keeps(kept))
            if kept is not None:
                kept.computed = [(out.detach(), lse)]
        ctx.save_for_backward(q, k, v, out, lse, sinks, buffer)
        ctx.layer = layer
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return *backward(dout, *ctx.saved_tensors, ctx.layer), None, None


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
