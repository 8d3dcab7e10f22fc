"""Placement: how even the work is, and how much moves, on packs of the named workloads.

Workloads, ranks -> rows of a table. Planned, not measured: numpy alone, the same figures on every machine.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from sap_hf.planning.workloads import pack
from sap_hf.strategies.auto import plan

WORKLOADS = ("magi", "megatron", "chatqa2", "short", "one")
RANKS = (4, 8, 16, 32, 64)
ROWS_PER_RANK = 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placed:
    """Packs of one workload on so many ranks, under strategy sap.

    Imbalance is the busiest rank's query-key pairs over the mean. Moved and bound are shares of the rows that an
    all-gather moves, means over the packs.
    """

    workload: str
    ranks: int
    rows: int
    packs: int
    mean_imbalance: float
    max_imbalance: float
    moved: float
    contiguous_imbalance: float
    contiguous_moved: float
    bound: float
    """What no placement with equal rows on every rank goes below."""


def placement_table(
    workloads: Sequence[str] = WORKLOADS, ranks: Sequence[int] = RANKS, packs: int = 20
) -> Iterator[Placed]:
    """Rows of balanced placement beside the contiguous order, on packs of seeds 0 to `packs` - 1.

    Args:
        ranks: numbers of ranks; each holds 8192 rows of a pack.
    """
    for workload in workloads:
        for count in ranks:
            yield _place(workload, count, packs)


def _place(workload: str, ranks: int, packs: int) -> Placed:
    rows = ranks * ROWS_PER_RANK
    found: list[tuple[float, ...]] = []
    # One document is the same pack for every seed.
    for seed in range(1 if workload == "one" else packs):
        lengths = pack(workload, rows, np.random.default_rng(seed))
        even, plain = (
            plan(lengths, cp_size=ranks, strategy="sap", layout=layout)
            for layout in ("balanced", "contiguous")
        )
        moved, plain_moved, bound = (
            count / even.all_gather_rows
            for count in (even.rows_moved.sum(), plain.rows_moved.sum(), even.lower_bound_rows)
        )
        found.append((even.imbalance, moved, plain.imbalance, plain_moved, bound))
    imbalance, moved, plain_imbalance, plain_moved, bound = np.array(found).T
    return Placed(
        workload=workload,
        ranks=ranks,
        rows=rows,
        packs=len(found),
        mean_imbalance=float(imbalance.mean()),
        max_imbalance=float(imbalance.max()),
        moved=float(moved.mean()),
        contiguous_imbalance=float(plain_imbalance.mean()),
        contiguous_moved=float(plain_moved.mean()),
        bound=float(bound.mean()),
    )
