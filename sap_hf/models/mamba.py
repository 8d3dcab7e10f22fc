"""Mamba layers: a convolution over a few rows and a recurrence over all rows before, both ending at document borders.

A patched mixer's call -> what its forward returns. Each rank scans its own stretches of documents from a state of zero,
all of them in one pass. The scan is linear in that state, so what the rank before left of a document that goes on here
is added afterwards: ranks wait for each other over one product with that state, not over a scan. Mamba-2 scans by
chunks after Dao and Gu 2024 (arXiv:2405.21060, section 6 and listing 1), Mamba-1 (Gu and Dao 2023, arXiv:2312.00752)
row by row. Projections, norms and gates are the layer's own.

Scans are in float32 at least, also under autocast, and plain torch. On CUDA and in half precision Mamba-2 runs the
fused scan of mamba_ssm 2.0.4 or newer where it is installed, as transformers itself does: sums in float32, products of
half precision (no test has run it; a stand-in of its signature is tested). causal_conv1d and the scan that mamba_ssm
has for Mamba-1 are not called.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils.import_utils import is_mamba_2_ssm_available

from sap_hf.models.bypass import Call
from sap_hf.models.mixers import Line, line_of
from sap_hf.models.recurrence import joined, scan, scan_by_chunks, stretches_of, wide


def mamba2(call: Call, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The forward of a Mamba-2 mixer; hidden_states and the result (1, C, F)."""
    layer = call.layer
    y, gate = _mamba2(call, layer.in_proj(hidden_states))
    return cast(Tensor, layer.out_proj(layer.norm(y, gate).to(hidden_states.dtype)))


def falcon_h1(call: Call, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """FalconH1Mixer.forward: multipliers, and a norm that the config may leave out."""
    layer = call.layer
    y, gate = _mamba2(call, layer.in_proj(hidden_states * layer.ssm_in_multiplier) * layer.mup_vector)
    y = layer.norm(y, gate) if layer.mamba_rms_norm else y * F.silu(gate)
    return cast(Tensor, layer.out_proj(y.to(hidden_states.dtype)))


def mamba1(call: Call, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The forward of a Mamba-1 mixer; hidden_states and the result (1, C, F)."""
    return _one_head(call, hidden_states, normed=False)


def mamba1_normed(call: Call, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The forward of a Mamba-1 mixer with norms of step, B and C."""
    return _one_head(call, hidden_states, normed=True)


def zamba(call: Call, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """ZambaMambaMixer.forward: Mamba-1 of several heads, each with a step, B and C of its own."""
    layer, line = call.layer, line_of(call.shard, hidden_states.device)
    heads = (layer.n_mamba_heads, layer.mamba_head_dim)
    # Its channels of x and of the gate take turns, one by one.
    x, gate = layer.in_proj(hidden_states).unflatten(-1, (-1, 2)).unbind(-1)
    x = _convolved(layer, line, x)[0].unflatten(-1, heads)
    sizes = [layer.time_step_rank, layer.ssm_state_size, layer.ssm_state_size]
    step, b, c = torch.einsum("tkp,ksp->tks", x, layer.x_proj_weight).split(sizes, -1)
    step = torch.einsum("tkr,kpr->tkp", step, layer.dt_proj_weight)
    y = _mamba1(call, x, step, b, c, layer.dt_proj_bias, layer.A_log, layer.D).flatten(1).unsqueeze(0)
    return cast(Tensor, layer.out_proj((y * F.silu(gate)).to(hidden_states.dtype)))


MIXERS: dict[str, Callable[..., Tensor]] = {
    "BambaMixer": mamba2,
    "FalconH1Mixer": falcon_h1,
    "FalconMambaMixer": mamba1_normed,
    "GraniteMoeHybridMambaLayer": mamba2,
    "JambaMambaMixer": mamba1_normed,
    "Mamba2Mixer": mamba2,
    "MambaMixer": mamba1,
    "NemotronHMamba2Mixer": mamba2,
    "Zamba2MambaMixer": mamba2,
    "ZambaMambaMixer": zamba,
}


def _mamba2(call: Call, projected: Tensor) -> tuple[Tensor, Tensor]:
    """From the input projection (1, C, ...) to the result (1, C, H * P) of the recurrence, and its gate."""
    layer, line = call.layer, line_of(call.shard, projected.device)
    gate, mixed, step = projected.split([layer.intermediate_size, layer.conv_dim, layer.num_heads], -1)
    mixed = _convolved(layer, line, mixed)[0]
    states = layer.n_groups * layer.ssm_state_size
    x, b, c = mixed.split([layer.intermediate_size, states, states], -1)
    with torch.autocast(projected.device.type, enabled=False):
        step, bias, a_log, skip = wide(step[0], layer.dt_bias, layer.A_log, layer.D)
        # In older versions of transformers zamba2 has a shortest step alone.
        shortest, longest = layer.time_step_limit or (layer.time_step_min, math.inf)
        step = F.softplus(step + bias).clamp(shortest, longest)
        # Heads of one group share B and C: (C, G, H / G, P) and (C, G, N).
        groups = (layer.n_groups, layer.num_heads // layer.n_groups)
        x, step = x.unflatten(-1, (*groups, layer.head_dim)), step.unflatten(-1, groups)
        b, c = (each.unflatten(-1, (layer.n_groups, -1)) for each in (b, c))
        rate, skip = -a_log.exp().view(groups), skip.view(groups)
        log_decay = step * rate
        stretches = stretches_of(call, line, layer.chunk_size, x.device)
        kernel = _kernel(layer, x)
        if kernel is None:
            x, b, c = wide(x, b, c)
            y, final = scan_by_chunks(log_decay, x * step[..., None], b, c, stretches)
            y = y + x * skip[..., None]
        else:
            kernel = functools.partial(kernel, chunk_size=layer.chunk_size)
            y, final = _fused(kernel, x, step, rate, b, c, skip, stretches)

        def read(reach: Tensor, state: Tensor) -> Tensor:
            return torch.einsum("tgn,ghpn->tghp", c[: len(reach)].to(state.dtype), state) * reach[..., 0]

        y = joined(line, y, final, log_decay[..., None, None], read)
    return y.flatten(1).unsqueeze(0), gate


def _kernel(layer: Any, x: Tensor) -> Callable[..., Any] | None:
    """The fused scan of mamba_ssm for x (C, G, H, P), which transformers calls too; None where torch is to scan.

    Its products of float32 are TF32, and it counts places in a tensor in 32 bits: past that it reads other rows.
    """
    rows = len(x)
    chunks = -(-rows // layer.chunk_size)
    states = chunks * layer.intermediate_size * layer.ssm_state_size
    scores = chunks * layer.chunk_size**2 * layer.n_groups
    fits = max(rows * layer.conv_dim, states, scores) < 2**31
    takes = x.device.type == "cuda" and x.dtype in (torch.float16, torch.bfloat16) and fits
    if not (takes and is_mamba_2_ssm_available()):
        return None
    module = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
    return cast("Callable[..., Any]", module.mamba_chunk_scan_combined)


def _one_head(call: Call, hidden_states: Tensor, normed: bool) -> Tensor:
    """A Mamba-1 mixer whose channels share a step, B and C."""
    layer, line = call.layer, line_of(call.shard, hidden_states.device)
    x, gate = layer.in_proj(hidden_states).chunk(2, -1)
    x = _convolved(layer, line, x)
    sizes = [layer.time_step_rank, layer.ssm_state_size, layer.ssm_state_size]
    step, b, c = layer.x_proj(x).split(sizes, -1)
    if normed:
        step, b, c = layer.dt_layernorm(step), layer.b_layernorm(b), layer.c_layernorm(c)
    # The weight of a quantized layer is no matrix. Of others it is taken, so that an adapter is left out as
    # transformers leaves it out.
    quantized = hasattr(layer.config, "_is_quantized")
    step = layer.dt_proj(step) - layer.dt_proj.bias if quantized else F.linear(step, layer.dt_proj.weight)
    rows = (each.transpose(0, 1) for each in (x, step, b, c))
    parameters = (each.unsqueeze(0) for each in (layer.dt_proj.bias, layer.A_log, layer.D))
    y = _mamba1(call, *rows, *parameters).transpose(0, 1)
    return cast(Tensor, layer.out_proj((y * F.silu(gate)).to(hidden_states.dtype)))


def _mamba1(
    call: Call, x: Tensor, step: Tensor, b: Tensor, c: Tensor, bias: Tensor, a_log: Tensor, skip: Tensor
) -> Tensor:
    """The recurrence of K heads of P channels with N states each.

    Args:
        x, step: (C, K, P); the step is to be biased and made positive.
        b, c: (C, K, N).
        bias, skip: (K, P).
        a_log: (K, P, N).

    Returns:
        (C, K, P), in float32 at least.
    """
    line = line_of(call.shard, x.device)
    with torch.autocast(x.device.type, enabled=False):
        x, step, b, c, bias, a_log, skip = wide(x, step, b, c, bias, a_log, skip)
        step = F.softplus(step + bias)
        log_decay = -step[..., None] * a_log.exp()
        stretches = stretches_of(call, line, 1, x.device)
        # Nothing is left of the document before.
        goes_on = F.pad(stretches[1:] == stretches[:-1], (0, 0, 1, 0))
        decay = log_decay.exp() * goes_on[..., None, None]
        states = scan(decay, (step * x)[..., None] * b[..., None, :])

        def read(reach: Tensor, state: Tensor) -> Tensor:
            return torch.einsum("tkpn,tkn->tkp", reach * state, c[: len(reach)])

        y = joined(line, torch.einsum("tkpn,tkn->tkp", states, c), states[-1], log_decay, read)
        return y + x * skip


def _fused(
    kernel: Callable[..., Any],
    x: Tensor,
    step: Tensor,
    rate: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    stretches: Tensor,
) -> tuple[Tensor, Tensor]:
    """As scan_by_chunks, with what x adds by itself.

    The kernel's final state is the one after the last row, of the last stretch alone, and has a gradient.

    Args:
        x: (C, G, H, P), in half precision as b and c.
        step: (C, G, H), as it counts: the kernel neither biases nor limits it again.
        rate, skip: (G, H), float32; the kernel's A and D.
    """
    groups = rate.shape
    y, final = kernel(
        x.flatten(1, 2).unsqueeze(0),
        step.flatten(1).unsqueeze(0),
        rate.flatten(),
        b.unsqueeze(0),
        c.unsqueeze(0),
        D=skip.flatten(),
        seq_idx=stretches.flatten()[: len(x)].int().unsqueeze(0),
        return_final_states=True,
    )
    return y[0].unflatten(1, groups), final[0].unflatten(0, groups)


def _convolved(layer: Any, line: Line, x: Tensor) -> Tensor:
    """The layer's causal convolution of x (1, C, F) and its activation, ending at document borders."""
    conv = layer.conv1d
    convolve = functools.partial(F.conv1d, weight=conv.weight, bias=conv.bias, groups=conv.groups)
    out = line.convolved(x.to(conv.weight.dtype), layer.conv_kernel_size - 1, convolve)
    return cast(Tensor, layer.act(out).to(x.dtype))
