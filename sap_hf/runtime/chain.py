"""Chain: rows and states that a rank passes to the next one, and their gradients that come back.

Ranks in the order of their rows, tensor -> the tensor of the rank before. What mixes neighbouring tokens (a
convolution, a recurrence) needs a little of the rank before it, where a document goes on from there. A backward runs
these in the reverse order of the forward on every rank, so that the messages of two ranks match.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.distributed as dist

from sap_hf.runtime import transport


@dataclasses.dataclass(frozen=True, eq=False)
class Chain:
    """The neighbours of this rank that something passes between; None where nothing does."""

    group: dist.ProcessGroup | None
    left: int | None
    right: int | None

    def shift(self, rows: torch.Tensor) -> torch.Tensor:
        """The `rows` of the rank before, of the same shape and dtype; zeros where nothing comes from there.

        Nobody waits for more than the rows of its own neighbours.
        """
        shifted: torch.Tensor = _Shift.apply(rows, self)  # type: ignore[no-untyped-call]
        return shifted

    def receive(self, anchor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """What the rank before sends; zeros where nothing comes from there.

        Args:
            anchor: on the device that it comes to; requires grad exactly where the rank before's tensor does.
        """
        received: torch.Tensor = _Receive.apply(anchor, shape, dtype, self)  # type: ignore[no-untyped-call]
        return received

    def send(self, out: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """Send `state` to the next rank; returns `out`, whose backward waits for the gradient of the state."""
        sent: torch.Tensor = _Send.apply(out, state, self)  # type: ignore[no-untyped-call]
        return sent

    def _exchange(
        self, sent: torch.Tensor | None, to: int | None, came: torch.Tensor, of: int | None
    ) -> None:
        """Send to one neighbour while `came` is filled by another one; both may be nobody."""
        sends = [] if to is None or sent is None else [(to, sent.contiguous())]
        receives = [] if of is None else [(of, came)]
        if self.group is not None and (sends or receives):
            transport.current().post(sends, receives, self.group).wait()


class _Shift(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, chain: Chain) -> torch.Tensor:
        ctx.chain = chain
        came = torch.zeros_like(rows, memory_format=torch.contiguous_format)
        chain._exchange(rows, chain.right, came, chain.left)
        return came

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        came = torch.zeros_like(gradient, memory_format=torch.contiguous_format)
        ctx.chain._exchange(gradient, ctx.chain.left, came, ctx.chain.right)
        return came, None


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, anchor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, chain: Chain
    ) -> torch.Tensor:
        ctx.chain = chain
        came = anchor.new_zeros(shape, dtype=dtype)
        chain._exchange(None, None, came, chain.left)
        return came

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, ...]:
        ctx.chain._exchange(gradient, ctx.chain.left, gradient, None)
        return None, None, None, None


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, state: torch.Tensor, chain: Chain) -> torch.Tensor:
        ctx.chain, ctx.shape, ctx.dtype = chain, state.shape, state.dtype
        chain._exchange(state, chain.right, state, None)
        return out.view_as(out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        if not ctx.needs_input_grad[1]:
            return gradient, None, None
        came = gradient.new_zeros(ctx.shape, dtype=ctx.dtype)
        ctx.chain._exchange(None, None, came, ctx.chain.right)
        return gradient, came, None
