"""Time whole training steps of a small Llama, several ways to train beside each other in one run.

    torchrun --nproc-per-node 4 benchmarks/step.py --rows 8192 --workload magi short one --turns 3 --out result.json
    torchrun --nproc-per-node 4 benchmarks/step.py --rows 8192 --workload chats --layers 2 --turns 4

A step is forward and backward, the average of all gradients over the ranks (plain all-reduces of what DDP puts into a
bucket), and AdamW. The average is the same for every way, so it is measured once a turn and added to each. Every rank
holds all parameters. After a warm-up on a few rows the ways take turns. The learning rate is 0: every step of
every way meets the same parameters, so ways that see the same tokens must find the same loss, which is checked.

A named workload is one pack of `rows`, shared by all ranks: our strategies against each other. `chats` are the lengths
of the recipes' chats (of at most `rows` tokens) with random tokens, as many packs of `rows` as ranks: shared by all,
one after the other, against one on each rank, or a padded batch of 8; other chats in every turn.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from peers import MODES, Ringmaster
from transformers import LlamaForCausalLM
from ways import HEADS, KV_HEADS, Way, build, chat_ways, shared_ways, targets

import sap_hf
from sap_hf.models.patch import find_patch
from sap_hf.planning.cost import critical_rows
from sap_hf.planning.workloads import WORKLOADS

BUCKET_BYTES = 25 << 20


@dataclasses.dataclass
class Spent:
    """Seconds of one way's steps, turn by turn, and what came of them."""

    compute: list[float] = dataclasses.field(default_factory=list)
    optimizer: list[float] = dataclasses.field(default_factory=list)
    loss: list[float] = dataclasses.field(default_factory=list)
    plan: sap_hf.Plan | None = None


def main() -> None:
    """Train all ways in turn and print a table; rank 0 writes JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--workload", nargs="+", default=["magi"], choices=[*WORKLOADS, "chats"])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ringmaster", action="store_true", help="time axolotl-ringmaster too; see peers.py")
    parser.add_argument(
        "--hardware", help="what auto plans for: a preset, or a file of sap-hf bench --calibrate"
    )
    parser.add_argument(
        "--note", default="", help="how the machine was set up, e.g. an emulated cluster's limits"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    device = (
        torch.device("cuda", dist.get_rank() % torch.cuda.device_count()) if cuda else torch.device("cpu")
    )
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    model = build(options.layers, options.rows).to(device, torch.bfloat16 if cuda else torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    peers = {mode: Ringmaster(mode, HEADS, KV_HEADS, device) for mode in MODES} if options.ringmaster else {}
    for workload in options.workload:
        make = chat_ways if workload == "chats" else shared_ways
        ways = make(workload, options, device, peers)
        spent, averaging = measure(model, optimizer, ways, options.turns)
        if dist.get_rank() == 0:
            report(workload, options, model, ways, spent, averaging)
    dist.barrier()
    dist.destroy_process_group()


def measure(
    model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, ways: dict[str, Way], turns: int
) -> tuple[dict[str, Spent], list[float]]:
    """Steps of all ways in turn, and the seconds of each turn's average of gradients."""
    spent = {name: Spent() for name in ways}
    averaging = []
    for turn in range(turns + 1):
        for place, (name, way) in enumerate(ways.items()):
            with way.setup(model):
                started = clock()
                parts = torch.zeros(2, dtype=torch.float64)
                # Memory grows in the first step of full size, which is nobody's.
                first = way.batches[1] if turn == place == 0 else []
                for batch in [*first, *way.batches[turn]]:
                    loss = model(**batch).loss
                    loss.backward()
                    parts += torch.tensor([loss.item(), 1.0], dtype=torch.float64) * targets(batch)
                computed = clock()
                plan = find_patch(model).sharding.last_plan if find_patch(model) else None
            if place == 0:
                average(model)
                averaged = clock()
            stepping = clock()
            optimizer.step()
            stepped = clock()
            optimizer.zero_grad()
            if turn == 0:
                continue
            if place == 0:
                averaging.append(averaged - computed)
            spent[name].compute.append(computed - started)
            spent[name].optimizer.append(stepped - stepping)
            spent[name].plan = plan
            dist.all_reduce(parts)
            spent[name].loss.append(float(parts[0] / parts[1]))
    return spent, averaging


def clock() -> float:
    """Seconds, when the slowest rank has come."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter()


def average(model: LlamaForCausalLM) -> None:
    """Gradients averaged over all ranks in buckets of DDP's size, after the backward."""
    buckets: list[list[torch.Tensor]] = [[]]
    for parameter in reversed(list(model.parameters())):
        if buckets[-1] and sum(gradient.nbytes for gradient in buckets[-1]) + parameter.nbytes > BUCKET_BYTES:
            buckets.append([])
        assert parameter.grad is not None
        buckets[-1].append(parameter.grad)
    for bucket in buckets:
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for gradient, part in zip(bucket, flat.split([gradient.numel() for gradient in bucket])):
            gradient.copy_(part.view_as(gradient))


def report(
    workload: str,
    options: argparse.Namespace,
    model: LlamaForCausalLM,
    ways: dict[str, Way],
    spent: dict[str, Spent],
    averaging: list[float],
) -> None:
    """Print the table and write it with where it came from."""
    world, common = dist.get_world_size(), statistics.median(averaging)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    plan = spent["auto auto"].plan
    assert plan is not None
    inside = plan.hardware.ranks_per_node >= world
    shape = dataclasses.replace(plan.shape, bytes_per_element=model.dtype.itemsize)
    critical = critical_rows(shape, plan.hardware, inside_node=inside)
    print(
        f"{workload}: {options.rows} rows, {world} ranks, {options.layers} layers, {parameters / 1e6:.1f} M "
        f"parameters, planned for {plan.hardware.name}: C/c* = {options.rows // world}/{critical} = "
        f"{options.rows / world / critical:.2g}"
    )
    compute = {name: statistics.median(each.compute) for name, each in spent.items()}
    steps = {name: compute[name] + common + statistics.median(each.optimizer) for name, each in spent.items()}
    tokens_per_s, without = (dict.fromkeys(spent, 0.0) for _ in range(2))
    for name, each in spent.items():
        total = sum(ways[name].tokens[1:])
        seconds = sum(each.compute) + sum(each.optimizer)
        without[name] = total / seconds
        tokens_per_s[name] = total / (seconds + sum(averaging))
        moved = ""
        if each.plan is not None and each.plan.all_gather_rows:
            moved = f"  rows moved {each.plan.rows_moved.sum() / each.plan.all_gather_rows:6.1%}"
        print(
            f"  {name:<32} forward and backward {compute[name]:8.3f} s  "
            f"AdamW {statistics.median(each.optimizer):6.3f} s  step {steps[name]:8.3f} s  "
            f"{tokens_per_s[name]:8.1f} tokens/s, {without[name]:8.1f} without averaging{moved}"
        )
    print(f"  averaging gradients {common:.3f} s: {common / steps['auto auto']:.0%} of auto's step")
    apart = largest_difference(ways, spent)
    print(f"  losses on the same tokens differ by at most {apart:.1e}")
    if options.out:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
        record = {
            "machine": f"{platform.processor() or platform.machine()}, torch {torch.__version__}",
            "note": options.note,
            "commit": commit.stdout.strip(),
            "command": shlex.join(sys.argv),
            "workload": workload,
            "rows": options.rows,
            "ranks": world,
            "layers": options.layers,
            "parameters": parameters,
            "rows_per_critical": options.rows / world / critical,
            "step_seconds": steps,
            "compute_seconds": {name: each.compute for name, each in spent.items()},
            "optimizer_seconds": {name: each.optimizer for name, each in spent.items()},
            "averaging_seconds": averaging,
            "tokens": {name: way.tokens[1:] for name, way in ways.items()},
            "tokens_per_s": tokens_per_s,
            "tokens_per_s_without_averaging": without,
            "loss_difference": apart,
            "hardware": dataclasses.asdict(plan.hardware),
        }
        with options.out.open("a") as file:
            file.write(json.dumps(record) + "\n")


def largest_difference(ways: dict[str, Way], spent: dict[str, Spent]) -> float:
    """Between the losses that ways with the same tokens found in the same turn."""
    found: dict[tuple[str, int], list[float]] = {}
    for name, way in ways.items():
        for turn, loss in enumerate(spent[name].loss):
            found.setdefault((way.data, turn), []).append(loss)
    return max(max(losses) - min(losses) for losses in found.values())


if __name__ == "__main__":
    main()
