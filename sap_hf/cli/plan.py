"""sap-hf plan: show how ranks share a pack of documents."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from sap_hf.config import LAYOUTS, STRATEGIES
from sap_hf.errors import SapError
from sap_hf.planning import compile_program
from sap_hf.planning.render import as_json
from sap_hf.planning.workloads import WORKLOADS
from sap_hf.planning.workloads import pack as workload
from sap_hf.strategies import plan


def add(commands: Any) -> None:
    """Add this command and its options to the parser's."""
    show = commands.add_parser("plan", help="show how ranks share a pack of documents")
    pack = show.add_mutually_exclusive_group(required=True)
    pack.add_argument("--lengths", type=_numbers, metavar="5,3,8", help="rows of each document")
    pack.add_argument("--workload", metavar="NAME", help=" | ".join(WORKLOADS))
    show.add_argument("--rows", type=int, default=131_072, help="rows of a workload's pack (default 131072)")
    show.add_argument("--seed", type=int, default=0, help="which pack of the workload")
    show.add_argument("--cp", type=int, required=True, metavar="W", help="ranks that share the pack")
    show.add_argument("--strategy", default="auto", help=" | ".join(STRATEGIES))
    show.add_argument("--layout", default="auto", help=" | ".join(LAYOUTS))
    show.add_argument("--window", type=int, help="keys a query sees, itself included")
    show.add_argument("--hardware", help="preset for the modelled seconds (default h100)")
    show.add_argument("--json", action="store_true", help="the figures as JSON")
    show.add_argument(
        "--program", type=int, metavar="RANK", help="what that rank posts, waits for and computes"
    )
    show.set_defaults(run=_plan)


def _plan(options: argparse.Namespace) -> None:
    lengths = options.lengths
    if lengths is None:
        lengths = workload(options.workload, options.rows, np.random.default_rng(options.seed))
    made = plan(
        lengths,
        cp_size=options.cp,
        strategy=options.strategy,
        layout=options.layout,
        window=options.window,
        hardware=options.hardware,
    )
    if options.program is not None:
        if not 0 <= options.program < options.cp:
            raise SapError(f"--program {options.program}: ranks are 0 to {options.cp - 1}.")
        print(compile_program(made, options.program, options.window))
    elif options.json:
        print(as_json(made))
    else:
        print(made)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.replace(" ", "").split(",") if part]
