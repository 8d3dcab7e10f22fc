"""Gated linear recurrent units (RG-LRU, De et al. 2024, arXiv:2402.19427) with a convolution in front of them.

A patched block's call -> what its forward returns. One state per channel, which decays by a gate and takes in what
another gate lets in; the first row of a document takes in all of it. Scans are in float32 at least, row by row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sap_hf.models.bypass import Call
from sap_hf.models.mixers import line_of
from sap_hf.models.recurrence import joined, scan, stretches_of, wide

# The factor of the logarithm of a decay; c in the paper.
SHARPNESS = 8.0


def recurrent_block(call: Call, input_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    """RecurrentGemmaRecurrentBlock.forward: input_states and the first result (1, C, F)."""
    layer, line = call.layer, line_of(call.shard, input_states.device)
    gate = layer.act_fn(layer.linear_y(input_states))
    conv = layer.conv_1d
    convolve = functools.partial(F.conv1d, weight=conv.weight, bias=conv.bias, groups=conv.groups)
    x = line.convolved(layer.linear_x(input_states), layer.conv1d_width - 1, convolve)
    return layer.linear_out(_recurrence(call, x[0]).unsqueeze(0) * gate), None


def _recurrence(call: Call, x: Tensor) -> Tensor:
    """RecurrentGemmaRglru.forward of x (C, F): (C, F)."""
    unit, line = call.layer.rg_lru, line_of(call.shard, x.device)
    heads = x.unflatten(-1, (unit.num_attention_heads, -1)).transpose(0, 1)

    def gate(weight: Tensor, bias: Tensor) -> Tensor:
        return torch.baddbmm(bias.unsqueeze(1), heads, weight).transpose(0, 1).flatten(1).sigmoid()

    taken = x * gate(unit.input_gate_weight, unit.input_gate_bias)
    log_decay = gate(unit.recurrent_gate_weight, unit.recurrent_gate_bias) * F.softplus(unit.recurrent_param)
    taken, log_decay = wide(taken, -SHARPNESS * log_decay)
    stretches = stretches_of(call, line, 1, x.device)
    goes_on = F.pad(stretches[1:] == stretches[:-1], (0, 0, 1, 0), value=line.continued)
    # Theirs, for its gradient has a bound.
    fraction = call.theirs.SqrtBoundDerivative.apply(1 - (2 * log_decay).exp())
    states = scan(log_decay.exp() * goes_on, taken * torch.where(goes_on, fraction, 1.0))
    return joined(line, states, states[-1], log_decay, torch.mul).to(x.dtype)


MIXERS: dict[str, Callable[..., Any]] = {"RecurrentGemmaRecurrentBlock": recurrent_block}
