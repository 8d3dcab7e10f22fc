"""Exact and cheap sequence parallelism for packed rows inside Hugging Face training."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sap_hf import errors
from sap_hf.config import SapConfig
from sap_hf.strategies import plan

if TYPE_CHECKING:
    from sap_hf.data import DataCollatorForPacking, pack
    from sap_hf.hf import SapPlugin, attach, detach
    from sap_hf.models import patch_model, unpatch_model
    from sap_hf.planning import Plan
    from sap_hf.runtime import attention

__version__ = "0.1.0"

# Planning needs numpy alone; torch and transformers load when something that needs them is asked for.
_LAZY = {
    "DataCollatorForPacking": "sap_hf.data",
    "Plan": "sap_hf.planning",
    "SapPlugin": "sap_hf.hf",
    "attach": "sap_hf.hf",
    "attention": "sap_hf.runtime",
    "detach": "sap_hf.hf",
    "pack": "sap_hf.data",
    "patch_model": "sap_hf.models",
    "unpatch_model": "sap_hf.models",
}

__all__ = [
    "DataCollatorForPacking",
    "Plan",
    "SapConfig",
    "SapPlugin",
    "attach",
    "attention",
    "detach",
    "errors",
    "pack",
    "patch_model",
    "plan",
    "unpatch_model",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'sap_hf' has no attribute {name!r}")
    return getattr(importlib.import_module(_LAZY[name]), name)
