"""Models: the layer that patches transformers models."""

from sap_hf.models.patch import Patch, patch_model, unpatch_model

__all__ = ["Patch", "patch_model", "unpatch_model"]
