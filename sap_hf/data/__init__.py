"""Tokenised documents -> packs -> one row per batch. Knows nothing of ranks or plans."""

from sap_hf.data.collator import DataCollatorForPacking
from sap_hf.data.packing import pack

__all__ = ["DataCollatorForPacking", "pack"]
