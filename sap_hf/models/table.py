"""The patch table: classes of transformers that are patched one by one, at class level.

They are attention classes that never ask transformers' attention interface, or hide from it what matters, and layers
that mix neighbouring tokens without attention. One entry names the method that is replaced and the function that does
its work. The patched method goes there while a pack is sharded and to the original at all other times, so a patched and
an unpatched model of one class live side by side.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from sap_hf.errors import UnsupportedAttention
from sap_hf.models import bypass, delta_net, lightning, mamba, rg_lru, short_conv
from sap_hf.models.bypass import Call, heads_given
from sap_hf.models.interface import KEYWORD, NAME, originals, state


@dataclasses.dataclass(frozen=True)
class Entry:
    """How to patch one class.

    Attributes:
        method: what is replaced.
        sharded: takes a Call and the method's arguments, and returns what the method does.
        dropout: the probability at which a layer drops attention weights in training.
    """

    method: str
    sharded: Callable[..., Any]
    dropout: Callable[[Any], float] = lambda layer: 0.0


def _given_the_keyword(call: Call, *args: Any, **kwargs: Any) -> Any:
    """For a class that asks the interface, but whose block keeps keyword arguments from it."""
    return call.original(call.layer, *args, **{**kwargs, KEYWORD: call.shard})


def _given_its_window(call: Call, *args: Any, **kwargs: Any) -> Any:
    """For a class that asks the interface, but tells its window to nobody but its mask."""
    window = getattr(call.layer, "sliding_window", None)
    return call.original(call.layer, *args, **{**kwargs, "sliding_window": window})


def _mixing(function: Callable[..., Any]) -> Entry:
    """For a layer that mixes neighbouring tokens: seen as soon as it is called."""

    def sharded(call: Call, *args: Any, **kwargs: Any) -> Any:
        call.shard.seen.add(id(call.layer))
        return function(call, *args, **kwargs)

    return Entry("forward", sharded)


MIXERS = {
    name: _mixing(function)
    for module in (delta_net, lightning, mamba, rg_lru, short_conv)
    for name, function in module.MIXERS.items()
}
TABLE = {
    **MIXERS,
    "Attention": Entry("_attn", bypass.openai, lambda layer: layer.attn_dropout.p),
    "BloomAttention": Entry("forward", bypass.bloom, lambda layer: layer.attention_dropout.p),
    "CodeGenAttention": Entry("_attn", heads_given(lambda layer: 1 / float(layer.scale_attn))),
    # Without alibi it drops nothing.
    "FalconAttention": Entry(
        "forward", bypass.falcon, lambda layer: layer.attention_dropout.p if layer.config.alibi else 0.0
    ),
    "GPTJAttention": Entry("_attn", heads_given(lambda layer: 1 / float(layer.scale_attn))),
    "GPTNeoSelfAttention": Entry(
        "_attn",
        heads_given(
            lambda layer: 1.0,
            lambda layer: layer.config.window_size if layer.attention_type == "local" else None,
        ),
        lambda layer: layer.attn_dropout.p,
    ),
    "GPTNeoXJapaneseAttention": Entry(
        "_attn",
        heads_given(lambda layer: 1 / float(layer.norm_factor)),
        lambda layer: layer.attention_dropout.p,
    ),
    "Llama4TextAttention": Entry("forward", bypass.llama4),
    "MptAttention": Entry("forward", bypass.mpt, lambda layer: layer.attn_dropout_p),
    "NemotronAttention": Entry("forward", _given_the_keyword),
    "PhimoeAttention": Entry("forward", bypass.phimoe),
    "Qwen2MoeAttention": Entry("forward", _given_its_window),
    "StableLmAttention": Entry("forward", _given_the_keyword),
    "XGLMAttention": Entry("forward", bypass.xglm, lambda layer: layer.dropout),
}


def entry_of(cls: type) -> Entry | None:
    """How to patch this class; None where it is not in the table, or asks the interface (as from transformers 5.24)."""
    entry = TABLE.get(cls.__name__)
    return entry if entry is not None and hasattr(cls, entry.method) else None


def mixes(cls: type) -> bool:
    """Whether the layer mixes neighbouring tokens outside attention, and is in the table."""
    return cls.__name__ in MIXERS and entry_of(cls) is not None


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
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        # The keyword is there in a recompute too, when the state is not.
        shard = kwargs.get(KEYWORD) or state.shard
        if shard is None or id(self) not in shard.layers:
            return _as_before(original, self, *args, **kwargs)
        if self.training and entry.dropout(self):
            raise UnsupportedAttention(
                f"{type(self).__name__} has attention dropout {entry.dropout(self)}, whose random mask cannot be "
                "shared by ranks.\n  Set the config's attention dropout to 0.0."
            )
        return entry.sharded(Call(self, shard, original), *args, **kwargs)

    return method


def _as_before(original: Callable[..., Any], layer: Any, *args: Any, **kwargs: Any) -> Any:
    """The original method under the name that the model had: some choose by it what to compute."""
    config = getattr(layer, "config", None)
    if config is None or config._attn_implementation != NAME:
        return original(layer, *args, **kwargs)
    config._attn_implementation_internal = originals.get(id(config), "sdpa")
    try:
        return original(layer, *args, **kwargs)
    finally:
        config._attn_implementation_internal = NAME


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
