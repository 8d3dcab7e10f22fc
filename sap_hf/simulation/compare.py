"""Compare: the peers' policies and our own plans on the same packs, on the same machine.

(workload, ranks, Machine) -> seconds of each policy. Twice: as the tools are, with all that their PyTorch code copies
and ours does, and as bare policies, where such copies and a ring's fixed cost per step are free for everyone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from sap_hf.planning.cost import BACKWARD_FLOPS, Shape
from sap_hf.planning.documents import Documents
from sap_hf.planning.workloads import pack
from sap_hf.simulation.fit import TOOLS
from sap_hf.simulation.peers import contiguous_needed
from sap_hf.simulation.scheduled import planned
from sap_hf.simulation.timing import Machine, Timed
from sap_hf.strategies.auto import Request, make_plan

OURS = "sap_hf"
PEERS = {**TOOLS, "contiguous": contiguous_needed}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compared:
    """One workload on so many ranks.

    Attributes:
        flops: useful ones of a forward, per rank, mean of the packs.
        tools, bare: {policy: (forward, backward) seconds, mean of the packs}, as the tools are and as bare policies.
            A policy that cannot run (heads that do not last) is left out.
        layouts: what `auto` chose, and how often; u8: 8 ranks exchange heads.
    """

    workload: str
    ranks: int
    flops: float
    tools: dict[str, tuple[float, float]]
    bare: dict[str, tuple[float, float]]
    layouts: dict[str, int]

    def ratio(self, policy: str, bare: bool) -> float:
        """Time of a policy over ours, forward and backward together."""
        seconds = self.bare if bare else self.tools
        return sum(seconds[policy]) / sum(seconds[OURS])

    def rate(self, policy: str) -> float:
        """TFLOP/s per GPU of a tool, useful pairs alone, forward and backward together."""
        return self.flops * (1 + BACKWARD_FLOPS) / sum(self.tools[policy]) / 1e12


def bare(machine: Machine) -> Machine:
    """The machine on which PyTorch's copies and the steps of rings cost nothing."""
    return dataclasses.replace(machine, eager_bytes_per_s=math.inf, ring_seconds=0.0)


def runs(name: str, ranks: int, shape: Shape, node: int) -> bool:
    """Whether the heads last for that policy's exchange of heads."""
    size = {"ulysses": ranks, "usp": min(node, ranks), "loongtrain": min(node, ranks)}.get(name, 1)
    return shape.num_heads % size == 0


def packs(workload: str, rows: int, count: int) -> list[Documents]:
    """Packs of the seeds 0 to count - 1; one where all are the same."""
    made = [
        Documents.from_lengths(pack(workload, rows, np.random.default_rng(seed))) for seed in range(count)
    ]
    first = made[0].cu_seqlens
    return made[:1] if all(np.array_equal(other.cu_seqlens, first) for other in made) else made


def compare(
    workload: str, ranks: int, rows_per_rank: int, count: int, shape: Shape, machine: Machine
) -> Compared:
    """Every policy on the workload's packs; ours is `auto`, planned for the machine's hardware."""
    documents = packs(workload, ranks * rows_per_rank, count)
    machines = (machine, bare(machine))
    seconds: tuple[dict[str, list[tuple[float, float]]], ...] = ({}, {})
    layouts: dict[str, int] = {}
    for pack_ in documents:
        plan = make_plan(Request(pack_, ranks, shape=shape, hardware=machine.hardware, ulysses_size="auto"))
        chosen = f"{plan.layout} {plan.strategy}" + f" u{plan.ulysses_size}" * (plan.ulysses_size > 1)
        layouts[chosen] = layouts.get(chosen, 0) + 1
        timed: dict[str, Timed] = {OURS: planned(plan)}
        for name, peer in PEERS.items():
            if runs(name, ranks, shape, machine.hardware.ranks_per_node):
                timed[name] = peer(pack_, ranks, shape, machine.hardware.ranks_per_node)
        for each, where in zip(seconds, machines):
            for name, what in timed.items():
                forward, backward = what.seconds(where)
                each.setdefault(name, []).append((float(forward.max()), float(backward.max())))
    tools, bare_ = ({name: _mean(values) for name, values in each.items()} for each in seconds)
    flops = float(np.mean([pack_.pairs() for pack_ in documents])) * shape.flops_per_pair / ranks
    return Compared(workload=workload, ranks=ranks, flops=flops, tools=tools, bare=bare_, layouts=layouts)


def _mean(values: list[tuple[float, float]]) -> tuple[float, float]:
    forward, backward = np.mean(values, axis=0)
    return float(forward), float(backward)


def best_peer(rows: Sequence[Compared], bare: bool) -> tuple[str, float, float]:
    """The one policy that is best for all workloads: its name, the mean and the least of its time over ours."""
    ratios = {
        name: [row.ratio(name, bare) for row in rows]
        for name in PEERS
        if all(name in row.tools for row in rows)
    }
    name = min(ratios, key=lambda n: float(np.mean(ratios[n])))
    return name, float(np.mean(ratios[name])), min(ratios[name])
