"""Count the bytes that tensors hold in a training step of a small Llama, several strategies on the same pack.

    torchrun --nproc-per-node 4 benchmarks/memory.py --out result.json

Ranks hold equally many rows, whatever their number. Every storage that an operator makes is counted from its making to
its end, so nothing depends on an allocator or on the machine: one attention layer, beside what its plan says; then
one step, forward and backward, layer by layer, with what the exchanges of rows have allocated (the arena). Parameters
and their gradients are there before and are not counted. Every figure is of the rank on which it is largest. On CPUs:
gloo and float32.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from transformers import LlamaForCausalLM
from ways import HEAD_DIM, HEADS, KV_HEADS, build, packed

import sap_hf
from sap_hf.kernels.sdpa import Sdpa
from sap_hf.models.patch import find_patch, unpatch_model
from sap_hf.planning import compile_program
from sap_hf.planning.workloads import WORKLOADS, pack
from sap_hf.runtime import transport
from sap_hf.runtime.arena import arena, free
from sap_hf.runtime.device_program import load

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.runtime.memory import CopyingTransport, LiveBytes

MIB = 1 << 20


@dataclasses.dataclass(frozen=True)
class Held:
    """Bytes of one way, each on the rank where they are most.

    Attributes:
        plan: how the pack is shared.
        planned: Plan.peak_bytes.
        layer: one attention layer beside q, k, v, out and dout, without what the kernel allocates for itself.
        with_kernel: and with it.
        remote_rows: of other ranks, that the plan has room for.
        arena: after each layer of the step's forward, in its order, then of the backward.
        layers: most that is alive in each layer, in the same order.
        head: most that is alive while logits and loss are computed, there and back.
        step: most of all.
    """

    plan: str
    planned: int
    layer: int
    with_kernel: int
    remote_rows: int
    arena: list[int]
    layers: list[int]
    head: int
    step: int


def main() -> None:
    """Run all ways and print a table; rank 0 writes JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=2048, help="of each rank")
    parser.add_argument("--workload", default="magi", choices=WORKLOADS)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--budget", type=int, default=512, help="max_remote_rows, where a way has one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hardware", default="cpu", help="what auto plans for")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    rows, rng = options.rows * dist.get_world_size(), np.random.default_rng(options.seed)
    batch = packed(pack(options.workload, rows, rng), rng, torch.device("cpu"))
    model = build(options.layers, rows)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    held = {}
    for name, way in ways(options.budget).items():
        with sharing(model, hardware=options.hardware, **way):
            held[name] = measure(model, batch)
    if dist.get_rank() == 0:
        report(options, model, held)
    dist.barrier()
    dist.destroy_process_group()


def ways(budget: int) -> dict[str, dict[str, Any]]:
    """Options of ours."""
    return {
        "auto": {},
        f"auto, {budget} remote rows": {"max_remote_rows": budget},
        f"sap, {budget} remote rows": {"strategy": "sap", "ulysses_size": 1, "max_remote_rows": budget},
        "sap contiguous": {"strategy": "sap", "layout": "contiguous", "ulysses_size": 1},
        "all_gather zigzag": {"strategy": "all_gather", "layout": "zigzag", "ulysses_size": 1},
        "ring zigzag": {"strategy": "ring", "layout": "zigzag", "ulysses_size": 1},
        "ulysses": {"strategy": "ulysses"},
    }


@contextlib.contextmanager
def sharing(model: LlamaForCausalLM, **options: Any) -> Iterator[None]:
    """The model patched, for the time of a `with`."""
    sap_hf.patch_model(model, **options)
    try:
        yield
    finally:
        unpatch_model(model)


def measure(model: LlamaForCausalLM, batch: dict[str, torch.Tensor]) -> Held:
    """One way, on all ranks; the model is patched for it."""
    free()
    peaks, arenas = step(model, batch)
    plan = find_patch(model).sharding.last_plan
    layers = len(model.model.layers)
    mine = [*one_layer(plan), max(peaks), peaks[layers + 1], *arenas]
    mine += [*peaks[1 : layers + 1], *peaks[layers + 2 : -1]]
    most = torch.tensor(mine)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    layer, with_kernel, whole, head, *rest = most.tolist()
    programs = [
        compile_program(plan, rank, window) for rank in range(plan.cp_size) for window in plan.windows
    ]
    return Held(
        plan=f"{plan.strategy} {plan.layout}" + f" x ulysses {plan.ulysses_size}" * (plan.ulysses_size > 1),
        planned=plan.peak_bytes,
        layer=layer,
        with_kernel=with_kernel,
        remote_rows=max(made.buffer_rows - len(made.kept.index) for made in programs),
        arena=rest[: 2 * layers],
        layers=rest[2 * layers :],
        head=head,
        step=whole,
    )


def step(model: LlamaForCausalLM, batch: dict[str, torch.Tensor]) -> tuple[list[int], list[int]]:
    """A forward and backward, cut where a layer ends.

    Returns:
        Most live bytes before the layers, in each layer's forward, in the head there and back, in each layer's backward
        (the last layer first), and behind them; and the arena's bytes after each layer's forward and backward.
    """
    peaks: list[int] = []
    arenas: list[int] = []
    stops = [*model.model.layers, model.model.norm]

    def cut(*_: Any) -> None:
        peaks.append(counted.peak)
        arenas.append(allocated())
        counted.peak = counted.live

    def before(_: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        cut()
        args[0].register_hook(cut)

    handles = [module.register_forward_pre_hook(before) for module in stops]
    with LiveBytes(*model.parameters(), *(parameter.grad for parameter in model.parameters())) as counted:
        model(**batch).loss.backward()
        peaks.append(counted.peak)
    for handle in handles:
        handle.remove()
    count = len(stops) - 1
    return peaks, arenas[1 : count + 1] + arenas[count + 2 :]


def one_layer(plan: sap_hf.Plan) -> list[int]:
    """Most bytes of one attention layer beside q, k, v, out and dout, once the arena is there.

    Returns:
        Without what the kernel allocates for itself, and with it.
    """
    shapes = [(plan.rows_per_rank, heads, HEAD_DIM) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    q, k, v = (torch.randn(shape, requires_grad=True) for shape in shapes)
    # They live as long as the plan, and serve all layers.
    loaded = load(plan, dist.get_rank(), None, q.device)
    indices = [index for index in loaded.packed if index is not None]
    found = []
    for own in (contextlib.nullcontext, without_kernel):
        free()
        # gloo's threads let go of a message some time after the wait for it: here they get copies.
        with transport.using(CopyingTransport()), LiveBytes(q, k, v, *indices) as counted, own(counted):
            # The first one makes the arena, the second one is counted.
            sap_hf.attention(q, k, v, plan).sum().backward()
            q.grad = k.grad = v.grad = None
            counted.peak = counted.live
            out = sap_hf.attention(q, k, v, plan)
            forward = counted.peak - out.nbytes
            dout = torch.ones_like(out)
            counted.peak = counted.live
            out.backward(dout)
        found.append(max(forward, counted.peak - out.nbytes - dout.nbytes))
        q.grad = k.grad = v.grad = None
    return found[::-1]


@contextlib.contextmanager
def without_kernel(counted: LiveBytes) -> Iterator[None]:
    """Of a kernel call, only what it is given and returns counts."""

    def passed_over(method: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            peak = counted.peak
            result = method(*args, **options)
            counted.peak = max(peak, counted.live)
            return result

        return call

    with mock.patch.multiple(Sdpa, forward=passed_over(Sdpa.forward), backward=passed_over(Sdpa.backward)):
        yield


def allocated() -> int:
    """The arena's bytes."""
    return arena(torch.empty(0), {}).bytes


def report(options: argparse.Namespace, model: LlamaForCausalLM, held: dict[str, Held]) -> None:
    """Print the table and write it with where it came from."""
    world = dist.get_world_size()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{options.workload}: {world} ranks, {options.rows} rows on each, {options.layers} layers, "
        f"{parameters / 1e6:.1f} M parameters ({2 * parameters * 4 / MIB:.0f} MiB with gradients); MiB"
    )
    for name, each in held.items():
        arenas = [sorted({f"{size / MIB:.2f}" for size in half}) for half in halves(each.arena)]
        forward, backward = (max(half) / MIB for half in halves(each.layers))
        print(
            f"  {name:<22} plan says {each.planned / MIB:6.2f}  one layer {each.layer / MIB:6.2f} "
            f"({each.with_kernel / MIB:6.2f} with the kernel)  "
            f"remote rows {each.remote_rows:6}  arena in forward {'/'.join(arenas[0])}, "
            f"in backward {'/'.join(arenas[1])}  step: layers {forward:6.1f}, back {backward:6.1f}, "
            f"head {each.head / MIB:6.1f}, most {each.step / MIB:6.1f}  ({each.plan})"
        )
    if options.out:
        commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True)
        record = {
            "machine": f"{platform.processor() or platform.machine()}, torch {torch.__version__}",
            "commit": commit.stdout.strip(),
            "command": shlex.join(sys.argv),
            "workload": options.workload,
            "rows_per_rank": options.rows,
            "ranks": world,
            "layers": options.layers,
            "parameters": parameters,
            "bytes": {name: dataclasses.asdict(each) for name, each in held.items()},
        }
        with options.out.open("a") as file:
            file.write(json.dumps(record) + "\n")


def halves(of_layers: list[int]) -> tuple[list[int], list[int]]:
    """Of the forward, and of the backward."""
    middle = len(of_layers) // 2
    return of_layers[:middle], of_layers[middle:]


if __name__ == "__main__":
    main()
