"""sap-hf bench: measure this machine."""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
from pathlib import Path
from typing import Any

from sap_hf.cli.plan import heads_option
from sap_hf.errors import ConfigError, LayoutError


def add(commands: Any) -> None:
    """Add this command and its options to the parser's."""
    bench = commands.add_parser("bench", help="measure this machine")
    bench.add_argument(
        "--calibrate",
        required=True,
        type=Path,
        metavar="FILE.yaml",
        help="write what plans need to know of this machine: SapConfig(hardware=FILE.yaml)",
    )
    bench.add_argument(
        "--heads",
        type=heads_option,
        default="32:8",
        metavar="H:K",
        help="query and kv heads of the layer (default 32:8)",
    )
    bench.add_argument("--head-dim", type=int, default=128, help="their width (default 128)")
    bench.set_defaults(run=_calibrate)


def _calibrate(options: argparse.Namespace) -> None:
    """Under a launcher: all ranks measure, rank 0 writes the file."""
    path: Path = options.calibrate
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(
            f"--calibrate {path}: the name must end in .yaml, which is how hardware= knows a file."
        )
    if "RANK" not in os.environ:
        raise LayoutError(
            "Calibration needs the ranks that will train.\n"
            f"  Start it with: torchrun --nproc-per-node N -m sap_hf.cli bench --calibrate {path}"
        )
    # torch only here: the other commands start without it.
    import torch
    import torch.distributed as dist
    import yaml

    from sap_hf.planning.cost import Shape
    from sap_hf.runtime.calibrate import calibrate

    query, kv = options.heads
    if not kv or query % kv:
        raise LayoutError(f"--heads {query}:{kv}: the query heads must be a multiple of the kv heads.")
    shape = Shape(query, kv, options.head_dim)
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        hardware = calibrate(path.stem, shape, device)
        if dist.get_rank() == 0:
            what = torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine()
            header = (
                f"# Measured by sap-hf bench --calibrate on {dist.get_world_size()} ranks ({what}), torch "
                f"{torch.__version__}, {shape.num_heads}:{shape.num_kv_heads} heads of {shape.head_dim}.\n"
            )
            text = header + yaml.safe_dump(dataclasses.asdict(hardware), sort_keys=False)
            path.write_text(text)
            print(text, end="", flush=True)
        dist.barrier()
    finally:
        dist.destroy_process_group()
