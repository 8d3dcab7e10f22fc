"""A walk over every causal-LM type of the installed transformers: patched, or refused by a message."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.models.tiny import config_of

# transformers cannot build these from a config of their own: timm is missing; the decoder's config is not found.
CONFIG_ONLY = ("gemma3n", "musicgen", "musicgen_melody")


def every_type() -> list[str]:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def model_of(model_type: str) -> Any:
    """A model of the type without memory for its weights."""
    from transformers import AutoModelForCausalLM

    config = config_of(model_type)
    if model_type in CONFIG_ONLY:
        bare: Any = nn.Module()
        bare.config = config
        return bare
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def refusal_of(model_type: str) -> str | None:
    """What patch_model says to this type; None if it patches it."""
    import sap_hf

    model: Any = model_of(model_type)
    try:
        sap_hf.patch_model(model)
    except sap_hf.errors.UnsupportedAttention as error:
        return str(error)
    sap_hf.unpatch_model(model)
    return None


def refusals() -> dict[str, str]:
    """{type: the first line of its refusal} of all types that are refused."""
    found = {name: refusal_of(name) for name in every_type()}
    return {name: message.splitlines()[0] for name, message in found.items() if message is not None}
