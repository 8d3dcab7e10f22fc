"""Packs for property tests, drawn by hypothesis; and what a schedule means, painted cell by cell."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

import sap_hf

STRATEGIES = ("sap", "all_gather", "ring")
LAYOUTS = ("balanced", "contiguous", "zigzag")

# Many short documents, one-token ones among them, and few that are longer than a rank's share.
packs = st.lists(st.one_of(st.just(1), st.integers(1, 6), st.integers(1, 40)), min_size=1, max_size=9)
ranks = st.integers(1, 6)
windows = st.one_of(st.none(), st.integers(1, 12), st.just(1000))
both = st.tuples(st.sampled_from(STRATEGIES), st.sampled_from(LAYOUTS))

# Packs that random draws meet too rarely: a rank of pure padding, one document, only one-token documents.
CORNERS = [
    ([2], 4),
    ([1], 1),
    ([1], 3),
    ([23], 4),
    ([1] * 9, 4),
    ([8, 8], 2),
    ([7, 1, 1, 1, 17], 5),
    ([3, 3, 3, 3, 3], 6),
]


@dataclasses.dataclass
class Painted:
    """A plan and its schedule, turned into arrays over the rows of the pack.

    Attributes:
        total: T, rows of the pack without padding.
        owner: (W * ceil(T / W),) the rank that holds each row, padding included.
        received: per rank, (T,) how often each row arrives there.
        attended: (T, T) how often each query-key pair is computed.
    """

    plan: Any
    total: int
    owner: np.ndarray
    received: list[np.ndarray]
    attended: np.ndarray


def owners(plan: Any, lengths: Sequence[int], cp_size: int) -> np.ndarray:
    """The rank of every row, padding included; every row must have exactly one."""
    held = [plan.rows(rank) for rank in range(cp_size)]
    owner = np.full(sum(len(rows) for rows in held), -1, dtype=np.int64)
    for rank, rows in enumerate(held):
        assert (owner[rows] == -1).all(), f"rank {rank} holds rows that another one holds"
        owner[rows] = rank
    assert (owner >= 0).all()
    return owner


def paint(plan: Any, lengths: Sequence[int], cp_size: int, window: int | None) -> Painted:
    """Walk the steps in order and hold what must hold for each transfer and each tile by itself."""
    total = sum(lengths)
    owner = owners(plan, lengths, cp_size)
    received = [np.zeros(total, dtype=np.int64) for _ in range(cp_size)]
    attended = np.zeros((total, total), dtype=np.int64)
    document = np.repeat(np.arange(len(lengths)), lengths)
    for step in plan.schedule(window).steps:
        assert step.transfers.dtype == np.int64 and step.transfers.shape[1:] == (4,)
        assert step.tiles.dtype == np.int64 and step.tiles.shape[1:] == (5,)
        for source, destination, start, stop in step.transfers.tolist():
            assert 0 <= start < stop <= total, "a transfer is empty or moves padding"
            assert source != destination and 0 <= destination < cp_size
            assert (owner[start:stop] == source).all(), "a sender does not hold what it sends"
            received[destination][start:stop] += 1
        for rank, q_start, q_stop, k_start, k_stop in step.tiles.tolist():
            assert 0 <= q_start < q_stop <= total and 0 <= k_start < k_stop <= total
            assert (owner[q_start:q_stop] == rank).all(), "a tile queries a row of another rank"
            keys = slice(k_start, k_stop)
            assert ((owner[keys] == rank) | (received[rank][keys] > 0)).all(), (
                "a tile reads what has not arrived"
            )
            assert len({*document[q_start:q_stop], *document[keys]}) == 1, "a tile crosses a document"
            distance = np.arange(q_start, q_stop)[:, None] - np.arange(k_start, k_stop)[None, :]
            seen = (distance >= 0) & (True if window is None else distance < window)
            assert seen.any(), "a tile is empty"
            attended[q_start:q_stop, keys] += seen
    return Painted(plan, total, owner, received, attended)


def planned(
    lengths: Sequence[int], cp_size: int, strategy: str, layout: str, window: int | None = None
) -> tuple[Any, Painted]:
    """One plan and what its schedule paints."""
    plan = sap_hf.plan(lengths=lengths, cp_size=cp_size, strategy=strategy, layout=layout, window=window)
    return plan, paint(plan, lengths, cp_size, window)
