"""The exchange of heads for rows, and back: U neighbouring ranks of the cp group compute some heads of all their rows.

q_CHD -> q_RhD with R = U * C rows and h of the H heads; out_RhD -> out_CHD. q, k and v travel together. A kv
head that query heads of several ranks read goes to each of them, and its gradients are summed in rank order.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist

from sap_hf.planning.heads import Heads, split_heads
from sap_hf.runtime import transport


@dataclasses.dataclass(eq=False)
class Kept:
    """What one checkpointed layer holds between its forward, which leaves it here, and its recompute, which takes it.

    Attributes:
        tensors: out and lse, so that nothing is computed again.
        heads: q, k and v of all neighbours' rows, and rows: out of the rank's own, so that no heads are exchanged
            again; with remote_kv="keep" alone.
    """

    tensors: tuple[torch.Tensor, torch.Tensor] | None = None
    heads: tuple[torch.Tensor, ...] | None = None
    rows: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class HeadExchange:
    """Who exchanges what: the ranks [first, first + U) of the group, which hold C rows each.

    Attributes:
        rank: this process in the group.
        heads: U, in rank order.
    """

    group: dist.ProcessGroup
    rank: int
    heads: tuple[Heads, ...]

    @classmethod
    def of(
        cls, q: torch.Tensor, k: torch.Tensor, group: dist.ProcessGroup, rank: int, size: int
    ) -> HeadExchange:
        """For q (C, H, D) and k (C, K, D), among `size` neighbours."""
        return cls(group, rank, split_heads(q.shape[1], k.shape[1], size))

    @property
    def mine(self) -> Heads:
        """This rank's heads."""
        return self.heads[self.rank % len(self.heads)]

    def scatter(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, kept: Kept | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q (U*C, h, D), k (U*C, h_kv, D), v (U*C, h_kv, Dv) of all neighbours' rows; differentiable."""
        return _Scatter.apply(q, k, v, self, kept)  # type: ignore[no-any-return, no-untyped-call]

    def gather(self, out: torch.Tensor, kept: Kept | None = None) -> torch.Tensor:
        """(C, H, Dv) of this rank's rows from (U*C, h, Dv); differentiable."""
        return _Gather.apply(out, self, kept)  # type: ignore[no-any-return, no-untyped-call]

    def swap(self, send: torch.Tensor, sent: list[int], received: list[int]) -> torch.Tensor:
        """What neighbours send to this rank: flat `send` and the result hold `sent` and `received` elements each.

        Messages among neighbours, and no collective of the whole group: that has empty ones for all other ranks, which
        gloo sends, and which wait behind rows on the way to other nodes.
        """
        me = self.rank % len(self.heads)
        receive = send.new_empty(sum(received))
        leaving, coming = send.split(sent), receive.split(received)
        sends, receives = (
            [(self.rank - me + peer, part) for peer, part in enumerate(parts) if peer != me]
            for parts in (leaving, coming)
        )
        pending = transport.current().post(sends, receives, self.group)
        coming[me].copy_(leaving[me])
        pending.wait()
        return receive

    def to_heads(self, tensors: tuple[torch.Tensor, ...], ranges: list[tuple[slice, ...]]) -> torch.Tensor:
        """(U * C, width): this rank's heads of all neighbours' rows, the tensors side by side.

        Args:
            tensors: (C, heads, width) each.
            ranges: for each neighbour, its heads of each tensor.
        """
        rows = len(tensors[0])
        widths = [
            sum((r.stop - r.start) * t.shape[2] for r, t in zip(its, tensors, strict=True)) for its in ranges
        ]
        send = tensors[0].new_empty(rows * sum(widths))
        for part, width, its in zip(send.split([rows * w for w in widths]), widths, ranges, strict=True):
            cut = [t[:, r].flatten(1) for r, t in zip(its, tensors, strict=True)]
            torch.cat(cut, dim=1, out=part.view(rows, width))
        mine = widths[self.rank % len(self.heads)]
        received = self.swap(send, [rows * w for w in widths], [rows * mine] * len(ranges))
        return received.view(len(ranges) * rows, mine)

    def to_rows(self, merged: torch.Tensor, widths: list[int]) -> tuple[torch.Tensor, ...]:
        """For each neighbour, what it computed for this rank's rows, (C, its width).

        Args:
            merged: (U * C, width) of this rank's heads, for all neighbours' rows.
        """
        size = len(widths)
        rows = len(merged) // size
        send = merged.contiguous().view(-1)
        received = self.swap(send, [send.numel() // size] * size, [rows * width for width in widths])
        return tuple(
            part.view(rows, width)
            for part, width in zip(received.split([rows * w for w in widths]), widths, strict=True)
        )


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        exchange: HeadExchange,
        kept: Kept | None,
    ) -> tuple[torch.Tensor, ...]:
        ctx.exchange, ctx.shapes = exchange, (q.shape, k.shape, v.shape)
        if kept is not None and kept.heads is not None:
            held, kept.heads = kept.heads, None
            return held
        merged = exchange.to_heads((q, k, v), [(its.q, its.kv, its.kv) for its in exchange.heads])
        parts = _apart(merged, _widths(exchange.mine, ctx.shapes))
        if kept is not None:
            kept.heads = tuple(part.detach() for part in parts)
        return parts

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        exchange, shapes = ctx.exchange, ctx.shapes
        widths = [_widths(its, shapes) for its in exchange.heads]
        # Without a name, what leaves is gone when the gradients of this rank's rows have come.
        parts = exchange.to_rows(
            torch.cat([gradient.flatten(1) for gradient in gradients], dim=1),
            [sum(h * d for h, d in its) for its in widths],
        )
        dtype = parts[0].dtype
        # Gradients of a kv head that went to one rank alone are not summed, and need no wider room.
        shared = sum(its.kv_count for its in exchange.heads) > shapes[1][1]
        wide = torch.promote_types(dtype, torch.float32) if shared else dtype
        dq = parts[0].new_empty(shapes[0])
        dk, dv = (parts[0].new_zeros(shape, dtype=wide) for shape in shapes[1:])
        for its, width, part in zip(exchange.heads, widths, parts, strict=True):
            part_q, part_k, part_v = _apart(part, width)
            dq[:, its.q] = part_q
            dk[:, its.kv].add_(part_k)
            dv[:, its.kv].add_(part_v)
        return dq, dk.to(dtype), dv.to(dtype), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, exchange: HeadExchange, kept: Kept | None) -> torch.Tensor:
        ctx.exchange, (rows, _, width) = exchange, out.shape
        if kept is not None and kept.rows is not None:
            held, kept.rows = kept.rows, None
            return held
        parts = exchange.to_rows(out.flatten(1), [its.q_count * width for its in exchange.heads])
        gathered = torch.cat(parts, dim=1).view(rows // len(parts), -1, width)
        if kept is not None:
            kept.rows = gathered.detach()
        return gathered

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        exchange: HeadExchange = ctx.exchange
        merged = exchange.to_heads((gradient,), [(its.q,) for its in exchange.heads])
        return merged.view(len(merged), exchange.mine.q_count, -1), None, None


def _widths(heads: Heads, shapes: tuple[torch.Size, ...]) -> list[tuple[int, int]]:
    """(heads, width of one) of q, k and v."""
    counts = (heads.q_count, heads.kv_count, heads.kv_count)
    return [(count, shape[2]) for count, shape in zip(counts, shapes, strict=True)]


def _apart(merged: torch.Tensor, widths: list[tuple[int, int]]) -> tuple[torch.Tensor, ...]:
    """The tensors that lie side by side in merged, as views (rows, heads, width)."""
    parts = merged.split([heads * width for heads, width in widths], dim=1)
    return tuple(part.unflatten(1, shape) for part, shape in zip(parts, widths, strict=True))
