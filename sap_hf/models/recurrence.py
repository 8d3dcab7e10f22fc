"""Recurrences over the rows of documents on a line of ranks: what Mamba and gated linear recurrent units share.

Rows (C, ...) of decays and of what is added -> states, or what rows read of them. A rank scans from zero; what the
rank before left of a document that goes on here is added afterwards, since the scan is linear in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sap_hf.models.bypass import Call, once
from sap_hf.models.mixers import Line


def joined(
    line: Line, y: Tensor, final: Tensor, log_decay: Tensor, read: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Take the first stretch's state from the rank before into account, and pass the last one's on.

    Args:
        y: (C, ...), scanned from a state of zero.
        final: the state after the last row.
        log_decay: (C, ...) of each row; broadcasts to states.
        read: what rows read from a state that has decayed by a factor (rows, ...).
    """
    if not line.continued:
        return line.send(y, final)
    rows = line.cu_seqlens[1]
    reach = log_decay[:rows].cumsum(0).exp()
    state = line.receive(final, tuple(final.shape), final.dtype)
    if rows == len(y):
        final = final + reach[-1] * state
    # First what the next rank waits for.
    y = line.send(y, final)
    return torch.cat([(y[:rows] + read(reach, state)).to(y.dtype), y[rows:]])


def stretches_of(call: Call, line: Line, size: int, device: torch.device) -> Tensor:
    """Which stretch each row is of, in chunks of `size`; the last one's filled. Derived once per batch."""

    def make() -> Tensor:
        rows = line.cu_seqlens[-1]
        stretches = np.repeat(np.arange(len(line.cu_seqlens) - 1), np.diff(line.cu_seqlens))
        within = min(size, rows)
        return torch.from_numpy(np.pad(stretches, (0, -rows % within), "edge").reshape(-1, within)).to(device)

    key = ("stretches", call.shard.group.rank, size, device)
    return cast(Tensor, once(call.shard.plan, key, make))


def wide(*tensors: Tensor) -> list[Tensor]:
    """The tensors in float32 at least."""
    return [each.to(torch.promote_types(each.dtype, torch.float32)) for each in tensors]


def scan(decay: Tensor, added: Tensor) -> Tensor:
    """state[t] = decay[t] * state[t - 1] + added[t], from zero; all (C, ...). Its backward is one in reverse order."""
    return cast(Tensor, _Rows.apply(decay, added))  # type: ignore[no-untyped-call]


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, decay: Tensor, added: Tensor) -> Tensor:
        states = _recur(decay, added)
        ctx.save_for_backward(decay, states)
        return states

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        decay, states = ctx.saved_tensors
        added = _recur(decay.roll(-1, 0).flip(0), gradient.flip(0)).flip(0)
        before = torch.cat([torch.zeros_like(states[:1]), states[:-1]])
        return added * before, added


def _recur(decay: Tensor, added: Tensor) -> Tensor:
    """Row by row, in all chunks at a time, then chunk by chunk: 2 sqrt(C) steps."""
    rows = len(added)
    size = math.isqrt(rows - 1) + 1
    missing = (0, 0) * (added.dim() - 1) + (0, -rows % size)
    decay, states = (F.pad(each, missing).unflatten(0, (-1, size)).clone() for each in (decay, added))
    for row in range(1, size):
        states[:, row] += decay[:, row] * states[:, row - 1]
        # Of what entered the chunk.
        decay[:, row] *= decay[:, row - 1]
    for chunk in range(1, len(states)):
        states[chunk] += decay[chunk] * states[chunk - 1, -1]
    return states.flatten(0, 1)[:rows]


def scan_by_chunks(
    log_decay: Tensor, x: Tensor, b: Tensor, c: Tensor, stretches: Tensor
) -> tuple[Tensor, Tensor]:
    """Rows of a chunk read each other as in attention, and earlier chunks through the state they left.

    state[t] = exp(log_decay[t]) * state[t - 1] + x[t] b[t]^T, from zero where a stretch begins, and row t reads
    state[t] c[t]. After Dao and Gu 2024 (arXiv:2405.21060, section 6 and listing 1).

    Args:
        log_decay: (C, G, H) of G groups of H heads.
        x: (C, G, H, P).
        b, c: (C, G, N).
        stretches: (chunks, rows of a chunk), which stretch each row is of; no row reads another stretch.

    Returns:
        (C, G, H, P), and the state (G, H, P, N) after the last row.
    """
    # Rows that fill the last chunk change no state: they keep all of it and add nothing.
    log_decay, full_x, b, c = (_filled(each, stretches) for each in (log_decay, x, b, c))
    log_decay = log_decay.movedim(1, -1)
    # y, z: chunks; i: row that reads; j: row that is read.
    left = _left(log_decay, stretches[:, None, None])
    scores = torch.einsum("zign,zjgn->zgij", c, b).unsqueeze(2) * left
    out = torch.einsum("zghij,zjghp->zighp", scores, full_x)
    added = torch.einsum("zghj,zjghp,zjgn->zghpn", left[..., -1, :], full_x, b)
    ends = stretches[:, -1]
    states = torch.einsum("ghyz,zghpn->yghpn", _left(log_decay.sum(-1).movedim(0, -1), ends), added)
    # The chunk before has left something to those rows that go on with its last stretch.
    goes_on = (stretches == F.pad(ends[:-1], (1, 0), value=-1).unsqueeze(1))[:, None, None]
    reach = log_decay.cumsum(-1).exp() * goes_on
    before = torch.cat([torch.zeros_like(states[:1]), states[:-1]])
    out = out + torch.einsum("zign,zghpn,zghi->zighp", c, before, reach)
    return out.flatten(0, 1)[: len(x)], states[-1]


def _left(log_decay: Tensor, stretches: Tensor) -> Tensor:
    """(..., L, L): what is left at row i of what row j added, from (..., L); nothing across stretches.

    Sums of the rows in between, not differences of sums from the start: those would cancel.
    """
    sums = log_decay.unsqueeze(-1).expand(*log_decay.shape, log_decay.shape[-1]).tril(-1).cumsum(-2)
    reads = (stretches.unsqueeze(-1) == stretches.unsqueeze(-2)).tril()
    # In place: this is the largest tensor of a scan.
    return sums.masked_fill_(~reads, -math.inf).exp_()


def _filled(rows: Tensor, chunks: Tensor) -> Tensor:
    """(C, ...) -> (chunks, rows of a chunk, ...), the last one filled with zeros."""
    missing = chunks.numel() - len(rows)
    return F.pad(rows, (0, 0) * (rows.dim() - 1) + (0, missing)).unflatten(0, tuple(chunks.shape))
