"""Gated delta nets on packed rows over ranks: the class's own forward, told of documents and of the ranks before.

Hidden states (1, C, E) of this rank's rows -> what the layer returns for them. Every class (qwen3_next, qwen3_5,
olmo_hybrid, kimi_linear, ...) looks at other rows through two functions of its module alone, a causal convolution and
a delta rule (Yang et al. 2024, arXiv:2412.06464). Its forward runs here with both replaced; projections, gates, norms
and all that a class does otherwise stay its own.

The rule is linear in its state S: a stretch that began on an earlier rank needs, beside its own outputs and final
state from S = 0, what it reads from S and what it carries on of it. All four come from one run of the rule before S
is there. What ranks wait for each other for is then two small products, not the recurrence.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from transformers.utils.import_utils import is_flash_linear_attention_available

from sap_hf.errors import UnsupportedAttention
from sap_hf.models.bypass import Call, once
from sap_hf.models.interface import Shard
from sap_hf.models.mixers import Line, line_of

CONVOLUTION = "causal_conv1d_fn"
RULES = ("torch_chunk_gated_delta_rule", "chunk_kimi_delta_attention")
# Rows that the torch rules compute at once.
CHUNK = 64
# Rows that they are given at once: they write chunk after chunk into one tensor, and every such write has a backward
# over all of it.
BLOCK = 8 * CHUNK
# The logarithm of a decay to 0. Finite, because the rules subtract decays from each other.
FORGET = -1e4

Rule = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def delta_net(call: Call, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
    """The layer's forward, without a cache, on hidden states (1, C, E).

    Raises:
        UnsupportedAttention: this version of transformers writes the class otherwise, ranks do not hold consecutive
            rows, or hold fewer than the convolution reaches back.
    """
    forward = inspect.unwrap(call.original)
    theirs, names = forward.__globals__, forward.__code__.co_names
    rule = next((name for name in RULES if name in names), None)
    if rule is None or CONVOLUTION not in names:
        raise UnsupportedAttention(
            f"{type(call.layer).__name__} does not call {CONVOLUTION} and one of {', '.join(RULES)}, where sap_hf "
            "takes its place.\n  Install transformers 5.24 or a later 5.x."
        )
    line = line_of(call.shard, hidden_states.device)
    replaced = {
        CONVOLUTION: functools.partial(_convolve, line, theirs[CONVOLUTION]),
        rule: functools.partial(_scan, line, call.shard, theirs[rule]),
    }
    # The same code as a function of its own: replaced in the module, the two would be gone for models that are not
    # sharded, and for other threads.
    own = FunctionType(
        forward.__code__,
        {**theirs, **replaced},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    return own(call.layer, hidden_states, **{**kwargs, "cache": None, "attention_mask": None})


def _convolve(
    line: Line,
    convolve: Callable[..., torch.Tensor],
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    **ignored: Any,
) -> torch.Tensor:
    """The depthwise convolution of x (1, F, C) with weight (F, K), which sees no other document: (1, F, C)."""
    own = functools.partial(convolve, weight=weight, bias=bias, activation=activation)
    return line.convolved(x.transpose(1, 2), weight.shape[1] - 1, own).transpose(1, 2)


def _scan(
    line: Line,
    shard: Shard,
    rule: Rule,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    use_qk_l2norm_in_kernel: bool = False,
    **ignored: Any,
) -> tuple[torch.Tensor, None]:
    """The rule on query, key (1, C, H, K) and value (1, C, G, V): (1, C, G, V), and no state for a cache.

    Every stretch goes on from zero, but the first from the state that comes where its document began earlier.

    Args:
        g: (1, C, G) or (1, C, G, K), logarithm of the decay.
        beta: (1, C, G).
    """
    run = functools.partial(_run, functools.partial(rule, use_qk_l2norm_in_kernel=use_qk_l2norm_in_kernel))
    rows, border = query.shape[1], line.cu_seqlens[1] if line.continued else 0
    inputs = {"query": query, "key": key, "value": value, "g": g, "beta": beta}
    first = {name: x[:, :border] for name, x in inputs.items()}
    others = {name: x[:, border:] for name, x in inputs.items()}
    if not border:
        out, state = _from_zero(line, shard, run, others)
        return line.send(out, state), None
    responses = _responses(run, first)
    if border == rows:
        out, state = _after(line, *responses)
        return line.send(out, state), None
    # Computed before the first message: who sends waits until the next rank has come as far.
    out, state = _from_zero(line, shard, run, others)
    out = line.send(out, state)
    return torch.cat([_after(line, *responses)[0], out], 1), None


def _run(
    rule: Rule,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs and final state of the rule; of every stretch of cu_seqlens, which the torch rules do not take."""
    if _is_fused(value.device):
        # fla names the first three otherwise.
        return rule(
            query,
            key,
            value,
            g=g,
            beta=beta,
            initial_state=initial_state,
            output_final_state=True,
            cu_seqlens=cu_seqlens,
        )
    outs, state = [], initial_state
    blocks = (torch.split(x, BLOCK, 1) for x in (query, key, value, g, beta))
    for q, k, v, decay, rate in zip(*blocks, strict=True):
        out, state = rule(
            q, k, v, g=decay, beta=rate, initial_state=state, output_final_state=True, chunk_size=CHUNK
        )
        outs.append(out)
    return torch.cat(outs, 1), cast(torch.Tensor, state)


def _is_fused(device: torch.device) -> bool:
    """Whether transformers runs flash-linear-attention's kernels there."""
    return device.type == "cuda" and bool(is_flash_linear_attention_available())


def _responses(run: Rule, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """What one stretch makes of any state S: outputs are out + reads @ S, the final state is state + carries @ S.

    The rule treats columns of value and state alike and apart. K more of them, with values of 0 and the unit matrix
    for a state, give what each entry of a column of S does to outputs and final state.

    Returns:
        out (1, C, G, V), reads (1, C, G, K), state (1, G, K, V) and carries (1, G, K, K).
    """
    value = inputs["value"]
    heads, width, inner = *value.shape[2:], inputs["key"].shape[-1]
    units = torch.eye(inner, device=value.device).expand(1, heads, inner, inner)
    wide = {**inputs, "value": F.pad(value, (0, inner))}
    out, state = run(**wide, initial_state=F.pad(units, (width, 0)))
    return out[..., :width], out[..., width:], state[..., :width], state[..., width:]


def _after(
    line: Line, out: torch.Tensor, reads: torch.Tensor, state: torch.Tensor, carries: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs and final state of the first stretch, when the state of the rank before has come."""
    came = line.receive(state, tuple(state.shape), state.dtype)
    # Autocast would round the state once per rank.
    with torch.autocast(came.device.type, enabled=False):
        read = reads.transpose(1, 2).to(came.dtype) @ came
        return out + read.transpose(1, 2).to(out.dtype), state + carries @ came


def _from_zero(
    line: Line, shard: Shard, run: Rule, inputs: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs of the stretches that begin on this rank, and the final state of the last one.

    With flash-linear-attention on a GPU its own cu_seqlens keep them apart (no test has run this). The torch rules
    know no borders: rows that carry nothing on fill up the last chunk of every stretch.
    """
    borders = np.array(line.cu_seqlens[line.continued :])
    if len(borders) == 2:
        return run(**inputs)
    device = inputs["value"].device
    key = ("delta net", shard.group.rank, device)
    where = once(shard.plan, key, lambda: _where(borders - borders[0], device))
    cu_seqlens, places, rows = cast(tuple[torch.Tensor, torch.Tensor, int], where)
    if _is_fused(device):
        out, states = run(**inputs, cu_seqlens=cu_seqlens)
        return out, states[-1:]
    filled = {
        name: x.new_full((1, rows, *x.shape[2:]), FORGET if name == "g" else 0.0).index_copy(1, places, x)
        for name, x in inputs.items()
    }
    out, state = run(**filled)
    return out.index_select(1, places), state


def _where(
    borders: np.ndarray[Any, np.dtype[np.int64]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Borders of stretches on the device, where their rows lie when at least one row fills up each, and rows then."""
    lengths = np.diff(borders)
    room = (lengths // CHUNK + 1) * CHUNK
    starts = np.cumsum(room) - room
    places = np.arange(borders[-1]) + np.repeat(starts - borders[:-1], lengths)
    # The last one carries its state on.
    rows = int(starts[-1] + lengths[-1])
    return torch.from_numpy(borders).to(device), torch.from_numpy(places).to(device), rows


MIXERS: dict[str, Callable[..., Any]] = dict.fromkeys(
    (
        "BailingHybridDeltaAttention",
        "KimiLinearDeltaAttention",
        "LaraMiniGatedDeltaNet",
        "OlmoHybridGatedDeltaNet",
        "Qwen3NextGatedDeltaNet",
        "Qwen3_5GatedDeltaNet",
        "Qwen3_5MoeGatedDeltaNet",
        "Qwen4ExpTextGatedDeltaNet",
    ),
    delta_net,
)
