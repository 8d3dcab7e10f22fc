"""Attention classes that the interface alone does not serve: their own forward, around `sap_hf`'s attention.

A class's method and its arguments -> what the method returns. Some classes never ask transformers' attention interface
(falcon, gpt_neo, ...), some of these add a bias to the logits (bloom, mpt), and some ask it but keep the meaning of
their mask to themselves (llama4's chunks, phimoe's window). `table` says which function serves which class.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch

from sap_hf.errors import UnsupportedAttention
from sap_hf.models.interface import KEYWORD, Shard, originals, share_attention
from sap_hf.planning import Documents, Plan

# The factor in q of what a bias needs in k. A power of two, so that it rounds nothing; it keeps the biases of positions
# beyond a million under 65504, where float16 ends.
UNIT = 256.0


@dataclasses.dataclass(frozen=True, eq=False)
class Places:
    """Where this rank's rows lie in their documents; (C,) int64 each, on the device. Padding is alone in one.

    Attributes:
        positions: of each row inside its document.
        lengths: rows of that document.
        longest: rows of the longest document of the pack.
    """

    positions: torch.Tensor
    lengths: torch.Tensor
    longest: int


Bias = Callable[[Places], torch.Tensor]


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """One call of a patched method while a pack is sharded.

    Attributes:
        layer: the attention module.
        original: its method as transformers has it.
    """

    layer: Any
    shard: Shard
    original: Callable[..., Any]

    @property
    def theirs(self) -> Any:
        """The module of transformers that the layer's class comes from."""
        return sys.modules[type(self.layer).__module__]

    def attend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        scaling: float,
        window: int | None = None,
        bias: Bias | None = None,
    ) -> torch.Tensor:
        """Attention of q (1, H, C, D), k and v (1, K, C, D) over the ranks: (1, C, H, D).

        Args:
            bias: gives (H, C), what query head h adds to its logits of key c, counted by the key's document.
        """
        if bias is not None:
            q, k, v = self._biased(q, k, v, scaling, bias)
        return share_attention(self.layer, self.shard, q, k, v, scaling, window)

    def places(self, device: torch.device) -> Places:
        """Where this rank's rows lie; derived once per batch."""
        plan, rank = self.shard.plan, self.shard.group.rank
        return cast(Places, once(plan, ("places", rank, device), lambda: _places(plan, rank, device)))

    def _biased(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float, bias: Bias
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Write a bias into a few more columns of q and k, so that every kernel adds it."""
        dtype = q.dtype
        if torch.is_autocast_enabled(q.device.type) and dtype != torch.float64:
            # What attention would cast to anyway: the columns are split for that dtype.
            dtype = torch.get_autocast_dtype(q.device.type)
            q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        if k.shape[1] != q.shape[1]:
            # Heads that share a key have biases of their own.
            shared = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
        rank = self.shard.group.rank
        key = ("bias", type(self.layer), q.shape[1], scaling, dtype, rank, q.device)
        columns = once(
            self.shard.plan, key, lambda: columns_of(bias(self.places(q.device)), scaling, dtype).unsqueeze(0)
        )
        k = torch.cat([k, cast(torch.Tensor, columns)], -1)
        return torch.cat([q, q.new_full((*q.shape[:3], k.shape[3] - q.shape[3]), UNIT)], -1), k, v


def columns_of(bias: torch.Tensor, scaling: float, dtype: torch.dtype) -> torch.Tensor:
    """Columns of k (..., n) whose products with UNIT in q add up to `bias` (...) once they are scaled.

    In float64 one column does. Else it is three, of 8 significant bits each (float16: 11), together the 24 of float32:
    bfloat16 holds them, and a matrix product that rounds its float32 input (TF32) leaves them as they are. Their sum
    is the bias up to 2**-23 of it; in float16, whose smallest number is 2**-24, up to that times UNIT * scaling more.
    """
    wide = dtype == torch.float64
    rest = bias.to(dtype if wide else torch.float32) / (scaling * UNIT)
    if wide:
        return rest.unsqueeze(-1)
    columns = []
    for _ in range(3):
        columns.append(rest.to(torch.float16 if dtype == torch.float16 else torch.bfloat16))
        rest = rest - columns[-1].float()
    return torch.stack(columns, -1).to(dtype)


def chunked(plan: Plan, size: int) -> Plan:
    """The same placement of the same rows, with documents cut every `size` rows; derived once per batch."""

    def cut() -> Plan:
        rows = np.arange(plan.documents.rows)
        positions = rows - plan.documents.cu_seqlens[plan.documents.index_of(rows)]
        borders = np.append(np.flatnonzero(positions % size == 0), plan.documents.rows)
        return dataclasses.replace(plan, documents=Documents(borders), windows={None: 1})

    if size >= int(plan.documents.lengths.max()):
        return plan
    return cast(Plan, once(plan, ("chunks", size), cut))


def once(plan: Plan, key: object, make: Callable[[], object]) -> object:
    """What `make` gives, made once per plan and key."""
    if key not in plan.derived:
        plan.derived[key] = make()
    return plan.derived[key]


def _places(plan: Plan, rank: int, device: torch.device) -> Places:
    documents, rows = plan.documents, plan.rows(rank)
    padding = rows >= documents.rows
    document = documents.index_of(np.where(padding, 0, rows))
    positions = np.where(padding, 0, rows - documents.cu_seqlens[document])
    lengths = np.where(padding, 1, documents.lengths[document])
    return Places(
        torch.from_numpy(positions).to(device),
        torch.from_numpy(lengths).to(device),
        int(documents.lengths.max()),
    )


def heads_given(
    scaling: Callable[[Any], float], window: Callable[[Any], int | None] = lambda layer: None
) -> Callable[..., Any]:
    """For a method that takes query, key, value (1, H, C, D) and returns (out (1, H, C, D), weights)."""

    def method(
        call: Call, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        out = call.attend(query, key, value, scaling(call.layer), window(call.layer))
        return out.transpose(1, 2), None

    return method


def openai(call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any) -> Any:
    """Attention._attn of GPT-1: its keys come transposed, (1, H, D, C)."""
    scaling = 1 / math.sqrt(v.shape[-1]) if call.layer.scale else 1.0
    return [call.attend(q, k.transpose(2, 3), v, scaling).transpose(1, 2)]


def bloom(
    call: Call,
    hidden_states: torch.Tensor,
    residual: torch.Tensor,
    alibi: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """BloomAttention.forward."""
    layer = call.layer
    q, k, v = layer._reshape(layer.query_key_value(hidden_states))
    out = call.attend(q, k, v, layer.inv_norm_factor, bias=_from_start(call, q.shape[1], alibi.dtype))
    out = layer.dense(out.flatten(2))
    return call.theirs.dropout_add(out, residual, layer.hidden_dropout, layer.training), None


def falcon(
    call: Call,
    hidden_states: torch.Tensor,
    alibi: torch.Tensor | None,
    *args: Any,
    position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
    **kwargs: Any,
) -> Any:
    """FalconAttention.forward; keys that heads share are sent once."""
    layer = call.layer
    qkv = layer.query_key_value(hidden_states)
    if layer.new_decoder_architecture:
        groups = qkv.unflatten(-1, (layer.num_kv_heads, -1, layer.head_dim))
        q, k, v = groups[..., :-2, :].flatten(2, 3), groups[..., -2, :], groups[..., -1, :]
    else:
        q, k, v = layer._split_heads(qkv)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    bias = None
    if alibi is None:
        q, k = call.theirs.apply_rotary_pos_emb(q, k, *cast(Any, position_embeddings))
    else:
        if originals.get(id(layer.config)) == "eager":
            raise UnsupportedAttention(
                "FalconAttention with attn_implementation='eager' adds its alibi bias twice.\n"
                "  Load the model with attn_implementation='sdpa'."
            )
        bias = _from_start(call, q.shape[1], alibi.dtype, math.sqrt(layer.head_dim))
    return layer.dense(call.attend(q, k, v, layer.inv_norm_factor, bias=bias).flatten(2)), None


def mpt(call: Call, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """MptAttention.forward."""
    layer = call.layer
    qkv = layer.Wqkv(hidden_states)
    if layer.clip_qkv:
        qkv = qkv.clamp(min=-layer.clip_qkv, max=layer.clip_qkv)
    q, k, v = (x.unflatten(-1, (layer.n_heads, -1)).transpose(1, 2) for x in qkv.chunk(3, dim=2))

    def bias(places: Places) -> torch.Tensor:
        # Built for the longest document, and 0 at the last key of each.
        table = call.theirs.build_mpt_alibi_tensor(layer.n_heads, places.longest, device=q.device)[:, 0]
        return cast(torch.Tensor, table[:, places.longest - places.lengths + places.positions])

    return layer.out_proj(call.attend(q, k, v, layer.softmax_scale, bias=bias).flatten(2)), None


def xglm(
    call: Call,
    hidden_states: torch.Tensor,
    key_value_states: torch.Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """XGLMAttention.forward, of a decoder alone."""
    layer = call.layer
    if key_value_states is not None:
        raise UnsupportedAttention("XGLMAttention attends to an encoder, whose rows no plan knows.")
    q, k, v = (
        project(hidden_states).unflatten(-1, (layer.num_heads, -1)).transpose(1, 2)
        for project in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    return layer.out_proj(call.attend(q * layer.scaling, k, v, 1.0).flatten(2)), None


def phimoe(call: Call, *args: Any, **kwargs: Any) -> Any:
    """PhimoeAttention.forward: the window, which it leaves to its mask, told to the interface."""
    return call.original(call.layer, *args, **kwargs, sliding_window=call.layer.config.sliding_window)


def llama4(call: Call, *args: Any, **kwargs: Any) -> Any:
    """Llama4TextAttention.forward: chunks, which it leaves to its mask, and positions, which it counts by row."""
    layer = call.layer
    if layer.config.layer_types[layer.layer_idx] == "chunked_attention":
        plan = chunked(call.shard.plan, layer.config.attention_chunk_size)
        kwargs[KEYWORD] = dataclasses.replace(call.shard, plan=plan)
    # The shard's plan, not the chunks': the temperature grows over the whole document.
    positions = call.places(kwargs["position_embeddings"].device).positions
    return call.original(layer, *args, **{**kwargs, "cache": _Positions(positions)})


class _Positions:
    """Stands where a cache would: how far each row lies from where counting rows would put it."""

    def __init__(self, positions: torch.Tensor) -> None:
        self._offsets = positions - torch.arange(len(positions), device=positions.device)

    def get_seq_length(self, layer_idx: int = 0) -> torch.Tensor:
        return self._offsets

    def update(self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Nothing is kept."""
        return keys, values


def _from_start(call: Call, heads: int, dtype: torch.dtype, divisor: float = 1.0) -> Bias:
    """The bias of bloom and falcon as transformers builds it for one document, rounded as there."""

    def bias(places: Places) -> torch.Tensor:
        ones = torch.ones(1, places.longest, dtype=torch.long, device=places.positions.device)
        table = call.theirs.build_alibi_tensor(ones, heads, dtype)[:, 0]
        return cast(torch.Tensor, table[:, places.positions] / divisor)

    return bias
