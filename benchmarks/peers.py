"""axolotl-ringmaster as a peer: its attention on packed rows, set up as its collator-side interface asks.

    pip install --no-deps --target peers axolotl-ringmaster==0.2.7; export PYTHONPATH=peers

Its README's quickstart leaks across documents: it passes no borders on. Here every call gets the pack's cu_seqlens.
On CPUs its kernel is torch's SDPA under a dense T/W x T mask (T x T after an exchange of heads), and its gloo
all-to-all gathers everything everywhere; with CUDA both are what NCCL and flash-attn give.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Ranks that exchange heads: none, all, those of a node of two. The last is what its backend="auto" picks there.
MODES = {"ringmaster ring": 1, "ringmaster ulysses": None, "ringmaster usp": 2}
VERSION = "0.2.7"


class Ringmaster:
    """One mode of axolotl-ringmaster over all ranks: for one attention layer, or as hooks on a model.

    Args:
        mode: one of MODES.
        heads, kv_heads: of the layers that it will serve.

    Raises:
        SystemExit: it is not installed, or another version.
    """

    def __init__(self, mode: str, heads: int, kv_heads: int, device: torch.device):
        rm = _import()
        world = dist.get_world_size()
        ulysses = MODES[mode] or world
        config = rm.RingmasterConfig(
            size=world, backend=mode.split()[1], ulysses_size=ulysses, ring_size=world // ulysses
        )
        inner = "flash_attention_2" if device.type == "cuda" else "sdpa"
        self.runtime = rm.setup(config, num_kv_heads=kv_heads, device_type=device.type, inner_attn=inner)
        self.layer = types.SimpleNamespace(num_key_value_groups=heads // kv_heads, is_causal=True)
        rm.teardown()

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: np.ndarray) -> torch.Tensor:
        """Attention of this rank's contiguous rows: q (C, H, D), k and v (C, K, D) -> (C, H, D)."""
        from ringmaster.runtime import set_runtime
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        set_runtime(self.runtime)
        borders = self._borders(lengths)
        if borders is None:
            self.runtime.varlen = None
        else:
            self.runtime.varlen = (torch.tensor(borders[0], dtype=torch.int32, device=q.device), borders[1])
        function = ALL_ATTENTION_FUNCTIONS[self.runtime.attn_implementation]
        parts = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        return function(self.layer, *parts, None, scaling=q.shape[-1] ** -0.5)[0][0]

    @contextlib.contextmanager
    def on(self, model: PreTrainedModel) -> Iterator[None]:
        """Route the model's attention through it for the time of a `with`."""
        from ringmaster.runtime import set_runtime

        before = model.config._attn_implementation
        set_runtime(self.runtime)
        model.set_attn_implementation(self.runtime.attn_implementation)
        try:
            with _import().ContextParallelContextManager([model], self.runtime.cp_group):
                yield
        finally:
            set_runtime(None)
            model.set_attn_implementation(before)

    def cut(self, batch: dict[str, torch.Tensor], lengths: np.ndarray) -> dict[str, Any]:
        """This rank's part of a packed batch (1, T), with what its hook asks for."""
        from ringmaster.shard import CP_SHARD_KEY, shard_collated_batch

        mine = shard_collated_batch(dict(batch), cp_rank=self.runtime.cp_rank, cp_size=self.runtime.cp_size)
        mine[CP_SHARD_KEY]["varlen"] = self._borders(lengths)
        return mine

    def _borders(self, lengths: np.ndarray) -> tuple[list[int], int] | None:
        """cu_seqlens and the longest document; None, its dense path, where a single one runs on that."""
        if len(lengths) == 1 and self.runtime.ring_size == 1:
            return None
        # A ring over one dense document calls a CUDA operator: on CPUs it runs as a pack of one.
        return [0, *np.cumsum(lengths).tolist()], int(max(lengths))


def _import() -> Any:
    """The installed ringmaster."""
    how = (
        f"Install it with: pip install --no-deps --target peers axolotl-ringmaster=={VERSION}\n"
        "  and start with PYTHONPATH=peers."
    )
    try:
        import ringmaster
    except ImportError:
        raise SystemExit(f"--ringmaster: axolotl-ringmaster is not installed.\n  {how}") from None
    if version("axolotl-ringmaster") != VERSION:
        raise SystemExit(
            f"--ringmaster: axolotl-ringmaster {version('axolotl-ringmaster')} is installed, figures here are of "
            f"{VERSION}.\n  {how}"
        )
    return ringmaster
