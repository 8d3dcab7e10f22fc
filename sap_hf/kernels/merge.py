"""Combine partial attentions over disjoint keys.

(out, lse) of one part and (out, lse) of another -> (out, lse) of both, as if one softmax had seen all keys.
"""

from __future__ import annotations

import torch

__all__ = ["merge", "merge_into"]


def merge(
    out_a: torch.Tensor, lse_a: torch.Tensor, out_b: torch.Tensor, lse_b: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Combine two partial attentions over disjoint keys into one.

    Args:
        out_a, out_b: (t, H, Dv); a half dtype is widened to lse's.
        lse_a, lse_b: (t, H), float32 or float64, natural log. -inf means "attended to nothing"; allowed on
            either side or both.

    Returns:
        out (t, H, Dv) and lse (t, H) in lse's dtype. Exact up to rounding; order does not matter.
    """
    weight_a, weight_b, lse = _weights(lse_a, lse_b)
    return (out_a * weight_a).addcmul(out_b, weight_b), lse


def merge_into(
    out: torch.Tensor,
    lse: torch.Tensor,
    rows: torch.Tensor | slice,
    part_out: torch.Tensor,
    part_lse: torch.Tensor,
) -> None:
    """Merge one part into the running out and lse of these rows, in place.

    Args:
        out, lse: (t, H, Dv) and (t, H), float32 or float64, the accumulators. Start: out 0, lse -inf.
        rows: int64 indices without repeats, or a slice; which rows of out the part belongs to.
        part_out, part_lse: (len(rows), H, Dv) and (len(rows), H).
    """
    weight, part_weight, merged = _weights(lse[rows], part_lse)
    lse[rows] = merged
    # A slice is a view and is changed where it lies; indices give a copy that has to go back.
    mine = out[rows]
    mine *= weight
    mine.addcmul_(part_out, part_weight)
    if not isinstance(rows, slice):
        out[rows] = mine


def _weights(lse_a: torch.Tensor, lse_b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    lse = torch.logaddexp(lse_a, lse_b)
    # -inf - -inf would be NaN; against 0 both weights are exp(-inf) = 0, which is the right answer.
    finite = lse.masked_fill(lse == float("-inf"), 0.0)
    return torch.exp(lse_a - finite).unsqueeze(-1), torch.exp(lse_b - finite).unsqueeze(-1), lse
