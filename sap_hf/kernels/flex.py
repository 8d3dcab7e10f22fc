"""torch's FlexAttention, for softcap on CUDA where flash-attn is not installed.

q, k, v and Segments -> out in q's dtype, lse float32. One compiled call for all segments: a query row reads one run of
key rows, and a BlockMask made once per batch names the blocks that hold them.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from itertools import pairwise
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from sap_hf.kernels.interface import NOWHERE, Places, Scoring, Segments

__all__ = ["Flex", "why_no_flex"]

# Rows and keys of a block: FlexAttention's default.
BLOCK = 128


class Flex:
    """torch.nn.attention.flex_attention, compiled.

    Its backward has no door for an out and lse from outside: it uses those of its own forward. So `backward` computes
    this call's own out and lse again, and asks for the gradients of the merge: with w = exp(own lse - final lse),
    d own out = w dout and d own lse = w dout . (own out - final out), which gives exactly the gradients of
    `Kernel.backward`, at the price of one more forward.
    """

    name = "flex"

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        segments: Segments,
        scoring: Scoring,
        place: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Kernel.forward`; out is in q's dtype, in new memory."""
        if segments.max_q == 0:
            return q.new_zeros(0, q.shape[1], v.shape[2]), q.new_zeros(0, q.shape[1], dtype=torch.float32)
        return _attend(q, k, v, segments, scoring)

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
        """See `Kernel.backward`; the gradients are in q's dtype, in new memory."""
        if segments.max_q == 0:
            return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            own_out, own_lse = _attend(*leaves, segments, scoring)
        weight = torch.exp(own_lse.detach() - lse)
        dout = dout.to(lse.dtype)
        down_out = (weight.unsqueeze(-1) * dout).to(own_out.dtype)
        # From the rounded gradient, which is what the kernel takes off again.
        down_lse = _dot(down_out, own_out.detach(), lse.dtype) - weight * _dot(dout, out, lse.dtype)
        dq, dk, dv = torch.autograd.grad((own_out, own_lse), leaves, (down_out, down_lse))
        return dq, dk, dv


@functools.cache
def why_no_flex() -> str | None:
    """Why FlexAttention cannot be compiled here; None when it can."""
    if importlib.util.find_spec("triton") is None:
        return "FlexAttention is compiled by triton, which is not installed"
    return None


def _dot(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return (a.to(dtype) * b.to(dtype)).sum(-1)


@functools.cache
def _compiled() -> Callable[..., Any]:
    # dynamic: rows differ from batch to batch, and must not compile again.
    return torch.compile(flex_attention, dynamic=True)


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    segments: Segments,
    scoring: Scoring,
) -> tuple[torch.Tensor, torch.Tensor]:
    out, aux = _compiled()(
        *(x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)),
        score_mod=None if scoring.softcap is None else _capped(scoring.softcap, q.dtype, q.device),
        block_mask=_mask(segments, scoring.window),
        scale=scoring.scale,
        enable_gqa=q.shape[1] != k.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    return out.squeeze(0).transpose(0, 1), aux.lse.squeeze(0).transpose(0, 1)


# One function for each softcap: a new one would be compiled again.
@functools.cache
def _capped(softcap: float, like: torch.dtype, device: torch.device) -> Callable[..., torch.Tensor]:
    # A tensor: torch's compiler turns a captured float into a variable once it has met a second one, and then fails.
    cap = torch.tensor(softcap, dtype=torch.promote_types(like, torch.float32), device=device)

    def score_mod(
        score: torch.Tensor, batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        return torch.tanh(score / cap) * cap

    return score_mod


# Every layer and the backward of one batch come with the same Segments; the masks go when they go.
_masks_of: WeakKeyDictionary[Segments, dict[int | None, BlockMask]] = WeakKeyDictionary()


def _mask(segments: Segments, window: int | None) -> BlockMask:
    known = _masks_of.setdefault(segments, {})
    if window not in known:
        known[window] = _block_mask(segments, window)
    return known[window]


def _block_mask(segments: Segments, window: int | None) -> BlockMask:
    """Blocks that hold a key of a row's run, and among them those that every row reads whole."""
    first, last = (x.to(segments.cu_q_device.device) for x in _runs(segments, window))
    rows, keys = segments.cu_q[-1], segments.cu_k[-1]
    starts = torch.arange(0, rows, BLOCK, device=first.device)
    ends = (starts + BLOCK - 1).clamp(max=rows - 1)
    # first and last never fall from one row to the next, so a block's bounds are those of its first and last row.
    low, high = first[starts] // BLOCK, last[ends] // BLOCK
    full_low, full_end = -(-first[ends] // BLOCK), (last[starts] + 1) // BLOCK
    full = (full_end - full_low).clamp(min=0)
    # The last rows may be no whole block, which only a partial block tells apart.
    full = torch.where(starts + BLOCK <= rows, full, 0)
    column = torch.arange(-(-keys // BLOCK), device=first.device)
    partial_index = low.unsqueeze(1) + column
    hop = (full > 0).unsqueeze(1) & (partial_index >= full_low.unsqueeze(1))
    partial_index = partial_index + torch.where(hop, full.unsqueeze(1), 0)
    full_index = full_low.unsqueeze(1) + column

    def mask_mod(
        batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        return (first[query] <= key) & (key <= last[query])

    return BlockMask.from_kv_blocks(
        *(_listed(high - low + 1 - full, partial_index, len(column))),
        *(_listed(full, full_index, len(column))),
        BLOCK_SIZE=BLOCK,
        mask_mod=mask_mod,
        seq_lengths=(rows, keys),
    )


def _listed(count: torch.Tensor, index: torch.Tensor, blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As a BlockMask wants them: (1, 1, rows) and (1, 1, rows, columns), int32; beyond a count nothing is read."""
    return count.int()[None, None], index.clamp(max=blocks - 1).int().contiguous()[None, None]


def _runs(segments: Segments, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(n_q,) each, int32, on the CPU: the first and the last key row that every query row reads."""
    assert window is None or (segments.causal and window > 0), f"window {window} needs causal segments"
    sizes = torch.tensor([hi - lo for lo, hi in pairwise(segments.cu_q)])
    first, end = (
        torch.tensor(bounds).repeat_interleave(sizes) for bounds in (segments.cu_k[:-1], segments.cu_k[1:])
    )
    if not segments.causal:
        return first.int(), (end - 1).int()
    last_row = torch.tensor(segments.cu_q[1:]).repeat_interleave(sizes) - 1
    last = end - 1 - (last_row - torch.arange(segments.cu_q[-1]))
    return (first if window is None else torch.maximum(first, last - window + 1)).int(), last.int()
