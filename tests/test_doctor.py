"""sap-hf doctor: what is wrong is named with what to change, and a hang is reported, not waited for."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from sap_hf.cli import doctor, machine, main
from sap_hf.cli.doctor import OK, PROBLEM, WARNING, Finding
from tests.dist import run_ranks, run_script


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in machine.LAUNCHER:
        monkeypatch.delenv(name, raising=False)


def level_of(findings: list[Finding], subject: str) -> str:
    (finding,) = [finding for finding in findings if finding.subject == subject]
    return finding.level


# ---- one process ------------------------------------------------------------------------------------


def test_this_machine_has_no_problem(capsys):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["problems"] == 0
    found = {finding["subject"]: finding for finding in report["findings"]}
    assert found["torch"]["found"] == importlib.metadata.version("torch")
    assert {"python", "transformers", "accelerate", "trl", "GPU", "kernel", "launcher"} <= set(found)
    assert "torchrun" in found["launcher"]["found"]


def test_a_problem_ends_with_code_1_and_says_what_to_change(capsys, monkeypatch):
    monkeypatch.setattr(machine, "devices", lambda: [Finding(PROBLEM, "GPU", "asleep", "wake it")])
    assert main(["doctor"]) == 1
    lines = capsys.readouterr().out.splitlines()
    at = lines.index("problem  GPU             asleep")
    assert lines[at + 1].strip() == "-> wake it"
    assert lines[-1] == "1 problems, 0 warnings"


def test_versions_are_those_that_the_package_asks_for(monkeypatch):
    installed = {
        "torch": "2.10.1+cu128",
        "transformers": "6.0.0",
        "accelerate": "1.12.0",
        "flash-attn": "2.6.3",
        "numpy": "2.0",
        "datasets": "5",
    }

    def version(name: str) -> str:
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.9.2")
    found = {finding.subject: finding for finding in doctor.versions()}
    assert found["python"] == Finding(PROBLEM, "python", "3.9.2, >=3.10 is needed", "use another Python")
    assert found["torch"].level == PROBLEM
    assert found["torch"].found == "2.10.1+cu128, >=2.11 is needed"
    assert found["torch"].change == "pip install 'torch>=2.11'"
    assert found["transformers"].level == PROBLEM
    assert found["accelerate"] == Finding(OK, "accelerate", "1.12.0")
    assert found["trl"] == Finding(PROBLEM, "trl", "not installed", "pip install 'trl'")
    # Extras may be absent, but not be too old.
    assert found["flash-attn"].level == WARNING
    assert found["peft"].level == OK and "pip install 'peft'" in found["peft"].found
    # Tools of those who work on this package are nobody else's care.
    assert "pytest" not in found


def test_what_is_absent_is_told_where_torch_or_the_package_is_not_installed():
    script = """
import importlib.metadata, importlib.util, sys
metadata, find_spec = importlib.metadata.metadata, importlib.util.find_spec
sys.modules["torch"] = None
importlib.util.find_spec = lambda name: None if name == "torch" else find_spec(name)
if "unnamed" in sys.argv:
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)
    importlib.metadata.metadata = absent
from sap_hf.cli import main
sys.exit(main(["doctor"]))
"""
    for arguments, text in (([], "ok       python"), (["unnamed"], "not compared: sap-hf is not installed")):
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert text in done.stdout and "kernel" not in done.stdout


def test_the_kernel_of_each_layer_is_named_and_so_is_why_not_another():
    findings = machine.kernels()
    assert all(finding.level == OK and finding.subject == "kernel" for finding in findings)
    plain, softcap, absent = (finding.found for finding in findings)
    assert plain.startswith("bfloat16, bfloat16 window, float32, float32 window: sdpa: ")
    assert "float32 softcap" in softcap and ": reference: " in softcap and "no softcap" in softcap
    assert absent.startswith("not here: varlen, flash") and "CUDA" in absent


class Broken:
    """A kernel whose answer is changed by `how`."""

    name = "flash"

    def __init__(self, how: Any):
        from sap_hf.kernels.reference import Reference

        self.how, self.right = how, Reference()

    def forward(self, *args: Any, **options: Any) -> Any:
        out, lse = self.right.forward(*args, **options)
        return self.how(out), lse

    def backward(self, *args: Any, **options: Any) -> Any:
        return self.right.backward(*args, **options)


def no_image(out: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no kernel image is available for execution on the device\nmore")


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (no_image, "flash fails: no kernel image is available for execution on the device"),
        (lambda out: out * 1.1, "flash is off by 2."),
        (lambda out: out * torch.nan, "flash is off by inf"),
    ],
)
def test_a_kernel_that_does_not_work_is_a_problem(monkeypatch, how, message):
    pick = machine.pick

    def broken(name: str, **asked: Any) -> Any:
        return pick(name, **asked) if name == "reference" else (Broken(how), "fastest")

    monkeypatch.setattr(machine, "pick", broken)
    problems = [finding for finding in machine.kernels() if finding.level == PROBLEM]
    assert problems and all(message in finding.found for finding in problems)
    assert problems[0].change == "take another one: kernel=varlen"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_kernel_of_this_machine_is_right(dtype):
    from sap_hf.kernels.reference import Reference
    from sap_hf.kernels.sdpa import Sdpa

    cpu = torch.device("cpu")
    for window in (None, 32):
        assert machine.try_kernel(Sdpa(), cpu, dtype, None, window) is None
        assert machine.try_kernel(Reference(), cpu, dtype, 50.0, window) is None
    # The window is really asked for.
    assert "is off by" in str(machine.try_kernel(Broken(lambda out: out.flip(0)), cpu, dtype, None, None))


def launched(monkeypatch: pytest.MonkeyPatch, **changes: str) -> list[Finding]:
    values = {
        "RANK": "1",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "here",
        "MASTER_PORT": "1234",
    }
    for name, value in {**values, **changes}.items():
        monkeypatch.setenv(name, value)
    return machine.launcher()


def test_the_launchers_variables_must_fit_together(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2 * torch.get_num_threads())
    assert [finding.level for finding in launched(monkeypatch)] == [OK, OK]
    (finding,) = launched(monkeypatch, LOCAL_WORLD_SIZE="", RANK="x")
    assert finding.level == PROBLEM and finding.found == "RANK='x', LOCAL_WORLD_SIZE=''"
    assert launched(monkeypatch, WORLD_SIZE="5")[0].level == WARNING
    threads = launched(monkeypatch, WORLD_SIZE="8", LOCAL_WORLD_SIZE="4")[1]
    assert (threads.subject, threads.level) == ("OMP_NUM_THREADS", WARNING)
    assert threads.change == f"export OMP_NUM_THREADS={max(2 * torch.get_num_threads() // 4, 1)}"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert launched(monkeypatch)[1] == Finding(
        PROBLEM, "launcher", "2 processes for 1 GPUs", "--nproc-per-node 1"
    )


def test_a_gpu_that_torch_cannot_use_is_a_problem(monkeypatch):
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: str(path) == "/dev/nvidiactl" or exists(path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for cuda, change in (
        (None, "install a CUDA build of torch"),
        ("13.0", "update the driver to one for CUDA 13.0"),
    ):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        (finding,) = [finding for finding in machine.devices() if finding.subject == "GPU"]
        assert finding.level == PROBLEM and finding.change.startswith(change)


@pytest.mark.parametrize(("free", "level"), [(79, OK), (50, WARNING)])
def test_memory_that_others_hold_is_a_warning(monkeypatch, free, level):
    for name, value in (
        ("is_available", True),
        ("device_count", 1),
        ("mem_get_info", (free * 2**30, 80 * 2**30)),
        ("get_device_name", "H100"),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda *device, value=value: value)
    findings = machine.devices()
    assert level_of(findings, "GPU memory") == level
    # The torch of a machine without GPUs has none.
    assert level_of(findings, "NCCL") == (OK if torch.distributed.is_nccl_available() else PROBLEM)


def test_a_host_name_without_an_address_is_a_warning(monkeypatch):
    def unknown(*asked: Any) -> Any:
        raise socket.gaierror("Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert level_of(machine.devices(), "host name") == WARNING
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert not [finding for finding in machine.devices() if finding.subject == "host name"]


def test_findings_of_several_ranks_are_printed_once_and_other_versions_are_a_problem(capsys):
    same, own = Finding(OK, "GPU", "none"), Finding(WARNING, "GPU memory", "3 GiB")
    ranks = [[Finding(OK, "torch", text), same] for text in ("2.13", "2.13", "2.12")]
    ranks[1].append(own)
    assert doctor._print(ranks[:2], False) == 0
    assert capsys.readouterr().out.splitlines()[:3] == [
        "ok       torch           2.13",
        "ok       GPU             none",
        "warning  GPU memory      rank 1: 3 GiB",
    ]
    assert doctor._print(ranks, True) == 1
    findings = json.loads(capsys.readouterr().out)["findings"]
    assert [f["ranks"] for f in findings if f["subject"] == "GPU"] == [[0, 1, 2]]
    (problem,) = [f for f in findings if f["level"] == PROBLEM]
    assert problem["found"] == "ranks differ: 2.13, 2.12"


def test_a_limit_of_no_time_is_refused(capsys):
    assert main(["doctor", "--limit", "0"]) == 2
    assert "--limit 0.0" in capsys.readouterr().err


# ---- ranks ------------------------------------------------------------------------------------------


def on_rank(rank: int, world: int, how: str) -> tuple[int, str]:
    """The exit code and the report of one rank."""
    from sap_hf.cli import ranks
    from sap_hf.runtime import calibrate, transport

    calibrate.SECONDS, calibrate.LONG = 0.02, 0.02
    if how == "a slow wire":
        ranks.link_bytes_per_s = lambda *link: 1e6 if link[1] == world else 1e9
    elif how == "wrong rows":

        class Wire(transport.Transport):
            def post_all_to_all(self, send: Any, *rest: Any) -> Any:
                return super().post_all_to_all(send + 1, *rest)

        transport._current = Wire()
    out, leave = io.StringIO(), os._exit
    # Where something is wrong the command ends its process; this one has to tell what it printed.
    os._exit = lambda code: torch.distributed.destroy_process_group()  # type: ignore[assignment]
    try:
        with contextlib.redirect_stdout(out):
            code = main(["doctor", "--json", "--limit", "20"])
    finally:
        os._exit = leave
    return code, out.getvalue()


def report_of(world: int, how: str, per_node: int) -> tuple[int, dict[str, list[dict[str, Any]]]]:
    """The exit code, and the findings of rank 0 by subject."""
    env = {"LOCAL_WORLD_SIZE": str(per_node)}
    (code, printed), *others = run_ranks(on_rank, world, how, init=False, env=env)
    assert others == [(0, "")] * (world - 1)
    found: dict[str, list[dict[str, Any]]] = {}
    for finding in json.loads(printed)["findings"]:
        found.setdefault(finding["subject"], []).append(finding)
    return code, found


def test_ranks_that_work_are_found_to():
    code, found = report_of(2, "right", 2)
    assert code == 0
    for subject in ("process groups", "all-reduce", "all-to-all", "point-to-point"):
        assert [(finding["level"], finding["ranks"]) for finding in found[subject]] == [(OK, [0, 1])]
    (link,) = found["links"]
    assert link["found"].startswith("inside the node") and link["ranks"] == [0, 1]


def test_links_inside_and_between_nodes_are_told_beside_what_plans_assume():
    code, found = report_of(4, "a slow wire", 2)
    assert code == 0
    inside, between = found["links"]
    assert inside["level"] == OK and inside["found"].startswith("inside the node 1.00 GB/s")
    assert between["level"] == WARNING and between["found"].startswith("between nodes 0.00 GB/s")
    assert "'cpu' assume 0.10" in between["found"] and "bench --calibrate" in between["change"]


def test_rows_that_arrive_wrong_are_a_problem_and_end_the_checks():
    code, found = report_of(2, "wrong rows", 2)
    assert code == 1
    (finding,) = found["all-to-all"]
    assert finding["level"] == PROBLEM and "others arrived wrong" in finding["found"]
    assert finding["ranks"] == [0, 1] and "point-to-point" not in found


HANGS = """
import os, sys, time
import torch.distributed as dist
from sap_hf.cli import main, ranks

if os.environ["RANK"] == "1":
    ranks.{check} = lambda *given: time.sleep(1000)
    {also}
sys.exit(main(["doctor", "--limit", "3"]))
"""


@pytest.mark.parametrize(
    ("check", "also", "subject"),
    [
        ("_all_reduce", "", "all-reduce"),
        ("_groups", "", "process groups"),
        ("_point_to_point", "ranks.gather = lambda *given: time.sleep(1000)", "report"),
    ],
)
def test_a_hang_is_reported_and_not_waited_for(tmp_path, check, also, subject):
    script = tmp_path / "hangs.py"
    script.write_text(HANGS.format(check=check, also=also))
    started = time.monotonic()
    done = run_script(script, 2, timeout=100, env={"PYTHONPATH": str(Path(__file__).parent.parent)})
    assert done.code == 1
    assert f"problem  {subject}" in done.output, done.output
    # The check is the last one; a rank that says nothing at all is named besides.
    assert "no answer in 3 s" in done.output
    assert ("rank 1: none 6 s after rank 0 was done" in done.output) == bool(also)
    assert "problem  links" not in done.output
    assert time.monotonic() - started < 60


def test_a_rank_that_meets_nobody_says_so():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Rank 1 of two, and no rank 0 that listens.
    place = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    done = subprocess.run(
        [sys.executable, "-m", "sap_hf.cli", "doctor", "--limit", "2"],
        env={**os.environ, **place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        capture_output=True,
        text=True,
        check=False,
        timeout=100,
    )
    assert done.returncode == 1
    assert f"problem  rendezvous      127.0.0.1:{port}: " in done.stdout
    assert "MASTER_ADDR" in done.stdout
