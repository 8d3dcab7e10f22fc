"""sap-hf verify: is a model exact when ranks share its packs? Logits, loss, gradients and leaks, and a verdict."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sap_hf.hf.verify import Verdict


def add(commands: Any) -> None:
    """Add this command and its options to the parser's."""
    show = commands.add_parser("verify", help="check that a model is exact when ranks share its packs")
    show.add_argument(
        "model",
        metavar="MODEL_OR_CONFIG",
        help="a folder with config.json, a model type such as qwen3, or the id of a model on a hub",
    )
    show.add_argument("--ranks", type=int, default=2, metavar="N", help="CPU processes (default 2)")
    show.add_argument(
        "--weights", action="store_true", help="its own weights, not a tiny random clone of its config"
    )
    show.set_defaults(run=_verify)


def _verify(options: argparse.Namespace) -> int:
    """0 when exact, 1 when not."""
    # Here: the other commands start without transformers.
    from sap_hf.hf.verify import verify

    verdict = verify(options.model, options.ranks, options.weights)
    print(show(verdict, options.ranks))
    return 0 if verdict.exact else 1


def show(verdict: Verdict, ranks: int) -> str:
    """What was run, a table of errors, and the verdict in the last line."""
    from sap_hf.hf.verify import LENGTHS

    lines = [
        f"{verdict.model}; {verdict.dtype}",
        f"patched: {verdict.patched}",
        *(f"layers:  {kernel}" for kernel in verdict.kernels),
        f"pack:    documents of {', '.join(map(str, LENGTHS))} rows, shared by {ranks} processes. The truth is each of "
        "them run alone",
        "         by transformers' eager attention; errors are parts of the largest logit, loss and gradient",
        *(f"note:    {note}" for note in verdict.notes),
        "",
        f"{'plan':<28}{'rows moved':>11}{'logits':>10}{'loss':>10}{'gradients':>11}{'document 2':>12}{'leak':>10}",
    ]
    lines += [
        f"{trial.plan:<28}{trial.rows_moved:>11}{trial.logits:>10.1e}{trial.loss:>10.1e}{trial.gradients:>11.1e}"
        f"{trial.second_document:>12.1e}{trial.leak:>10.1e}"
        for trial in verdict.trials
    ]
    return "\n".join([*lines, "", _last_line(verdict)])


def _last_line(verdict: Verdict) -> str:
    if verdict.exact:
        return f"EXACT: no error is above {verdict.tolerance:.0e}, and no document sees another."
    worst = max(verdict.trials, key=lambda trial: trial.error)
    if worst.error <= verdict.tolerance:
        return "NOT TESTED: no rows were moved, or the model answers the same to any tokens."
    line = f"NOT EXACT: {worst.plan}: {worst.worst} is off by {worst.error:.1e}; {verdict.tolerance:.0e} is allowed."
    if verdict.tolerance < worst.leak < math.inf:
        line += f" The first document moves the logits of the others by {worst.leak:.1e}."
    return line
