"""benchmarks/gpu_proof.py, tried on two CPU processes: its parts run, and its scores are what they say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.dist import ONE_THREAD, _loopback

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def gpu_proof(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_proof

    return gpu_proof


def entry(plan, attention_ms, workload="magi", chosen="", **more):
    return {
        "workload": workload,
        "rows": 8,
        "plan": plan,
        "chosen": chosen,
        "attention_ms": attention_ms,
        **more,
    }


def test_a_score_is_measured_over_predicted_of_the_same_plan(gpu_proof):
    predicted = [entry("a", 2.0, step_ms=10.0), entry("b", 4.0, step_ms=10.0), entry("c", 3.0, step_ms=10.0)]
    measured = [
        entry("a", 3.0),
        entry("b", 4.0),
        entry("c", 1.0, chosen="another"),
        entry("d", 1.0),
        {**entry("a", 3.0), "step_ms": 5.0, "layers_left_out": 0},
        {**entry("b", 4.0), "step_ms": 1.0, "layers_left_out": 3},
    ]
    found = gpu_proof.compare(predicted, measured)
    assert found["another_plan"] == 1
    assert found["attention_ms"] == {"compared": 2, "measured_over_predicted": [1.0, 1.25, 1.5]}
    assert found["step_ms"] == {"compared": 1, "measured_over_predicted": [0.5, 0.5, 0.5]}


def test_only_clear_differences_within_a_pack_are_put_in_order(gpu_proof):
    predicted = [entry(plan, ms) for plan, ms in (("a", 1), ("b", 2), ("c", 3))] + [entry("a", 9, "one")]
    measured = [entry("a", 2.0), entry("b", 2.1), entry("c", 1.0), entry("a", 1.0, "one")]
    found = gpu_proof.compare(predicted, measured)
    # a and b are too close to tell; c should have been the slowest.
    assert (found["pairs_in_order"], found["pairs_out_of_order"]) == (0, 2)


def test_losses_of_one_pack_are_held_against_each_other(gpu_proof):
    same = [entry("a", 1, loss=2.0), entry("b", 1, loss=2.0), entry("a", 1, "one", loss=7.0)]
    assert gpu_proof.losses_apart(same) == 0
    assert gpu_proof.losses_apart([*same, entry("c", 1, loss=2.5)]) == 0.25
    assert gpu_proof.losses_apart([entry("a", 1)]) is None


def test_the_error_of_the_first_rank_comes_before_what_the_launcher_says(gpu_proof):
    said = "\n".join(
        ["Traceback", "torch.OutOfMemoryError: 3 GiB", "later", "ChildFailedError: rank 0", "===="]
    )
    assert gpu_proof.cause(said).splitlines()[0] == "torch.OutOfMemoryError: 3 GiB"


def test_the_parts_run_and_all_plans_find_one_loss(tmp_path):
    parts = ("environment", "packed", "attention", "step", "score")
    command = [
        sys.executable,
        str(BENCHMARKS / "gpu_proof.py"),
        "--tiny",
        "--ranks",
        "2",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(
        [*command, "--parts", *parts], capture_output=True, text=True, timeout=300, env=environment()
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "gpu_proof.json").read_text())
    assert {name: record[name]["failed"] for name in parts if "failed" in record[name]} == {}
    assert [one["documents"] for one in record["packed"]["measured"][:3]] == [128, 64, 32]
    assert len(record["attention"]["measured"]) == 30 and len(record["step"]["measured"]) == 12
    assert (
        "torch's CPU flash attention"
        in record["environment"]["kernels"]["torch.float32 head_dim 64 softcap None"]
    )
    assert record["score"]["losses_apart"] < 1e-5
    assert "committed_left_out" in record["score"]


def test_a_part_that_fails_is_recorded_and_the_others_run(tmp_path):
    command = [
        sys.executable,
        str(BENCHMARKS / "gpu_proof.py"),
        "--tiny",
        "--ranks",
        "2",
        "--minutes",
        "0.001",
    ]
    done = subprocess.run(
        [*command, "--out", str(tmp_path), "--parts", "trace", "score"],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "gpu_proof.json").read_text())
    assert record["trace"]["failed"] == "still running after 0.001 minutes"
    assert record["score"]["losses_apart"] is None


def environment():
    return {**os.environ, **ONE_THREAD, **_loopback()}
