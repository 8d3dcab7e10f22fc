"""Hybrid: short documents whole on one rank, longer ones in a ring over as many ranks as their rows need.

(Documents, ranks, Shape, ranks per node) -> Batches. Megatron-LM's hybrid (dynamic) context parallelism, after the
description of its scheduler (megatron/core/pipeline_parallel/hybrid_cp_schedule.py): all ranks wait for each other
between micro-batches, inside one the groups stay as they are.
"""

from __future__ import annotations

import collections
import collections.abc
import dataclasses

import numpy as np

from sap_hf.planning.cost import Float64, Shape
from sap_hf.planning.documents import Documents
from sap_hf.simulation.rings import ring
from sap_hf.simulation.timing import FA3, Kernel, Load, Machine, Wire

# Rows of one document that a rank holds at most; the benchmark's rows per rank.
MOST_ROWS = 8192
# Work of ranks counts as even within this part.
SLACK = 0.05
# A bucket is closed when it would have this much more than its share of work.
BUCKET_SLACK = 1.1


@dataclasses.dataclass
class Group:
    """Ranks that attend to the same documents, one after the other; groups take consecutive ranks in order."""

    size: int
    work: float
    lengths: list[int]


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
    """Micro-batches with a barrier after each.

    Attributes:
        whole: what single ranks do, a stage for each micro-batch.
        rings: a ring's Load, and (S, W) how many of its kind each rank takes part in.
    """

    whole: Load
    rings: list[tuple[Load, Float64]]

    def pairs(self) -> Float64:
        """(W,) query-key pairs that each rank computes in the forward, times its heads."""
        total = self.whole.pairs()
        for load, count in self.rings:
            total = total + count.sum(axis=0) * load.pairs().mean()
        return total

    def seconds(self, machine: Machine) -> tuple[Float64, Float64]:
        """(W,) seconds of all micro-batches, forward and backward."""
        ways = list(self.whole.busy(machine))
        for load, count in self.rings:
            for i, seconds in enumerate(load.seconds(machine)):
                ways[i] = ways[i] + count * seconds.max()
        ranks = ways[0].shape[1]
        forward, backward = (np.full(ranks, way.max(axis=1).sum()) for way in ways)
        return forward, backward


def hybrid_dcp(documents: Documents, ranks: int, shape: Shape, node: int, kernel: Kernel = FA3) -> Batches:
    """Time the micro-batches: a document on one rank is one kernel call, on more a ring over them."""
    made = batches(documents.lengths.tolist(), ranks)
    work, rows, calls = (np.zeros((len(made), ranks, *more)) for more in ((4,), (), ()))
    counts: dict[tuple[int, int, int], Float64] = collections.defaultdict(
        lambda: np.zeros((len(made), ranks))
    )
    for stage, groups in enumerate(made):
        start = 0
        for group in groups:
            mine = slice(start, start + group.size)
            lengths = np.array(group.lengths, np.float64)
            if group.size == 1:
                heads = shape.num_heads // shape.num_kv_heads
                work[stage, mine] = kernel.work(lengths, lengths, True, heads).sum(axis=0)
                rows[stage, mine], calls[stage, mine] = lengths.sum(), len(lengths)
            else:
                # Where a group lies in two nodes without filling one, it has half of its ranks in each.
                inside = start // node == (start + group.size - 1) // node
                near = group.size if inside else min(node, max(1, group.size // 2))
                for length in group.lengths:
                    counts[length, group.size, near][stage, mine] += 1
            start += group.size
    nothing = Wire.none(len(made), ranks)
    # These calls are not varlen: they start no empty blocks.
    whole = Load(shape, work, rows, calls, np.zeros_like(rows), nothing, nothing, kernel, merged=False)
    rings = [
        (ring(Documents.from_lengths([length]), size, 1, shape, near, kernel), count)
        for (length, size, near), count in counts.items()
    ]
    return Batches(whole, rings)


def batches(lengths: list[int], ranks: int, most_rows: int = MOST_ROWS) -> list[list[Group]]:
    """Micro-batches of groups, longest documents first, until all are placed."""
    waiting = sorted(lengths, reverse=True)
    made = []
    while waiting:
        groups, waiting = _batch(waiting, ranks, most_rows)
        made.append(groups)
    return made


def needed(length: int, ranks: int, most_rows: int) -> int:
    """Ranks for a document: a power of two, so that none holds more than `most_rows` of it."""
    return min(1 << max(0, -(-length // most_rows) - 1).bit_length(), ranks)


def _batch(waiting: list[int], ranks: int, most_rows: int) -> tuple[list[Group], list[int]]:
    """Groups that fill one micro-batch, and the documents that are left."""

    def size(length: int) -> int:
        return needed(length, ranks, most_rows)

    def work(length: int) -> float:
        return length * length / size(length)

    buckets = _buckets([(length, work(length)) for length in waiting], len({size(n) for n in waiting}))
    groups: list[Group] = []
    first: int | None = None
    even = False
    while buckets:
        free = ranks - sum(group.size for group in groups)
        sizes = {group.size for group in groups}
        bucket = next((b for b in buckets if size(b[0]) in sizes or size(b[0]) <= free), None)
        if bucket is None:
            break
        length = bucket.popleft()
        same = [group for group in groups if group.size == size(length)]
        group = min(same, key=lambda g: g.work, default=None)
        if group is None or (group.work > 0 and free >= size(length)):
            group = Group(size(length), 0.0, [])
            groups.append(group)
        group.lengths.append(length)
        group.work += work(length)
        buckets = [b for b in buckets if b]
        first = first or size(length)
        even = even or size(length) < first
        busiest, idlest = _extremes(groups, ranks)
        if even and buckets and busiest - idlest <= SLACK * busiest:
            break
    left = [length for bucket in buckets for length in bucket]
    _trim(groups, ranks, left, work)
    _fill(groups, ranks)
    return groups, left


def _buckets(documents: list[tuple[int, float]], count: int) -> list[collections.deque[int]]:
    """As many runs of documents as there are group sizes, of about the same work."""
    target = sum(work for _, work in documents) / count
    made: list[collections.deque[int]] = []
    current: collections.deque[int] = collections.deque()
    total, remaining = 0.0, count
    for i, (length, work) in enumerate(documents):
        few = len(documents) - i <= remaining - len(made)
        if current and (total + work > target * BUCKET_SLACK or few):
            made.append(current)
            current, total = collections.deque(), 0.0
            remaining -= 1
        current.append(length)
        total += work
    return [*made, current]


def _extremes(groups: list[Group], ranks: int) -> tuple[float, float]:
    idle = sum(group.size for group in groups) < ranks
    return max(g.work for g in groups), 0.0 if idle else min(g.work for g in groups)


def _trim(
    groups: list[Group], ranks: int, left: list[int], work: collections.abc.Callable[[int], float]
) -> None:
    """Take the last document of the busiest group back as long as that evens out the work."""
    while True:
        busiest, idlest = _extremes(groups, ranks)
        group = max(groups, key=lambda g: g.work)
        if busiest - idlest <= SLACK * busiest or idlest == 0 or len(group.lengths) <= 1:
            return
        group.work -= work(group.lengths[-1])
        high, low = _extremes(groups, ranks)
        if high - low >= busiest - idlest:
            group.work += work(group.lengths[-1])
            return
        left.append(group.lengths.pop())


def _fill(groups: list[Group], ranks: int) -> None:
    """Double the smallest groups until no rank is idle."""
    while (free := ranks - sum(group.size for group in groups)) > 0:
        group = min(groups, key=lambda g: g.size)
        group.size += min(group.size, free)
