"""Plans as text and as JSON: who holds which documents, what moves, what it costs, what else was weighed."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from sap_hf.planning.cost import critical_rows

if TYPE_CHECKING:
    from sap_hf.planning.plan import Plan

WIDTH = 48
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def picture(plan: Plan) -> str:
    """Several lines: one per rank with its rows (a letter is a document, '.' is padding), then the totals."""
    documents, moved = plan.documents, plan.rows_moved
    shown = min(plan.rows_per_rank, WIDTH)
    scale = plan.rows_per_rank / shown
    lines = [
        f"{_count(len(documents), 'document')}, {_count(documents.rows, 'row')}, {_count(plan.cp_size, 'rank')}: "
        f"{method(plan)}{f', {plan.turns} turns' if plan.turns > 1 else ''} on {plan.layout}"
        + (f" (one column is about {scale:.3g} rows)" if scale > 1 else "")
    ]
    width = len(str(plan.cp_size - 1))
    mean = plan.pairs.mean() or 1
    for rank in range(plan.cp_size):
        rows = plan.rows(rank)[(np.arange(shown) * scale).astype(np.int64)]
        owners = documents.index_of(rows)
        bar = "".join(
            "." if row >= documents.rows else LETTERS[doc % len(LETTERS)]
            for row, doc in zip(rows, owners, strict=True)
        )
        received = int(moved[:, rank].sum())
        lines.append(
            f"rank {rank:>{width}} |{bar:<{shown}}| work {plan.pairs[rank] / mean:4.2f}  receives {received:,}"
        )
    total = int(moved.sum())
    lines.append(
        f"rows moved {total:,} of {plan.all_gather_rows:,} for an all-gather ({share(plan):.1%}), "
        f"at least {plan.lower_bound_rows:,}"
    )
    lines.append(
        f"imbalance {plan.imbalance:.2f} (busiest rank / mean), modelled {plan.seconds * 1e3:.3g} ms forward and "
        f"backward on {plan.hardware.name}, peak {_size(plan.peak_bytes)} per rank"
    )
    return "\n".join(lines)


def method(plan: Plan) -> str:
    """The strategy, and what it is combined with."""
    if plan.strategy == "ulysses" or plan.ulysses_size == 1:
        return plan.strategy
    return f"ulysses {plan.ulysses_size} x {plan.strategy}"


def share(plan: Plan) -> float:
    """Rows moved as a share of an all-gather's."""
    return float(plan.rows_moved.sum() / plan.all_gather_rows) if plan.all_gather_rows else 0.0


def table(plan: Plan, members: Sequence[Plan]) -> str:
    """A line for the fastest plan of each layout and method that was weighed, in that order, `plan` marked; then c*."""
    head = ("layout", "strategy", "stages", "delivery", "ms", "imbalance", "of all-gather", "of bound")
    marks: dict[tuple[str, ...], str] = {head: ""}
    seen: set[tuple[str, str, str]] = set()
    for member in sorted(members, key=lambda member: (member.seconds, member is not plan)):
        kind = (member.layout, member.placement.start, method(member))
        if kind not in seen:
            marks[_cells(member)] = "*" if member is plan else ""
        seen.add(kind)
    widths = [max(map(len, column)) for column in zip(*marks)]
    lines = []
    for cells, mark in marks.items():
        # Words to the left, numbers to the right.
        aligned = (f"{cell:{'<' if i in (0, 1, 3) else '>'}{widths[i]}}" for i, cell in enumerate(cells))
        lines.append("  ".join((f"{mark:1}", *aligned)))
    inside, between = critical(plan).values()
    lines.append(
        f"c*: where a rank holds fewer than {inside:,} rows of a document ({between:,} between nodes), a received row "
        "travels longer than it is computed on"
    )
    return "\n".join(lines)


def _cells(plan: Plan) -> tuple[str, ...]:
    found = figures(plan)
    ratio = found["ratio_to_lower_bound"]
    return (
        f"{plan.layout} ({found['start']})" if found["start"] else plan.layout,
        method(plan),
        f"{found['stages']}{' whole' if found['whole'] and found['stages'] else ''}",
        _runs(plan.deliveries),
        f"{plan.seconds * 1e3:.4g}",
        f"{plan.imbalance:.2f}",
        f"{share(plan):.1%}",
        "-" if ratio is None else f"{ratio:.2f}",
    )


def figures(plan: Plan) -> dict[str, Any]:
    """What plans of one pack are compared by, ready for JSON.

    Returns:
        modelled_seconds are those of the slowest rank, forward and backward. ratio_to_lower_bound is None where nothing
        has to move.
    """
    moved, bound = int(plan.rows_moved.sum()), plan.lower_bound_rows
    return {
        "layout": plan.layout,
        "start": plan.placement.start,
        "strategy": plan.strategy,
        "ulysses_size": plan.ulysses_size,
        "turns": plan.turns,
        "stages": len(plan.deliveries),
        "whole": plan.widest.whole,
        "deliveries": list(plan.deliveries),
        "modelled_seconds": plan.seconds,
        "imbalance": plan.imbalance,
        "rows_moved_total": moved,
        "share_of_all_gather": share(plan),
        "ratio_to_lower_bound": moved / bound if bound else None,
        "digest": plan.digest,
    }


def per_critical(plan: Plan) -> str:
    """C/c*, the rows of a rank over c* of the slowest link: below 1 a row travels longer than it is computed on."""
    inside, between = critical(plan).values()
    rows = inside if plan.cp_size <= plan.hardware.ranks_per_node else between
    return f"C/c* = {plan.rows_per_rank:,}/{rows:,} = {plan.rows_per_rank / rows:.2g}"


def critical(plan: Plan) -> dict[str, int]:
    """c* of the plan's layer on its hardware, in rows."""
    return {
        "inside_node": critical_rows(plan.shape, plan.hardware, inside_node=True),
        "between_nodes": critical_rows(plan.shape, plan.hardware, inside_node=False),
    }


def as_dict(plan: Plan) -> dict[str, Any]:
    """The plan's figures under the names of its attributes, ready for JSON; seconds_per_rank are lists of W."""
    return {
        **figures(plan),
        "ulysses_size": plan.ulysses_size,
        "cp_size": plan.cp_size,
        "rows": plan.documents.rows,
        "rows_per_rank": plan.rows_per_rank,
        "documents": len(plan.documents),
        "rows_moved": plan.rows_moved.tolist(),
        "all_gather_rows": plan.all_gather_rows,
        "lower_bound_rows": plan.lower_bound_rows,
        "pairs": plan.pairs.tolist(),
        "seconds_per_rank": {
            part: getattr(plan.layer_seconds, part).tolist()
            for part in ("forward", "forward_exposed", "backward", "backward_exposed")
        },
        "critical_rows": critical(plan),
        "peak_bytes": plan.peak_bytes,
    }


def as_json(plan: Plan, members: Sequence[Plan] = ()) -> str:
    """`as_dict` as indented JSON, and `figures` of the plans that were weighed, in that order."""
    weighed = [{**figures(member), "chosen": member is plan} for member in members]
    return json.dumps({**as_dict(plan), "members": weighed}, indent=2)


def _runs(names: Sequence[str]) -> str:
    """Names in a row, equal neighbours counted: 'p2p x2, all_to_all'."""
    counted = [(name, len(list(run))) for name, run in itertools.groupby(names)]
    return ", ".join(name if count == 1 else f"{name} x{count}" for name, count in counted) or "-"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _size(size: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024  # type: ignore[assignment]
    return f"{size:.4g} GiB"
