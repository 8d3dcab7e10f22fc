"""Attention written out: scores, softmax, and the gradients by their formulas.

q, k, v and Segments -> out, lse; any device, any float dtype (half types in float32, float64 stays).
The truth that the other kernels are compared with, and the fallback for what they lack (softcap).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sap_hf.kernels.interface import HALF_DTYPES, NOWHERE, Places, Scoring, Segments, space

__all__ = ["Reference"]

# Query rows per chunk, and elements of one chunk's score matrix (H x rows x keys): 2^26 floats are 256 MiB.
CHUNK_ROWS = 512
CHUNK_SCORES = 2**26


class Reference:
    """Plain torch, chunked over query rows so that memory stays bounded."""

    name = "reference"

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        segments: Segments,
        scoring: Scoring,
        place: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Kernel.forward`; out is float32 (float64 for float64)."""
        q, k, v = widen(q, k, v)
        heads, kv_heads = q.shape[1], k.shape[1]
        out = space(place, q, v.shape[2], zeros=True)
        lse = q.new_full((q.shape[0], heads), float("-inf"))

        for rows, keys, mask in chunks(segments, scoring.window, heads, q.device):
            scores = _scores(_group(q[rows], kv_heads), k[keys], mask, scoring)
            lse_KGn = scores.logsumexp(-1)
            probs = torch.exp(scores - lse_KGn.unsqueeze(-1))
            out[rows] = _ungroup(_times_rows(probs, v[keys]))
            lse[rows] = _ungroup(lse_KGn.unsqueeze(-1)).squeeze(-1)

        return out, lse

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        segments: Segments,
        scoring: Scoring,
        places: Places = NOWHERE,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """See `Kernel.backward`; the gradients are float32 (float64 for float64)."""
        dout, q, k, v, out = widen(dout, q, k, v, out)
        heads, kv_heads = q.shape[1], k.shape[1]
        dq, dk, dv = (space(place, x, zeros=True) for place, x in zip(places, (q, k, v)))
        delta = (out * dout).sum(-1, keepdim=True)

        for rows, keys, mask in chunks(segments, scoring.window, heads, q.device):
            q_KGnD, dout_KGnD = _group(q[rows], kv_heads), _group(dout[rows], kv_heads)
            scores = _scores(q_KGnD, k[keys], mask, scoring)
            probs = torch.exp(scores - _group(lse[rows].unsqueeze(-1), kv_heads))
            dprobs = _times_columns(dout_KGnD, v[keys])
            dscores = probs * (dprobs - _group(delta[rows], kv_heads))
            if scoring.softcap is not None:
                # d tanh(x) = 1 - tanh(x)^2; a masked score is -inf, its dscore is 0 already and must stay 0.
                dscores *= 1 - (scores.masked_fill(probs == 0, 0.0) / scoring.softcap) ** 2
            dscores *= scoring.scale
            dq[rows] = _ungroup(_times_rows(dscores, k[keys]))
            dk[keys] += _transposed_times(dscores, q_KGnD)
            dv[keys] += _transposed_times(probs, dout_KGnD)

        return dq, dk, dv


def widen(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Half types to float32; float32 and float64 as they are."""
    return tuple(x.float() if x.dtype in HALF_DTYPES else x for x in tensors)


def chunks(
    segments: Segments, window: int | None, heads: int, device: torch.device
) -> Iterator[tuple[slice, slice, torch.Tensor | None]]:
    """Cut the segments into (query rows, key rows within their reach, True where not read or None)."""
    assert window is None or (segments.causal and window > 0), f"window {window} needs causal segments"

    for q_lo, q_hi, k_lo, k_hi in segments.bounds():
        chunk = max(16, min(CHUNK_ROWS, CHUNK_SCORES // (heads * (k_hi - k_lo))))
        for lo in range(q_lo, q_hi, chunk):
            hi = min(lo + chunk, q_hi)
            if not segments.causal:
                yield slice(lo, hi), slice(k_lo, k_hi), None
                continue
            # Query row r reads up to key row r + shift, that key included.
            shift = k_hi - q_hi
            first = k_lo if window is None else max(k_lo, lo + shift - window + 1)
            end = hi + shift
            yield slice(lo, hi), slice(first, end), band(hi - lo, end - first, window, device)


def band(rows: int, keys: int, window: int | None, device: torch.device | None = None) -> torch.Tensor:
    """True where a bottom-right causal (rows, keys) block with this window is NOT read."""
    last_key = torch.arange(keys - rows, keys, device=device).unsqueeze(1)
    key = torch.arange(keys, device=device)
    hidden = key > last_key
    return hidden if window is None else hidden | (key <= last_key - window)


def _scores(
    q_KGnD: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, scoring: Scoring
) -> torch.Tensor:
    scores = _times_columns(q_KGnD, k) * scoring.scale
    if scoring.softcap is not None:
        scores = torch.tanh(scores / scoring.softcap) * scoring.softcap
    return scores if mask is None else scores.masked_fill(mask, float("-inf"))


# K kv heads, each read by G query heads: a group's queries are one tall matrix; K and V are never repeated.


def _group(x_nHD: torch.Tensor, kv_heads: int) -> torch.Tensor:
    return x_nHD.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)


def _ungroup(x_KGnD: torch.Tensor) -> torch.Tensor:
    return x_KGnD.permute(2, 0, 1, 3).flatten(1, 2)


def _times_columns(x_KGnD: torch.Tensor, y_mKD: torch.Tensor) -> torch.Tensor:
    """(K, G, n, D) x (m, K, D) -> (K, G, n, m)."""
    return torch.matmul(x_KGnD.flatten(1, 2), y_mKD.permute(1, 2, 0)).unflatten(1, x_KGnD.shape[1:3])


def _times_rows(x_KGnm: torch.Tensor, y_mKD: torch.Tensor) -> torch.Tensor:
    """(K, G, n, m) x (m, K, D) -> (K, G, n, D)."""
    return torch.matmul(x_KGnm.flatten(1, 2), y_mKD.transpose(0, 1)).unflatten(1, x_KGnm.shape[1:3])


def _transposed_times(x_KGnm: torch.Tensor, y_KGnD: torch.Tensor) -> torch.Tensor:
    """Sum over the group and the queries: (K, G, n, m) x (K, G, n, D) -> (m, K, D)."""
    return torch.matmul(x_KGnm.flatten(1, 2).transpose(1, 2), y_KGnD.flatten(1, 2)).transpose(0, 1)
