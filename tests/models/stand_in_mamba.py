"""mamba_ssm's fused scan on the CPU, with exactly its signature, in dense torch of any dtype.

The semantics are those of mamba_ssm/ops/triton/ssd_combined.py, 2.0.4 to 2.3.2: rows read rows of the same seq_idx
alone, the final state is that after the last row, and both results have gradients. Results have the dtypes of the
kernel: out that of x, the final state at least float32. What the kernel refuses or would read wrongly is an assertion.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows of a chunk, which change no result: one for every call.
CALLS: list[int] = []


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
    state_dtype: torch.dtype | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    batch, rows, heads, _ = x.shape
    assert dt.shape == (batch, rows, heads) and A.shape == (heads,)
    assert B.shape == C.shape and B.shape[:2] == (batch, rows) and heads % B.shape[2] == 0
    assert x.dtype == B.dtype == C.dtype
    assert A.dtype == torch.promote_types(x.dtype, torch.float32)
    assert D is None or D.shape == (heads,)
    assert not return_varlen_states and all(
        each is None for each in (z, initial_states, cu_seqlens, state_dtype)
    )
    if seq_idx is None:
        seq_idx = torch.zeros(batch, rows, dtype=torch.int32)
    # Causal by the order of rows; stretches are looked for by their ends, so the numbers only rise.
    assert seq_idx.shape == (batch, rows) and seq_idx.dtype == torch.int32
    assert (seq_idx.diff() >= 0).all() and (seq_idx >= 0).all()
    CALLS.append(chunk_size)

    x_, dt, B, C = (each.to(A.dtype) for each in (x, dt, B, C))
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        dt = F.softplus(dt)
    dt = dt.clamp(*dt_limit)
    B, C = (each.repeat_interleave(heads // each.shape[2], 2) for each in (B, C))
    sums = (dt * A).cumsum(1)
    reads = (seq_idx.unsqueeze(2) == seq_idx.unsqueeze(1)).tril().unsqueeze(-1)
    # (batch, rows that read, rows that are read, heads)
    left = (sums.unsqueeze(2) - sums.unsqueeze(1)).masked_fill(~reads, -math.inf).exp() * dt.unsqueeze(1)
    out = torch.einsum("zihn,zjhn,zijh,zjhp->zihp", C, B, left, x_)
    if D is not None:
        out = out + x_ * D.unsqueeze(-1)
    out = out.to(x.dtype)
    final = torch.einsum("zjhn,zjh,zjhp->zhpn", B, left[:, -1], x_)
    return (out, final) if return_final_states else out
