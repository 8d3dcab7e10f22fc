"""Stand-ins for the transport: one that delivers as late as it may, one that counts.

gloo hides what CUDA punishes: a buffer read before its data has arrived, or written while it is still
being sent. LateTransport makes both visible on any machine.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from sap_hf.runtime.transport import Transport


class LateTransport(Transport):
    """Receive buffers hold NaN from post on; data moves only inside wait().

    Attributes:
        posted, waited: exchanges begun and ended so far.
    """

    def __init__(self) -> None:
        self.posted = 0
        self.waited = 0

    def post(self, sends: Any, receives: Any, group: Any) -> Any:
        begin = super().post
        buffers = [tensor for _, tensor in sends], [tensor for _, tensor in receives]
        return LatePending(self, *buffers, lambda: begin(sends, receives, group))

    def post_all_to_all(self, send: Any, receive: Any, send_rows: Any, receive_rows: Any, group: Any) -> Any:
        begin = super().post_all_to_all
        return LatePending(
            self, [send], [receive], lambda: begin(send, receive, send_rows, receive_rows, group)
        )

    def post_all_gather(self, send: Any, receive: Any, group: Any) -> Any:
        begin = super().post_all_gather
        others = [part for part in receive.split(len(send)) if part.data_ptr() != send.data_ptr()]
        return LatePending(self, [send], others, lambda: begin(send, receive, group))


class LatePending:
    """An exchange that has not begun, whatever its caller believes."""

    def __init__(
        self,
        transport: LateTransport,
        sends: list[torch.Tensor],
        receives: list[torch.Tensor],
        begin: Callable[[], Any],
    ):
        transport.posted += 1
        self.transport = transport
        self.sends = [(tensor, tensor.clone()) for tensor in sends]
        self.receives = receives
        self.begin: Callable[[], Any] | None = begin
        for tensor in receives:
            tensor.fill_(float("nan"))

    def wait(self) -> None:
        """Exchange now."""
        assert self.begin is not None, "an exchange was waited for twice"
        for tensor, as_posted in self.sends:
            assert torch.equal(tensor, as_posted), "a buffer was written while it was being sent"
        for tensor in self.receives:
            assert tensor.isnan().all(), "a buffer was written while it was being received into"
        begin, self.begin = self.begin, None
        begin().wait()
        self.transport.waited += 1


class CountingTransport(Transport):
    """Moves everything at once, as usual, and counts.

    Attributes:
        bytes_received: since the last take().
    """

    def __init__(self) -> None:
        self.bytes_received = 0

    def take(self) -> int:
        """Bytes received since the last take()."""
        taken, self.bytes_received = self.bytes_received, 0
        return taken

    def post(self, sends: Any, receives: Any, group: Any) -> Any:
        self.bytes_received += sum(tensor.numel() * tensor.element_size() for _, tensor in receives)
        return super().post(sends, receives, group)

    def post_all_to_all(self, send: Any, receive: Any, send_rows: Any, receive_rows: Any, group: Any) -> Any:
        self.bytes_received += receive.numel() * receive.element_size()
        return super().post_all_to_all(send, receive, send_rows, receive_rows, group)

    def post_all_gather(self, send: Any, receive: Any, group: Any) -> Any:
        self.bytes_received += (receive.numel() - send.numel()) * receive.element_size()
        return super().post_all_gather(send, receive, group)
