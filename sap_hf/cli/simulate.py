"""sap-hf simulate: what other tools would take for the same packs, beside our own plans."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from sap_hf.errors import ConfigError
from sap_hf.planning.hardware import find_hardware
from sap_hf.planning.workloads import WORKLOADS
from sap_hf.simulation import chart, megatron
from sap_hf.simulation.compare import compare
from sap_hf.simulation.fit import FITTED, fit, machine_of
from sap_hf.simulation.placement import placement_table
from sap_hf.simulation.report import chart_table, compare_table, constants_table
from sap_hf.simulation.step import predict


def add(commands: Any) -> None:
    """Add this command and its options to the parser's."""
    show = commands.add_parser("simulate", help="time other tools' policies and our plans under one model")
    show.add_argument("--chart", action="store_true", help="the model beside MagiAttention's published chart")
    show.add_argument("--fit", action="store_true", help="search the model's constants again")
    show.add_argument("--placement", action="store_true", help="imbalance and rows moved of balanced layouts")
    show.add_argument(
        "--megatron", action="store_true", help="Megatron-Core's dynamic-CP example beside ours"
    )
    show.add_argument(
        "--predict", metavar="FILE.json", help="write what a step of an 8B model should take on 8 H100"
    )
    show.add_argument("--workload", default="all", metavar="NAME", help=f"all | {' | '.join(WORKLOADS)}")
    show.add_argument("--ranks", default="8,16,32,64", metavar="8,16", help="ranks that share a pack")
    show.add_argument("--rows-per-rank", type=int, default=chart.ROWS_PER_RANK, help="default 8192")
    show.add_argument("--packs", type=int, default=chart.PACKS, help="packs of each workload (default 20)")
    show.add_argument(
        "--hardware", help="preset or file for links and kernels (default: as fitted to the chart)"
    )
    show.set_defaults(run=_simulate)


def _simulate(options: argparse.Namespace) -> None:
    if options.chart:
        print(chart_table(machine_of(FITTED)))
    if options.fit:
        print(constants_table(FITTED, fit()))
    if options.placement:
        print(placement_report())
    if options.megatron:
        print(megatron.report())
    if options.predict is not None:
        Path(options.predict).write_text(json.dumps(predict(), indent=1) + "\n")
    if options.chart or options.fit or options.placement or options.megatron or options.predict:
        return
    machine = machine_of(FITTED)
    if options.hardware is not None:
        machine = dataclasses.replace(machine, hardware=find_hardware(options.hardware))
    if options.packs < 1:
        raise ConfigError(f"--packs {options.packs}: at least one pack is needed.")
    names = list(WORKLOADS) if options.workload == "all" else [options.workload]
    for ranks in _ranks(options.ranks):
        rows = [
            compare(name, ranks, options.rows_per_rank, options.packs, chart.SHAPE, machine) for name in names
        ]
        print(compare_table(rows), end="\n\n", flush=True)


def placement_report() -> str:
    """One line for each workload and number of ranks: means over its packs."""
    lines = [
        "workload  ranks     rows  imbalance mean  worst  of all-gather  contiguous: imbalance  of all-gather"
    ]
    lines += [
        f"{placed.workload:<9} {placed.ranks:>5} {placed.rows:>8}  {placed.mean_imbalance:14.3f}  "
        f"{placed.max_imbalance:5.3f}  {placed.moved:13.2%}  {placed.contiguous_imbalance:21.2f}  "
        f"{placed.contiguous_moved:13.2%}"
        for placed in placement_table()
    ]
    return "\n".join(lines)


def _ranks(text: str) -> list[int]:
    ranks = [int(part) for part in text.replace(" ", "").split(",") if part.isdigit()]
    if not ranks or min(ranks) < 2:
        raise ConfigError(f"--ranks {text}: give numbers of ranks, at least 2, such as 8,16.")
    return ranks
