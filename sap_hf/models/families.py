"""Which models are exact, and where their attention layers are.

A family is listed here when its logits, loss and all gradients over several ranks equal every document run alone
(tests/models). Anything else is refused by name: a model can hide a mask, mix neighbouring tokens or drop keyword
arguments, and would then train on something else without a word.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
import transformers
from accelerate.utils import compare_versions

from sap_hf.errors import UnsupportedAttention
from sap_hf.models.table import entry_of, mixes

# model_type of the config that the model itself is built from.
EXACT_FAMILIES = (
    "afmoe",
    "apertus",
    "apertus1p5_text",
    "arcee",
    "aria_text",
    "axk1",
    "bailing_hybrid",
    "bamba",
    "beam",
    "bert",
    "bert-generation",
    "biogpt",
    "bitnet",
    "bloom",
    "camembert",
    "codegen",
    "cohere",
    "cohere2",
    "cohere2_moe",
    "cohere_compass_text",
    "ctrl",
    "cwm",
    "data2vec-text",
    "dbrx",
    "deepseek_v2",
    "deepseek_v3",
    "diffllama",
    "dory",
    "dots1",
    "electra",
    "emu3_text_model",
    "ernie",
    "ernie4_5",
    "ernie4_5_moe",
    "exaone",
    "exaone4",
    "exaone_moe",
    "falcon",
    "falcon_h1",
    "falcon_mamba",
    "flex_olmo",
    "flint",
    "gemma",
    "gemma2",
    "gemma3_text",
    "gemma3n_text",
    "gemma4_text",
    "gemma4_unified_text",
    "glm",
    "glm4",
    "glm4_moe",
    "glm4_moe_lite",
    "gpt2",
    "gpt_bigcode",
    "gpt_neo",
    "gpt_neox",
    "gpt_neox_japanese",
    "gpt_oss",
    "gptj",
    "granite",
    "granite_swa",
    "granitemoe",
    "granitemoe_swa",
    "granitemoehybrid",
    "granitemoeshared",
    "helium",
    "hrm_text",
    "hunyuan_v1_dense",
    "hunyuan_v1_moe",
    "hy_v3",
    "hyperclovax",
    "internlm3",
    "iquestcoder",
    "jais2",
    "jamba",
    "jetmoe",
    "kimi_linear",
    "kolibri1",
    "laguna",
    "lara_mini",
    "lfm2",
    "lfm2_moe",
    "lfm3",
    "llama",
    "llama4_text",
    "longcat_flash",
    "mamba",
    "mamba2",
    "mellum",
    "mimo_v2_flash",
    "minicpm3",
    "minimax",
    "minimax_m2",
    "minimax_m3_vl_text",
    "ministral",
    "ministral3",
    "mistral",
    "mixtral",
    "modernbert-decoder",
    "moshi",
    "mpt",
    "nanochat",
    "nemotron",
    "nemotron_h",
    "olmo",
    "olmo2",
    "olmo3",
    "olmo_hybrid",
    "olmoe",
    "openai-gpt",
    "opt",
    "persimmon",
    "phi",
    "phi3",
    "phimoe",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_5_moe_text",
    "qwen3_5_text",
    "qwen3_moe",
    "qwen3_next",
    "recurrent_gemma",
    "roberta",
    "roberta-prelayernorm",
    "roc_bert",
    "sarvam_mla",
    "sarvam_moe",
    "seed_oss",
    "smollm3",
    "solar_open",
    "stablelm",
    "starcoder2",
    "vaultgemma",
    "xglm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
    "youtu",
    "zamba",
    "zamba2",
    "zaya",
)

_MIXES = (
    r"^(?!.*Norm).*"
    r"(Conv1d$|Mixer$|Mamba|DeltaNet|DeltaAttention|ShortConv|LightningAttention|RecurrentBlock|Rwkv|xLSTM)"
)
# Older layers of the same names clamp and group differently.
MIXERS_SINCE = "5.23.0"

_SECOND_LOOK = r"Indexer$|Compressor$|BlockSparse|LSHSelf|DogeAttention$"
# Names of modules that say why a family is not exact, and the reason.
_REASONS = (
    (r"CrossAttention$", "attends to the rows of another model, which no plan knows."),
    (_MIXES, "mixes neighbouring tokens outside attention; the rows of a document lie on several ranks."),
    (_SECOND_LOOK, "chooses its keys by a second look at the whole document, which ranks do not share."),
    (r"Ngram|RelativeAttention$|^CpmAnt", "adds a bias between tokens that a sharded pack has no place for."),
    (
        r"DecoderWrapper$|^TrOCRDecoder$",
        "numbers positions by itself and takes labels that are shifted already, as the decoder of a translator.",
    ),
    (
        r"Attention$",
        "has not been shown to be exact: it bypasses transformers' attention interface, or hides from it what matters.",
    ),
)


def attention_layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The modules that compute attention, by name.

    Raises:
        UnsupportedAttention: a family that is not exact here, or a layer of one that cannot be.
    """
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise UnsupportedAttention(
            f"{type(model).__name__} is not a transformers model: it has no config to tell what its attention means."
        )
    if config.model_type not in EXACT_FAMILIES:
        raise UnsupportedAttention(
            f"{config.model_type}: {_why_not_family(model)}\n"
            f"  {len(EXACT_FAMILIES)} other families are exact: sap_hf.models.families.EXACT_FAMILIES."
        )
    layers = _find(model)
    for name, layer in layers.items():
        reason = _why_not(layer)
        if reason:
            raise UnsupportedAttention(f"{config.model_type}: {name} ({type(layer).__name__}) {reason}")
    if not layers and not any(mixes(type(module)) for module in model.modules()):
        raise UnsupportedAttention(
            f"{config.model_type}: {type(model).__name__} has no attention layer to patch."
        )
    return layers


def mixer_layers(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """The modules that mix neighbouring tokens outside attention, by name; ranks hold consecutive rows for them.

    Raises:
        UnsupportedAttention: a layer that seems to do so and is not in the patch table, or a version of transformers
            whose layers were other ones.
    """
    found = {name: module for name, module in model.named_modules() if mixes(type(module))}
    if found and compare_versions("transformers", "<", MIXERS_SINCE):
        name, layer = next(iter(found.items()))
        raise UnsupportedAttention(
            f"{name} ({type(layer).__name__}) mixes neighbouring tokens outside attention, which transformers "
            f"{transformers.__version__} computes otherwise than what has been shown to be exact.\n"
            f"  Install transformers {MIXERS_SINCE} or a later 5.x."
        )
    for name, module in model.named_modules():
        kind = type(module).__name__
        if name and re.search(_MIXES, kind) and not _is_of(name, found):
            config: Any = model.config
            raise UnsupportedAttention(
                f"{config.model_type}: {name} ({kind}) mixes neighbouring tokens outside attention, and is not in the "
                "patch table."
            )
    return found


def windows(model: torch.nn.Module, layers: dict[str, torch.nn.Module]) -> dict[int | None, int]:
    """{window: number of attention layers} as the config states it; None is full attention."""
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    return dict(Counter(_window(config, layer) for layer in layers.values())) or {None: 0}


def _window(config: Any, layer: Any) -> int | None:
    if getattr(layer, "attention_type", None) == "local":
        return int(config.window_size)
    kinds, index = getattr(config, "layer_types", None), getattr(layer, "layer_idx", None)
    kind = "sliding_attention" if kinds is None else "" if index is None else kinds[index]
    if kind == "chunked_attention":
        # What a row of a chunk sees on average: as much is computed with this window.
        return int(config.attention_chunk_size + 1) // 2
    if "sliding" in kind and getattr(config, "use_sliding_window", True) is not False:
        return getattr(config, "sliding_window", None)
    return None


def honours_interface(layer: torch.nn.Module) -> bool:
    """Whether the layer's forward asks transformers' attention interface what to call."""
    forward: Any = type(layer).forward
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    return "ALL_ATTENTION_FUNCTIONS" in forward.__code__.co_names


def _find(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Attention modules by name; of one inside another, the inner one."""
    found = {name: module for name, module in model.named_modules() if _is_attention(module)}
    return {
        name: module
        for name, module in found.items()
        if not any(other.startswith(f"{name}.") for other in found)
    }


def _is_attention(module: torch.nn.Module) -> bool:
    if mixes(type(module)):
        return False
    named = type(module).__name__.endswith(("Attention", "MLA")) and hasattr(module, "layer_idx")
    return named or entry_of(type(module)) is not None


def _is_of(name: str, mixers: Iterable[str]) -> bool:
    """Whether this is a mixer, a part of one, or the block around it: they are called alike."""
    return any(f"{name}.".startswith(f"{mixer}.") or mixer.startswith(f"{name}.") for mixer in mixers)


def _why_not_family(model: torch.nn.Module) -> str:
    """The layer that a family is refused for, and the reason; the first that fits."""
    config: Any = model.config
    parts = [name for name in getattr(config, "sub_configs", None) or {} if hasattr(config, name)]
    if parts:
        return f"it is made of several models ({', '.join(parts)}), and only text models are split."
    mixers = tuple(name for name, module in model.named_modules() if mixes(type(module)))
    for pattern, reason in _REASONS:
        for name, module in model.named_modules():
            kind = type(module).__name__
            if not name or not re.search(pattern, kind) or kind.endswith("Model"):
                continue
            if not _is_of(name, mixers):
                return f"{name} ({kind}) {reason}"
    return f"{type(model).__name__} has not been shown to be exact when a pack is split over ranks."


def _why_not(layer: torch.nn.Module) -> str | None:
    """Why this layer cannot be exact, or None."""
    if not honours_interface(layer) and entry_of(type(layer)) is None:
        return "bypasses transformers' attention interface and is not in the patch table."
    if any(re.search(_SECOND_LOOK, type(inner).__name__) for inner in layer.modules()):
        return "chooses its keys by a second look at the whole document, which ranks do not share."
    if getattr(layer, "is_causal", True) is not True:
        return "attends in both directions; packs are split for causal attention only."
    dropout = _dropout(layer)
    if dropout > 0:
        return (
            f"has attention_dropout={dropout}, whose random mask cannot be shared by ranks.\n"
            "  Set the config's attention dropout to 0.0."
        )
    return None


def _dropout(layer: torch.nn.Module) -> float:
    """The probability at which the layer drops attention weights in training."""
    entry = entry_of(type(layer))
    found = [0.0 if entry is None else entry.dropout(layer)]
    for name in ("attention_dropout", "attn_dropout", "attn_pdrop", "dropout"):
        value = getattr(layer, name, 0.0)
        found.append(value.p if isinstance(value, torch.nn.Dropout) else value)
    return max(float(value) for value in found if isinstance(value, int | float))
