"""transformers without float32: its norms, rotary embeddings and losses go down to float32 for any model.

A sum in another order then moves a bit of theirs now and then, which hides errors under 1e-7. Inside
`whole_float64()` a float64 tensor stays one, in transformers' own code alone: a float64 that sap_hf loses stays lost.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def whole_float64() -> Iterator[None]:
    """Make `.float()` and `.to(torch.float32)` leave float64 tensors as they are when transformers calls them."""
    to, down = torch.Tensor.to, torch.Tensor.float

    def theirs() -> bool:
        return str(sys._getframe(2).f_globals.get("__name__", "")).startswith("transformers.")

    def keep_to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.dtype == torch.float64 and torch.float32 in (*args, *kwargs.values()) and theirs():
            return self
        return to(self, *args, **kwargs)

    def keep_float(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.dtype == torch.float64 and theirs():
            return self
        return down(self, *args, **kwargs)

    torch.Tensor.to, torch.Tensor.float = keep_to, keep_float  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.Tensor.to, torch.Tensor.float = to, down  # type: ignore[method-assign]
