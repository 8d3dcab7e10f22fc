"""The CPU kernel: torch's flash attention for CPU, which returns lse and takes the final out and lse back.

q, k, v and Segments -> out, lse. Segments become tiles (one call of the operator each): short ones are
grouped under a block-diagonal mask, a window is walked in bands, a causal segment with older keys is split in
two and merged.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch.nn.functional import pad

from sap_hf.kernels.interface import NOWHERE, Places, Scoring, Segments, cut, space
from sap_hf.kernels.merge import merge_into
from sap_hf.kernels.reference import band, widen

__all__ = ["Sdpa"]

# Neighbouring segments share a call while they have at most this many query rows and key rows together: a
# call costs 0.02 ms (0.05 in the backward), the masked pairs cost more than that from about 50 rows on. Longer ones
# gain nothing from a call that takes several as a batch: of 64 rows and more, the operator is as fast one by one.
# 300 documents, 9/3 heads of 64, one core, float32, forward / backward in ms, by this number:
#   documents of         0          16          32          64         128
#   1-8 rows      8 /  15     5 /   7     3 /   6     4 /   7     5 /  11
#   8-16 rows    12 /  21    11 /  22     8 /  16     9 /  20    14 /  29
#   8-64 rows    30 /  67    30 /  62    27 /  62    27 /  63    40 /  88
#   64 rows      57 / 126    58 / 123    59 / 126    58 / 128    79 / 170
GROUP_ROWS = 32
# Query rows per call under a window: each call reads WINDOW_ROWS + window - 1 keys, WINDOW_ROWS in vain.
# Between 64 and 256 the times differ by no more than the noise for windows of 128 to 2048.
WINDOW_ROWS = 128


class Tile(NamedTuple):
    """One call of the operator."""

    rows: slice
    keys: slice
    is_causal: bool
    """Square and causal; the operator's own flag is top-left aligned, so it is used for nothing else."""
    mask: torch.Tensor | None
    """(1, 1, rows, keys), 0 where read and -inf elsewhere; None: no mask."""
    again: bool
    """These rows have an out already (over other keys): merge."""


class Sdpa:
    """aten::_scaled_dot_product_flash_attention_for_cpu over tiles; half types in float32."""

    name = "sdpa"

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
        assert scoring.softcap is None, "refused by pick"
        q, k, v = widen(q, k, v)
        value_dim = v.shape[2]
        q, k, v = _same_width(q, k, v)
        kv_heads = k.shape[1]
        out = space(place, q, value_dim)
        lse = q.new_empty(q.shape[0], q.shape[1])
        # Views of everything, made once: a tile is a slice of each.
        queries, whole_out = _queries(q, kv_heads), _queries(out, kv_heads)
        whole_lse = _queries(lse.unsqueeze(-1), kv_heads).squeeze(-1)
        keys, values = (_keys(x, q.shape[1]) for x in (k, v))

        for tile in _tiles(segments, scoring.window, q.dtype):
            out_KGnD, lse_KGn = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                queries[:, :, tile.rows],
                keys[:, :, tile.keys],
                values[:, :, tile.keys],
                0.0,
                tile.is_causal,
                attn_mask=tile.mask,
                scale=scoring.scale,
            )
            part_out = out_KGnD[..., :value_dim]
            if tile.again:
                part_lse = lse_KGn.permute(2, 0, 1).flatten(1, 2)
                merge_into(out, lse, tile.rows, _rows(part_out), part_lse)
            else:
                whole_out[:, :, tile.rows], whole_lse[:, :, tile.rows] = part_out, lse_KGn

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
        assert scoring.softcap is None, "refused by pick"
        dout, q, k, v, out = widen(dout, q, k, v, out)
        head_dim, value_dim, kv_heads = q.shape[2], v.shape[2], k.shape[1]
        dout, q, k, v, out = _same_width(dout, q, k, v, out)
        dq, dk, dv = (space(place, x, zeros=True) for place, x in zip(places, (q, k, v)))
        of_rows = [_queries(x, kv_heads) for x in (dout, q, out, lse.unsqueeze(-1), dq)]
        of_keys = [_keys(x, q.shape[1]) for x in (k, v)]
        dk_KmD, dv_KmD = dk.transpose(0, 1), dv.transpose(0, 1)

        for tile in _tiles(segments, scoring.window, q.dtype):
            douts, queries, outs, lses, dqs = (x[:, :, tile.rows] for x in of_rows)
            dq_KGnD, dk_KGmD, dv_KGmD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                douts,
                queries,
                *(x[:, :, tile.keys] for x in of_keys),
                outs,
                lses.squeeze(-1),
                0.0,
                tile.is_causal,
                attn_mask=tile.mask,
                scale=scoring.scale,
            )
            dqs.add_(dq_KGnD)
            dk_KmD[:, tile.keys].add_(dk_KGmD.sum(1))
            dv_KmD[:, tile.keys].add_(dv_KGmD.sum(1))

        return cut(dq, head_dim), cut(dk, head_dim), cut(dv, value_dim)


# Every layer and the backward of one batch come with the same Segments, so its tiles and masks are made once;
# they go when it goes.
_tiles_of: WeakKeyDictionary[Segments, dict[tuple[int | None, torch.dtype], list[Tile]]] = WeakKeyDictionary()


def _tiles(segments: Segments, window: int | None, dtype: torch.dtype) -> list[Tile]:
    known = _tiles_of.setdefault(segments, {})
    if (window, dtype) not in known:
        known[window, dtype] = _cut(segments, window, dtype)
    return known[window, dtype]


def _cut(segments: Segments, window: int | None, dtype: torch.dtype) -> list[Tile]:
    assert window is None or (segments.causal and window > 0), f"window {window} needs causal segments"

    tiles: list[Tile] = []
    bounds = segments.bounds()
    first = 0
    while first < len(bounds):
        q_start, _, k_start, _ = bounds[first]
        end = first + 1
        while (
            end < len(bounds)
            and bounds[end][1] - q_start <= GROUP_ROWS
            and bounds[end][3] - k_start <= GROUP_ROWS
        ):
            end += 1
        if end - first > 1:
            tiles.append(_group_tile(bounds[first:end], segments.causal, window, dtype))
        else:
            tiles += _segment_tiles(*bounds[first], segments.causal, window, dtype)
        first = end

    return tiles


def _group_tile(
    bounds: list[tuple[int, int, int, int]], causal: bool, window: int | None, dtype: torch.dtype
) -> Tile:
    """Several segments in one call: block-diagonal."""
    q_start, k_start = bounds[0][0], bounds[0][2]
    q_end, k_end = bounds[-1][1], bounds[-1][3]
    hidden = torch.ones(q_end - q_start, k_end - k_start, dtype=torch.bool)
    for q_lo, q_hi, k_lo, k_hi in bounds:
        block = hidden[q_lo - q_start : q_hi - q_start, k_lo - k_start : k_hi - k_start]
        block[:] = band(q_hi - q_lo, k_hi - k_lo, window) if causal else False
    return Tile(slice(q_start, q_end), slice(k_start, k_end), False, _additive(hidden, dtype), False)


def _segment_tiles(
    q_lo: int, q_hi: int, k_lo: int, k_hi: int, causal: bool, window: int | None, dtype: torch.dtype
) -> list[Tile]:
    """One segment, in as many calls as its shape needs."""
    rows, keys = slice(q_lo, q_hi), slice(k_lo, k_hi)
    if not causal:
        return [Tile(rows, keys, False, None, False)]

    # Query row r reads up to key row r + shift, that key included.
    shift = k_hi - q_hi
    if window is None or window >= k_hi - k_lo:
        square = Tile(rows, slice(q_lo + shift, k_hi), True, None, False)
        older = slice(k_lo, q_lo + shift)
        return [square] if older.start == older.stop else [square, Tile(rows, older, False, None, True)]

    tiles = []
    for lo in range(q_lo, q_hi, WINDOW_ROWS):
        hi = min(lo + WINDOW_ROWS, q_hi)
        start = max(k_lo, lo + shift - window + 1)
        mask = _band_mask(hi - lo, hi + shift - start, window, dtype)
        tiles.append(Tile(slice(lo, hi), slice(start, hi + shift), False, mask, False))
    return tiles


# The inner bands of a long document, and of all documents, have one and the same mask.
@lru_cache(maxsize=16)
def _band_mask(rows: int, keys: int, window: int, dtype: torch.dtype) -> torch.Tensor:
    return _additive(band(rows, keys, window), dtype)


def _additive(hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(1, 1, *hidden.shape, dtype=dtype).masked_fill(hidden, float("-inf"))


def _same_width(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Zero columns up to the widest: the operator wants D == Dv, and they change neither logits nor out."""
    width = max(x.shape[2] for x in tensors)
    return tuple(x if x.shape[2] == width else pad(x, (0, width - x.shape[2])) for x in tensors)


# The operator is called with batch = kv heads K and heads = the group G = H / K: K and V are then broadcast
# to the group by a stride of 0, in the backward too (which has no GQA of its own), never repeated in memory.


def _queries(x_nHD: torch.Tensor, kv_heads: int) -> torch.Tensor:
    return x_nHD.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)


def _keys(x_mKD: torch.Tensor, heads: int) -> torch.Tensor:
    return x_mKD.transpose(0, 1).unsqueeze(1).expand(-1, heads // x_mKD.shape[1], -1, -1)


def _rows(x_KGnD: torch.Tensor) -> torch.Tensor:
    return x_KGnD.permute(2, 0, 1, 3).flatten(1, 2)
