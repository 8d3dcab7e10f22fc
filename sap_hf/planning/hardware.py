"""Hardware: a machine in fourteen numbers, by name, or from a file that `sap-hf bench --calibrate` wrote."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from sap_hf.errors import ConfigError

# What may be 0, and ends below this.
BELOW = {"contention": 1, "tile_keys": 65_536, "tile_rows": 65_536}


@dataclasses.dataclass(frozen=True)
class Hardware:
    """What a rank computes, copies, sends and receives in a second, and what it costs to begin."""

    name: str
    flops_per_s: float
    """Attention kernel, forward."""
    backward_flops_per_s: float
    """Attention kernel, backward."""
    copy_bytes_per_s: float
    """Memory read plus memory written."""
    call_seconds: float
    """Starting one kernel call."""
    tile_keys: float
    """Keys that a query row costs beyond those it reads: a tile of queries begins, ends, and is computed whole."""
    tile_rows: float
    """Query rows that a key costs beyond those that read it: the same of a backward's tile of keys."""
    node_bytes_per_s: float
    """Per rank and direction, to ranks of the same node."""
    network_bytes_per_s: float
    """Per rank and direction, to ranks of other nodes, while all ranks of the node send."""
    network_alone_bytes_per_s: float
    """The same for a rank that sends alone: more, where ranks share a network card."""
    message_seconds: float
    """Fixed cost of one message."""
    step_seconds: float
    """Fixed cost of starting a group of messages."""
    blocking_seconds: float
    """Fixed cost of an exchange between two kernels, which both wait for: ranks that come late included."""
    contention: float
    """Part of its speed that a kernel loses while an exchange is under way: NCCL computes on the same chip."""
    ranks_per_node: int

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self)[1:]:
            value = getattr(self, field.name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if field.name in BELOW:
                if not number or not 0 <= value < BELOW[field.name]:
                    raise ConfigError(
                        f"hardware {self.name}: {field.name}={value!r} must be a number from 0, and below "
                        f"{BELOW[field.name]:g}."
                    )
            elif not number or not value > 0:
                raise ConfigError(
                    f"hardware {self.name}: {field.name}={value!r} must be a number greater than 0."
                )


PRESETS = {
    hardware.name: hardware
    for hardware in (
        # NCCL's part of the chip is what explains MagiAttention's published figures best (`sap-hf simulate --fit`).
        # 400 of 989 dense bf16 TFLOP/s reached by flash attention; NVLink 4 and one 400 Gbit/s NIC per GPU, less
        # overhead. Flash attention's tiles have 128 rows on a side: of a causal one half is computed in vain, and it
        # takes about as long to begin and to end.
        Hardware("h100", 4e14, 3.5e14, 2.5e12, 6e-6, 128, 128, 3e11, 4e10, 4e10, 3e-6, 2e-5, 2e-5, 0.2, 8),
        # 312 dense TFLOP/s; NVLink 3 and one 200 Gbit/s NIC per GPU.
        Hardware("a100", 1.8e14, 1.6e14, 1.5e12, 6e-6, 128, 128, 2e11, 2e10, 2e10, 3e-6, 2e-5, 2e-5, 0.2, 8),
        # A box of PCIe 4.0 x16 cards without NVLink (L40S, A6000), one 100 Gbit/s NIC for all eight.
        Hardware(
            "pcie", 1.5e14, 1.2e14, 7e11, 6e-6, 128, 128, 1.6e10, 1.5e9, 1.2e10, 1e-5, 3e-5, 3e-5, 0.2, 8
        ),
        # gloo over loopback between single-core processes.
        Hardware("cpu", 3e10, 2e10, 5e9, 3e-5, 64, 64, 1e9, 1e8, 1e9, 1e-4, 2e-4, 2e-4, 0.2, 64),
    )
}


def find_hardware(hardware: Hardware | str | None) -> Hardware:
    """The preset of that name, or the numbers in that YAML file (its keys are the fields); None is h100.

    Raises:
        ConfigError: neither a preset nor a file, or a file without exactly the fields of Hardware.
    """
    if isinstance(hardware, Hardware):
        return hardware
    name = hardware or "h100"
    if name in PRESETS:
        return PRESETS[name]
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"hardware={name!r} is not one of {', '.join(PRESETS)}, nor a YAML file.")
    if not path.is_file():
        raise ConfigError(f"hardware={name!r}: no such file. `sap-hf bench --calibrate {name}` writes one.")
    import yaml

    values: Any = yaml.safe_load(path.read_text())
    fields = {field.name for field in dataclasses.fields(Hardware)}
    if not isinstance(values, dict) or set(values) != fields:
        found = sorted(values) if isinstance(values, dict) else type(values).__name__
        raise ConfigError(
            f"hardware={name!r}: the keys {', '.join(sorted(fields))} are needed, found {found}."
        )
    return Hardware(**values)
