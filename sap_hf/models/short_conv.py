"""Short convolutions between attention layers (lfm2 and those after it) or in front of them (zaya).

A layer's forward and its arguments -> what it returns. All but the convolution is done token by token; it alone takes
the last rows of the rank before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, cast

import torch

from sap_hf.errors import UnsupportedAttention
from sap_hf.models.bypass import Call
from sap_hf.models.mixers import line_of


def short_conv(call: Call, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Lfm2ShortConv.forward: hidden_states (1, C, F) -> (1, C, F)."""
    layer = call.layer
    before, after, x = layer.in_proj(hidden_states).chunk(3, dim=-1)
    weight = layer.conv.weight.squeeze(1)
    convolve = functools.partial(call.theirs.causal_conv1d_fn, weight=weight, bias=layer.conv.bias)
    x = line_of(call.shard, x.device).convolved(before * x, weight.shape[-1] - 1, convolve)
    return cast(torch.Tensor, layer.out_proj(after * x))


def zaya(call: Call, hidden_states: torch.Tensor, *args: Any) -> tuple[torch.Tensor, ...]:
    """ZayaCCAProjection.forward: query, key and value (1, C, heads, D), each from a few rows before its own too."""
    layer = call.layer
    if layer.q_proj.bias is not None:
        raise UnsupportedAttention(
            "ZayaCCAProjection with attention_bias=True: what it reads before a document's start is not zero."
        )
    line = line_of(call.shard, hidden_states.device)
    # Where the projections of zeros are zeros, the whole of it may see zeros for what is before a document.
    spaced, kept = line.spaced(hidden_states, layer.conv_kernel_size)
    return tuple(states[:, kept] for states in call.original(layer, spaced, None))


MIXERS: dict[str, Callable[..., Any]] = {
    "Lfm2MoeShortConv": short_conv,
    "Lfm2ShortConv": short_conv,
    "Lfm3ShortConv": short_conv,
    "ZayaCCAProjection": zaya,
}
