"""Fit: the machine's constants, so that the peers take what MagiAttention's chart says on 8 and 16 GPUs.

Chart -> Machine. A pattern search over few constants, the same for all tools; 32 and 64 GPUs are never looked at, and
so show how far the model carries.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sap_hf.planning.cost import BACKWARD_FLOPS, Shape
from sap_hf.planning.documents import Documents
from sap_hf.planning.hardware import PRESETS, Hardware
from sap_hf.simulation import chart
from sap_hf.simulation.hybrid import hybrid_dcp
from sap_hf.simulation.peers import magi_a2av, magi_native, ring_allgather, ulysses
from sap_hf.simulation.rings import loongtrain, ring_p2p, usp
from sap_hf.simulation.timing import Machine, Timed

# What the fit sees, and what it does not.
SEEN = (8, 16)
HELD_OUT = (32, 64)

TOOLS: dict[str, Callable[[Documents, int, Shape, int], Timed]] = {
    "ulysses": ulysses,
    "ring_p2p": ring_p2p,
    "ring_allgather": ring_allgather,
    "usp": usp,
    "loongtrain": loongtrain,
    "hybrid_dcp": hybrid_dcp,
    "magi_a2av": magi_a2av,
    "magi_native": magi_native,
}

# {constant: (where the search begins, least, most)}: the most is what the chip, or its links, have.
BOUNDS = {
    "flops_per_s": (6e14, 4e14, 7.4e14),
    "backward_flops_per_s": (5e14, 3e14, 6e14),
    "node_bytes_per_s": (3e11, 1e11, 3.8e11),
    "network_bytes_per_s": (4e10, 1e10, 5e10),
    "ring_seconds": (1e-4, 1e-6, 1e-3),
    "eager_bytes_per_s": (1e12, 2e11, 3.35e12),
    "tile_keys": (30.0, 1.0, 256.0),
    "tile_rows": (30.0, 1.0, 256.0),
    "block_seconds": (1e-9, 1e-10, 1e-8),
    "contention": (0.15, 0.01, 0.5),
    "group_cast_bytes_per_s": (2e10, 5e9, 5e10),
}
# The first steps of the search change a constant by this part; it ends when steps are smaller than the last.
STEP, LAST_STEP = 0.2, 0.005

# What `fit` found; `sap-hf simulate --fit` searches again.
FITTED = {
    "flops_per_s": 7.4e14,
    "backward_flops_per_s": 6e14,
    "node_bytes_per_s": 3.753e11,
    "network_bytes_per_s": 3.704e10,
    "ring_seconds": 4.156e-4,
    "eager_bytes_per_s": 1.841e12,
    "tile_keys": 256.0,
    "tile_rows": 204.8,
    "block_seconds": 4.988e-9,
    "contention": 0.2349,
    "group_cast_bytes_per_s": 1.779e10,
}

Workload = dict[str, dict[int, list[tuple[float, Timed]]]]


def workload(ranks: Sequence[int]) -> Workload:
    """{tool: {ranks: [(useful flops per rank, what is timed) of each pack]}} for the chart's packs."""
    shape = chart.SHAPE
    return {
        name: {
            w: [
                (documents.pairs() * shape.flops_per_pair / w, tool(documents, w, shape, chart.PER_NODE))
                for documents in chart.packs(w)
            ]
            for w in ranks
        }
        for name, tool in TOOLS.items()
    }


def modelled(timed: Sequence[tuple[float, Timed]], machine: Machine) -> tuple[float, float]:
    """TFLOP/s per GPU, forward and backward: of the slowest rank, and the mean over packs, as in the chart."""
    rates = []
    for flops, what in timed:
        forward, backward = what.seconds(machine)
        rates.append((flops / forward.max(), flops * BACKWARD_FLOPS / backward.max()))
    forward_rate, backward_rate = np.mean(rates, axis=0) / 1e12
    return float(forward_rate), float(backward_rate)


def machine_of(constants: dict[str, float]) -> Machine:
    """The constants as a Machine; those that the chart says nothing about are the h100 preset's."""
    fields = {field.name for field in dataclasses.fields(Hardware)}
    links: dict[str, Any] = {name: value for name, value in constants.items() if name in fields}
    rest = {name: value for name, value in constants.items() if name not in fields}
    # A network card for each GPU.
    links["network_alone_bytes_per_s"] = links["network_bytes_per_s"]
    return Machine(dataclasses.replace(PRESETS["h100"], name="h100-chart", **links), **rest)


def error(constants: dict[str, float], seen: Workload) -> float:
    """Mean square of log(modelled / published) over the tools, ranks and directions of `seen`."""
    machine = machine_of(constants)
    logs = []
    for name, by_ranks in seen.items():
        for ranks, timed in by_ranks.items():
            for way, rate in enumerate(modelled(timed, machine)):
                logs.append(np.log(rate / chart.PUBLISHED[name][way][chart.RANKS.index(ranks)]))
    return float(np.mean(np.square(logs)))


def fit(seen: Workload | None = None) -> dict[str, float]:
    """Search one constant after the other, each by a factor up or down, with ever smaller factors.

    Args:
        seen: None is the chart at SEEN.
    """
    if seen is None:
        seen = workload(SEEN)
    constants = {name: start for name, (start, _, _) in BOUNDS.items()}
    best, step = error(constants, seen), STEP
    while step >= LAST_STEP:
        before = best
        for name, (_, least, most) in BOUNDS.items():
            for factor in (1 + step, 1 / (1 + step)):
                tried = {**constants, name: min(max(constants[name] * factor, least), most)}
                found = error(tried, seen)
                if found < best:
                    constants, best = tried, found
                    break
        if before - best < best / 1000:
            step /= 2
    return {name: float(f"{value:.4g}") for name, value in constants.items()}
