"""Hugging Face integration: attach to a Trainer, or build the mesh for a loop of your own."""

from sap_hf.hf.attach import attach, detach
from sap_hf.hf.plugin import SapPlugin

__all__ = ["SapPlugin", "attach", "detach"]
