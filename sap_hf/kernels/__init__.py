"""Attention kernels behind one interface: q, k, v, Segments -> out, lse; and back."""

from sap_hf.kernels.interface import Kernel, Segments, pick
from sap_hf.kernels.merge import merge, merge_into
from sap_hf.kernels.uneven import Uneven

__all__ = ["Kernel", "Segments", "Uneven", "merge", "merge_into", "pick"]
