"""The text picture of a plan: who holds which documents, what moves, what it costs."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

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
        f"{plan.strategy} on {plan.layout}"
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


def share(plan: Plan) -> float:
    """Rows moved as a share of an all-gather's."""
    return float(plan.rows_moved.sum() / plan.all_gather_rows) if plan.all_gather_rows else 0.0


def as_dict(plan: Plan) -> dict[str, Any]:
    """The plan's figures under the names of its attributes, ready for JSON."""
    return {
        "strategy": plan.strategy,
        "layout": plan.layout,
        "deliveries": list(plan.deliveries),
        "ulysses_size": plan.ulysses_size,
        "cp_size": plan.cp_size,
        "rows": plan.documents.rows,
        "rows_per_rank": plan.rows_per_rank,
        "documents": len(plan.documents),
        "rows_moved": plan.rows_moved.tolist(),
        "rows_moved_total": int(plan.rows_moved.sum()),
        "all_gather_rows": plan.all_gather_rows,
        "lower_bound_rows": plan.lower_bound_rows,
        "pairs": plan.pairs.tolist(),
        "imbalance": plan.imbalance,
        "modelled_seconds": plan.seconds,
        "peak_bytes": plan.peak_bytes,
        "digest": plan.digest,
    }


def as_json(plan: Plan) -> str:
    """`as_dict` as indented JSON."""
    return json.dumps(as_dict(plan), indent=2)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _size(size: int) -> str:
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024  # type: ignore[assignment]
    return f"{size:.4g} GiB"
