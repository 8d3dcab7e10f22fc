"""Lightning attention (MiniMax et al. 2025, arXiv:2501.08313): linear attention whose state decays at a rate per head.

A patched layer's call -> what its forward returns. It is a recurrence as Mamba-2's, with a head's rate for every row:
the state takes in key and value, and the query reads it. Scans are in float32 at least, and plain torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sap_hf.models.bypass import Call
from sap_hf.models.mixers import line_of
from sap_hf.models.recurrence import joined, scan_by_chunks, stretches_of, wide


def lightning(call: Call, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """MiniMaxLightningAttention.forward: hidden_states and the first result (1, C, F)."""
    layer = call.layer
    qkv = layer.act_fn(layer.qkv_proj(hidden_states))
    with torch.autocast(qkv.device.type, enabled=False):
        out = _attended(call, qkv[0].unflatten(-1, (layer.num_attention_heads, -1)))
    out = layer.norm(out.to(qkv.dtype).flatten(1).unsqueeze(0))
    return layer.out_proj(layer.output_gate(hidden_states).sigmoid() * out), None


def _attended(call: Call, qkv: Tensor) -> Tensor:
    """(C, H, D), float32 at least, of queries, keys and values side by side (C, H, 3 D)."""
    layer, line = call.layer, line_of(call.shard, qkv.device)
    qkv, rate = wide(qkv, layer.slope_rate)
    q, k, v = qkv.chunk(3, -1)
    # Every head is a group of its own.
    log_decay = -rate.flatten().expand(len(q), -1).unsqueeze(-1)
    stretches = stretches_of(call, line, layer.block_size, qkv.device)
    out, final = scan_by_chunks(log_decay, v.unsqueeze(2), k, q, stretches)

    def read(reach: Tensor, state: Tensor) -> Tensor:
        return torch.einsum("tgn,ghpn->tghp", q[: len(reach)], state) * reach[..., 0]

    return joined(line, out, final, log_decay[..., None, None], read).squeeze(2)


MIXERS: dict[str, Callable[..., Any]] = {"MiniMaxLightningAttention": lightning}
