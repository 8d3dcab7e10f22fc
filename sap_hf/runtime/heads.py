"""The exchange of heads for rows, and back: U neighbouring ranks of the cp group compute some heads of all their rows.

q_CHD -> q_RhD with R = U * C rows and h of the H heads; out_RhD -> out_CHD. q, k and v travel together. A kv head that
query heads of several ranks read goes to each of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.distributed as dist

from sap_hf.planning.heads import Heads
from sap_hf.runtime import transport


@dataclasses.dataclass(frozen=True, eq=False)
class Arriving:
    """Heads or rows on the way.

    Attributes:
        sent: what leaves; it must live until all of it has.
        parts: views of where they arrive.
    """

    pending: transport.Pending
    sent: torch.Tensor
    parts: tuple[torch.Tensor, ...]

    def wait(self) -> tuple[torch.Tensor, ...]:
        """The parts, arrived."""
        self.pending.wait()
        return self.parts


@dataclasses.dataclass(frozen=True, eq=False)
class HeadExchange:
    """Who exchanges what: the ranks [first, first + U) of the group, which hold C rows each.

    Attributes:
        rank: this process in the group.
        heads: of each of the U, in rank order.
    """

    group: dist.ProcessGroup
    rank: int
    heads: tuple[Heads, ...]

    @property
    def mine(self) -> Heads:
        """This rank's heads."""
        return self.heads[self.rank % len(self.heads)]

    def to_heads(self, *tensors: torch.Tensor) -> Arriving:
        """Start to exchange the rank's rows, all heads, for all neighbours' rows, this rank's heads.

        Args:
            tensors: (C, heads, width) each: q, and after it those of kv heads.

        Returns:
            In its parts the same tensors, (U * C, this rank's heads, width).
        """
        rows = len(tensors[0])
        ranges = [(its.q, *[its.kv] * (len(tensors) - 1)) for its in self.heads]
        widths = [
            sum((r.stop - r.start) * t.shape[2] for r, t in zip(its, tensors, strict=True)) for its in ranges
        ]
        send = tensors[0].new_empty(rows * sum(widths))
        for part, width, its in zip(send.split([rows * w for w in widths]), widths, ranges, strict=True):
            cut = [t[:, r].flatten(1) for r, t in zip(its, tensors, strict=True)]
            torch.cat(cut, dim=1, out=part.view(rows, width))
        me = self.rank % len(self.heads)
        pending, received = self._swap(send, [rows * w for w in widths], [rows * widths[me]] * len(ranges))
        merged = received.view(len(ranges) * rows, widths[me])
        shapes = [(r.stop - r.start, t.shape[2]) for r, t in zip(ranges[me], tensors, strict=True)]
        return Arriving(pending, send, _apart(merged, shapes))

    def to_rows(self, tensors: Sequence[torch.Tensor]) -> Arriving:
        """Start to bring this rank's heads of all neighbours' rows home to those who hold the rows.

        Args:
            tensors: (U * C, this rank's heads, width) each: of query heads, and after it those of kv heads.

        Returns:
            In its parts the same tensors as every neighbour computed them, one neighbour after the other, for the rows
            of this rank: (C, that neighbour's heads, width).
        """
        size = len(self.heads)
        rows = len(tensors[0]) // size
        shapes = [
            [(count, t.shape[2]) for count, t in zip((its.q_count, *[its.kv_count] * 2), tensors)]
            for its in self.heads
        ]
        merged = [tensor.flatten(1) for tensor in tensors]
        send = (merged[0] if len(merged) == 1 else torch.cat(merged, dim=1)).contiguous().view(-1)
        # Without another name, what was put together is gone before there is room for what comes.
        del merged, tensors
        widths = [sum(count * width for count, width in its) for its in shapes]
        pending, received = self._swap(
            send, [send.numel() // size] * size, [rows * width for width in widths]
        )
        parts = received.split([rows * width for width in widths])
        apart = (_apart(part.view(rows, -1), its) for part, its in zip(parts, shapes, strict=True))
        return Arriving(pending, send, tuple(tensor for its in apart for tensor in its))

    def _swap(
        self, send: torch.Tensor, sent: list[int], received: list[int]
    ) -> tuple[transport.Pending, torch.Tensor]:
        """Start sending; where it will be what neighbours send: `sent` and `received` elements each.

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
        return pending, receive


def _apart(merged: torch.Tensor, shapes: Sequence[tuple[int, int]]) -> tuple[torch.Tensor, ...]:
    """The tensors that lie side by side in merged, as views (rows, heads, width)."""
    parts = merged.split([heads * width for heads, width in shapes], dim=1)
    return tuple(part.unflatten(1, shape) for part, shape in zip(parts, shapes, strict=True))
