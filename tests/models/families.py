"""A tiny random float64 model of every supported family, and what each document gives when run alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB = 61
IGNORED = -100
WINDOW = 6
# One token, longer than the window, and a length (45) that neither 2 nor 4 ranks divide.
LENGTHS = (13, 1, 22, 9)

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Large weights: attention that differs between keys, so a leak is seen.
    "initializer_range": 0.2,
}
ALTERNATING = ["sliding_attention", "full_attention"]


@dataclasses.dataclass(frozen=True)
class Family:
    """A family, the fields that make its tiny config special, and its attention class."""

    attention: str
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)


FAMILIES = {
    "llama": Family("LlamaAttention"),
    "qwen2": Family("Qwen2Attention"),
    "qwen3": Family("Qwen3Attention"),
    "mistral": Family("MistralAttention", {"sliding_window": WINDOW}),
    "gemma2": Family(
        "Gemma2Attention",
        {
            "sliding_window": WINDOW,
            "layer_types": ALTERNATING,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 6.0,
            "query_pre_attn_scalar": 5,
        },
    ),
    "gemma3_text": Family("Gemma3Attention", {"sliding_window": WINDOW, "layer_types": ALTERNATING}),
    "phi3": Family("Phi3Attention", {"sliding_window": None}),
    "olmo2": Family("Olmo2Attention"),
    "smollm3": Family("SmolLM3Attention", {"no_rope_layers": [1, 0]}),
    "granite": Family("GraniteAttention", {"attention_multiplier": 0.3, "residual_multiplier": 0.7}),
}
# The windows that some of these families can have beside what is tested above.
WINDOWED = {
    "qwen2-window": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": ALTERNATING},
    ),
    "phi3-window": ("phi3", {"sliding_window": WINDOW}),
}


def dense_attention(
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Softmax of one document in float64 under the mask that transformers makes for it.

    transformers' own functions will not do: "eager" takes the softmax in float32, "sdpa" leaves the softcap out.
    """
    groups = q.shape[1] // k.shape[1]
    assert q.dtype == torch.float64
    scores = q @ k.repeat_interleave(groups, 1).transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    causal = torch.ones(scores.shape[-2:]).tril().log() if attention_mask is None else attention_mask
    out = (scores + causal).softmax(-1) @ v.repeat_interleave(groups, 1)
    return out.transpose(1, 2), None


def build_dense(name: str, **changes: Any) -> nn.Module:
    """The same model with the dense attention above: what every document alone is run through."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register("dense", dense_attention)
    AttentionMaskInterface.register("dense", AttentionMaskInterface()["eager"])
    return build(name, "dense", **changes)


def build(name: str, attention: str | None = None, **changes: Any) -> nn.Module:
    """The tiny model of a family, the same in every process; attention None is transformers' own choice."""
    from transformers import AutoConfig, AutoModelForCausalLM

    family, extra = WINDOWED.get(name, (name, {}))
    fields = {**COMMON, **FAMILIES[family].fields, **extra, **changes}
    torch.manual_seed(11)
    config = AutoConfig.for_model(family, **fields)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).double().eval()
    with torch.no_grad():
        # Biases and norms start at 0 and 1, where a mistake in them shows nowhere.
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def pack(lengths: Sequence[int] = LENGTHS, seed: int = 4) -> dict[str, Tensor]:
    """A packed row (1, T) with unshifted labels, some of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCAB, (1, sum(lengths)), generator=generator)
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.2, IGNORED)
    position_ids = torch.cat([torch.arange(length) for length in lengths])[None]
    labels[position_ids == 0] = IGNORED
    return {"input_ids": ids, "labels": labels, "position_ids": position_ids}


@dataclasses.dataclass
class Answer:
    """logits (T, V), the mean loss over all targets, and the gradient of every parameter."""

    logits: Tensor
    loss: float
    gradients: dict[str, Tensor]


def documents_alone(model: nn.Module, row: dict[str, Tensor], lengths: Sequence[int]) -> Answer:
    """Run every document of the row by itself."""
    model.zero_grad()
    ids, labels = row["input_ids"][0].split(list(lengths)), row["labels"][0].split(list(lengths))
    targets = sum(int((label[1:] != IGNORED).sum()) for label in labels)
    logits, loss = [], 0.0
    for document, label in zip(ids, labels, strict=True):
        out = model(input_ids=document[None], use_cache=False).logits[0]
        part = F.cross_entropy(out[:-1], label[1:], ignore_index=IGNORED, reduction="sum") / targets
        part.backward()
        logits.append(out.detach())
        loss += part.item()
    return Answer(torch.cat(logits), loss, gradients(model))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }


def worst(left: dict[str, Tensor], right: dict[str, Tensor]) -> tuple[float, str]:
    """The largest absolute difference, and where."""
    assert left.keys() == right.keys()
    return max((float((left[name] - right[name]).abs().max()), name) for name in right)
