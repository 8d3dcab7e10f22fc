"""sap-hf simulate: what other tools would take for the same packs, beside our own plans."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from sap_hf.config import check_choice
from sap_hf.errors import ConfigError
from sap_hf.planning.hardware import find_hardware
from sap_hf.planning.workloads import WORKLOADS
from sap_hf.simulation import chart
from sap_hf.simulation.fit import FITTED, fit
from sap_hf.simulation.report import PARTS, constants_table, report
from sap_hf.simulation.step import predict


def add(commands: Any) -> None:
    """Add this command and its options to the parser's."""
    show = commands.add_parser("simulate", help="time other tools' policies and our plans under one model")
    show.add_argument(
        "--report",
        action="store_true",
        help="placement, chart, comparison, Megatron's example and step: minutes",
    )
    show.add_argument("--placement", action="store_true", help="imbalance and rows moved of balanced layouts")
    show.add_argument("--chart", action="store_true", help="the model beside MagiAttention's published chart")
    show.add_argument(
        "--megatron", action="store_true", help="Megatron-Core's dynamic-CP example beside ours"
    )
    show.add_argument("--step", action="store_true", help="a training step of an 8B model, by strategy")
    show.add_argument("--fit", action="store_true", help="search the model's constants again")
    show.add_argument(
        "--predict", metavar="FILE.json", help="write what a step of an 8B model should take on 8 H100"
    )
    show.add_argument("--workload", default="all", metavar="NAME", help=f"all | {' | '.join(WORKLOADS)}")
    show.add_argument(
        "--ranks",
        metavar="8,16",
        help="ranks that share a pack (default 8,16,32,64; --step: 8; --placement: 4, too)",
    )
    show.add_argument("--rows-per-rank", type=int, default=chart.ROWS_PER_RANK, help="default 8192")
    show.add_argument("--packs", type=int, default=chart.PACKS, help="packs of each workload (default 20)")
    show.add_argument(
        "--hardware",
        help="preset or file for links and kernels (default: as fitted to the chart; --step: h100)",
    )
    # The comparison is what comes when no part is named.
    show.set_defaults(run=_simulate, compare=False)


def _simulate(options: argparse.Namespace) -> None:
    check_choice("--workload", options.workload, ("all", *WORKLOADS))
    for name in ("packs", "rows_per_rank"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(options, name)}: at least 1 is needed.")
    parts = [part for part in PARTS if options.report or getattr(options, part)]
    if not (parts or options.fit or options.predict):
        parts = ["compare"]
    texts = report(
        parts,
        workloads=None if options.workload == "all" else [options.workload],
        ranks=None if options.ranks is None else _ranks(options.ranks),
        rows_per_rank=options.rows_per_rank,
        count=options.packs,
        hardware=None if options.hardware is None else find_hardware(options.hardware),
    )
    for text in texts:
        print(text, flush=True)
    if options.fit:
        print(constants_table(FITTED, fit()))
    if options.predict is not None:
        Path(options.predict).write_text(json.dumps(predict(), indent=1) + "\n")


def _ranks(text: str) -> list[int]:
    parts = text.replace(" ", "").split(",")
    if not all(part.isdecimal() and int(part) > 1 for part in parts):
        raise ConfigError(f"--ranks {text}: give numbers of ranks, at least 2, such as 8,16.")
    return [int(part) for part in parts]
