"""Profile: a transport that counts what this rank sends and times what it waits for, and leaves the rest to another.

A Transport -> the same, and a Reading of bytes by level and of seconds. It adds no communication, and no device is
synchronised before a Reading is taken.
"""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist

from sap_hf.runtime.transport import Message, Pending, Transport


@dataclasses.dataclass(frozen=True)
class Reading:
    """What one rank did between two readings.

    Attributes:
        bytes_inside_node, bytes_between_nodes: sent to ranks of its own node, and of others.
        wait_seconds: on CPUs, how long the host stood in `Pending.wait`; on CUDA, how long the compute stream stood
            still there (which the host does not notice).
    """

    bytes_inside_node: int
    bytes_between_nodes: int
    wait_seconds: float


class Meter(Transport):
    """Counts and times the exchanges that it hands on to `inner`.

    What is counted is what is posted: an all-gather counts each rank's rows once for each other rank, whatever way
    through the ranks the library takes.

    Attributes:
        ranks_per_node: ranks of the run that follow each other and share a node.
        on: whether to count; else exchanges are only handed on.
    """

    def __init__(self, inner: Transport, ranks_per_node: int = 1, on: bool = True):
        self.inner, self.ranks_per_node, self.on = inner, ranks_per_node, on
        self._sent = [0, 0]
        self._wait_seconds = 0.0
        self._stalls: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def take(self) -> Reading:
        """Bytes and seconds since the last take; waits for the device to have done all waits so far."""
        if self._stalls:
            self._stalls[-1][1].synchronize()
        self._add_stalls()
        reading = Reading(self._sent[0], self._sent[1], self._wait_seconds)
        self._sent, self._wait_seconds = [0, 0], 0.0
        return reading

    def post(
        self, sends: Sequence[Message], receives: Sequence[Message], group: dist.ProcessGroup
    ) -> Pending:
        """As of `inner`."""
        pending = self.inner.post(sends, receives, group)
        sizes = ((peer, tensor.nbytes) for peer, tensor in sends)
        return self._counted(pending, sizes, any(tensor.is_cuda for _, tensor in (*sends, *receives)), group)

    def post_all_to_all(
        self,
        send: torch.Tensor,
        receive: torch.Tensor,
        send_rows: list[int],
        receive_rows: list[int],
        group: dist.ProcessGroup,
    ) -> Pending:
        """As of `inner`."""
        pending = self.inner.post_all_to_all(send, receive, send_rows, receive_rows, group)
        row_bytes = send.nbytes // max(len(send), 1)
        sizes = ((peer, rows * row_bytes) for peer, rows in enumerate(send_rows))
        return self._counted(pending, sizes, send.is_cuda, group)

    def post_all_gather(self, send: torch.Tensor, receive: torch.Tensor, group: dist.ProcessGroup) -> Pending:
        """As of `inner`."""
        pending = self.inner.post_all_gather(send, receive, group)
        sizes = ((peer, send.nbytes) for peer in range(dist.get_world_size(group)))
        return self._counted(pending, sizes, send.is_cuda, group)

    def _counted(
        self, pending: Pending, sizes: Iterable[tuple[int, int]], cuda: bool, group: dist.ProcessGroup
    ) -> Pending:
        """Add bytes by (rank in the group); the pending exchange, timed."""
        if not self.on:
            return pending
        ranks, me = dist.get_process_group_ranks(group), dist.get_rank()
        for peer, size in sizes:
            there = ranks[peer]
            if there != me:
                self._sent[there // self.ranks_per_node != me // self.ranks_per_node] += size
        return _Timed(pending, self, cuda)

    def waited(self, pending: Pending, cuda: bool) -> None:
        """Wait, and remember for how long."""
        if not cuda:
            started = time.perf_counter()
            pending.wait()
            self._wait_seconds += time.perf_counter() - started
            return
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        pending.wait()
        after.record()
        self._stalls.append((before, after))
        # Between two readings there may be a million of them: those that are over are added up on the way.
        self._add_stalls()

    def _add_stalls(self) -> None:
        while self._stalls and self._stalls[0][1].query():
            before, after = self._stalls.popleft()
            self._wait_seconds += before.elapsed_time(after) / 1e3


class _Timed(Pending):
    """A pending exchange that tells its meter how long it was waited for."""

    def __init__(self, pending: Pending, meter: Meter, cuda: bool):
        super().__init__(())
        self._pending, self._meter, self._cuda = pending, meter, cuda

    def wait(self) -> None:
        self._meter.waited(self._pending, self._cuda)
