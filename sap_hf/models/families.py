"""Which models are exact, and where their attention layers are.

A family is listed here when its logits, loss and all gradients over several ranks equal every document run alone
(tests/models). Anything else is refused by name: a model can hide a mask, mix neighbouring tokens or drop keyword
arguments, and would then train on something else without a word.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

from sap_hf.errors import UnsupportedAttention
from sap_hf.models.table import entry_of

# model_type of the text config.
EXACT_FAMILIES = (
    "codegen",
    "gemma2",
    "gemma3_text",
    "gptj",
    "granite",
    "llama",
    "mistral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
)


def attention_layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The modules that compute attention, by name.

    Raises:
        UnsupportedAttention: a family that is not exact here, or a layer of one that cannot be.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise UnsupportedAttention(
            f"{type(model).__name__} is not a transformers model: it has no config to tell what its attention means."
        )
    family = config.get_text_config().model_type
    layers = {name: module for name, module in model.named_modules() if _is_attention(module)}
    classes = ", ".join(sorted({type(layer).__name__ for layer in layers.values()})) or "no attention class"
    if family not in EXACT_FAMILIES or config.model_type != family:
        raise UnsupportedAttention(
            f"{config.model_type}: {type(model).__name__} ({classes}) has not been shown to be exact when a pack is "
            f"split over ranks.\n  Exact families: {', '.join(EXACT_FAMILIES)}."
        )
    for name, layer in layers.items():
        reason = _why_not(layer)
        if reason:
            raise UnsupportedAttention(f"{config.model_type}: {name} ({type(layer).__name__}) {reason}")
    if not layers:
        raise UnsupportedAttention(
            f"{config.model_type}: {type(model).__name__} has no attention layer to patch."
        )
    return layers


def windows(model: torch.nn.Module) -> dict[int | None, int]:
    """{window: number of layers} as the config states it; None is full attention."""
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return {window: config.num_hidden_layers}
    return dict(Counter(window if kind == "sliding_attention" else None for kind in kinds))


def honours_interface(layer: torch.nn.Module) -> bool:
    """Whether the layer's forward asks transformers' attention interface what to call."""
    forward: Any = type(layer).forward
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    return "ALL_ATTENTION_FUNCTIONS" in forward.__code__.co_names


def _is_attention(module: torch.nn.Module) -> bool:
    return type(module).__name__.endswith("Attention") and hasattr(module, "layer_idx")


def _why_not(layer: torch.nn.Module) -> str | None:
    """Why this layer cannot be exact, or None."""
    if not honours_interface(layer) and entry_of(type(layer)) is None:
        return "bypasses transformers' attention interface and is not in the patch table."
    if getattr(layer, "is_causal", True) is not True:
        return "attends in both directions; packs are split for causal attention only."
    dropout = getattr(layer, "attention_dropout", 0.0)
    if isinstance(getattr(layer, "attn_dropout", None), torch.nn.Dropout):
        dropout = layer.attn_dropout.p
    if isinstance(dropout, float) and dropout > 0:
        return (
            f"has attention_dropout={dropout}, whose random mask cannot be shared by ranks.\n"
            "  Set the config's attention dropout to 0.0."
        )
    return None
