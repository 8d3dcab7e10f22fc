"""What the right answer is, computed the slow and obvious way. Nothing here imports sap_hf.

documents_alone      attention of each document run by itself, float64, differentiable
documents_of         document index of every row
mask                 which query row reads which key row
rows_needed          the rows a rank must receive, row by row from the mask
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


def documents_alone(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: Sequence[int],
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Dense causal softmax of each document alone, in float64; gradients by autograd.

    Args:
        q: (T, H, D). k: (T, K, D). v: (T, K, Dv). T is the sum of lengths.
        sinks: (H,), one more logit of every softmax, with value 0.

    Returns:
        out (T, H, Dv), float64.
    """
    import torch

    heads, kv_heads = q.shape[1], k.shape[1]
    assert q.shape[0] == k.shape[0] == v.shape[0] == sum(lengths) and heads % kv_heads == 0
    # Query head h reads kv head h // (H / K).
    kv_head = torch.arange(heads) // (heads // kv_heads)
    q, k, v = q.double(), k.double()[:, kv_head], v.double()[:, kv_head]
    scale = q.shape[2] ** -0.5 if scale is None else scale
    outs = []
    start = 0
    for length in lengths:
        rows = slice(start, start + length)
        start += length
        scores = torch.einsum("qhd,khd->hqk", q[rows], k[rows]) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
        seen = distance >= 0
        if window is not None:
            seen = seen & (distance < window)
        scores = scores.masked_fill(~seen, -torch.inf)
        if sinks is not None:
            scores = torch.cat([scores, sinks.double()[:, None, None].expand(heads, length, 1)], dim=2)
        weights = torch.softmax(scores, dim=2)[:, :, :length]
        outs.append(torch.einsum("hqk,khd->qhd", weights, v[rows]))
    return torch.cat(outs)


def documents_of(lengths: Sequence[int]) -> np.ndarray:
    """(T,) int64: the document that each row belongs to."""
    return np.array(
        [document for document, length in enumerate(lengths) for _ in range(length)], dtype=np.int64
    )


def mask(lengths: Sequence[int], window: int | None = None) -> np.ndarray:
    """(T, T) bool: query row (first axis) reads key row (second axis)."""
    document = documents_of(lengths)
    row = np.arange(len(document))
    seen = (document[:, None] == document[None, :]) & (row[:, None] >= row[None, :])
    if window is not None:
        seen &= row[:, None] - row[None, :] < window
    return seen


def rows_needed(seen: np.ndarray, owner: np.ndarray, rank: int) -> set[int]:
    """The rows that `rank` does not hold and that one of its query rows reads.

    Args:
        seen: (T, T) bool. owner: (T,), the rank of each row.
    """
    read = seen[owner == rank].any(axis=0) if (owner == rank).any() else np.zeros(len(owner), dtype=bool)
    return set(np.flatnonzero(read & (owner != rank)).tolist())
