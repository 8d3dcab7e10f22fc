"""Cost: what a schedule takes on a given machine, by an alpha-beta model with overlap.

(Schedule, Shape, Hardware) -> seconds and bytes per rank, forward and backward. It decides between plans, so it is the
same to the last bit on every rank: elementwise operations and sums in index order only.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from sap_hf.planning.documents import Int64
from sap_hf.planning.hardware import Hardware
from sap_hf.planning.schedule import (
    RANK,
    Schedule,
    is_full,
    sum_by,
    tile_pairs,
)

Float64 = NDArray[np.float64]
Travels = NDArray[np.bool_]
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
        least_parts: the same where queries that are `whole` in this schedule would read their keys in parts.
    """

    forward: Float64
    forward_exposed: Float64
    backward: Float64
    backward_exposed: Float64
    least: Float64
    least_parts: Float64

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


def kernel_seconds(pairs: Int64, rows: Int64, layers: int, shape: Shape, hardware: Hardware) -> Float64:
    """Seconds of kernels at least, forward and backward, for so many pairs of all layers and rows in each.

    Every layer takes one call on a rank that holds rows.
    """
    flops = pairs * shape.flops_per_pair
    around = (rows > 0) * hardware.call_seconds
    computing: Float64 = flops / hardware.flops_per_s + flops * (
        BACKWARD_FLOPS / hardware.backward_flops_per_s
    )
    return computing + 2 * layers * around


def layer_seconds(
    schedule: Schedule, wires: Wires, shape: Shape, hardware: Hardware, keep: bool = False
) -> Seconds:
    """One layer under `schedule`, in the order in which the program posts, waits and attends.

    Args:
        wires: how its stages travel.
        keep: the backward has the remote K/V still and does not fetch it again.
    """
    cp_size = len(wires.link)
    held = tile_rows(schedule, cp_size)
    travels = sharing(schedule, cp_size)
    busy = _busy(held, tile_pairs(schedule.tiles, schedule.window), shape, hardware, travels)
    receives = np.array([len(step.transfers) > 0 for step in schedule.steps])
    # Local steps are the first row, whose rows travel nowhere.
    staged, staged_back = (
        np.concatenate([part[~receives].sum(axis=0)[None], part[receives]]) for part in busy
    )
    forward, backward = (part.sum(axis=0) for part in (staged, staged_back))
    now, end = in_stages(
        staged,
        staged_back,
        wires.there,
        wires.back,
        contention=hardware.contention,
        slots=schedule.slots,
        whole=schedule.whole,
        keep=keep,
    )
    ways = wires.link, wires.link * (1 if keep else 2)
    least = least_parts = sum(map(np.maximum, (forward, backward), ways), np.zeros(cp_size))
    if schedule.whole:
        least_parts = np.zeros(cp_size)
        for taken, copied, parted, way in zip(
            (forward, backward),
            copied_bytes(held, shape, travels),
            copied_bytes(held.in_parts(), shape, np.zeros_like(travels)),
            ways,
        ):
            other = (parted - copied).sum(axis=0) / hardware.copy_bytes_per_s
            least_parts = least_parts + np.maximum(taken + other, way)
    return Seconds(forward, now - forward, backward, end - backward, least, least_parts)


def in_stages(
    busy: Float64,
    busy_back: Float64,
    there: Float64,
    back: Float64,
    *,
    contention: float = 0.0,
    slots: int | None = None,
    whole: bool = False,
    keep: bool = False,
) -> tuple[Float64, Float64]:
    """(W,) seconds until each rank's forward, and backward, is done, as the program posts, waits and attends.

    Args:
        busy, busy_back: (1 + S, W) seconds of kernels and copies: of local tiles, then of each stage.
        there, back: (S, W) seconds on the way, and home.
        contention: of the Hardware. slots, whole: of the Schedule.
    """
    stages = len(there)
    if contention and stages:
        # The next stage's rows travel beside a stage's kernels; in the backward so does what goes home.
        none = np.zeros_like(there[:1])
        ahead, home = np.concatenate([there, none]), np.concatenate([none, back])
        busy = beside(busy, ahead, contention)
        busy_back = beside(busy_back, (0 if keep else 1) * ahead + home, contention)
    slots = slots or stages
    now, arrival = busy[0], np.zeros_like(busy[0])
    done: list[Float64] = []
    for i in range(stages):
        # Rows of stage i go into the slot that stage i - slots has been computed from.
        arrival = (np.maximum(arrival, done[i - slots]) if i >= slots else arrival) + there[i]
        now = np.maximum(now, arrival) + busy[i + 1]
        done.append(now)
    # Half of the local work hides the second fetch, the other half what travels home.
    early = busy_back[0] / 2 if stages and not keep else np.zeros_like(now)
    end, arrival, done = early, np.zeros_like(now), []
    departure = _total(there, len(now)) if not keep and slots >= stages else np.zeros_like(now)
    for i in range(stages):
        if not keep:
            arrival = (np.maximum(arrival, done[i - slots]) if i >= slots else arrival) + there[i]
            end = np.maximum(end, arrival)
        end = end + busy_back[i + 1]
        done.append(end)
        # One communicator carries one exchange after the other: what goes home waits for the fetches before it.
        if not whole:
            departure = np.maximum(np.maximum(departure, end), arrival) + back[i]
    if whole:
        # A later stage still adds to what an earlier one brought.
        departure = np.maximum(np.maximum(departure, end), arrival) + _total(back, len(now))
    return now, np.maximum(end + busy_back[0] - early, departure)


def beside(busy: Float64, wire: Float64, contention: float) -> Float64:
    """Seconds of kernels that have the whole chip only when the exchange that began with them is over."""
    slowed: Float64 = np.minimum(busy + contention * wire, busy / (1 - contention))
    return slowed


def _total(rows: Float64, ranks: int) -> Float64:
    """(W,) sum of (n, W), in order."""
    return sum(rows, np.zeros(ranks))


def _busy(
    held: TileRows, pairs: Int64, shape: Shape, hardware: Hardware, travels: Travels
) -> tuple[Float64, Float64]:
    """(steps, W) seconds of each step's kernels and of the copies around them, forward and backward."""
    start = held.calls * hardware.call_seconds
    flops = sum_by(held.at, pairs, held.calls.size).reshape(held.calls.shape) * shape.flops_per_pair
    copied, copied_back = copied_bytes(held, shape, travels)
    forward = flops / hardware.flops_per_s + start + copied / hardware.copy_bytes_per_s
    backward = flops * (BACKWARD_FLOPS / hardware.backward_flops_per_s)
    return forward, backward + start + copied_back / hardware.copy_bytes_per_s


@dataclasses.dataclass(frozen=True, eq=False)
class TileRows:
    """Rows that the kernel calls of each step read on each rank.

    Attributes:
        at: (m,) step * W + rank of each tile.
        queries, keys: (3, steps, W) rows of q, and of K, in causal tiles that read their own rows alone, in causal
            tiles that read rows before them as well, and in full tiles.
        calls: (steps, W) int64; full tiles are one call of the kernel, causal ones another.
    """

    at: Int64
    queries: Int64
    keys: Int64
    calls: Int64

    def in_parts(self) -> TileRows:
        """What is read at least when tiles that read rows before their own become a causal and a full one."""
        own, long, full = self.queries
        none = np.zeros_like(self.keys)
        return dataclasses.replace(self, queries=np.stack([own + long, none[0], full + long]), keys=none)


def tile_rows(schedule: Schedule, cp_size: int) -> TileRows:
    """The rows of every tile, added up."""
    tiles, steps = schedule.tiles, len(schedule.steps)
    _, q_start, q_stop, k_start, k_stop = tiles.T
    at = np.repeat(np.arange(steps), [len(step.tiles) for step in schedule.steps]) * cp_size + tiles[:, RANK]
    size = steps * cp_size
    kind = (is_full(tiles) * 2 + (~is_full(tiles) & (k_start < q_start))) * size + at
    queries, keys = (
        sum_by(kind, rows, 3 * size).reshape(3, steps, cp_size)
        for rows in (q_stop - q_start, k_stop - k_start)
    )
    calls = (queries[:2].sum(axis=0) > 0).astype(np.int64) + (queries[2] > 0)
    return TileRows(at, queries, keys, calls)


def sharing(schedule: Schedule, cp_size: int) -> Travels:
    """(W,) whether a rank takes part in exchanges: in a collective all do, else those that send or receive."""
    travels = np.zeros(cp_size, bool)
    for step in schedule.steps:
        if len(step.transfers):
            travels |= step.delivery != "p2p"
            travels[step.transfers[:, :2].ravel()] = True
    return travels


def copied_bytes(held: TileRows, shape: Shape, travels: Travels) -> tuple[Float64, Float64]:
    """(steps, W) bytes that `runtime.attention` reads and writes around the kernels, forward and backward.

    Runs of rows that lie together are views there. Here the queries of causal calls are such runs, as they are in the
    layouts that keep documents together, and the keys of local ones.

    Args:
        travels: (W,) whether a rank sends or receives rows. One that computes alone copies nothing.
    """
    query, keys = shape.num_heads * shape.head_dim, 2 * shape.num_kv_heads * shape.head_dim
    wire, wide = shape.bytes_per_element, max(4, shape.bytes_per_element)
    (own, long, full), (own_keys, long_keys, full_keys) = held.queries, held.keys
    causal = own + long
    # A rank with full tiles has several parts of one row: it merges them, the first is only widened. Others write a
    # part to its rows, where there is more than one call.
    merges = full.sum(axis=0) > 0
    writes = ~merges & (held.calls.sum(axis=0) > 1)
    copied = query * (
        merges * (2 * (wide + wire) * causal + (8 * wide + 3 * wire) * full) + writes * 2 * wire * causal
    )
    # dq is written, or added to sums that are cast; q, out and dout are gathered for full tiles.
    copied_back = query * (
        merges * ((3 * wide + 2 * wire) * causal + (2 * wide + 7 * wire) * full) + writes * 2 * wire * causal
    )
    # K and V are put beside what is received, and sums of dK and dV cleared and cast. Rows that a call does not read as
    # they lie are gathered, and their gradients widened and added one by one.
    rows = np.zeros_like(causal)
    rows[0] = causal.sum(axis=0)
    gathered = long_keys + full_keys
    sums = (3 * wire + 2 * wide) * rows + (2 * wide + wire) * own_keys
    copied = copied + travels * keys * (2 * wire * rows + 2 * wire * gathered)
    copied_back = copied_back + travels * keys * (sums + (3 * wire + 4 * wide) * gathered)
    return copied.astype(np.float64), copied_back.astype(np.float64)
