"""Transport: the only place that talks to torch.distributed while a layer runs.

Tensors and peers -> a Pending to wait on. Nothing here builds a communicator: grouped point-to-point and the uneven
all-to-all and the all-gather use the group's existing one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

Message = tuple[int, torch.Tensor]


class Pending:
    """Communication under way. `wait` returns when all of it, sends included, is done with its buffers."""

    def __init__(self, works: Sequence[dist.Work], *buffers: torch.Tensor):
        self.works = works
        # Memory freed while a message is under way would be handed to someone else.
        self.buffers = buffers

    def wait(self) -> None:
        """Block the host (gloo) or the current stream (NCCL) until everything has arrived and has been sent."""
        for work in self.works:
            work.wait()


class Transport:
    """Starts exchanges. Tests put a double in its place with `using`."""

    def post(
        self, sends: Sequence[Message], receives: Sequence[Message], group: dist.ProcessGroup
    ) -> Pending:
        """Start one group of point-to-point messages.

        Args:
            sends, receives: (rank in the group, contiguous tensor). Between two ranks messages match in order.
        """
        operations = [
            dist.P2POp(dist.irecv, tensor, group=group, group_peer=peer) for peer, tensor in receives
        ]
        operations += [dist.P2POp(dist.isend, tensor, group=group, group_peer=peer) for peer, tensor in sends]
        return Pending(dist.batch_isend_irecv(operations) if operations else [])

    def post_all_to_all(
        self,
        send: torch.Tensor,
        receive: torch.Tensor,
        send_rows: list[int],
        receive_rows: list[int],
        group: dist.ProcessGroup,
    ) -> Pending:
        """Start one uneven all-to-all over the rows of `send` and `receive`; every rank of the group takes part."""
        work = dist.all_to_all_single(receive, send, receive_rows, send_rows, group=group, async_op=True)
        return Pending([work], send, receive)

    def post_all_gather(self, send: torch.Tensor, receive: torch.Tensor, group: dist.ProcessGroup) -> Pending:
        """Start one all-gather of `send` into `receive`, in rank order; `send` may be its own part of `receive`."""
        gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
        return Pending([gather(receive, send, group=group, async_op=True)], send, receive)


_current = Transport()


def current() -> Transport:
    """The transport in use."""
    return _current


@contextlib.contextmanager
def using(transport: Transport) -> Iterator[Transport]:
    """Use another transport inside the block, in every thread."""
    global _current
    before, _current = _current, transport
    try:
        yield transport
    finally:
        _current = before
