"""Time one attention layer, forward and backward, for several plans of the same packs, in one run.

    torchrun --nproc-per-node 4 benchmarks/attention.py --rows 4096 --workload short --out result.json

Any launcher that sets RANK and WORLD_SIZE will do, an emulated cluster too. Every plan runs on the same data; after a
warm-up the plans take turns, so that a busy machine disturbs them alike, and the median is kept. On CPUs the backend
is gloo and the dtype float32; with CUDA, NCCL and bfloat16.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from peers import MODES, Ringmaster
from torch.nn.functional import pad

import sap_hf
from sap_hf.planning.cost import critical_rows
from sap_hf.planning.render import method
from sap_hf.planning.workloads import pack

# Strategy, layout, ranks that exchange heads. The last are what other tools do on packed rows, with our kernel: all K/V
# gathered (Llama 3), a zigzag ring (ring-flash-attn), heads exchanged (DeepSpeed-Ulysses), both (USP).
PLANS = (
    ("auto", "auto", "auto"),
    ("sap", "contiguous", 1),
    ("sap", "zigzag", 1),
    ("sap", "balanced", 1),
    ("sap", "balanced", 2),
    ("all_gather", "zigzag", 1),
    ("ring", "zigzag", 1),
    ("ulysses", "contiguous", "auto"),
    ("ring", "zigzag", 2),
)
PEERS = ("all_gather zigzag", "ring zigzag", "ulysses contiguous", "ring zigzag x ulysses 2")
HEADS, KV_HEADS, HEAD_DIM = 8, 4, 64
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
# The pack rows of this rank, and what attends to the pack.
Layer = tuple[np.ndarray, Attend]


def main() -> None:
    """Run all plans in turn and print a table; rank 0 writes JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--workload", default="short")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--note", default="", help="how the machine was set up, e.g. the emulated cluster's limits"
    )
    parser.add_argument(
        "--hardware", help="what auto plans for: a preset, or a file of sap-hf bench --calibrate"
    )
    parser.add_argument("--ringmaster", action="store_true", help="time axolotl-ringmaster too; see peers.py")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    cuda = torch.cuda.is_available()
    dist.init_process_group("nccl" if cuda else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if cuda else torch.device("cpu")
    torch.set_num_threads(1)
    lengths = pack(options.workload, options.rows, np.random.default_rng(options.seed))
    plans = {
        f"{strategy} {layout}{f' x ulysses {size}' if size == 2 else ''}": sap_hf.plan(
            lengths,
            cp_size=world,
            strategy=strategy,
            layout=layout,
            ulysses_size=size,
            num_heads=HEADS,
            num_kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            bytes_per_element=2 if cuda else 4,
            hardware=options.hardware or ("h100" if cuda else "cpu"),
        )
        for strategy, layout, size in PLANS
        if size != 2 or world % 2 == 0
    }
    # What exchanges heads in turns, in one as well.
    plans |= {f"{name}, one turn": plan.in_turns(1) for name, plan in plans.items() if plan.turns > 1}
    dtype = torch.bfloat16 if cuda else torch.float32
    layers: dict[str, Layer] = {
        name: (plan.rows(rank), functools.partial(sap_hf.attention, plan=plan))
        for name, plan in plans.items()
    }
    if options.ringmaster:
        contiguous = np.arange(options.rows).reshape(world, -1)[rank]
        for mode in MODES:
            peer = Ringmaster(mode, HEADS, KV_HEADS, device)
            layers[mode] = (contiguous, functools.partial(peer.attend, lengths=lengths))
    seconds: dict[str, list[float]] = {name: [] for name in layers}
    for turn in range(options.turns + 1):
        for name, (rows, attend) in layers.items():
            spent = once(attend, len(rows), device, dtype)
            if turn:
                seconds[name].append(spent)
    checked = ("auto auto", *MODES) if options.ringmaster else ()
    errors = errors_of({name: layers[name] for name in checked}, lengths, device, dtype)
    if rank == 0:
        report(
            options,
            lengths,
            plans,
            {name: statistics.median(values) for name, values in seconds.items()},
            errors,
            world,
        )
    dist.barrier()
    dist.destroy_process_group()


def once(attend: Attend, rows: int, device: torch.device, dtype: torch.dtype) -> float:
    """Seconds of one forward and backward, until the slowest rank is done."""
    q, k, v = (
        torch.randn(rows, heads, HEAD_DIM, device=device, dtype=dtype, requires_grad=True)
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    )
    dist.barrier()
    started = time.perf_counter()
    attend(q, k, v).sum().backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter() - started


def errors_of(
    layers: dict[str, Layer], lengths: np.ndarray, device: torch.device, dtype: torch.dtype
) -> dict[str, dict[str, float]]:
    """Largest error of out, and of dq, dk and dv, on any rank: against every document alone, in float64."""
    if not layers:
        return {}
    generator = torch.Generator().manual_seed(0)
    shapes = [(int(lengths.sum()), heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)]
    q, k, v, dout = (torch.randn(shape, generator=generator).to(device, dtype) for shape in shapes)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    out = torch.cat([alone(*parts) for parts in zip(*(x.split(lengths.tolist()) for x in exact))])
    truth = [out.detach(), *torch.autograd.grad(out, exact, dout.double())]
    errors = {}
    for name, (rows, attend) in layers.items():
        mine = torch.from_numpy(rows[rows < len(q)]).to(device)
        padding = len(rows) - len(mine)
        leaves = [pad(x[mine], (0, 0, 0, 0, 0, padding)).requires_grad_() for x in (q, k, v)]
        found = attend(*leaves)
        gradients = torch.autograd.grad(found, leaves, pad(dout[mine], (0, 0, 0, 0, 0, padding)))
        apart = [
            (part[: len(mine)].double() - whole[mine]).abs().max()
            for part, whole in zip((found, *gradients), truth)
        ]
        worst = torch.stack([apart[0], torch.stack(apart[1:]).max()]).detach()
        dist.all_reduce(worst, op=dist.ReduceOp.MAX)
        errors[name] = dict(zip(("out", "gradient"), worst.tolist()))
    return errors


def alone(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Causal attention of one document, (t, H, D)."""
    parts = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)
    return out[0].transpose(0, 1)


def report(
    options: argparse.Namespace, lengths: np.ndarray, plans: dict, seconds: dict, errors: dict, world: int
) -> None:
    """Print the table and write it with where it came from."""
    fastest = min(seconds.values())
    hardware = plans["auto auto"].hardware.name
    auto = plans["auto auto"]
    critical = critical_rows(auto.shape, auto.hardware, inside_node=auto.hardware.ranks_per_node >= world)
    print(
        f"{options.workload}: {len(lengths)} documents, {options.rows} rows, {world} ranks, planned for {hardware}: "
        f"C/c* = {auto.rows_per_rank}/{critical} = {auto.rows_per_rank / critical:.2g}"
    )
    for name, plan in plans.items():
        share = plan.rows_moved.sum() / plan.all_gather_rows
        print(
            f"  {name:<25} {seconds[name] * 1e3:8.1f} ms  {seconds[name] / fastest:5.2f} x fastest  "
            f"modelled {plan.seconds * 1e3:8.1f} ms  rows moved {share:6.1%}  imbalance {plan.imbalance:.2f}  "
            f"{method(plan)} {plan.layout} {'+'.join(plan.deliveries)}"
        )
    for name in (name for name in seconds if name not in plans):
        print(
            f"  {name:<25} {seconds[name] * 1e3:8.1f} ms  {seconds[name] / fastest:5.2f} x fastest, "
            f"{seconds[name] / seconds['auto auto']:.2f} x auto"
        )
    for name, error in errors.items():
        print(
            f"  {name:<25} off by {error['out']:.1e} in out, {error['gradient']:.1e} in gradients "
            "from each document alone"
        )
    right, wrong = order(plans, seconds)
    print(
        f"  the model orders {right} of {right + wrong} pairs of plans as measured (those that differ by over 10 %)"
    )
    best = min((name for name in PEERS if name in seconds), key=seconds.__getitem__)
    print(f"  auto is {seconds[best] / seconds['auto auto']:.2f} x as fast as the best of the others, {best}")
    if options.out:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        ).stdout.strip()
        record = {
            "machine": f"{platform.processor() or platform.machine()}, torch {torch.__version__}",
            "note": options.note,
            "commit": commit,
            "command": " ".join(sys.argv),
            "workload": options.workload,
            "rows": options.rows,
            "ranks": world,
            "seconds": seconds,
            "modelled_seconds": {name: plan.seconds for name, plan in plans.items()},
            "rows_per_critical": auto.rows_per_rank / critical,
            "hardware": dataclasses.asdict(plans["auto auto"].hardware),
            "share_of_all_gather": {
                n: float(p.rows_moved.sum() / p.all_gather_rows) for n, p in plans.items()
            },
            "errors": errors,
        }
        with options.out.open("a") as file:
            file.write(json.dumps(record) + "\n")


def order(plans: dict, seconds: dict) -> tuple[int, int]:
    """Pairs of plans whose measured times differ by over 10 %: modelled in the same order, and not."""
    agree = [
        (plans[a].seconds < plans[b].seconds) == (seconds[a] < seconds[b])
        for a, b in itertools.combinations(plans, 2)
        if abs(seconds[a] - seconds[b]) > 0.1 * min(seconds[a], seconds[b])
    ]
    return sum(agree), len(agree) - sum(agree)


if __name__ == "__main__":
    main()
