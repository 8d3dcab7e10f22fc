"""A skipped test proves nothing, so the run fails on it unless its marker is on the list."""

import subprocess
import sys
from pathlib import Path

CONFTEST = Path(__file__).parent.parent / "conftest.py"
ONE_OF_EACH = """
import pytest

def test_skipped():
    pytest.skip("for no good reason")

@pytest.mark.skipif(True, reason="declared")
def test_skipped_by_mark():
    pass

@pytest.mark.gpu
def test_without_a_gpu():
    pytest.skip("no GPU here")

@pytest.mark.weights
@pytest.mark.skipif(True, reason="no weights")
def test_without_weights():
    pass

@pytest.mark.xfail(strict=True)
def test_known_to_fail():
    assert False

def test_passes():
    pass
"""
WHOLE_MODULE = """
import pytest

pytest.importorskip("a_library_that_does_not_exist")

def test_never_seen():
    pass
"""


def test_only_listed_markers_may_skip(tmp_path):
    (tmp_path / "conftest.py").write_text(CONFTEST.read_text())
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    gpu\n    weights\n")
    (tmp_path / "test_each.py").write_text(ONE_OF_EACH)
    (tmp_path / "test_module.py").write_text(WHOLE_MODULE)
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "--continue-on-collection-errors"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    # A skipif mark is met while a test is set up: pytest calls a failure there an error.
    assert "1 failed, 1 passed, 2 skipped, 1 xfailed, 2 errors" in done.stdout
    assert "FAILED test_each.py::test_skipped -" in done.stdout
    assert "ERROR test_each.py::test_skipped_by_mark -" in done.stdout
    assert "for no good reason" in done.stdout and "a whole module was skipped" in done.stdout
