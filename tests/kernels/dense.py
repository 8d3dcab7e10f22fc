"""The oracle of this folder: dense float64 softmax attention with an explicit mask; gradients by autograd."""

from __future__ import annotations

from itertools import pairwise

import torch


def visible(cu_q, cu_k, causal, window):
    """(n_q, n_k) bool: which query row reads which key row, pair by pair from the definition."""
    seen = torch.zeros(cu_q[-1], cu_k[-1], dtype=torch.bool)
    for (q_lo, q_hi), (k_lo, k_hi) in zip(pairwise(cu_q), pairwise(cu_k)):
        n_q, n_k = q_hi - q_lo, k_hi - k_lo
        i, j = torch.arange(n_q).unsqueeze(1), torch.arange(n_k).unsqueeze(0)
        ok = torch.ones(n_q, n_k, dtype=torch.bool)
        if causal:
            ok &= j <= i + n_k - n_q
        if window is not None:
            ok &= j > i + n_k - n_q - window
        seen[q_lo:q_hi, k_lo:k_hi] = ok
    return seen


def attend(q, k, v, seen, scale, softcap):
    """Differentiable out (n_q, H, Dv) and lse (n_q, H); K and V are repeated, every score exists."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    logits = torch.einsum("qhd,khd->hqk", q, k) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~seen, float("-inf"))
    out = torch.einsum("hqk,khd->qhd", logits.softmax(-1), v)
    return out, logits.logsumexp(-1).T


def gradients(dout, q, k, v, seen, scale, softcap):
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    out, _ = attend(q, k, v, seen, scale, softcap)
    return torch.autograd.grad(out, (q, k, v), dout.double())


def inputs(n_q, n_k, heads, kv_heads, head_dim, value_dim, dtype, seed=0):
    """q, dout; k and v as strided slices of one [n_k, K, D + Dv] buffer, the way `runtime` holds them."""
    gen = torch.Generator().manual_seed(seed)
    q = torch.randn(n_q, heads, head_dim, generator=gen, dtype=torch.float64).to(dtype)
    kv = torch.randn(n_k, kv_heads, head_dim + value_dim, generator=gen, dtype=torch.float64).to(dtype)
    dout = torch.randn(n_q, heads, value_dim, generator=gen, dtype=torch.float64).to(dtype)
    return q, kv[..., :head_dim], kv[..., head_dim:], dout


def error(got, want):
    """Largest difference relative to the largest entry, or to 1 (inputs are of order 1)."""
    assert got.shape == want.shape
    return ((got.double() - want.double()).abs().max() / want.double().abs().max().clamp(min=1)).item()
