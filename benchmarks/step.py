"""Time whole training steps of a small Llama, several ways to train beside each other in one run.

    torchrun --nproc-per-node 4 benchmarks/step.py --rows 8192 --workload magi short one --turns 3 --out result.json
    torchrun --nproc-per-node 4 benchmarks/step.py --rows 8192 --workload chats --layers 2 --turns 4

A step is what Trainer does: forward and backward of the step's batches under DistributedDataParallel, which averages
gradients over all ranks in buckets of 25 MB while the last batch's backward runs (those before only accumulate), and
AdamW. Every rank holds all parameters; a batch's mean loss counts by its share of the step's targets. After a warm-up
on a few rows the ways take turns, and in each turn every way makes a second step that averages nothing. So two figures
stand beside each other, the step and the step without averaging; and once the average alone, as plain all-reduces.

The learning rate is 0: every step of every way meets the same parameters, so ways that see the same tokens must find
the same loss, in every turn, and the same averaged gradients, in the first one: both are checked.

A named workload is one pack of `rows`, shared by all ranks: our strategies against each other. `chats` are the lengths
of the recipes' chats (of at most `rows` tokens) with random tokens, as many packs of `rows` as ranks: shared by all,
one after the other or at once, against one on each rank, or a padded batch of 8; other chats in every turn.
"""

from __future__ import annotations

import argparse
import contextlib
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
from torch.nn.parallel import DistributedDataParallel
from ways import HEADS, KV_HEADS, Way, build, chat_ways, shared_ways, targets

import sap_hf
from sap_hf.models.patch import find_patch
from sap_hf.planning.cost import critical_rows
from sap_hf.planning.workloads import WORKLOADS

BUCKET_BYTES = 25 << 20


@dataclasses.dataclass
class Spent:
    """Seconds of one way's steps, turn by turn, and what came of them.

    Attributes:
        averaged: with the average of gradients beside the backward.
        alone: without any average.
        gradients: how far those of the first turn, averaged, are from those of the first way with the same tokens:
            the norm of the difference over theirs.
    """

    averaged: list[float] = dataclasses.field(default_factory=list)
    alone: list[float] = dataclasses.field(default_factory=list)
    loss: list[float] = dataclasses.field(default_factory=list)
    gradients: float = 0.0
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
    if cuda:
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    model = build(options.layers, options.rows).to(device, torch.bfloat16 if cuda else torch.float32)
    replica = DistributedDataParallel(
        model, device_ids=[device.index] if cuda else None, gradient_as_bucket_view=True
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    averaging_seconds = average_alone(model)
    peers = {mode: Ringmaster(mode, HEADS, KV_HEADS, device) for mode in MODES} if options.ringmaster else {}
    for workload in options.workload:
        make = chat_ways if workload == "chats" else shared_ways
        ways = make(workload, options, device, peers)
        spent = measure(replica, optimizer, ways, options.turns)
        if dist.get_rank() == 0:
            report(workload, options, model, ways, spent, averaging_seconds)
    dist.barrier()
    dist.destroy_process_group()


def measure(
    replica: DistributedDataParallel, optimizer: torch.optim.Optimizer, ways: dict[str, Way], turns: int
) -> dict[str, Spent]:
    """Steps of all ways in turn, each with the average of gradients and without."""
    spent = {name: Spent() for name in ways}
    # Memory grows in the first step of full size, which is nobody's.
    step(replica, optimizer, next(iter(ways.values())), 1)
    truth: dict[str, torch.Tensor] = {}
    for turn in range(turns + 1):
        for name, way in ways.items():
            mine = spent[name]
            averaged, loss, mine.plan = step(replica, optimizer, way, turn)
            if turn == 1:
                gradients = flat(replica.module)
                first = truth.setdefault(way.data, gradients)
                mine.gradients = float((gradients - first).norm() / first.norm())
            alone, *_ = step(replica, optimizer, way, turn, averages=False)
            if turn:
                mine.averaged.append(averaged)
                mine.alone.append(alone)
                mine.loss.append(loss)
        truth.clear()
    return spent


def step(
    replica: DistributedDataParallel,
    optimizer: torch.optim.Optimizer,
    way: Way,
    turn: int,
    averages: bool = True,
) -> tuple[float, float, sap_hf.Plan | None]:
    """One step of a way: its seconds, its loss over all ranks, and its last plan. It leaves its gradients."""
    optimizer.zero_grad()
    batches = way.batches[turn]
    counts, found = [targets(batch) for batch in batches], []
    # Where ranks share a batch, each of them counts it, and its loss.
    everyone = torch.tensor(float(sum(counts)), device=replica.module.device)
    dist.all_reduce(everyone)
    shares = [count / float(everyone) for count in counts]
    with way.setup(replica.module):
        started = clock()
        for at, (batch, share) in enumerate(zip(batches, shares)):
            # As in gradient accumulation, the last batch's backward averages what all have added up to.
            syncs = averages and at == len(batches) - 1
            with contextlib.nullcontext() if syncs else replica.no_sync():
                loss = share * replica(**batch).loss
                (loss * dist.get_world_size()).backward()
            found.append(loss.detach())
        optimizer.step()
        seconds = clock() - started
        patch = find_patch(replica.module)
        plan = patch.sharding.last_plan if patch else None
    loss = torch.stack(found).sum()
    dist.all_reduce(loss)
    return seconds, float(loss), plan


def clock() -> float:
    """Seconds, when the slowest rank has come."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter()


def average_alone(model: torch.nn.Module) -> float:
    """Seconds of the average of all gradients with nothing beside it; there are none afterwards."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    started = clock()
    average(model)
    seconds = clock() - started
    for parameter in model.parameters():
        parameter.grad = None
    return seconds


def average(model: torch.nn.Module) -> None:
    """Gradients averaged over all ranks in buckets of DDP's size, after the backward."""
    buckets: list[list[torch.Tensor]] = [[]]
    for parameter in reversed(list(model.parameters())):
        if buckets[-1] and sum(gradient.nbytes for gradient in buckets[-1]) + parameter.nbytes > BUCKET_BYTES:
            buckets.append([])
        assert parameter.grad is not None
        buckets[-1].append(parameter.grad)
    for bucket in buckets:
        joined = torch.cat([gradient.reshape(-1) for gradient in bucket])
        dist.all_reduce(joined)
        joined /= dist.get_world_size()
        for gradient, part in zip(bucket, joined.split([gradient.numel() for gradient in bucket])):
            gradient.copy_(part.view_as(gradient))


def flat(model: torch.nn.Module) -> torch.Tensor:
    """A copy of all gradients, float32, one after the other."""
    return torch.cat([parameter.grad.float().reshape(-1) for parameter in model.parameters()])


def report(
    workload: str,
    options: argparse.Namespace,
    model: torch.nn.Module,
    ways: dict[str, Way],
    spent: dict[str, Spent],
    averaging_seconds: float,
) -> None:
    """Print the table and write it with where it came from."""
    world = dist.get_world_size()
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
    tokens_per_s, without = (dict.fromkeys(spent, 0.0) for _ in range(2))
    for name, each in spent.items():
        total = sum(ways[name].tokens[1:])
        tokens_per_s[name] = total / sum(each.averaged)
        without[name] = total / sum(each.alone)
        moved = ""
        if each.plan is not None and each.plan.all_gather_rows:
            moved = f"  rows moved {each.plan.rows_moved.sum() / each.plan.all_gather_rows:6.1%}"
        print(
            f"  {name:<32} step {statistics.median(each.averaged):8.3f} s  {tokens_per_s[name]:8.1f} tokens/s  "
            f"without averaging {statistics.median(each.alone):8.3f} s  {without[name]:8.1f} tokens/s{moved}"
        )
    print(f"  averaging gradients alone {averaging_seconds:.3f} s")
    apart, bent = largest_difference(ways, spent), max(each.gradients for each in spent.values())
    print(
        f"  on the same tokens losses differ by at most {apart:.1e}, averaged gradients by {bent:.1e} of their norm"
    )
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
            "step_seconds": {name: each.averaged for name, each in spent.items()},
            "step_seconds_without_averaging": {name: each.alone for name, each in spent.items()},
            "averaging_alone_seconds": averaging_seconds,
            "tokens": {name: way.tokens[1:] for name, way in ways.items()},
            "tokens_per_s": tokens_per_s,
            "tokens_per_s_without_averaging": without,
            "loss_difference": apart,
            "gradient_difference": bent,
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
