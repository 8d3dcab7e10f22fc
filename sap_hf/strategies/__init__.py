"""Strategies: pure functions (Documents, Layout, window) -> Schedule, and `plan`, which chooses among them."""

from sap_hf.strategies.all_gather import all_gather
from sap_hf.strategies.auto import Request, make_plan, plan
from sap_hf.strategies.ring import ring
from sap_hf.strategies.sap import sap

__all__ = ["Request", "all_gather", "make_plan", "plan", "ring", "sap"]
