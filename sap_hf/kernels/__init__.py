"""Attention kernels behind one interface: q, k, v, Segments -> out, lse; and back."""

from sap_hf.kernels.interface import NOWHERE, Kernel, Places, Scoring, Segments, pick
from sap_hf.kernels.merge import merge, merge_into
from sap_hf.kernels.uneven import Uneven

__all__ = ["NOWHERE", "Kernel", "Places", "Scoring", "Segments", "Uneven", "merge", "merge_into", "pick"]
