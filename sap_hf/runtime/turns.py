"""Attention where U neighbours exchange heads: some heads after the other, so that others travel meanwhile.

q_CHD, k, v -> out_CHD. A turn is some of each neighbour's kv heads and the query heads that read them: its heads come,
`runtime.layer` attends to all neighbours' rows, and out goes home. On the way beside a turn are the heads of the next
one and the results of the one before. Their messages are posted behind the turn's first rows, in the same order on all
ranks.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from sap_hf.kernels import Uneven
from sap_hf.planning import Plan
from sap_hf.planning.heads import split_turns
from sap_hf.runtime.heads import Arriving, HeadExchange
from sap_hf.runtime.layer import Kept, Layer, backward, forward

Tensors = tuple[torch.Tensor, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Turn:
    """Who exchanges which heads, and the layer as this rank computes it on its own."""

    exchange: HeadExchange
    layer: Layer

    def of(self, sinks: torch.Tensor | None) -> torch.Tensor | None:
        """The sinks (H,) of this rank's heads."""
        return None if sinks is None else sinks[self.exchange.mine.q]


def attend_in_turns(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    plan: Plan,
    rank: int,
    layer: Layer,
    kept: Kept | None,
) -> torch.Tensor:
    """out (C, H, Dv) of this rank's rows, from its q (C, H, D), k (C, K, D), v (C, K, Dv); differentiable."""
    group = layer.group
    assert group is not None, "heads are exchanged within a process group"
    turns = []
    for heads in split_turns(q.shape[1], k.shape[1], plan.ulysses_size, plan.turns):
        exchange, kernel = HeadExchange(group, rank, heads), layer.kernel
        if not exchange.mine.even:
            kernel = Uneven(kernel, exchange.mine.readers)
        turns.append(Turn(exchange, dataclasses.replace(layer, kernel=kernel)))
    return _InTurns.apply(q, k, v, sinks, tuple(turns), kept)  # type: ignore[no-any-return, no-untyped-call]


class _InTurns(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        sinks: torch.Tensor | None,
        turns: tuple[Turn, ...],
        kept: Kept | None,
    ) -> torch.Tensor:
        if kept is not None and kept.exchanged is not None:
            (rows, heads), computed = kept.exchanged, kept.computed or []
            buffers: list[torch.Tensor | None] = [None] * len(turns)
            kept.exchanged = kept.computed = None
        else:
            rows, heads, computed, buffers = _forward(q, k, v, sinks, turns, kept)
        saved = [(*qkv, *done, buffer) for qkv, done, buffer in zip(heads, computed, buffers, strict=True)]
        ctx.save_for_backward(sinks, *(tensor for turn in saved for tensor in turn))
        ctx.turns, ctx.shapes = turns, (q.shape, k.shape, v.shape)
        return rows

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        sinks, *saved = ctx.saved_tensors
        # What a turn has read is gone when the next one begins, unless there will be another backward.
        ctx.maybe_clear_saved_tensors()
        return *_backward(dout, sinks, saved, ctx.turns, ctx.shapes), None, None


def _forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    sinks: torch.Tensor | None,
    turns: tuple[Turn, ...],
    kept: Kept | None,
) -> tuple[torch.Tensor, list[Tensors], list[tuple[torch.Tensor, torch.Tensor]], list[torch.Tensor | None]]:
    """out of the rank's rows; and of each turn q, k and v, out and lse, and the K/V buffer, if kept."""
    recomputed = None
    if kept is not None:
        recomputed, kept.computed = kept.computed, None
    heads: list[Tensors] = []
    computed: list[tuple[torch.Tensor, torch.Tensor]] = []
    buffers: list[torch.Tensor | None] = []
    coming, home = [turns[0].exchange.to_heads(q, k, v)], list[Arriving]()

    def meanwhile() -> None:
        if computed:
            home.append(turns[len(computed) - 1].exchange.to_rows(computed[-1][:1]))
        if len(heads) < len(turns):
            coming.append(turns[len(heads)].exchange.to_heads(q, k, v))

    for number, turn in enumerate(turns):
        heads.append(coming.pop().wait())
        if recomputed is None:
            keep = turn.layer.keeps(kept)
            out, lse, buffer = forward(*heads[-1], turn.of(sinks), turn.layer, keep, meanwhile)  # type: ignore[misc]
            computed.append((out, lse))
            buffers.append(buffer)
        else:
            meanwhile()
            computed.append(recomputed[number])
            buffers.append(None)
    home.append(turns[-1].exchange.to_rows(computed[-1][:1]))
    rows = _in_order(home, turns)
    if kept is not None and recomputed is None:
        kept.computed = computed
        if turns[0].layer.keep_remote_kv:
            kept.exchanged = rows.detach(), heads
    return rows, heads, computed, buffers


def _in_order(home: list[Arriving], turns: tuple[Turn, ...]) -> torch.Tensor:
    """out (C, H, Dv) from what every neighbour sends home in every turn."""
    parts: dict[int, torch.Tensor] = {}
    for turn in turns:
        came = home.pop(0).wait()
        parts |= {its.q.start: part for its, part in zip(turn.exchange.heads, came, strict=True)}
    return torch.cat([parts[start] for start in sorted(parts)], dim=1)


def _backward(
    dout: torch.Tensor,
    sinks: torch.Tensor | None,
    saved: list[torch.Tensor],
    turns: tuple[Turn, ...],
    shapes: tuple[torch.Size, ...],
) -> tuple[torch.Tensor | None, ...]:
    """dq, dk, dv of the rank's rows and its part of dsinks.

    Args:
        saved: of each turn q, k, v, out, lse and the K/V buffer; used up.
    """
    dsinks = None if sinks is None else torch.zeros_like(sinks)
    coming, home = [turns[0].exchange.to_heads(dout)], list[Arriving]()
    computed: list[Tensors] = []

    def meanwhile() -> None:
        if computed:
            home.append(turns[len(home)].exchange.to_rows(computed.pop()))
        if len(home) + 1 < len(turns):
            coming.append(turns[len(home) + 1].exchange.to_heads(dout))

    for turn in turns:
        q, k, v, out, lse, buffer = saved[:6]
        del saved[:6]
        (its,) = coming.pop().wait()
        *gradients, of_sinks = backward(its, q, k, v, out, lse, turn.of(sinks), buffer, turn.layer, meanwhile)
        del q, k, v, out, lse, buffer, its
        computed.append(tuple(gradients))
        del gradients
        if dsinks is not None:
            dsinks[turn.exchange.mine.q] = of_sinks
    home.append(turns[-1].exchange.to_rows(computed.pop()))
    return *_sum(home, turns, shapes), dsinks


def _sum(
    home: list[Arriving], turns: tuple[Turn, ...], shapes: tuple[torch.Size, ...]
) -> tuple[torch.Tensor, ...]:
    """dq, dk and dv from what every neighbour sends home in every turn, added up in that order."""
    # What was sent is gone before there is room for the sums.
    parts = [part for _ in turns for part in home.pop(0).wait()]
    # Gradients of a kv head that went to one rank alone are not summed, and need no wider room.
    split = [its for turn in turns for its in turn.exchange.heads]
    copied = sum(its.kv_count for its in split) > shapes[1][1]
    dtype = parts[0].dtype
    dq = parts[0].new_empty(shapes[0])
    wide = torch.promote_types(dtype, torch.float32) if copied else dtype
    dk, dv = (dq.new_zeros(shape, dtype=wide) for shape in shapes[1:])
    for its, part_q, part_k, part_v in zip(split, parts[::3], parts[1::3], parts[2::3], strict=True):
        dq[:, its.q] = part_q
        dk[:, its.kv].add_(part_k)
        dv[:, its.kv].add_(part_v)
    return dq, dk.to(dtype), dv.to(dtype)
