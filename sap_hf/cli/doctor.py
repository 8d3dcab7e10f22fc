"""sap-hf doctor: what on this machine would hinder training on shared packs, and what to change.

Versions, devices, kernels and the launcher's variables -> findings. On ranks that a launcher started, process groups,
the three kinds of exchange and the speed of the links as well: each within a time limit, because what is wrong with
them shows as a hang. Rank 0 prints what all ranks found.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from typing import Any

from sap_hf.errors import ConfigError

OK, WARNING, PROBLEM = "ok", "warning", "problem"
# Extras of the package that training profits from, and that are worth a line when they are absent.
EXTRAS = ("flash", "peft")
# Packages whose versions all ranks must share.
VERSIONED = ("python", "torch", "transformers", "accelerate", "trl", "flash-attn", "NCCL")
START = "torchrun --nproc-per-node N -m sap_hf.cli"


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    level: str
    """ok | warning (slower, or soon wrong) | problem (training would fail or hang)."""
    subject: str
    found: str
    change: str = ""
    """What to do about it; empty where nothing is to be done."""


def add(commands: Any) -> None:
    """Add this command and its options to the parser's."""
    show = commands.add_parser("doctor", help="check versions, kernels, process groups and links")
    show.add_argument("--json", action="store_true", help="the findings as JSON")
    show.add_argument(
        "--limit",
        type=float,
        default=30.0,
        metavar="SECONDS",
        help="how long ranks are waited for, each time (default 30)",
    )
    show.set_defaults(run=_doctor)


def _doctor(options: argparse.Namespace) -> int:
    """0 when nothing is in the way, 1 when there is a problem."""
    if options.limit <= 0:
        raise ConfigError(f"--limit {options.limit}: more than 0 seconds are needed.")
    findings = versions()
    if importlib.util.find_spec("torch") is None:
        return _print([findings], options.json)
    # Here: versions are told without torch, too.
    from sap_hf.cli import machine, ranks

    findings += [*machine.devices(), *machine.kernels(), *machine.launcher()]
    if "RANK" not in os.environ or any((one.subject, one.level) == ("launcher", PROBLEM) for one in findings):
        return _print([findings], options.json)
    rank, found, store = int(os.environ["RANK"]), *ranks.examine(options.limit)
    clean = all(finding.level != PROBLEM for finding in found)
    code = 0
    if store is None:
        code = _print([[*findings, *found]], options.json)
    else:
        everyone = ranks.gather(store, [*findings, *found], 2 * options.limit)
        if rank == 0:
            code = _print(everyone, options.json)
    if not (clean and ranks.leave(options.limit)):
        # A thread still waits for the others inside torch, and would keep this process or abort it.
        sys.stdout.flush()
        os._exit(code)
    return code


def _print(everyone: list[list[Finding]], as_json: bool) -> int:
    """Print what each rank found, the same findings once; 1 when there is a problem."""
    ranks_of: dict[Finding, list[int]] = {}
    for rank, findings in enumerate(everyone):
        for finding in findings:
            ranks_of.setdefault(finding, []).append(rank)
    ranks_of.update(_differing_versions(ranks_of))
    problems = sum(finding.level == PROBLEM for finding in ranks_of)
    if as_json:
        listed = [{**dataclasses.asdict(finding), "ranks": ranks} for finding, ranks in ranks_of.items()]
        print(json.dumps({"findings": listed, "problems": problems}, indent=1))
        return int(problems > 0)
    for finding, ranks in ranks_of.items():
        where = "" if len(ranks) == len(everyone) else f"rank {', '.join(map(str, ranks))}: "
        print(f"{finding.level:<9}{finding.subject:<16}{where}{finding.found}")
        if finding.change:
            print(f"{'':<25}-> {finding.change}")
    warnings = sum(finding.level == WARNING for finding in ranks_of)
    print(f"\n{problems} problems, {warnings} warnings")
    return int(problems > 0)


def _differing_versions(ranks_of: dict[Finding, list[int]]) -> dict[Finding, list[int]]:
    """A problem for each package of which ranks have different versions."""
    found: dict[str, list[str]] = {}
    for finding in ranks_of:
        if finding.subject in VERSIONED:
            found.setdefault(finding.subject, []).append(finding.found)
    return {
        Finding(PROBLEM, name, f"ranks differ: {', '.join(texts)}", "install the same on every node"): sorted(
            {rank for finding, ranks in ranks_of.items() if finding.subject == name for rank in ranks}
        )
        for name, texts in found.items()
        if len(texts) > 1
    }


def versions() -> list[Finding]:
    """What is installed, beside what this package asks for."""
    try:
        from packaging.requirements import Requirement
        from packaging.specifiers import SpecifierSet

        asked = importlib.metadata.metadata("sap-hf")
    except ModuleNotFoundError as error:
        # Also of a package without metadata.
        change = "pip install packaging" if error.name == "packaging" else "pip install -e . in its folder"
        return [
            Finding(WARNING, "versions", f"not compared: {error.name or 'sap-hf'} is not installed", change)
        ]
    python = SpecifierSet(asked["Requires-Python"])
    fits = python.contains(platform.python_version(), prereleases=True)
    findings = [
        Finding(OK, "python", platform.python_version())
        if fits
        else Finding(
            PROBLEM, "python", f"{platform.python_version()}, {python} is needed", "use another Python"
        )
    ]
    for text in asked.get_all("Requires-Dist") or ():
        package = Requirement(text)
        extras = [name for name in EXTRAS if package.marker and package.marker.evaluate({"extra": name})]
        if package.marker is not None and not extras:
            continue
        wanted = f"pip install '{package.name}{package.specifier}'"
        try:
            version = importlib.metadata.version(package.name)
        except importlib.metadata.PackageNotFoundError:
            level = OK if extras else PROBLEM
            findings.append(
                Finding(
                    level,
                    package.name,
                    "not installed" + (f" (optional: {wanted})" if extras else ""),
                    "" if extras else wanted,
                )
            )
            continue
        if package.specifier.contains(version, prereleases=True):
            findings.append(Finding(OK, package.name, version))
        else:
            findings.append(
                Finding(
                    WARNING if extras else PROBLEM,
                    package.name,
                    f"{version}, {package.specifier} is needed",
                    wanted,
                )
            )
    return findings
