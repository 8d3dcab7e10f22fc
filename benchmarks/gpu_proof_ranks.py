"""What all ranks of gpu_proof.py measure together; started by it, one part at a time.

    torchrun --nproc-per-node 8 benchmarks/gpu_proof_ranks.py attention --out attention.jsonl

Every measurement is written as it is made: a run that dies keeps those before.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from gpu_proof import LLAMA_8B, SIZES, TINY
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaModel
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import sap_hf
from sap_hf.planning.documents import Documents
from sap_hf.planning.hardware import find_hardware
from sap_hf.planning.workloads import pack
from sap_hf.simulation.step import LOSS_ROWS, PLANS, WORKLOADS, Model
from sap_hf.strategies.auto import Request, make_plan

SEED = 0
TURNS = {"attention": 10, "step": 2, "tiny": 2}
# A rank that runs out of memory leaves the others in a collective.
LOST = datetime.timedelta(minutes=5)
# Of the GPUs' memory, what parameters, gradients and AdamW's moments may take: 16 bytes a parameter.
STATES = 0.5
IGNORED = -100


def main() -> None:
    """Measure one part on this rank; rank 0 writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, help="of the document, for context")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=LOST)
    PARTS[options.part](options, device, TINY if options.tiny else LLAMA_8B)
    dist.barrier()
    dist.destroy_process_group()


def attention(options: argparse.Namespace, device: torch.device, model: Model) -> None:
    """One layer for every prediction."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rank, world = dist.get_rank(), dist.get_world_size()
    for workload in WORKLOADS:
        for rows in SIZES["tiny" if options.tiny else "rows"]:
            documents = Documents.from_lengths(pack(workload, rows, np.random.default_rng(SEED)))
            for strategy, layout in PLANS:
                asked = Request(
                    documents,
                    world,
                    strategy=strategy,
                    layout=layout,
                    shape=model.shape,
                    hardware=find_hardware("h100"),
                )
                plan = make_plan(asked)
                heads = (model.num_heads, model.num_kv_heads, model.num_kv_heads, model.num_heads)
                *leaves, dout = (
                    torch.randn(len(plan.rows(rank)), count, model.head_dim, device=device, dtype=dtype)
                    for count in heads
                )
                leaves = [x.requires_grad_() for x in leaves]
                marks = []
                together = torch.zeros(1, device=device)
                for _ in range(TURNS["tiny" if options.tiny else "attention"] + 1):
                    # The ranks start together, and the hosts need not wait for it.
                    dist.all_reduce(together)
                    marks.append([mark(device)])
                    out = sap_hf.attention(*leaves, plan)
                    marks[-1].append(mark(device))
                    torch.autograd.grad(out, leaves, dout)
                    marks[-1].append(mark(device))
                # The first one warms up.
                forward, backward = (
                    slowest(
                        statistics.median(seconds_between(*turn[i : i + 2]) for turn in marks[1:]), device
                    )
                    for i in (0, 1)
                )
                write(
                    options,
                    workload=workload,
                    rows=rows,
                    plan=f"{strategy} {layout}",
                    chosen=f"{plan.strategy} {plan.layout} {'+'.join(plan.deliveries)}".strip(),
                    attention_forward_ms=1e3 * forward,
                    attention_backward_ms=1e3 * backward,
                    attention_ms=1e3 * (forward + backward),
                )


def step(options: argparse.Namespace, device: torch.device, model: Model) -> None:
    """A training step for every prediction of these workloads: work that balances itself, and work that does not."""
    decoder, optimizer, left_out = build(model, device)
    for workload in ("magi", "one"):
        for rows in SIZES["tiny" if options.tiny else "rows"]:
            lengths = pack(workload, rows, np.random.default_rng(SEED))
            for strategy, layout in PLANS:
                found = train(decoder, optimizer, lengths, device, strategy=strategy, layout=layout)
                write(
                    options,
                    workload=workload,
                    rows=rows,
                    plan=f"{strategy} {layout}",
                    layers_left_out=left_out,
                    **found,
                )


def context(options: argparse.Namespace, device: torch.device, model: Model) -> None:
    """One step on one document."""
    decoder, optimizer, left_out = build(model, device)
    found = train(decoder, optimizer, np.array([options.rows]), device)
    write(options, rows=options.rows, layers_left_out=left_out, **found)


def trace(options: argparse.Namespace, device: torch.device, model: Model) -> None:
    """A profiler's trace of a step beside --out, and its longest operations."""
    decoder, optimizer, left_out = build(model, device)
    rows = SIZES["tiny" if options.tiny else "rows"][0]
    lengths = pack("magi", rows, np.random.default_rng(SEED))
    train(decoder, optimizer, lengths, device)
    with torch.profiler.profile() as profiler:
        train(decoder, optimizer, lengths, device, turns=1)
    if dist.get_rank() == 0:
        file = options.out.with_name("trace_rank0.json.gz")
        profiler.export_chrome_trace(str(file))
        order = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=order, row_limit=30)
        write(options, file=file.name, rows=rows, layers_left_out=left_out, longest=table.splitlines())


PARTS = {"attention": attention, "step": step, "context": context, "trace": trace}


# ---- a model ----------------------------------------------------------------------------------------


class Decoder(torch.nn.Module):
    """A Llama whose logits exist for LOSS_ROWS rows at once, as the predictions have it."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.backbone = LlamaModel(config)
        self.head = torch.nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, ids: torch.Tensor, positions: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Sum of losses over this rank's rows; targets are those of the whole pack."""
        hidden = self.backbone(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state[0]
        plan = sap_hf.models.patch.find_patch(self.backbone).sharding.last_plan
        rows = torch.from_numpy(plan.rows(dist.get_rank())).to(ids.device)
        mine = targets[rows.clamp(max=len(targets) - 1)].masked_fill(rows >= len(targets), IGNORED)
        weight = self.head.weight
        parts = (
            checkpoint(_loss, part, weight, wanted, use_reentrant=False)
            for part, wanted in zip(hidden.split(LOSS_ROWS), mine.split(LOSS_ROWS))
        )
        return torch.stack(list(parts)).sum()


def _loss(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    logits = (hidden @ weight.T).float()
    return cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")


def build(model: Model, device: torch.device) -> tuple[Decoder, torch.optim.Optimizer, int]:
    """Random weights under FSDP2 over all ranks, with gradient checkpointing; and how many layers do not fit.

    The learning rate is 0: every step meets the same weights, so all plans must find the same loss.
    """
    layers = model.layers
    if device.type == "cuda":
        memory = STATES * torch.cuda.get_device_properties(device).total_memory * dist.get_world_size()
        fitting = (memory / 16 - 2 * model.head_parameters) // model.layer_parameters
        layers = max(1, min(layers, int(fitting)))
    config = LlamaConfig(
        vocab_size=model.vocabulary,
        hidden_size=model.hidden,
        intermediate_size=model.mlp,
        num_hidden_layers=layers,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        max_position_embeddings=1 << 30,
        attn_implementation="sdpa",
    )
    with torch.device("meta"):
        decoder = Decoder(config)
    decoder.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    # Rounded on the way to the GPUs only there: the CPU's bfloat16 products are slow, and no test of anything.
    policy = MixedPrecisionPolicy(*[torch.bfloat16] * 2) if device.type == "cuda" else MixedPrecisionPolicy()
    for layer in decoder.backbone.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(decoder, mp_policy=policy)
    decoder.to_empty(device=device)
    # Its frequencies are no parameters, so meta left them without values.
    decoder.backbone.rotary_emb = LlamaRotaryEmbedding(config).to(device)
    torch.manual_seed(SEED)
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            parameter.fill_(1.0) if "norm" in name else parameter.normal_(std=0.02)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=0.0, fused=device.type == "cuda")
    return decoder.train(), optimizer, model.layers - layers


def train(
    decoder: Decoder,
    optimizer: torch.optim.Optimizer,
    lengths: np.ndarray,
    device: torch.device,
    turns: int = TURNS["step"],
    **how: Any,
) -> dict[str, Any]:
    """A step to warm up and `turns` more; the slowest rank's milliseconds and the fullest one's memory."""
    patch = sap_hf.patch_model(decoder.backbone, ulysses_size=1, **how)
    generator = torch.Generator().manual_seed(SEED)
    rows = int(lengths.sum())
    ids = torch.randint(decoder.head.weight.shape[0], (1, rows), generator=generator).to(device)
    positions = torch.cat([torch.arange(int(n)) for n in lengths])[None].to(device)
    targets = ids[0].roll(-1).masked_fill(positions[0].roll(-1) == 0, IGNORED)
    count = int((targets != IGNORED).sum())
    seconds = []
    for turn in range(turns + 1):
        if turn == 1 and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        started = seconds_now(device)
        loss = decoder(ids, positions, targets)
        # FSDP averages over the ranks, each of which has a part of the sum.
        (loss * dist.get_world_size() / count).backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(seconds_now(device) - started)
    total = loss.detach().double()
    dist.all_reduce(total)
    plan = patch.sharding.last_plan
    assert plan is not None
    sap_hf.unpatch_model(decoder.backbone)
    middle = slowest(statistics.median(seconds[1:]), device)
    found = {
        "chosen": f"{plan.strategy} {plan.layout} {'+'.join(plan.deliveries)}".strip(),
        "step_ms": 1e3 * middle,
        "tokens_per_s": rows / middle,
        "loss": float(total) / count,
    }
    if device.type == "cuda":
        found["peak_gib"] = slowest(torch.cuda.max_memory_allocated(device) / 2**30, device)
    return found


# ---- clocks -----------------------------------------------------------------------------------------


def mark(device: torch.device) -> Any:
    """A moment of this rank's GPU, without waiting for it; elsewhere of its clock."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def seconds_between(first: Any, last: Any) -> float:
    """Of two marks."""
    if isinstance(first, float):
        return last - first
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def seconds_now(device: torch.device) -> float:
    """When all ranks have come."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    dist.barrier()
    return time.perf_counter()


def slowest(value: float, device: torch.device) -> float:
    """The largest of all ranks' values."""
    both = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(both, op=dist.ReduceOp.MAX)
    return float(both)


def write(options: argparse.Namespace, **found: Any) -> None:
    """One more line, by rank 0."""
    if dist.get_rank() == 0:
        with options.out.open("a") as file:
            file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
