"""Planning: documents, layouts, schedules and plans. numpy only."""

from sap_hf.planning.compile import compile_program
from sap_hf.planning.cost import Shape
from sap_hf.planning.documents import Documents
from sap_hf.planning.hardware import Hardware
from sap_hf.planning.layout import Layout
from sap_hf.planning.plan import Plan
from sap_hf.planning.program import Program
from sap_hf.planning.schedule import Schedule, Step, reverse

__all__ = [
    "Documents",
    "Hardware",
    "Layout",
    "Plan",
    "Program",
    "Schedule",
    "Shape",
    "Step",
    "compile_program",
    "reverse",
]
