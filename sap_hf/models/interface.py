"""The attention and mask functions that transformers calls under the name "sap".

While a pack is sharded, attention goes to `sap_hf.attention` and no mask is made (the plan is the mask). At all other
times (generation, an unsharded evaluation) both do what the model did before it was patched.
"""

from __future__ import annotations

import dataclasses
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sap_hf.config import SapConfig
from sap_hf.errors import UnsupportedAttention
from sap_hf.planning import Plan
from sap_hf.runtime import attention
from sap_hf.runtime.group import CpGroup
from sap_hf.runtime.layer import Kept

# No "flash" and no "/" in it: both would change what transformers does with the name.
NAME = "sap"
# The keyword argument that carries a Shard through the model, and with it into a checkpoint's recompute.
KEYWORD = "sap_shard"


@dataclasses.dataclass(eq=False)
class Shard:
    """What every layer of one sharded forward needs that looks at other tokens.

    Attributes:
        plan: how the ranks of `group` attend to this pack.
        layers: ids of the attention layers, and of those that mix neighbouring tokens, of the model that is running.
        seen: ids of the layers that came through here in this forward.
        kept: what each layer holds between a checkpointed forward and its recompute; None without checkpointing.
        running: the forward has not ended: a layer that comes is no recompute.
    """

    plan: Plan
    group: CpGroup
    config: SapConfig
    layers: frozenset[int] = frozenset()
    kept: dict[int, Kept | None] | None = None
    seen: set[int] = dataclasses.field(default_factory=set)
    running: bool = True

    def keep(self, layer: torch.nn.Module) -> Kept | None:
        """Where what this layer holds waits for its recompute; None where nothing does."""
        if self.kept is None:
            return None
        if self.running and id(layer) in self.seen:
            # It runs several times in one forward, and its recomputes could not be told apart.
            self.kept[id(layer)] = None
        return self.kept.setdefault(id(layer), Kept())


class _State(threading.local):
    shard: Shard | None = None


# Masks are made in the thread that runs the forward and are never recomputed, so a thread-local serves them.
state = _State()
# id of a patched model's config -> what it used before.
originals: dict[int, str] = {}


def sap_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    sap_shard: Shard | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """transformers' attention function: q (1, H, C, D), k and v (1, K, C, D) -> out (1, C, H, D), no weights."""
    name = type(module).__name__
    if sap_shard is None:
        if state.shard is not None:
            raise UnsupportedAttention(
                f"{name} did not pass on the keyword argument {KEYWORD!r}: its recompute could not find its plan."
            )
        return _original(module)(
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=scaling,
            dropout=dropout,
            sliding_window=sliding_window,
            softcap=softcap,
            **({} if s_aux is None else {"s_aux": s_aux}),
            **kwargs,
        )
    if attention_mask is not None or kwargs.get("position_bias") is not None:
        raise UnsupportedAttention(f"{name} passes a mask or a position bias; a sharded pack has neither.")
    if dropout:
        raise UnsupportedAttention(
            f"{name} has attention dropout {dropout}; set config.attention_dropout = 0.0."
        )
    return share_attention(
        module, sap_shard, query, key, value, scaling, sliding_window, softcap, s_aux
    ), None


def share_attention(
    module: torch.nn.Module,
    shard: Shard,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one layer over the ranks of the shard's group: (1, H, C, D) each -> (1, C, H, D)."""
    kept = shard.keep(module)
    shard.seen.add(id(module))
    out = attention(
        query.squeeze(0).transpose(0, 1),
        key.squeeze(0).transpose(0, 1),
        value.squeeze(0).transpose(0, 1),
        shard.plan,
        group=shard.group.device,
        softmax_scale=scaling,
        window=sliding_window,
        softcap=softcap,
        sinks=sinks,
        kernel=shard.config.kernel,
        remote_kv=shard.config.remote_kv,
        kept=kept,
    )
    return out.unsqueeze(0)


def sap_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """transformers' mask function: None while a pack is sharded, else the mask of the original implementation."""
    config = kwargs.get("config")
    if state.shard is not None:
        # MptModel casts its mask without asking whether there is one.
        return torch.empty(0) if getattr(config, "model_type", None) == "mpt" else None
    original = originals.get(id(config), "sdpa")
    mapping = AttentionMaskInterface()
    return mapping[original if original in mapping else "sdpa"](*args, **kwargs)  # type: ignore[no-any-return]


def register() -> None:
    """Make the name "sap" known to transformers."""
    AttentionInterface.register(NAME, sap_attention)
    AttentionMaskInterface.register(NAME, sap_mask)


def unregister() -> None:
    """Take the name back when no patched model is left."""
    if not originals:
        # There is no public way out of a registry.
        for registry in (AttentionInterface, AttentionMaskInterface):
            registry._global_mapping.pop(NAME, None)


def _original(module: torch.nn.Module) -> Callable[..., tuple[torch.Tensor, torch.Tensor | None]]:
    name = originals.get(id(module.config), "sdpa")
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    return ALL_ATTENTION_FUNCTIONS.get_interface(name, eager)  # type: ignore[no-any-return]
