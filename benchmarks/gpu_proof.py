"""The first run on real GPUs, in one command: what the machine is, whether all is exact there, how fast, how far.

    make gpu-proof
    python benchmarks/gpu_proof.py --out outputs/gpu-proof --parts attention score

It writes gpu_proof.json and, beside it, what each part found. Every part has processes of its own, so that one that
fails leaves its last lines in the record and the others run:

    environment   GPUs, driver, links, libraries, and which kernel `auto` takes and why
    parity        tests/gpu: every kernel alone, attention over all GPUs, a model; the speed of packed calls
    calibration   sap-hf bench --calibrate; needs two GPUs
    packed        benchmarks/packed.py: many documents against one of as many query-key pairs, on one GPU
    attention     one layer of Llama-3.1-8B, forward and backward, for all packs and plans of the predictions
    step          training steps of that model; with FSDP2, and fewer layers where it does not fit
    context       one document, doubled in length until a step fails
    trace         a profiler's trace of rank 0's step
    score         measured over predicted: by the committed predictions for eight H100, and by the same model with this
                  machine's calibration

--tiny tries the script itself on a few rows, on CPUs too.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from collections.abc import Callable, Iterable
from itertools import combinations
from pathlib import Path
from typing import Any

import torch

from sap_hf.kernels import pick
from sap_hf.simulation.step import LLAMA_8B, Model, predict

ROOT = Path(__file__).resolve().parents[1]
COMMITTED = ROOT / "benchmarks" / "predictions" / "h100x8.json"
PACKAGES = ("flash-attn", "flash-attn-3", "flash-attn-4", "kernels", "triton", "transformers", "numpy")
TINY = Model(layers=2, hidden=64, mlp=128, num_heads=4, num_kv_heads=2, head_dim=16, vocabulary=128)
SIZES = {"rows": (65536, 131072), "tiny": (256,)}
# What a measurement and a prediction are of.
KEY = ("workload", "rows", "plan")
METRICS = ("attention_forward_ms", "attention_backward_ms", "attention_ms", "step_ms", "peak_gib")

Found = dict[str, Any]


def main() -> None:
    """Run the parts and write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/gpu-proof"), help="a folder")
    parser.add_argument(
        "--ranks", type=int, default=max(torch.cuda.device_count(), 1), help="default: all GPUs"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--minutes", type=float, default=30, help="that a part may take (default 30)")
    parser.add_argument("--tiny", action="store_true", help="a few rows and a small model")
    options = parser.parse_args()
    # The parts run from the repository.
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    record_file = options.out / "gpu_proof.json"
    record = json.loads(record_file.read_text()) if record_file.exists() else {}
    record["command"] = " ".join(sys.argv)
    for part in options.parts:
        print(f"{part} ...", flush=True)
        started = time.perf_counter()
        found = PARTS[part](options)
        record[part] = found | {"seconds": round(time.perf_counter() - started, 1)}
        record_file.write_text(json.dumps(record, indent=1) + "\n")
        print(f"  {summary(found)}", flush=True)
    print(f"wrote {record_file}")


def summary(found: Found) -> str:
    """One line of what a part found."""
    if "failed" in found:
        return f"failed: {found['failed'].splitlines()[0]}"
    plain = {name: value for name, value in found.items() if not isinstance(value, (list, dict))}
    lengths = {name: len(value) for name, value in found.items() if isinstance(value, (list, dict))}
    return ", ".join(f"{name} {value}" for name, value in {**plain, **lengths}.items()) or "done"


# ---- parts ------------------------------------------------------------------------------------------


def environment(options: argparse.Namespace) -> Found:
    """What this machine is."""
    cuda = torch.cuda.is_available()
    properties = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    found: Found = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
        "gpus": [
            {
                "name": gpu.name,
                "capability": f"{gpu.major}.{gpu.minor}",
                "gib": round(gpu.total_memory / 2**30, 1),
            }
            for gpu in properties
        ],
        "packages": {name: version(name) for name in PACKAGES},
        "commit": output("git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"),
        "driver": output(
            "nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv"
        ),
        "links": output("nvidia-smi", "topo", "-m"),
        "kernels": {},
    }
    for dtype in (torch.bfloat16, torch.float32):
        for head_dim in (64, 128, 192, 256):
            for softcap in (None, 30.0):
                _, why = pick(
                    "auto",
                    device_type="cuda" if cuda else "cpu",
                    dtype=dtype,
                    head_dim=head_dim,
                    value_dim=head_dim,
                    softcap=softcap,
                    window=None,
                )
                found["kernels"][f"{dtype} head_dim {head_dim} softcap {softcap}"] = why
    return found


def parity(options: argparse.Namespace) -> Found:
    """The tests that need GPUs: how many passed, and what each other one said."""
    report = options.out / "parity.xml"
    done = run(
        options, "-m", "pytest", str(ROOT / "tests" / "gpu"), "-q", "-m", "gpu", f"--junitxml={report}"
    )
    if not report.exists():
        return done
    found: Found = {"passed": 0, "failures": {}, "skipped": {}}
    for case in xml.etree.ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        problem = next(
            (case.find(kind) for kind in ("failure", "error") if case.find(kind) is not None), None
        )
        skipped = case.find("skipped")
        if problem is not None:
            found["failures"][name] = problem.get("message")
        elif skipped is not None:
            reason = skipped.get("message") or ""
            found["skipped"][reason] = found["skipped"].get(reason, 0) + 1
        else:
            found["passed"] += 1
    return found


def calibration(options: argparse.Namespace) -> Found:
    """This machine's Hardware."""
    if options.ranks < 2:
        return {"left_out": "one GPU sends nothing"}
    model = model_of(options)
    file = options.out / "machine.yaml"
    heads = f"{model.num_heads}:{model.num_kv_heads}"
    launcher = launch(options.ranks, "-m", "sap_hf.cli")
    done = run(
        options,
        *launcher,
        "bench",
        "--calibrate",
        str(file),
        "--heads",
        heads,
        "--head-dim",
        str(model.head_dim),
    )
    return done if "failed" in done else {"hardware": file.read_text()}


def packed(options: argparse.Namespace) -> Found:
    """What documents cost beside their pairs, on one GPU."""
    model, file = model_of(options), options.out / "packed.jsonl"
    file.unlink(missing_ok=True)
    rows = 2048 if options.tiny else 131072
    heads = f"{model.num_heads}:{model.num_kv_heads}"
    size = ["--rows", str(rows), "--heads", heads, "--head-dim", str(model.head_dim)]
    done = run(options, str(ROOT / "benchmarks" / "packed.py"), *size, "--out", str(file))
    return done | {"measured": lines_of(file)}


def lines_of(file: Path) -> list[Found]:
    """The measurements in a file, as many as there are."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def worker(part: str) -> Callable[[argparse.Namespace], Found]:
    """A part that all ranks run together, gpu_proof_ranks.py; each line of its file is one measurement."""

    def start(options: argparse.Namespace, **more: object) -> Found:
        file = options.out / f"{part}.jsonl"
        file.unlink(missing_ok=True)
        arguments = [part, "--out", str(file), *(["--tiny"] if options.tiny else [])]
        for name, value in more.items():
            arguments += [f"--{name}", str(value)]
        done = run(
            options, *launch(options.ranks, str(Path(__file__).with_name("gpu_proof_ranks.py"))), *arguments
        )
        return done | {"measured": lines_of(file)}

    return start


def context(options: argparse.Namespace) -> Found:
    """Rows of one document, doubled while a step works; each try starts afresh."""
    rows = 128 if options.tiny else 8192 * options.ranks
    tries: list[Found] = []
    while True:
        done = worker("context")(options, rows=rows)
        tries += done["measured"]
        if "failed" in done or (options.tiny and rows >= 256):
            break
        rows *= 2
    longest = max((one["rows"] for one in tries), default=0)
    return {"longest_rows": longest, "then": done.get("failed", "").split("\n")[0], "measured": tries}


def score(options: argparse.Namespace) -> Found:
    """Measured over predicted, for what earlier parts measured."""
    measured = [one for part in ("attention", "step") for one in lines_of(options.out / f"{part}.jsonl")]
    found: Found = {"losses_apart": losses_apart(measured)}
    committed = json.loads(COMMITTED.read_text())
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if len(gpus) == options.ranks == committed["ranks"] and all("H100" in name for name in gpus):
        found["committed"] = compare(committed["predictions"], measured)
    else:
        found["committed_left_out"] = (
            f"they are for {committed['ranks']} H100, here: {options.ranks} x {gpus[:1]}"
        )
    machine = options.out / "machine.yaml"
    if machine.exists():
        model, rows = model_of(options), SIZES["tiny" if options.tiny else "rows"]
        made = predict(str(machine), options.ranks, rows, model)
        found["calibrated"] = compare(made["predictions"], measured)
    return found


PARTS: dict[str, Callable[[argparse.Namespace], Found]] = {
    "environment": environment,
    "parity": parity,
    "calibration": calibration,
    "packed": packed,
    "attention": worker("attention"),
    "step": worker("step"),
    "context": context,
    "trace": worker("trace"),
    "score": score,
}


# ---- scoring ----------------------------------------------------------------------------------------


def compare(predictions: Iterable[Found], measurements: Iterable[Found]) -> Found:
    """How far predictions were from measurements of the same pack and plan.

    Returns:
        How many measurements were of another plan than was predicted, and are left out; for each metric, how many
        were compared and the smallest, middle and largest of measured / predicted; how many pairs of plans for one
        pack, whose measured attention differs by over 10 %, were predicted in that order.
    """
    predicted = {tuple(one[name] for name in KEY): one for one in predictions}
    measured: dict[tuple[Any, ...], Found] = {}
    others = 0
    for one in measurements:
        key = tuple(one[name] for name in KEY)
        if key not in predicted:
            continue
        if one["chosen"] == predicted[key]["chosen"]:
            measured.setdefault(key, {}).update(one)
        else:
            others += 1
    pairs = [(predicted[key], real) for key, real in measured.items()]
    found: Found = {"another_plan": others}
    for metric in METRICS:
        # A step of fewer layers is no measurement of the model's.
        ratios = [
            real[metric] / one[metric]
            for one, real in pairs
            if metric in real and not (metric in ("step_ms", "peak_gib") and real.get("layers_left_out"))
        ]
        if ratios:
            spread = (min(ratios), statistics.median(ratios), max(ratios))
            found[metric] = {
                "compared": len(ratios),
                "measured_over_predicted": [round(x, 3) for x in spread],
            }
    right = wrong = 0
    for (one, real), (other, other_real) in combinations(pairs, 2):
        if one["workload"] != other["workload"] or one["rows"] != other["rows"]:
            continue
        times = [x.get("attention_ms") for x in (real, other_real)]
        if None in times or abs(times[0] - times[1]) <= 0.1 * min(times):
            continue
        agree = (one["attention_ms"] < other["attention_ms"]) == (times[0] < times[1])
        right, wrong = right + agree, wrong + (not agree)
    return found | {"pairs_in_order": right, "pairs_out_of_order": wrong}


def losses_apart(measurements: Iterable[Found]) -> float | None:
    """Between the plans of one pack, which train the same weights on the same tokens; relative to the smallest."""
    losses: dict[tuple[Any, ...], list[float]] = {}
    for one in measurements:
        if "loss" in one:
            losses.setdefault((one["workload"], one["rows"]), []).append(one["loss"])
    return max((max(values) / min(values) - 1 for values in losses.values()), default=None)


# ---- processes --------------------------------------------------------------------------------------


def model_of(options: argparse.Namespace) -> Model:
    """Whose layers are measured."""
    return TINY if options.tiny else LLAMA_8B


def launch(ranks: int, *script: str) -> list[str]:
    """Arguments that start a script, or a module after -m, on all ranks of this machine."""
    # The address: a host name may resolve to nothing in a container.
    alone = ["--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node", str(ranks)]
    return ["-m", "torch.distributed.run", *alone, *script]


def run(options: argparse.Namespace, *arguments: str) -> Found:
    """Run Python with these arguments from the repository; empty, or how it `failed`."""
    with tempfile.TemporaryFile("w+") as said:
        # Its own session: a limit must end the launcher's children too, and nothing else.
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(60 * options.minutes)
        except subprocess.TimeoutExpired:
            return {"failed": f"still running after {options.minutes:g} minutes"}
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        said.seek(0)
        return {"failed": cause(said.read())} if code else {}


def cause(said: str) -> str:
    """The first traceback's last line, which is the error itself, and the end of all that was said."""
    lines = said.splitlines()
    errors = [line for line in lines if re.search(r"\w(Error|Exception)\b.*:", line)]
    return "\n".join([*errors[:1], *lines[-40:]])


def output(*command: str) -> str | None:
    """What a command prints; None where there is no such command."""
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return None


def version(package: str) -> str | None:
    """Of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
