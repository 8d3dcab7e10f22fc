"""Clone: the config that a name stands for, and a tiny config that means the same attention.

A folder, a model type or a hub id -> a config of transformers -> one with few heads, layers and tokens. The model built
from it takes a moment on a CPU and is exact, or leaks, where the large one does.
"""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from sap_hf.errors import ConfigError, UnsupportedAttention

# Shorter than a document: a window that is not honoured shows.
WINDOW = 6
VOCABULARY = 61
# What transformers' configs and models raise on values that do not fit together.
UNBUILT = (
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
# Fields that count something or are wide, by their names, and how much of that a clone keeps. The first that fits.
# Widths of a head stay as they are: rotary embeddings and scales are made for them.
FEW = (
    (r"(num_)?experts_per_tok(en)?|(moe_)?top_?k|moe_k", 2),
    (r"n_group|topk_group|num_expert_group|first_k_dense_replace", 1),
    (r".*(experts|expert_num)", 4),
    (r".*(intermediate_size(_mlp)?|ffn_(dim|hidden_size)|n_inner|dim_ff|d_ff|dff)", 64),
    (r"sliding_window|attention_window_size|window_size|local_attention|attention_chunk_size", WINDOW),
    (r"vocab_size(_per_layer_input)?", VOCABULARY),
    (r".*token_ids?", VOCABULARY - 1),
)


def find_config(name: str, weights: bool) -> Any:
    """The config of a folder, a model type or a model on a hub.

    Raises:
        ConfigError: there is none of that name, or no weights that can be verified.
        UnsupportedAttention: transformers has no causal language model for it.
    """
    path = Path(name)
    is_type = not path.exists() and name in CONFIG_MAPPING
    if weights and (is_type or path.is_file()):
        raise ConfigError(f"--weights: {name} has none. Name a folder with weights, or a hub id.")
    if is_type:
        config = CONFIG_MAPPING[name]()
    elif path.exists() or "/" in name:
        config = _read_config(name)
    else:
        close = difflib.get_close_matches(name, CONFIG_MAPPING, n=1)
        raise ConfigError(
            f"{name}: neither a folder with config.json, nor a model type, nor the id of a model on a hub (owner/name)."
            + (f"\n  Did you mean the model type {close[0]!r}?" if close else "")
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnsupportedAttention(
            f"{config.model_type}: transformers has no causal language model for {type(config).__name__}."
        )
    if weights and getattr(config, "quantization_config", None) is not None:
        raise ConfigError(
            f"--weights: {name} is quantized. Leave --weights out to verify a clone that is not."
        )
    return config


def _read_config(name: str) -> Any:
    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        kind = "the folder" if Path(name).exists() else "no such folder; the model of a hub"
        raise ConfigError(f"{name}: {kind} was not read: {' '.join(str(error).split())}") from error


def outline(config: Any) -> torch.nn.Module:
    """The whole model, without memory for its weights.

    Raises:
        ConfigError: transformers cannot build it.
    """
    try:
        with torch.device("meta"):
            model: torch.nn.Module = AutoModelForCausalLM.from_config(config)
    except UNBUILT as error:
        raise ConfigError(
            f"{config.model_type}: transformers cannot build a model of this config: {type(error).__name__}: {error}"
        ) from error
    return model


def clone(config: Any) -> Any:
    """A config like this one with few heads, narrow layers and few tokens; one layer of each kind, at least two.

    Kept: the width of a head, the ratio of query and kv heads up to 4, and whatever is not a size.

    Raises:
        ConfigError: no model of it can be built.
    """
    values, layers = config.to_dict(), config.num_hidden_layers
    for name in ("dtype", "quantization_config", "_attn_implementation", "transformers_version"):
        values.pop(name, None)
    kept = _one_of_each_kind(values, layers)
    for name, value in values.items():
        cap = next((few for pattern, few in FEW if re.fullmatch(pattern, name)), None)
        values[name] = _of_layers(name, value, kept, layers)
        if cap is not None:
            values[name] = _at_most(cap, values[name])

    def named(field: str) -> str:
        return str(config.attribute_map.get(field, field))

    heads = values.get(named("num_attention_heads"))
    if not heads:
        raise ConfigError(
            f"{config.model_type}: a model without attention has no heads to make few of.\n"
            "  Verify the model with --weights, or a small config of its type."
        )
    width = values.get("head_dim") or values[named("hidden_size")] // heads
    kv_name = next(
        (name for name in (named("num_key_value_heads"), "num_kv_heads") if values.get(name)), None
    )
    kv_heads = heads if kv_name is None else values[kv_name]
    group = heads // kv_heads
    few_kv_heads = min(kv_heads, max(2, 4 // group))
    few_heads = few_kv_heads * min(group, 4)
    values[named("num_hidden_layers")] = len(kept)
    values[named("num_attention_heads")] = few_heads
    values[named("hidden_size")] = few_heads * width
    if kv_name is not None:
        values[kv_name] = few_kv_heads
    expand, mamba_width = values.get("mamba_expand"), values.get("mamba_d_head")
    if expand and mamba_width and values.get("mamba_d_ssm") is None:
        values["mamba_n_heads"] = expand * few_heads * width // mamba_width
    each = "num_attention_heads_per_layer"
    if values.get(each):
        values[each] = [few_kv_heads * min(of_layer // kv_heads, 4) for of_layer in values[each]]
    # Weights that let attention tell keys apart, whatever the width: logits of about 1.
    values["initializer_range"] = (few_heads * width) ** -0.5
    try:
        small = type(config).from_dict(values)
        outline(small)
    except (ConfigError, *UNBUILT) as error:
        raise ConfigError(
            f"{config.model_type}: a small clone of this config cannot be built: {error}\n"
            "  Verify the model with --weights, or a small config of its type."
        ) from error
    return small


def _one_of_each_kind(values: dict[str, Any], layers: int) -> list[int]:
    """The first layer of each kind, as the per-layer fields of the config tell them apart; at least two layers."""
    kinds: dict[str, int] = {}
    for layer in range(layers):
        kind = [_of_layers(name, value, [layer], layers) for name, value in values.items()]
        kinds.setdefault(repr(kind), layer)
    return sorted(kinds.values()) if len(kinds) > 1 else list(range(min(2, layers)))


def _of_layers(name: str, value: Any, kept: list[int], layers: int) -> Any:
    """What a field of a config with so many layers says about those that are kept."""
    if name == "num_kv_shared_layers" and value:
        return sum(layer >= layers - value for layer in kept)
    if isinstance(value, dict) and name == "per_layer_config":
        return {new: value[key] for new, old in enumerate(kept) for key in value if int(key) == old}
    if not isinstance(value, list):
        return value
    numbers = all(type(item) is int and 0 <= item < layers for item in value)
    if re.search("layer|idx", name) and numbers and value == sorted(set(value)) and layers > 2:
        # Some layers by their numbers, not an entry for each.
        return [kept.index(layer) for layer in value if layer in kept]
    return [value[layer] for layer in kept] if len(value) == layers else value


def _at_most(cap: int, value: Any) -> Any:
    if isinstance(value, list):
        return [_at_most(cap, item) for item in value]
    return min(value, cap) if type(value) is int else value


def build(config: Any, weights: str | None, dtype: torch.dtype) -> torch.nn.Module:
    """The model with transformers' eager attention, ready to be evaluated.

    Args:
        weights: the folder or hub id that has them; None makes random ones, the same in every process.

    Raises:
        ConfigError: there are none.
    """
    # No product of experts takes float64 but the plain loop.
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
    if weights is not None:
        try:
            model = AutoModelForCausalLM.from_pretrained(weights, dtype=dtype, **plain)
        except (OSError, ValueError) as error:
            raise ConfigError(f"--weights: {weights} was not loaded: {error}") from error
        return model.eval()
    torch.manual_seed(11)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, **plain)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                # Biases and norms start at 0 and 1, where a mistake in them shows nowhere.
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def affordable(parameters: int, ranks: int) -> tuple[torch.dtype, list[str]]:
    """The dtype in which every rank's weights, gradients and true gradients fit into this machine; why, if float32.

    Raises:
        ConfigError: they fit in neither.
    """
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    needed = {dtype: 3 * ranks * parameters * dtype.itemsize for dtype in (torch.float64, torch.float32)}
    if needed[torch.float64] <= memory:
        return torch.float64, []
    text = f"{parameters / 1e9:.1f}e9 weights on {ranks} processes"
    if needed[torch.float32] <= memory:
        return torch.float32, [f"float32: {text} take {needed[torch.float64] / 2**30:.0f} GiB in float64"]
    raise ConfigError(
        f"--weights: {text} take {needed[torch.float32] / 2**30:.0f} GiB with gradients in float32; this machine has "
        f"{memory / 2**30:.0f}.\n  Leave --weights out to verify a clone."
    )


def describe(config: Any, layers: int) -> str:
    """A clone in words; `layers` are those of the whole model."""
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return (
        f"a tiny random clone: {config.num_hidden_layers} of {layers} layers, {config.num_attention_heads}:{kv_heads} "
        f"heads, width {config.hidden_size}, {config.vocab_size} tokens"
    )
