"""CPU time of `sap_hf.plan` with everything left to auto, beside an empty Python loop of a million rounds.

    python benchmarks/planning.py --out result.json

A plan is made once per batch on the host, ahead of the step. The loop is timed in turn with the plans, in the same
process, so that the ratio of the two means the same on a slow machine and on a fast one.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import sap_hf
from sap_hf.planning.documents import Int64
from sap_hf.planning.workloads import pack

# Ranks, documents, ranks that exchange heads, and the part of the loop's time that a plan should take at most.
SCALES: tuple[tuple[int, int, int | str, float], ...] = (
    (8, 70, 1, 0.2),
    (64, 900, 1, 0.8),
    (64, 420, 1, 0.8),
    (64, 900, "auto", 0.8),
)
WORKLOADS = ("megatron", "short", "magi")
PACKS = 3
# Documents are drawn until there are more than enough: no workload's are longer in the mean.
LONG = 8192


def main() -> None:
    """Time every pack, print a table; write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--turns", type=int, default=25)
    parser.add_argument("--note", default="", help="how the machine was set up")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    machine = platform.processor() or platform.machine()
    machine = f"{machine}, Python {platform.python_version()}, numpy {np.__version__}"
    print(f"{machine}, commit {commit}")
    found = []
    for ranks, documents, heads, limit in SCALES:
        for workload in WORKLOADS:
            for seed in range(PACKS):
                lengths = pack(workload, documents * LONG, np.random.default_rng(seed))[:documents]
                row = measure(lengths, ranks, heads, options.turns)
                found.append(
                    {
                        "workload": workload,
                        "seed": seed,
                        "documents": documents,
                        "ranks": ranks,
                        "ulysses_size": heads,
                        **row,
                    }
                )
                print(
                    f"  {workload:<9} {documents:3} documents, {int(lengths.sum()):9,} rows, {ranks:2} ranks, "
                    f"heads {heads}: plan {row['plan_seconds'] * 1e3:6.2f} ms, "
                    f"loop {row['loop_seconds'] * 1e3:6.2f} ms, ratio {row['ratio']:.3f} (at most {limit})"
                )
    if options.out:
        record = {
            "machine": machine,
            "note": options.note,
            "commit": commit,
            "command": " ".join(sys.argv),
            "turns": options.turns,
            "packs": found,
        }
        with options.out.open("a") as file:
            file.write(json.dumps(record) + "\n")


def measure(lengths: Int64, ranks: int, heads: int | str, turns: int) -> dict[str, float]:
    """Least seconds of a plan and of the loop, which take turns, and their ratio; the first turn warms up."""
    plans, loops = [], []
    for _ in range(turns + 1):
        loops.append(timed(loop))
        plans.append(timed(lambda: complete(lengths, ranks, heads)))
    plan_seconds, loop_seconds = min(plans[1:]), min(loops[1:])
    return {"plan_seconds": plan_seconds, "loop_seconds": loop_seconds, "ratio": plan_seconds / loop_seconds}


def complete(lengths: Int64, ranks: int, heads: int | str) -> None:
    """A plan as a trainer needs it: placement, schedule, modelled time and digest."""
    made = sap_hf.plan(lengths, cp_size=ranks, ulysses_size=heads)
    assert made.seconds > 0
    assert made.digest


def loop() -> None:
    """A million times nothing."""
    for _ in range(1_000_000):
        pass


def timed(run: Callable[[], None]) -> float:
    """Seconds of this process that `run` takes."""
    started = time.process_time()
    run()
    return time.process_time() - started


if __name__ == "__main__":
    main()
