"""Rules for the whole run: hypothesis is deterministic; a skipped test fails unless its marker allows it."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings

# Before torch is loaded: tests share few cores with the ranks that they start, and threads that spin slow both.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A test may be skipped for lack of a GPU or of the real weights, and for nothing else.
MAY_BE_SKIPPED = {"gpu", "weights"}

settings.register_profile("sap_hf", deadline=None, derandomize=True, database=None, max_examples=80)
settings.load_profile("sap_hf")


def pytest_collection_finish() -> None:
    # Imports and tests stay to the end: every gc.collect, one of Trainer's for each run, would look through them.
    gc.freeze()


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    outcome: Any = yield
    report: pytest.TestReport = outcome.get_result()
    # An expected failure is reported as "skipped" too, and is none.
    if report.skipped and not hasattr(report, "wasxfail"):
        markers = {marker.name for marker in item.iter_markers()}
        if not markers & MAY_BE_SKIPPED:
            report.outcome = "failed"
            report.longrepr = (
                f"skipped without one of the markers {sorted(MAY_BE_SKIPPED)}: {report.longrepr}"
            )


@pytest.hookimpl(hookwrapper=True)
def pytest_make_collect_report() -> Iterator[None]:
    outcome: Any = yield
    report: pytest.CollectReport = outcome.get_result()
    # pytest.importorskip and friends at the top of a module would drop all of its tests silently.
    if report.skipped:
        report.outcome = "failed"
        report.longrepr = f"a whole module was skipped: {report.longrepr}"
