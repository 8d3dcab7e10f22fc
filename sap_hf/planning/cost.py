"""Cost: what a schedule takes on a given machine, by an alpha-beta model with overlap.

(Bundle, Shape, Hardware) -> seconds and bytes per rank, forward and backward. It decides between plans, so it is the
same to the last bit on every rank: elementwise operations and sums in index order only.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
from numpy.typing import NDArray

from sap_hf.planning.documents import Int64
from sap_hf.planning.hardware import Hardware
from sap_hf.planning.schedule import Bundle, ends, is_full, sum_by, tile_pairs

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
    """How the stages of V schedules travel, S of them at most; those that a schedule lacks take no time.

    Attributes:
        deliveries: V times the names of a schedule's stages.
        there, back: (S, V, W) seconds until each rank has sent and received its part: of the rows in the forward, and
            of dK/dV on their way home.
        starts: (S, V, W) seconds of these that starting the messages takes, one way.
    """

    deliveries: tuple[tuple[str, ...], ...]
    there: Float64
    back: Float64
    starts: Float64

    @property
    def seconds(self) -> Float64:
        """(V, W) of all stages, there and back."""
        total: Float64 = self.there.sum(axis=0) + self.back.sum(axis=0)
        return total


def kernel_seconds(pairs: Int64, rows: Int64, layers: int, shape: Shape, hardware: Hardware) -> Float64:
    """Seconds of kernels at least, forward and backward, for so many pairs of all layers and rows in each.

    Every layer takes one call on a rank that holds rows.
    """
    forward, backward = kernel_parts(pairs, layers * rows, layers * rows, shape, hardware)
    total: Float64 = forward + backward + 2 * layers * (rows > 0) * hardware.call_seconds
    return total


def moving_seconds(
    pairs: Int64, rows: Int64, layers: int, ways: tuple[Float64, Float64], shape: Shape, hardware: Hardware
) -> Float64:
    """`kernel_seconds` at least, and no less than the ways take that forward and backward wait for."""
    forward, backward = kernel_parts(pairs, layers * rows, layers * rows, shape, hardware)
    start = layers * (rows > 0) * hardware.call_seconds
    total: Float64 = np.maximum(forward + start, ways[0]) + np.maximum(backward + start, ways[1])
    return total


def kernel_parts(
    pairs: Int64, queries: Int64, keys: Int64, shape: Shape, hardware: Hardware
) -> tuple[Float64, Float64]:
    """Seconds of kernels, forward and backward, without their starts.

    Args:
        queries, keys: rows of all tiles.
    """
    forward = (pairs + hardware.tile_keys * queries) * (shape.flops_per_pair / hardware.flops_per_s)
    rate = BACKWARD_FLOPS * shape.flops_per_pair / hardware.backward_flops_per_s
    return forward, (pairs + hardware.tile_rows * keys) * rate


@dataclasses.dataclass(frozen=True, eq=False)
class LayerCosts:
    """What one layer costs under each of V schedules.

    Attributes:
        wires: how their stages travel.
    """

    bundle: Bundle
    wires: Wires
    shape: Shape
    hardware: Hardware
    _seconds: dict[int, Float64] = dataclasses.field(default_factory=dict, init=False, repr=False)

    @functools.cached_property
    def _held(self) -> TileRows:
        return tile_rows(self.bundle)

    @functools.cached_property
    def _kernels(self) -> tuple[Float64, Float64]:
        """(1 + S, V, W) seconds of each step's kernels, forward and backward."""
        held, hardware = self._held, self.hardware
        start = held.calls * hardware.call_seconds
        pairs = sum_by(held.at, tile_pairs(self.bundle.tiles.T, self.bundle.window), start.size)
        queries, keys = (of.sum(axis=0) for of in (held.queries, held.keys))
        forward, backward = kernel_parts(pairs.reshape(start.shape), queries, keys, self.shape, hardware)
        return forward + start, backward + start

    def seconds(self, turns: int = 1) -> Float64:
        """(4, V, W) the fields of Seconds, in the order in which the program posts, waits and attends.

        Args:
            turns: in which some heads are computed after the others: all kernels and messages start as often.
        """
        if turns not in self._seconds:
            self._seconds[turns] = self._in_turns(turns)
        return self._seconds[turns]

    def links(self, turns: int) -> Float64:
        """(2, V, W) seconds that rows are on the way, forward and backward."""
        there = (self.wires.there + (turns - 1) * self.wires.starts).sum(axis=0)
        return np.stack([there, there + (self.wires.back + (turns - 1) * self.wires.starts).sum(axis=0)])

    def _in_turns(self, turns: int) -> Float64:
        busy, busy_back = map(np.add, self._kernels, self._copies(self._held))
        stages, wires = self.bundle.stages, self.wires
        there, back = wires.there, wires.back
        if turns > 1:
            # All turns take as long as one of all heads, and their starts.
            calls, messages = (
                (turns - 1) * of for of in (self._held.calls * self.hardware.call_seconds, wires.starts)
            )
            busy, busy_back, there, back = busy + calls, busy_back + calls, there + messages, back + messages
        now, end = in_stages(
            busy,
            busy_back,
            there,
            back,
            contention=self.hardware.contention,
            slots=np.array([min(of.slots or stages, stages) for of in self.bundle.schedules]),
            whole=np.array([of.whole for of in self.bundle.schedules]),
        )
        forward, backward = busy.sum(axis=0), busy_back.sum(axis=0)
        return np.stack([forward, now - forward, backward, end - backward])

    def least(self, number: int, link: Float64) -> Float64:
        """(W,) no more than a schedule's forward and backward take, however many stages bring the same rows.

        Args:
            link: (W,) seconds that the bytes of all stages take on a rank's links, one way.
        """
        forward, backward = (
            (kernels + copies)[:, number].sum(axis=0)
            for kernels, copies in zip(self._kernels, self._copies(self._held.at_best()))
        )
        least: Float64 = np.maximum(forward, link) + np.maximum(backward, 2 * link)
        return least

    def _copies(self, held: TileRows) -> list[Float64]:
        """(1 + S, V, W) seconds of what is copied around the kernels, forward and backward."""
        return [copied / self.hardware.copy_bytes_per_s for copied in copied_bytes(held, self.shape)]


def in_stages(
    busy: Float64,
    busy_back: Float64,
    there: Float64,
    back: Float64,
    *,
    contention: float,
    slots: Int64,
    whole: NDArray[np.bool_],
) -> tuple[Float64, Float64]:
    """(V, W) seconds until each rank's forward, and backward, is done, as programs post, wait and attend.

    Args:
        busy, busy_back: (1 + S, V, W) seconds of kernels and copies: of local tiles, then of each stage.
        there, back: (S, V, W) seconds on the way, and home.
        contention: of the Hardware. slots, whole: (V,) of the Schedules; at least S slots where all rows are held.
    """
    stages, number = len(there), np.arange(len(slots))
    if contention and stages:
        # The next stage's rows travel beside a stage's kernels; in the backward so does what goes home.
        none = np.zeros_like(there[:1])
        ahead, home = np.concatenate([there, none]), np.concatenate([none, back])
        busy = beside(busy, ahead, contention)
        busy_back = beside(busy_back, ahead + home, contention)
    # done[i + 1] is when stage i has been computed; rows of stage i go into the slot of stage i - slots.
    done = np.zeros((stages + 1, *busy.shape[1:]))
    free = [np.maximum(i + 1 - slots, 0) for i in range(stages)]
    now, arrival = busy[0], np.zeros_like(busy[0])
    for i in range(stages):
        arrival = np.maximum(arrival, done[free[i], number]) + there[i]
        done[i + 1] = now = np.maximum(now, arrival) + busy[i + 1]
    # Half of the local work hides the second fetch, the other half what travels home.
    early = busy_back[0] / 2
    end, arrival = early, np.zeros_like(now)
    # One communicator carries one exchange after the other: what goes home waits for the fetches before it.
    departure = (slots >= stages)[:, None] * there.sum(axis=0)
    # A later stage of a whole one still adds to what an earlier one brought: all goes home in the end.
    later = whole[:, None]
    for i in range(stages):
        arrival = np.maximum(arrival, done[free[i], number]) + there[i]
        done[i + 1] = end = np.maximum(end, arrival) + busy_back[i + 1]
        leaves = np.maximum(np.maximum(departure, end), arrival)
        departure = np.where(later, departure, leaves + back[i])
    if stages:
        departure = np.where(later, leaves + back.sum(axis=0), departure)
    return now, np.maximum(end + (busy_back[0] - early), departure)


def beside(busy: Float64, wire: Float64, contention: float) -> Float64:
    """Seconds of kernels that have the whole chip only when the exchange that began with them is over."""
    slowed: Float64 = np.minimum(busy + contention * wire, busy / (1 - contention))
    return slowed


@dataclasses.dataclass(frozen=True, eq=False)
class TileRows:
    """Rows that the kernel calls of each step read on each rank, and those that travel.

    Of V schedules with S stages at most: step 0 is what needs no others' rows, step i + 1 what stage i brings.

    Attributes:
        at: (m,) (step * V + schedule) * W + rank of each tile.
        queries, keys: (3, 1 + S, V, W) rows of q, and of K, in causal tiles that read their own rows alone, in causal
            tiles that read rows before them as well, and in full tiles.
        scattered: (3, 1 + S, V, W) whether there are several causal tiles that read rows before them, several full
            tiles, and, with several of the former or pieces of one document on a rank, keys that do not lie together.
        halved: (V, W) whether local tiles are two calls of the backward.
        kept: (V, W) own rows in the K/V buffer. sent, received: (V, W) rows that travel, each as often as it does.
    """

    at: Int64
    queries: Int64
    keys: Int64
    scattered: NDArray[np.bool_]
    halved: NDArray[np.bool_]
    kept: Int64
    sent: Int64
    received: Int64

    @functools.cached_property
    def calls(self) -> Int64:
        """(1 + S, V, W) calls of the kernel: full tiles are one, causal ones another."""
        own, long, full = self.queries
        calls: Int64 = (own + long > 0).astype(np.int64) + (full > 0)
        return calls

    def at_best(self) -> TileRows:
        """What is read at least, however many stages the same tiles are spread over."""
        return dataclasses.replace(self, scattered=np.zeros_like(self.scattered))


def tile_rows(bundle: Bundle) -> TileRows:
    """The rows of every tile, added up."""
    ranks = (len(bundle.schedules), bundle.cp_size)
    steps, width = 1 + bundle.stages, ranks[0] * ranks[1]
    rank, q_start, q_stop, k_start, k_stop = bundle.tiles
    at = bundle.tile_step * width + (which := bundle.tile_number * ranks[1] + rank)
    full = is_full(bundle.tiles.T)
    long = k_start < np.where(full, 0, q_start)
    kind = (full * 2 + long) * (steps * width) + at
    size = 3 * steps * width
    rows = q_stop - q_start
    count = np.bincount(kind, minlength=size).reshape(3, steps, *ranks)
    queries, keys = (sum_by(kind, of, size).reshape(3, steps, *ranks) for of in (rows, k_stop - k_start))
    # Of its own rows a rank keeps those that it sends, those of tiles that read received rows before them, and those
    # that are read by tiles of other queries too.
    local = bundle.tile_step == 0
    mixed, shared = (long & ~local).nonzero()[0], ((long | full) & local).nonzero()[0]
    # All schedules move the same rows: what is sent is put together once.
    source, destination, start, stop = bundle.schedules[0].transfers.T
    sent, received = (sum_by(of, stop - start, ranks[1]) for of in (source, destination))
    sender, start, stop = union(source, start, stop)
    sender = (sender + np.arange(ranks[0])[:, None] * ranks[1]).ravel()
    rank, start, stop = union(
        np.concatenate([sender, which[mixed], which[shared]]),
        np.concatenate([*[start] * ranks[0], q_start[mixed], k_start[shared]]),
        np.concatenate([*[stop] * ranks[0], q_stop[mixed], np.minimum(k_stop[shared], q_start[shared])]),
    )
    kept = sum_by(rank, stop - start, width).reshape(ranks)
    several_local = np.bincount(which[local], minlength=width).reshape(ranks) > 1
    halved = several_local & (sent + received > 0)
    sent, received = (np.broadcast_to(of, ranks) for of in (sent, received))
    # What a tile reads of the rank's earlier pieces lies elsewhere than what it receives.
    pieces = (keys[1] - queries[1]).sum(axis=0) > received
    several = count[1:] > 1
    scattered = np.concatenate([several, (several[0] | (pieces & (count[1] > 0)))[None]])
    return TileRows(at, queries, keys, scattered, halved, kept, sent, received)


def union(rank: Int64, start: Int64, stop: Int64) -> tuple[Int64, Int64, Int64]:
    """Ranges of ranks' rows, (n,) each, as the fewest that have the same rows."""
    if not len(rank):
        return rank, start, stop
    # Ranks are lifted apart, so that one scan finds where each range ends.
    lift = rank * (int(stop.max()) + 1)
    first = start + lift
    # Much is in order already: a stable sort is the fastest.
    order = first.argsort(kind="stable")
    end = np.maximum.accumulate((stop + lift).take(order))
    new = np.ones(len(order), bool)
    new[1:] = first.take(order[1:]) > end[:-1]
    opens, closes = ends(new)
    opens = order.take(opens)
    return rank.take(opens), start.take(opens), end.take(closes) - lift.take(opens)


def copied_bytes(held: TileRows, shape: Shape) -> tuple[Int64, Int64]:
    """(1 + S, V, W) bytes that `runtime.attention` reads and writes around the kernels, forward and backward.

    Runs of rows that lie together are views there. Here they are those of a call's only tile, and of tiles that read
    their own rows alone. What happens once in a layer is in the first step.
    """
    query, keys = shape.num_heads * shape.head_dim, 2 * shape.num_kv_heads * shape.head_dim
    wire, wide = shape.bytes_per_element, max(4, shape.bytes_per_element)
    cast = wire + wide if wire < wide else 0
    (own, long, full), (_, long_keys, full_keys) = held.queries, held.keys
    apart, apart_full, apart_keys = held.scattered
    # A rank with full tiles has several parts of one row: it merges them, the first is only widened. On others kernels
    # write out and dq where they belong, but of tiles that lie apart; lse is put there, where there are several calls.
    merges = full.any(axis=0)
    writes = ~merges & (held.calls.sum(axis=0) > 1)
    causal, apart_long = own + long, apart * long
    # For tiles that lie apart q, and in the backward out and dout, are gathered.
    writes_back = writes | (~merges & held.halved)
    written, gathered = 2 * wire * query * writes, 2 * wire * query * writes_back
    copied = 2 * written * apart_long + 2 * wide * shape.num_heads * writes * causal
    copied_back = 4 * gathered * apart_long
    copied_keys = apart_keys * long_keys
    if merges.any():
        apart_rows, merged = apart_full * full, query * merges
        copied += merged * (2 * cast * causal + (4 * wide + wire) * full + (4 * wide + 2 * wire) * apart_rows)
        copied_back += merged * (
            (3 * wide + wire + cast) * causal + (2 * wide + wire) * full + (6 * wire + cast) * apart_rows
        )
        copied_keys = copied_keys + apart_full * full_keys
    # Kept rows are put beside what is received; keys that lie apart are gathered.
    copied += keys * 2 * wire * copied_keys
    copied[0] += keys * 2 * wire * held.kept
    # Gradients of keys that have several parts are added to sums: these are cleared, sent home, added to, and cast.
    adds = 2 * wide + wire
    copied_back += keys * (adds * (long_keys + full_keys) + (2 * wire + cast) * copied_keys)
    alone = np.maximum(held.kept - long.sum(axis=0), 0)
    copied_back[0] += keys * (
        (3 * wire + 2 * wide) * held.kept + adds * (alone + held.sent) + (2 * wide + wire) * held.received
    )
    return copied, copied_back
