"""Bench: a few training steps of a small model, profiled.

Document lengths, SapConfig -> what its steps took on the ranks of this run. `sap-hf bench step` prints it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from sap_hf.config import SapConfig
from sap_hf.data import DataCollatorForPacking
from sap_hf.hf.profile import Profile
from sap_hf.models import patch_model
from sap_hf.planning import Plan
from sap_hf.planning.cost import Shape
from sap_hf.planning.documents import Int64

VOCABULARY = 1024


def train_llama(
    packs: Sequence[Int64], config: SapConfig, shape: Shape, layers: int, device: torch.device
) -> tuple[Plan, dict[str, float]]:
    """Train a small Llama of random weights, one step on each pack, which all ranks of the run share.

    Args:
        packs: rows of the documents of each. The first one is there to warm up.
        shape: its attention layers. bfloat16 on CUDA, float32 elsewhere.

    Returns:
        The plan of the last pack, and means over the steps after the first: what `Profile.take` gives, sap/wait_seconds
        over all ranks, and step_seconds until the slowest rank is done. Plans are made before the clock starts.

    Raises:
        SapError: a config that these ranks and heads cannot have, on every rank.
    """
    torch.manual_seed(0)
    width = shape.num_heads * shape.head_dim
    llama = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=max(int(lengths.max()) for lengths in packs),
    )
    model = LlamaForCausalLM(llama).to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    patch = patch_model(model, config)
    replica = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters())
    taken: list[dict[str, float]] = []
    with Profile(patch) as profile:
        for lengths in packs:
            documents = [{"input_ids": torch.randint(VOCABULARY, (int(n),))} for n in lengths]
            batch = {name: value.to(device) for name, value in DataCollatorForPacking()(documents).items()}
            # As a Trainer's thread would have done by now.
            patch.sharding.look_ahead(batch)
            dist.barrier()
            started = time.perf_counter()
            replica(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds = torch.tensor(time.perf_counter() - started, dtype=torch.float64, device=device)
            dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
            figures = profile.take()
            waited = torch.tensor(figures["sap/wait_seconds"], dtype=torch.float64, device=device)
            dist.all_reduce(waited)
            figures["sap/wait_seconds"] = float(waited) / dist.get_world_size()
            taken.append({"step_seconds": float(seconds), **figures})
    plan, measured = patch.sharding.last_plan, taken[1:]
    assert plan is not None
    return plan, {name: sum(step[name] for step in measured) / len(measured) for name in measured[0]}
