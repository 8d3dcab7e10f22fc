"""docs/models.md, from the results of the matrix and the refusals of the walk."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.models.matrix import Case, Result, is_exact
from tests.models.walk import refusals

HEAD = """\
# Supported models

Written by `make matrix` (transformers {transformers}, torch {torch}, CPU, float64); not edited by hand.

{exact} of the {all} causal-LM types of transformers are exact: on a tiny random model of the type, logits, loss and all
gradients on 2 and on 4 ranks equal every document run alone, for a packed row and for a single document, and no
document sees another one. The errors are the largest of all, as parts of the largest entry. "asked" is what the
type's layers ask of attention beyond full causal attention; "router" that the mixture's router loss is compared too.
Where layers mix neighbouring tokens without attention (convolutions, recurrences), ranks hold consecutive rows (layout
contiguous) and pass on to each other what such a layer needs. Everything else is refused before training, by the
message at the end of this page.

| type | layers | asked | error, 2 ranks | error, 4 ranks |
|---|---|---|---|---|
"""
REFUSED = """\

## Refused

| type | why |
|---|---|
"""


def write(path: Path, cases: Mapping[str, Case], results: Mapping[int, Mapping[str, Any]]) -> None:
    """Write the page; a case that failed on ranks stands there as such."""
    import torch
    import transformers

    refused = refusals()
    types = [name for name, case in cases.items() if name == case.model_type]
    exact = [name for name in types if all(is_exact(found[name]) for found in results.values())]
    lines = [
        HEAD.format(
            transformers=transformers.__version__,
            torch=torch.__version__.split("+")[0],
            exact=len(exact),
            all=len(types) + len(refused),
        )
    ]
    lines += [_row(name, [results[world][name] for world in sorted(results)]) for name in cases]
    lines.append(REFUSED)
    lines += [f"| {name} | {reason} |\n" for name, reason in refused.items()]
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")


def _row(name: str, found: list[Any]) -> str:
    first = next((result for result in found if isinstance(result, Result)), None)
    if first is None:
        return f"| {name} | fails | | | |\n"
    asked = ", ".join([*first.features, *(["router"] if "router" in first.rows else [])])
    errors = [f"{result.worst:.0e}" if isinstance(result, Result) else "fails" for result in found]
    return f"| {name} | {first.report} | {asked} | {' | '.join(errors)} |\n"
