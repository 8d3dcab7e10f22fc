"""torch.empty and its relatives, filled with NaN: memory that is read before it is written shows.

Floating tensors only. The sum of a test that reads stale memory is then NaN instead of, by luck, right.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from sap_hf.runtime.arena import Arena

# Owner and name of every way in which code asks torch for memory that nobody has written.
UNWRITTEN = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
    (Arena, "take"),
)


def _filled(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        made = make(*args, **kwargs)
        if made.is_floating_point() and made.device.type != "meta":
            # An `empty` that requires grad is a leaf, and autograd lets nobody write a leaf in place.
            with torch.no_grad():
                made.detach().fill_(float("nan"))
        return made

    return poisoned


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """Inside this block, unwritten floating memory holds NaN."""
    kept = [(owner, name, getattr(owner, name)) for owner, name in UNWRITTEN]
    try:
        for owner, name, make in kept:
            setattr(owner, name, _filled(make))
        yield
    finally:
        for owner, name, make in kept:
            setattr(owner, name, make)
