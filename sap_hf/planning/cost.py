"""Cost: what a schedule takes on a given machine, by an alpha-beta model with overlap.

(Schedule, Shape, Hardware) -> seconds and bytes per rank, forward and backward. It decides between plans, so it is the
same to the last bit on every rank: elementwise operations and sums in index order only.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from sap_hf.planning.hardware import Hardware
from sap_hf.planning.schedule import (
    DESTINATION,
    Q_START,
    Q_STOP,
    RANK,
    SOURCE,
    START,
    STOP,
    Schedule,
    Step,
    is_full,
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
    """

    forward: Float64
    forward_exposed: Float64
    backward: Float64
    backward_exposed: Float64

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


def layer_seconds(
    schedule: Schedule, cp_size: int, shape: Shape, hardware: Hardware, keep: bool = False
) -> Seconds:
    """One layer under `schedule`, in the order in which the program posts, waits and attends.

    Args:
        keep: the backward has the remote K/V still and does not fetch it again.
    """
    stages = [step for step in schedule.steps if len(step.transfers)]
    local = [step for step in schedule.steps if not len(step.transfers)]
    wire = [wire_seconds(step, cp_size, shape, hardware) for step in stages]
    home = [wire_seconds(step, cp_size, shape, hardware, returning=True) for step in stages]
    own, own_back = _busy(local, schedule.window, cp_size, shape, hardware)
    work = [_busy([step], schedule.window, cp_size, shape, hardware) for step in stages]
    slots = schedule.slots or len(stages)

    now, arrival = own, np.zeros(cp_size)
    done: list[Float64] = []
    for i, (busy, _) in enumerate(work):
        # Rows of stage i go into the slot that stage i - slots has been computed from.
        arrival = (np.maximum(arrival, done[i - slots]) if i >= slots else arrival) + wire[i]
        now = np.maximum(now, arrival) + busy
        done.append(now)
    forward = own + sum((busy for busy, _ in work), np.zeros(cp_size))

    # Half of the local work hides the second fetch, the other half what travels home.
    early = own_back / 2 if stages and not keep else np.zeros(cp_size)
    back, arrival, done = early, np.zeros(cp_size), []
    departure = sum(wire, np.zeros(cp_size)) if not keep and slots >= len(stages) else np.zeros(cp_size)
    for i, (_, busy) in enumerate(work):
        if not keep:
            arrival = (np.maximum(arrival, done[i - slots]) if i >= slots else arrival) + wire[i]
            back = np.maximum(back, arrival)
        back = back + busy
        done.append(back)
        # One communicator carries one exchange after the other: what goes home waits for the fetches before it.
        departure = np.maximum(np.maximum(departure, back), arrival) + home[i]
    backward = own_back + sum((busy for _, busy in work), np.zeros(cp_size))
    end = np.maximum(back + own_back - early, departure)
    return Seconds(forward, now - forward, backward, end - backward)


def _busy(
    steps: list[Step], window: int | None, cp_size: int, shape: Shape, hardware: Hardware
) -> tuple[Float64, Float64]:
    """(W,) seconds of kernels and of merging what they give, forward and backward."""
    forward, backward = np.zeros(cp_size), np.zeros(cp_size)
    for step in steps:
        tiles = step.tiles
        pairs, rows = np.zeros(cp_size, np.int64), np.zeros(cp_size, np.int64)
        np.add.at(pairs, tiles[:, RANK], tile_pairs(tiles, window))
        np.add.at(rows, tiles[:, RANK], tiles[:, Q_STOP] - tiles[:, Q_START])
        calls = np.zeros((cp_size, 2), bool)
        calls[tiles[:, RANK], is_full(tiles).astype(np.int64)] = True
        start = calls.sum(axis=1) * hardware.call_seconds
        # A part of `out` is read, and the sum is read and written, in float32; dq likewise in the backward.
        merge = rows * (3 * 4 * shape.num_heads * shape.head_dim / hardware.copy_bytes_per_s)
        flops = pairs * shape.flops_per_pair
        forward += flops / hardware.flops_per_s + start + merge
        backward += flops * (BACKWARD_FLOPS / hardware.backward_flops_per_s) + start + merge
    return forward, backward


def wire_seconds(
    step: Step, cp_size: int, shape: Shape, hardware: Hardware, *, returning: bool = False
) -> Float64:
    """(W,) seconds until each rank has sent and received its part of the step's transfers.

    Inside the node and between nodes different links carry the rows, at the same time. An all-gather between nodes
    brings every row to a node once, spread over its ranks.

    Args:
        returning: the way home of dK/dV, which is never an all-gather: an all-to-all instead.
    """
    transfers = step.transfers
    if not len(transfers):
        return np.zeros(cp_size)
    source, destination = transfers[:, SOURCE], transfers[:, DESTINATION]
    amount = (transfers[:, STOP] - transfers[:, START]) * shape.bytes_per_row
    node = hardware.ranks_per_node
    outside = (source // node != destination // node).astype(np.int64)
    # [rank, inside or outside its node]
    sent, received = np.zeros((cp_size, 2), np.int64), np.zeros((cp_size, 2), np.int64)
    np.add.at(sent, (source, outside), amount)
    np.add.at(received, (destination, outside), amount)
    peers, messages = np.zeros((cp_size, cp_size), bool), np.zeros((cp_size, 2), np.int64)
    peers[source, destination] = True
    np.add.at(messages[:, 0], source, 1)
    np.add.at(messages[:, 1], destination, 1)
    busiest = np.maximum(sent, received)
    if step.delivery == "all_gather" and not returning:
        ranks = min(node, cp_size)
        inside, outside = busiest[:, 0] + busiest[:, 1] * (ranks - 1) // ranks, busiest[:, 1] // ranks
        hops = np.full(cp_size, ranks + cp_size // ranks - 2)
        wire = np.maximum(inside / hardware.node_bytes_per_s, outside / hardware.network_bytes_per_s)
        gathered: Float64 = wire + hardware.step_seconds + hops * hardware.message_seconds
        return gathered
    wire = np.maximum(busiest[:, 0] / hardware.node_bytes_per_s, busiest[:, 1] / hardware.network_bytes_per_s)
    if step.delivery == "p2p":
        count = messages.max(axis=1)
    else:
        count = np.maximum(peers.sum(axis=0), peers.sum(axis=1))
        # Rows of many places are read and written once more, to lie together when they are sent.
        packed = (received if returning else sent) * 2
        wire = wire + (packed[:, 0] + packed[:, 1]) / hardware.copy_bytes_per_s
    total: Float64 = wire + count * hardware.message_seconds + hardware.step_seconds * (count > 0)
    return total
