"""Bytes that are alive: every storage that an operator makes, from its making to its end."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from sap_hf.runtime.transport import Pending, Transport


class LiveBytes(TorchDispatchMode):
    """Counts storages met inside the block, `given` apart; `peak` is the most that were alive at once."""

    def __init__(self, *given: torch.Tensor) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet(tensor.untyped_storage() for tensor in given)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._meet(tensor.untyped_storage())
        return result

    def _meet(self, storage: Any) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self.live -= size


class CopyingTransport(Transport):
    """Gives gloo copies that nobody counts: its threads let go of a message some time after the wait for it."""

    def post_all_to_all(
        self, send: Any, receive: Any, send_rows: Any, receive_rows: Any, group: Any
    ) -> Pending:
        with _disable_current_modes():
            there = torch.empty_like(receive)
            begun = super().post_all_to_all(send.clone(), there, send_rows, receive_rows, group)
        return _Copying(begun, receive, there, send)


class _Copying(Pending):
    def __init__(
        self, begun: Pending, receive: torch.Tensor, there: torch.Tensor, send: torch.Tensor
    ) -> None:
        # As any exchange, it holds what is sent and received until it is over.
        super().__init__([], send)
        self._begun, self._receive, self._there = begun, receive, there

    def wait(self) -> None:
        self._begun.wait()
        with _disable_current_modes():
            self._receive.copy_(self._there)
