"""Cost: what a schedule takes on a given machine, by an alpha-beta model with overlap.

(Schedule, Shape, Hardware) -> seconds and bytes per rank, forward and backward. It decides between plans, so it is the
same to the last bit on every rank: elementwise operations and sums in index order only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sap_hf.planning.documents import Int64
from sap_hf.planning.hardware import Hardware
from sap_hf.planning.schedule import (
    Q_START,
    Q_STOP,
    RANK,
    Schedule,
    is_full,
    sum_by,
    tile_pairs,
)

Float64 = NDArray[np.float64]
# Matrix products of the backward over those of the forward: 5 (S, dP, dQ, dK, dV) to 2 (S, O).
BACKWARD_FLOPS = 2.5


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


@dataclasses.dataclass(frozen=True, eq=False)
class Seconds:
    """Modelled seconds of one layer on each rank, all (W,).

    Attributes:
        forward, backward: kernels, and the copies around them.
        forward_exposed, backward_exposed: waiting for other ranks' rows.
        least: no more than forward and backward take, however many stages bring the same rows.
    """

    forward: Float64
    forward_exposed: Float64
    backward: Float64
    backward_exposed: Float64
    least: Float64

    @property
    def total(self) -> Float64:
        """(W,) forward and backward, waiting included."""
        return self.forward + self.forward_exposed + self.backward + self.backward_exposed


def critical_rows(shape: Shape, hardware: Hardware, inside_node: bool) -> int:
    """c*: a rank that holds fewer rows of a document computes on each received row for less time than it travels.

    Receiving a row takes bytes_per_row / bytes_per_s; what c queries compute on it, c * flops_per_pair / flops_per_s.
    """
    rate = hardware.node_bytes_per_s if inside_node else hardware.network_bytes_per_s
    return int(-(-shape.bytes_per_row * hardware.flops_per_s // (rate * shape.flops_per_pair)))


@dataclasses.dataclass(frozen=True, eq=False)
class Wires:
    """How the S stages of a schedule travel.

    Attributes:
        deliveries: S names.
        there, back: (S, W) seconds until each rank has sent and received its part: of the rows in the forward, and of
            dK/dV on their way home.
        link: (W,) seconds that the bytes of all stages take on a rank's links, one way.
    """

    deliveries: tuple[str, ...]
    there: Float64
    back: Float64
    link: Float64


def wire_seconds(
    schedule: Schedule, names: Sequence[str], cp_size: int, shape: Shape, hardware: Hardware
) -> Wires:
    """Each stage by the delivery among `names` that takes least there and back, the earlier one on a tie.

    Inside the node and between nodes different links carry the rows, at the same time. An all-gather brings every row
    to a node once, spread over its ranks, its own ones too (NCCL's and gloo's ring); dK/dV come home by an all-to-all.
    """
    steps = [step.transfers for step in schedule.steps if len(step.transfers)]
    stages, node = len(steps), hardware.ranks_per_node
    if not stages:
        none = np.zeros((0, cp_size))
        return Wires((), none, none, np.zeros(cp_size))
    source, destination, start, stop = np.concatenate(steps).T
    stage = np.repeat(np.arange(stages), [len(transfers) for transfers in steps])
    amount = (stop - start) * shape.bytes_per_row
    # [inside or outside the node, stage, rank]
    at = ((source // node != destination // node) * stages + stage) * cp_size
    sent, received = (
        sum_by(at + rank, amount, 2 * stages * cp_size).reshape(2, stages, cp_size)
        for rank in (source, destination)
    )
    busiest = np.maximum(sent, received)
    link = _both_links(busiest, hardware)
    messages = [
        np.bincount(stage * cp_size + rank, minlength=stages * cp_size) for rank in (source, destination)
    ]
    peers = np.zeros((stages, cp_size, cp_size), bool)
    peers[stage, source, destination] = True
    ways: list[tuple[Float64, Float64]] = []
    for name in names:
        if name == "p2p":
            way = _started(link, np.maximum(*messages).reshape(stages, cp_size), hardware)
            ways.append((way, way))
            continue
        # Rows of many places are read and written once more, to lie together when they are sent.
        count = np.maximum(peers.sum(axis=1), peers.sum(axis=2))
        there, back = (
            _started(link + (packed * 2).sum(axis=0) / hardware.copy_bytes_per_s, count, hardware)
            for packed in (sent, received)
        )
        if name == "all_gather":
            ranks = min(node, cp_size)
            # A ring through all ranks: what a node receives passes it once, over the links of all its ranks.
            total = busiest.sum(axis=0)
            once = np.stack([total * (ranks - 1) // ranks, total // ranks]) if node < cp_size else busiest
            hops = ranks + cp_size // ranks - 2
            there = _both_links(once, hardware) + hardware.step_seconds + hops * hardware.message_seconds
        ways.append((there, back))
    best = np.argmin([there.max(axis=1) + back.max(axis=1) for there, back in ways], axis=0).tolist()
    return Wires(
        tuple(names[way] for way in best),
        np.stack([ways[way][0][i] for i, way in enumerate(best)]),
        np.stack([ways[way][1][i] for i, way in enumerate(best)]),
        _both_links(np.maximum(sent.sum(axis=1), received.sum(axis=1)), hardware),
    )


def gather_link_seconds(held: Int64, shape: Shape, hardware: Hardware) -> tuple[Float64, Float64]:
    """(W,) seconds that links need at least to bring all ranks' (W,) `held` rows to every rank, and dK/dV home."""
    cp_size, node = len(held), hardware.ranks_per_node
    nodes = np.arange(cp_size) // node
    ranks = np.bincount(nodes)[nodes]
    near = sum_by(nodes, held, int(nodes[-1]) + 1)[nodes]
    inside = np.maximum(held * (ranks - 1), near - held)
    outside = np.maximum(held * (cp_size - ranks), held.sum() - near)
    home = _both_links(np.stack([inside, outside]) * shape.bytes_per_row, hardware)
    if node >= cp_size:
        return home, home
    total = (inside + outside) * shape.bytes_per_row
    once = _both_links(np.stack([total * (node - 1) // node, total // node]), hardware)
    return np.minimum(once, home), home


def kernel_seconds(pairs: Int64, rows: Int64, layers: int, shape: Shape, hardware: Hardware) -> Float64:
    """Seconds of kernels at least, forward and backward, for so many pairs of all layers and rows in each.

    Every layer takes one call on a rank that holds rows, and one part of `out` for each row.
    """
    flops = pairs * shape.flops_per_pair
    around = (rows > 0) * hardware.call_seconds + _merge_seconds(rows, shape, hardware)
    computing: Float64 = flops / hardware.flops_per_s + flops * (
        BACKWARD_FLOPS / hardware.backward_flops_per_s
    )
    return computing + 2 * layers * around


def _merge_seconds(rows: Int64, shape: Shape, hardware: Hardware) -> Float64:
    """A part of `out` is read, and the sum is read and written, in float32; dq likewise in the backward."""
    per_row = np.float64(3 * 4 * shape.num_heads * shape.head_dim / hardware.copy_bytes_per_s)
    seconds: Float64 = rows * per_row
    return seconds


def _both_links(amount: Int64, hardware: Hardware) -> Float64:
    """(2, ...) bytes inside the node and between nodes -> (...) seconds."""
    seconds: Float64 = np.maximum(
        amount[0] / hardware.node_bytes_per_s, amount[1] / hardware.network_bytes_per_s
    )
    return seconds


def _started(seconds: Float64, messages: Int64, hardware: Hardware) -> Float64:
    """`seconds`, and what it costs to start that many messages as one group."""
    total: Float64 = seconds + messages * hardware.message_seconds + hardware.step_seconds * (messages > 0)
    return total


def layer_seconds(
    schedule: Schedule, wires: Wires, shape: Shape, hardware: Hardware, keep: bool = False
) -> Seconds:
    """One layer under `schedule`, in the order in which the program posts, waits and attends.

    Args:
        wires: how its stages travel.
        keep: the backward has the remote K/V still and does not fetch it again.
    """
    cp_size, stages = len(wires.link), len(wires.deliveries)
    busy = _busy(schedule, cp_size, shape, hardware)
    receives = np.array([len(step.transfers) > 0 for step in schedule.steps])
    own, own_back = (sum(part[~receives], np.zeros(cp_size)) for part in busy)
    work, work_back = (part[receives] for part in busy)
    slots = schedule.slots or stages

    now, arrival = own, np.zeros(cp_size)
    done: list[Float64] = []
    for i in range(stages):
        # Rows of stage i go into the slot that stage i - slots has been computed from.
        arrival = (np.maximum(arrival, done[i - slots]) if i >= slots else arrival) + wires.there[i]
        now = np.maximum(now, arrival) + work[i]
        done.append(now)
    forward = own + sum(work, np.zeros(cp_size))

    # Half of the local work hides the second fetch, the other half what travels home.
    early = own_back / 2 if stages and not keep else np.zeros(cp_size)
    back, arrival, done = early, np.zeros(cp_size), []
    departure = sum(wires.there, np.zeros(cp_size)) if not keep and slots >= stages else np.zeros(cp_size)
    for i in range(stages):
        if not keep:
            arrival = (np.maximum(arrival, done[i - slots]) if i >= slots else arrival) + wires.there[i]
            back = np.maximum(back, arrival)
        back = back + work_back[i]
        done.append(back)
        # One communicator carries one exchange after the other: what goes home waits for the fetches before it.
        departure = np.maximum(np.maximum(departure, back), arrival) + wires.back[i]
    backward = own_back + sum(work_back, np.zeros(cp_size))
    end = np.maximum(back + own_back - early, departure)
    least = np.maximum(forward, wires.link) + np.maximum(backward, wires.link * (1 if keep else 2))
    return Seconds(forward, now - forward, backward, end - backward, least)


def _busy(schedule: Schedule, cp_size: int, shape: Shape, hardware: Hardware) -> tuple[Float64, Float64]:
    """(steps, W) seconds of each step's kernels and of merging what they give, forward and backward."""
    steps = len(schedule.steps)
    tiles, size = schedule.tiles, steps * cp_size
    at = np.repeat(np.arange(steps), [len(step.tiles) for step in schedule.steps]) * cp_size + tiles[:, RANK]
    pairs = sum_by(at, tile_pairs(tiles, schedule.window), size)
    rows = sum_by(at, tiles[:, Q_STOP] - tiles[:, Q_START], size)
    # Full tiles are one call of the kernel, causal ones another.
    calls = np.zeros((2, size), bool)
    calls[is_full(tiles).astype(np.int64), at] = True
    start = calls.sum(axis=0) * hardware.call_seconds
    merge = _merge_seconds(rows, shape, hardware)
    flops = pairs * shape.flops_per_pair
    forward = flops / hardware.flops_per_s + start + merge
    backward = flops * (BACKWARD_FLOPS / hardware.backward_flops_per_s) + start + merge
    return forward.reshape(steps, cp_size), backward.reshape(steps, cp_size)
