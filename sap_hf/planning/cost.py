"""Cost: what a schedule takes on a given machine, by an alpha-beta model with overlap.

(Schedule, Shape, Hardware) -> seconds and bytes per rank, forward and backward. It decides between plans, so it is the
same to the last bit on every rank: elementwise operations and sums in index order only.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from numpy.typing import NDArray

from sap_hf.planning.documents import Int64
from sap_hf.planning.hardware import Hardware
from sap_hf.planning.schedule import (
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


@dataclasses.dataclass(frozen=True, eq=False)
class LayerCost:
    """What one layer under a schedule costs.

    Attributes:
        wires: how its stages travel.
    """

    schedule: Schedule
    wires: Wires
    shape: Shape
    hardware: Hardware

    @functools.cached_property
    def _held(self) -> TileRows:
        return tile_rows(self.schedule, len(self.wires.link))

    @functools.cached_property
    def _kernels(self) -> tuple[Float64, Float64]:
        """(steps, W) seconds of each step's kernels, forward and backward."""
        held, hardware = self._held, self.hardware
        start = held.calls * hardware.call_seconds
        pairs = sum_by(held.at, tile_pairs(self.schedule.tiles, self.schedule.window), held.calls.size)
        flops = pairs.reshape(held.calls.shape) * self.shape.flops_per_pair
        backward = flops * (BACKWARD_FLOPS / hardware.backward_flops_per_s)
        return flops / hardware.flops_per_s + start, backward + start

    def seconds(self, keep: bool = False) -> Seconds:
        """In the order in which the program posts, waits and attends.

        Args:
            keep: the backward has the remote K/V still and does not fetch it again.
        """
        busy = map(np.add, self._kernels, self._copies(self._held))
        receives = np.array([len(step.transfers) > 0 for step in self.schedule.steps])
        # Local steps are the first row, whose rows travel nowhere.
        staged, staged_back = (
            np.concatenate([part[~receives].sum(axis=0)[None], part[receives]]) for part in busy
        )
        now, end = in_stages(
            staged,
            staged_back,
            self.wires.there,
            self.wires.back,
            contention=self.hardware.contention,
            slots=self.schedule.slots,
            whole=self.schedule.whole,
            keep=keep,
        )
        forward, backward = (part.sum(axis=0) for part in (staged, staged_back))
        return Seconds(forward, now - forward, backward, end - backward)

    def least(self, in_parts: bool = False) -> Float64:
        """(W,) no more than forward and backward take, however many stages bring the same rows.

        Args:
            in_parts: where queries that are `whole` in this schedule would read their keys in parts.
        """
        read = self._held.at_best()
        if in_parts and self.schedule.whole:
            read = read.in_parts()
        forward, backward = map(np.add, self._kernels, self._copies(read))
        link = self.wires.link
        least: Float64 = np.maximum(forward.sum(axis=0), link) + np.maximum(backward.sum(axis=0), 2 * link)
        return least

    def _copies(self, held: TileRows) -> list[Float64]:
        """(steps, W) seconds of what is copied around the kernels, forward and backward."""
        return [copied / self.hardware.copy_bytes_per_s for copied in copied_bytes(held, self.shape)]


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


@dataclasses.dataclass(frozen=True, eq=False)
class TileRows:
    """Rows that the kernel calls of each step read on each rank, and those that travel.

    Attributes:
        at: (m,) step * W + rank of each tile.
        queries, keys: (3, steps, W) rows of q, and of K, in causal tiles that read their own rows alone, in causal
            tiles that read rows before them as well, and in full tiles.
        calls: (steps, W) int64; full tiles are one call of the kernel, causal ones another.
        scattered: (2, steps, W) whether there are several causal tiles that read rows before them, or several full
            tiles: what they read does not lie together.
        halved: (W,) whether local tiles are two calls of the backward.
        kept: (W,) own rows in the K/V buffer. sent, received: (W,) rows that travel, each as often as it does.
    """

    at: Int64
    queries: Int64
    keys: Int64
    calls: Int64
    scattered: NDArray[np.bool_]
    halved: NDArray[np.bool_]
    kept: Int64
    sent: Int64
    received: Int64

    def at_best(self) -> TileRows:
        """What is read at least, however many stages the same tiles are spread over."""
        return dataclasses.replace(self, scattered=np.zeros_like(self.scattered))

    def in_parts(self) -> TileRows:
        """What is read at least when tiles that read rows before their own become a causal and a full one."""
        own, long, full = self.queries
        none = np.zeros_like(self.keys)
        rows = np.zeros_like(self.kept)
        queries = np.stack([own + long, none[0], full + long])
        return dataclasses.replace(
            self.at_best(), queries=queries, keys=none, kept=rows, sent=rows, received=rows
        )


def tile_rows(schedule: Schedule, cp_size: int) -> TileRows:
    """The rows of every tile, added up."""
    tiles, steps = schedule.tiles, len(schedule.steps)
    rank, q_start, q_stop, k_start, k_stop = tiles.T
    step = np.repeat(np.arange(steps), [len(each.tiles) for each in schedule.steps])
    at, size = step * cp_size + rank, steps * cp_size
    full = is_full(tiles)
    long = ~full & (k_start < q_start)
    kind = (full * 2 + long) * size + at
    count, queries, keys = (
        sum_by(kind, rows, 3 * size).reshape(3, steps, cp_size)
        for rows in (np.ones_like(rank), q_stop - q_start, k_stop - k_start)
    )
    calls = (queries[:2].sum(axis=0) > 0).astype(np.int64) + (queries[2] > 0)
    moved = np.concatenate([np.zeros((0, 4), np.int64), *(each.transfers for each in schedule.steps)])
    source, destination, start, stop = moved.T
    # Of its own rows a rank keeps those that it sends, those of tiles that read received rows before them, and those
    # that are read by tiles of other queries too.
    staged = np.array([len(each.transfers) > 0 for each in schedule.steps], bool)[step]
    mixed, shared = long & staged, (long | full) & ~staged
    kept = _distinct(
        np.concatenate([source, rank[mixed], rank[shared]]),
        np.concatenate([start, q_start[mixed], k_start[shared]]),
        np.concatenate([stop, q_stop[mixed], np.minimum(k_stop, q_start)[shared]]),
        cp_size,
    )
    sent, received = (sum_by(of, stop - start, cp_size) for of in (source, destination))
    halved = (np.bincount(rank[~staged], minlength=cp_size) > 1) & (sent + received > 0)
    return TileRows(at, queries, keys, calls, count[1:] > 1, halved, kept, sent, received)


def _distinct(rank: Int64, start: Int64, stop: Int64, cp_size: int) -> Int64:
    """(W,) rows in any of a rank's ranges."""
    # Ranks are lifted apart, so that one scan finds what is new in each range.
    lift = rank * (int(stop.max(initial=0)) + 1)
    order = np.argsort(start + lift, kind="stable")
    first, last = (start + lift)[order], (stop + lift)[order]
    seen = np.concatenate([np.zeros(1, np.int64), np.maximum.accumulate(last)])[:-1]
    return sum_by(rank[order], np.maximum(last - np.maximum(first, seen), 0), cp_size)


def copied_bytes(held: TileRows, shape: Shape) -> tuple[Float64, Float64]:
    """(steps, W) bytes that `runtime.attention` reads and writes around the kernels, forward and backward.

    Runs of rows that lie together are views there. Here they are those of a call's only tile, and of tiles that read
    their own rows alone. What happens once in a layer is in the first step.
    """
    query, keys = shape.num_heads * shape.head_dim, 2 * shape.num_kv_heads * shape.head_dim
    wire, wide = shape.bytes_per_element, max(4, shape.bytes_per_element)
    cast = wire + wide if wire < wide else 0
    (own, long, full), (own_keys, long_keys, full_keys) = held.queries, held.keys
    apart, apart_full = held.scattered
    # A rank with full tiles has several parts of one row: it merges them, the first is only widened. Others write a
    # part to its rows, where there is more than one call.
    merges = full.sum(axis=0) > 0
    writes = ~merges & (held.calls.sum(axis=0) > 1)
    causal = own + long
    copied = query * (
        merges * (2 * cast * causal + (4 * wide + wire + apart_full * (4 * wide + 2 * wire)) * full)
        + writes * (2 * wire * causal + apart * 2 * wire * long)
    )
    # dq is written, or added to sums that are cast; q, out and dout are gathered for tiles that lie apart.
    writes |= ~merges & held.halved
    copied_back = query * (
        merges
        * ((3 * wide + wire + cast) * causal + (2 * wide + wire + apart_full * (6 * wire + cast)) * full)
        + writes * (2 * wire * causal + apart * 6 * wire * long)
    )
    # Kept rows are put beside what is received; keys that lie apart are gathered.
    gathered = apart * long_keys + apart_full * full_keys
    copied = copied + keys * 2 * wire * gathered
    copied[0] += keys * 2 * wire * held.kept
    # Gradients of keys are written, or added to sums: these are cleared, sent home, added to, and cast.
    adds = 2 * wide + wire
    copied_back = copied_back + keys * (
        (writes | merges) * 2 * wire * own_keys
        + adds * (long_keys + full_keys)
        + (2 * wire + cast) * gathered
    )
    alone = np.maximum(held.kept - long.sum(axis=0), 0)
    copied_back[0] += keys * (
        (3 * wire + 2 * wide) * held.kept + adds * (alone + held.sent) + (2 * wide + wire) * held.received
    )
    return copied.astype(np.float64), copied_back.astype(np.float64)
