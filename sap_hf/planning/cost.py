"""Cost: what a schedule takes on a given machine, by a plain alpha-beta model.

(Schedule, Shape, Hardware) -> seconds per rank. Good enough to choose between layouts; it is not a forecast.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from sap_hf.errors import ConfigError
from sap_hf.planning.documents import Int64
from sap_hf.planning.schedule import DESTINATION, RANK, SOURCE, START, STOP, Schedule, tile_pairs


@dataclasses.dataclass(frozen=True)
class Shape:
    """What one attention layer looks like: heads, width and bytes of an element on the wire."""

    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    bytes_per_element: int = 2

    @property
    def flops_per_pair(self) -> int:
        """Floating-point operations of one query-key pair over all heads: QK^T and PV, 2 flops each."""
        return 4 * self.num_heads * self.head_dim

    @property
    def bytes_per_row(self) -> int:
        """Bytes of K and V of one row."""
        return 2 * self.num_kv_heads * self.head_dim * self.bytes_per_element


@dataclasses.dataclass(frozen=True)
class Hardware:
    """A machine in seven numbers: what a rank computes and what it can send and receive at once."""

    name: str
    flops_per_s: float
    node_bytes_per_s: float
    """Per rank and direction, to ranks of the same node."""
    network_bytes_per_s: float
    """Per rank and direction, to ranks of other nodes."""
    message_seconds: float
    """Fixed cost of one message."""
    step_seconds: float
    """Fixed cost of starting a group of messages."""
    ranks_per_node: int


PRESETS = {
    # 400 of 989 dense bf16 TFLOP/s reached by flash attention; NVLink 4 and one 400 Gbit/s NIC per GPU, less overhead.
    "h100": Hardware("h100", 4e14, 3e11, 4e10, 3e-6, 2e-5, 8),
    "a100": Hardware("a100", 1.8e14, 2e11, 2e10, 3e-6, 2e-5, 8),
    # gloo over loopback between single-core processes.
    "cpu": Hardware("cpu", 3e10, 1e9, 1e8, 1e-4, 2e-4, 64),
}


def find_hardware(hardware: Hardware | str | None) -> Hardware:
    """The preset of that name; None is h100.

    Raises:
        ConfigError: no such preset.
    """
    if isinstance(hardware, Hardware):
        return hardware
    name = hardware or "h100"
    if name not in PRESETS:
        raise ConfigError(f"hardware={name!r} is not one of {', '.join(PRESETS)}.")
    return PRESETS[name]


def seconds(schedule: Schedule, cp_size: int, shape: Shape, hardware: Hardware) -> NDArray[np.float64]:
    """(W,) modelled seconds of one layer's forward on each rank: remote rows travel while local tiles run."""
    total = np.zeros(cp_size)
    hidden = np.zeros(cp_size)
    for step in schedule.steps:
        work = np.zeros(cp_size)
        np.add.at(work, step.tiles[:, RANK], tile_pairs(step.tiles, schedule.window))
        busy = work * shape.flops_per_pair / hardware.flops_per_s
        exposed = np.maximum(0.0, wire_seconds(step.transfers, cp_size, shape, hardware) - hidden)
        total += exposed + busy
        hidden = busy
    return total


def wire_seconds(transfers: Int64, cp_size: int, shape: Shape, hardware: Hardware) -> NDArray[np.float64]:
    """(W,) seconds until each rank has sent and received its part of `transfers`."""
    if not len(transfers):
        return np.zeros(cp_size)
    source, destination = transfers[:, SOURCE], transfers[:, DESTINATION]
    amount = (transfers[:, STOP] - transfers[:, START]) * shape.bytes_per_row
    inside = source // hardware.ranks_per_node == destination // hardware.ranks_per_node
    cost = amount / np.where(inside, hardware.node_bytes_per_s, hardware.network_bytes_per_s)
    cost += hardware.message_seconds
    received, sent = np.zeros(cp_size), np.zeros(cp_size)
    np.add.at(received, destination, cost)
    np.add.at(sent, source, cost)
    wire: NDArray[np.float64] = np.maximum(received, sent)
    return wire + hardware.step_seconds * (wire > 0)


def peak_bytes(schedule: Schedule, cp_size: int, rows_per_rank: int, shape: Shape) -> int:
    """Bytes that the busiest rank's attention holds beside q, k, v and out, at its peak (in the backward).

    K/V buffer in the wire's type, its gradient and dq in float32, and what comes home from the readers.
    """
    moved = schedule.rows_moved(cp_size)
    buffer = rows_per_rank + moved.sum(axis=0)
    width = 2 * shape.num_kv_heads * shape.head_dim
    wire = shape.bytes_per_element
    queries = rows_per_rank * shape.num_heads * shape.head_dim * 4
    held = buffer * width * (wire + 4) + (moved.sum(axis=0) + moved.sum(axis=1)) * width * wire + queries
    return int(held.max())
