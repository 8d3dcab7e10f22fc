"""The patch table: attention classes that never ask transformers' attention interface, patched at class level.

One entry names the method that gets q, k, v after all that comes before attention (projections, norms, rotary
embeddings). The patched method goes to `sap_hf` while a pack is sharded and to the original at all other times, so a
patched and an unpatched model of one class live side by side.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch

from sap_hf.models.interface import share_attention, state


@dataclasses.dataclass(frozen=True)
class Entry:
    """How to patch one class.

    Attributes:
        method: takes (self, query, key, value, attention_mask, ...), each (1, H, C, D), and returns
            (out (1, H, C, D), weights).
        scale: the factor on q . k of a layer.
    """

    method: str
    scale: Callable[[Any], float]


TABLE = {
    "CodeGenAttention": Entry("_attn", lambda layer: 1 / float(layer.scale_attn)),
    "GPTJAttention": Entry("_attn", lambda layer: 1 / float(layer.scale_attn)),
}


def entry_of(cls: type) -> Entry | None:
    """How to patch this class; None where it is not in the table, or asks the interface (as from transformers 5.24)."""
    entry = TABLE.get(cls.__name__)
    return entry if entry is not None and hasattr(cls, entry.method) else None


# Patched classes and the number of patched models that need each.
_in_use: Counter[type] = Counter()


def install(classes: Iterable[type]) -> None:
    """Patch the classes, once for all models that need them."""
    for cls in classes:
        if not _in_use[cls]:
            entry = entry_of(cls)
            assert entry is not None, f"{cls.__name__} is not in the patch table"
            setattr(cls, entry.method, _patched(getattr(cls, entry.method), entry))
        _in_use[cls] += 1


def uninstall(classes: Iterable[type]) -> None:
    """Give the original methods back when no patched model is left that needs them."""
    for cls in classes:
        _in_use[cls] -= 1
        if not _in_use[cls]:
            name = TABLE[cls.__name__].method
            setattr(cls, name, getattr(cls, name).__wrapped__)


def bind_recompute(blocks: Iterable[Any]) -> None:
    """Let a checkpointed block's recompute find the shard of its own forward.

    These classes drop keyword arguments, so the shard travels in the thread's state; the recompute runs long after the
    forward has cleared it, perhaps in another thread and after another batch's forward.
    """
    for block in blocks:
        function = getattr(block, "_gradient_checkpointing_func", None)
        if function is not None and not hasattr(function, "binds_shard"):
            block._gradient_checkpointing_func = _binding(function)


def _patched(original: Callable[..., Any], entry: Entry) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(
        self: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        shard = state.shard
        if shard is None or id(self) not in shard.layers:
            return original(self, query, key, value, *args, **kwargs)
        out = share_attention(self, shard, query, key, value, scaling=entry.scale(self))
        return out.transpose(1, 2), None

    return method


def _binding(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(checkpoint)
    def bound_checkpoint(run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        shard = state.shard

        def bound_run(*inner: Any, **named: Any) -> Any:
            before, state.shard = state.shard, shard
            try:
                return run(*inner, **named)
            finally:
                state.shard = before

        return checkpoint(bound_run, *args, **kwargs)

    bound_checkpoint.binds_shard = True  # type: ignore[attr-defined]
    return bound_checkpoint
