"""sap-hf: the command line, one module for each command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from sap_hf.cli import bench, doctor, plan, simulate, verify
from sap_hf.errors import SapError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 when it worked, 1 when what it looked at is not right, 2 when the input was refused."""
    parser = argparse.ArgumentParser(prog="sap-hf", description="Plans of packed rows over several ranks.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (plan, verify, doctor, bench, simulate):
        command.add(commands)
    options = parser.parse_args(arguments)
    try:
        return options.run(options) or 0
    except SapError as error:
        print(f"sap-hf: {error}", file=sys.stderr)
        return 2
