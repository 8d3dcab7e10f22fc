"""Arena: the memory in which every layer receives, one after the other.

A layer's buffers are gone when it returns, and the next layer wants the same ones. They are taken from one block that
stays, as large as the largest plan so far needs, instead of fragmenting the allocator with sizes that change per batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


class Arena:
    """Buffers in a row in one block per dtype. What was taken is valid until the next `clear`."""

    def __init__(self) -> None:
        self._blocks: dict[torch.dtype, torch.Tensor] = {}
        self._used: dict[torch.dtype, int] = {}

    def clear(self, device: torch.device, sizes: dict[torch.dtype, int]) -> None:
        """Start again, with room for `sizes` elements of each dtype."""
        self._used = dict.fromkeys(sizes, 0)
        for dtype, size in sizes.items():
            if dtype not in self._blocks or self._blocks[dtype].numel() < size:
                # The old block goes first: both at once would be the peak.
                self._blocks.pop(dtype, None)
                self._blocks[dtype] = torch.empty(size, dtype=dtype, device=device)

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """The next elements of the block, uninitialised."""
        start, size = self._used[dtype], math.prod(shape)
        assert start + size <= self._blocks[dtype].numel(), "the arena was cleared for less than is taken"
        self._used[dtype] = start + size
        return self._blocks[dtype][start : start + size].view(*shape)

    @property
    def bytes(self) -> int:
        """Held now."""
        return sum(block.numel() * block.element_size() for block in self._blocks.values())


_arenas: dict[object, Arena] = {}


def arena(like: torch.Tensor, sizes: dict[torch.dtype, int]) -> Arena:
    """The arena of the current stream of `like`'s device, cleared: a stream runs its work in the order of the calls."""
    space = Arena()
    # A subclass (a fake tensor, while shapes are traced) has no stream, and must not leave its memory to real ones.
    if type(like) is torch.Tensor:
        stream = torch.cuda.current_stream(like.device).cuda_stream if like.is_cuda else 0
        space = _arenas.setdefault((like.device, stream), space)
    space.clear(like.device, sizes)
    return space


def free() -> None:
    """Give the memory of all arenas back to the allocator."""
    _arenas.clear()
