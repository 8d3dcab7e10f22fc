"""Every notebook runs from top to bottom and prints what it was committed with.

After a change that should show in one: `OMP_NUM_THREADS=1 jupyter execute --inplace notebooks/NAME.ipynb`.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MOST_SECONDS = 60
MOST_BYTES = 200_000


def printed(cell: Any) -> str:
    """What a code cell printed, leaving out warnings and progress bars on stderr."""
    outputs = cell.get("outputs", [])
    return "".join(
        out["text"] for out in outputs if out["output_type"] == "stream" and out["name"] == "stdout"
    )


def pictures(cell: Any) -> int:
    return sum("image/png" in out.get("data", {}) for out in cell.get("outputs", []))


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_small_and_was_run_in_order(path: Path) -> None:
    assert path.stat().st_size < MOST_BYTES
    code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_prints_what_it_was_committed_with(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    committed = nbformat.read(path, as_version=4)
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    again = nbformat.from_dict(committed)
    begun = time.monotonic()
    NotebookClient(again, timeout=3 * MOST_SECONDS, kernel_name="python3").execute()
    seconds = time.monotonic() - begun
    for number, (before, now) in enumerate(zip(committed.cells, again.cells)):
        assert printed(now) == printed(before), (
            f"cell {number} prints something else than it was committed with"
        )
        assert pictures(now) == pictures(before), (
            f"cell {number} draws something else than it was committed with"
        )
    # The limit is for a machine of its own; tests that run beside it may take their share.
    assert seconds < 3 * MOST_SECONDS
