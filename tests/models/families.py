"""Tiny random float64 models of any causal-LM type, and what each document gives when run alone."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.float64 import whole_float64
from tests.models.tiny import VOCAB, config_of

IGNORED = -100
# One token, longer than the window, and a length (45) that neither 2 nor 4 ranks divide.
LENGTHS = (13, 1, 22, 9)


def build(model_type: str, attention: str | None = None, **changes: Any) -> nn.Module:
    """The tiny model of a type, the same in every process; attention None is transformers' own choice."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(11)
    config = config_of(model_type, **changes)
    # No product of experts takes float64 but the plain loop.
    options = {"experts_implementation": "eager", "attn_implementation": attention}
    model: nn.Module = AutoModelForCausalLM.from_config(config, **options)
    model.double().eval()
    with torch.no_grad():
        # Biases and norms start at 0 and 1, where a mistake in them shows nowhere.
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def build_plain(model_type: str, **changes: Any) -> nn.Module:
    """The same model with transformers' plain attention: what every document alone is run through."""
    # Falcon's plain attention adds its alibi twice.
    return build(model_type, "sdpa" if model_type == "falcon" else "eager", **changes)


@contextlib.contextmanager
def only_float64() -> Iterator[None]:
    """`whole_float64()`, and no sum, softmax or cast of transformers' own to float32 in other spellings either."""
    functions = [(F, "softmax"), (torch, "softmax"), (Tensor, "softmax"), (torch, "sum"), (Tensor, "type")]
    originals = [getattr(place, name) for place, name in functions]

    def keeping(original: Any) -> Any:
        def function(given: Tensor, *args: Any, **kwargs: Any) -> Any:
            caller = str(sys._getframe(1).f_globals.get("__name__", ""))
            if given.dtype == torch.float64 and caller.startswith("transformers."):
                if torch.float32 in args:
                    return given
                kwargs.pop("dtype", None)
            return original(given, *args, **kwargs)

        return function

    try:
        for (place, name), original in zip(functions, originals, strict=True):
            setattr(place, name, keeping(original))
        with whole_float64():
            yield
    finally:
        for (place, name), original in zip(functions, originals, strict=True):
            setattr(place, name, original)


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
