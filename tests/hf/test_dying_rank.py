"""A rank that dies in the middle of training ends the job with its traceback; nothing is left hanging."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.dist import run_script

SCRIPT = Path(__file__).with_name("dying_rank.py")


@pytest.mark.parametrize("how", ["raised", "killed"])
def test_a_dying_rank_ends_the_job(tmp_path: Path, how: str) -> None:
    script = run_script(SCRIPT, 2, str(tmp_path), how, timeout=100)
    assert script.code != 0
    # It trained first: what ended it is the death of a rank, not a failed start.
    assert "'loss'" in script.output
    if how == "raised":
        assert "RuntimeError: the disk is full" in script.output
        assert "dying_rank.py" in script.output
    else:
        assert "exitcode  : 17" in script.output
