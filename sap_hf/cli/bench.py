"""sap-hf bench: measure this machine, or training steps on it."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sap_hf.cli.plan import heads_option
from sap_hf.config import STRATEGIES, SapConfig, check_choice
from sap_hf.errors import ConfigError, LayoutError, SapError
from sap_hf.planning.cost import Shape
from sap_hf.planning.render import method, per_critical
from sap_hf.planning.workloads import WORKLOADS, pack

if TYPE_CHECKING:
    import torch


def add(commands: Any) -> None:
    """Add this command and its options to the parser's."""
    bench = commands.add_parser("bench", help="measure this machine, or training steps on it")
    bench.add_argument(
        "--calibrate",
        type=Path,
        metavar="FILE.yaml",
        help="write what plans need to know of this machine: SapConfig(hardware=FILE.yaml)",
    )
    _add_layer(bench, "32:8", 128)
    bench.set_defaults(run=_calibrate)
    step = bench.add_subparsers(metavar="step").add_parser(
        "step", help="train a small Llama a few steps by each strategy, and print what they took"
    )
    step.add_argument(
        "--strategies",
        type=lambda text: text.split(","),
        default=list(STRATEGIES),
        metavar="A,B",
        help=f"of {', '.join(STRATEGIES)} (default all)",
    )
    step.add_argument("--workload", default="magi", metavar="NAME", help=" | ".join(WORKLOADS))
    step.add_argument("--rows", type=int, default=2048, help="of each pack (default 2048)")
    step.add_argument("--steps", type=int, default=4, help="packs to train on, after one more (default 4)")
    step.add_argument("--layers", type=int, default=2, help="of the model (default 2)")
    _add_layer(step, "8:4", 64)
    step.add_argument("--hardware", default="auto", help="what is planned for, as in SapConfig")
    step.set_defaults(run=_steps)


def _add_layer(parser: Any, heads: str, head_dim: int) -> None:
    parser.add_argument(
        "--heads",
        type=heads_option,
        default=heads,
        metavar="H:K",
        help=f"query and kv heads of the layer (default {heads})",
    )
    parser.add_argument("--head-dim", type=int, default=head_dim, help=f"their width (default {head_dim})")


def _calibrate(options: argparse.Namespace) -> None:
    """Under a launcher: all ranks measure, rank 0 writes the file."""
    path: Path | None = options.calibrate
    if path is None:
        raise ConfigError("Say what to measure: sap-hf bench --calibrate FILE.yaml, or sap-hf bench step.")
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(
            f"--calibrate {path}: the name must end in .yaml, which is how hardware= knows a file."
        )
    shape = _shape(options)
    with _ranks(f"--calibrate {path}") as device:
        import torch
        import torch.distributed as dist
        import yaml

        from sap_hf.runtime.calibrate import calibrate

        hardware = calibrate(path.stem, shape, device)
        if dist.get_rank() == 0:
            header = (
                f"# Measured by sap-hf bench --calibrate on {dist.get_world_size()} ranks ({_machine(device)}), torch "
                f"{torch.__version__}, {shape.num_heads}:{shape.num_kv_heads} heads of {shape.head_dim}.\n"
            )
            text = header + yaml.safe_dump(dataclasses.asdict(hardware), sort_keys=False)
            path.write_text(text)
            print(text, end="", flush=True)


def _steps(options: argparse.Namespace) -> None:
    """Under a launcher: all ranks train, rank 0 prints a line for each strategy."""
    shape = _shape(options)
    for name in options.strategies:
        check_choice("--strategies", name, STRATEGIES)
    for name in ("rows", "steps", "layers"):
        if getattr(options, name) < 1:
            raise ConfigError(f"--{name} {getattr(options, name)}: at least 1 is needed.")
    packs = [
        pack(options.workload, options.rows, np.random.default_rng(seed)) for seed in range(options.steps + 1)
    ]
    with _ranks("step") as device:
        import torch.distributed as dist

        from sap_hf.hf.bench import train_llama

        def say(text: str) -> None:
            if dist.get_rank() == 0:
                print(text, flush=True)

        say(
            f"{dist.get_world_size()} ranks ({_machine(device)}), {options.layers} layers with {shape.num_heads}:"
            f"{shape.num_kv_heads} heads of {shape.head_dim}, packs of {options.rows:,} rows ({options.workload}); "
            f"means over {options.steps} steps"
        )
        say(
            f"{'strategy':<12}{'last plan':<34}{'step ms':>9}{'wait ms':>9}{'MB in node':>12}{'MB between':>12}"
            f"{'imbalance':>11}{'plan ms':>9}{'tokens/s':>10}"
        )
        plan = None
        for strategy in options.strategies:
            # Otherwise heads are exchanged where that is faster than what was named.
            size = "auto" if strategy in ("auto", "ulysses") else 1
            config = SapConfig(strategy=strategy, ulysses_size=size, hardware=options.hardware)
            try:
                plan, found = train_llama(packs, config, shape, options.layers, device)
            except SapError as error:
                say(f"{strategy:<12}{str(error).splitlines()[0]}")
                continue
            say(
                f"{strategy:<12}{method(plan) + ' ' + plan.layout:<34}{found['step_seconds'] * 1e3:>9.1f}"
                f"{found['sap/wait_seconds'] * 1e3:>9.1f}{found['sap/bytes_inside_node'] / 1e6:>12.2f}"
                f"{found['sap/bytes_between_nodes'] / 1e6:>12.2f}{found['sap/imbalance']:>11.2f}"
                f"{found['sap/plan_ms']:>9.1f}{options.rows / found['step_seconds']:>10,.0f}"
            )
        if plan is not None:
            say(f"planned for {plan.hardware.name}: {per_critical(plan)}")


def _shape(options: argparse.Namespace) -> Shape:
    """The attention layer that was asked for."""
    query, kv = options.heads
    if not kv or query % kv:
        raise LayoutError(f"--heads {query}:{kv}: the query heads must be a multiple of the kv heads.")
    return Shape(query, kv, options.head_dim)


@contextlib.contextmanager
def _ranks(arguments: str) -> Iterator[torch.device]:
    """This rank's device, once all ranks that a launcher started have met; they leave together."""
    if "RANK" not in os.environ:
        raise LayoutError(
            "This measures the ranks that will train.\n"
            f"  Start it with: torchrun --nproc-per-node N -m sap_hf.cli bench {arguments}"
        )
    # torch only here: the other commands start without it.
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        yield device
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _machine(device: torch.device) -> str:
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()
