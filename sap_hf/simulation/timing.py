"""Timing: what a tool does for one attention layer, as arrays, and the seconds that it takes.

Load, Machine -> seconds. It is the plan's own model (`planning.cost`) and, on top, what the peers' tools differ in:
kernels compute whole tiles, an exchange takes part of the chip from the kernels beside it, rings go in lockstep, heads
are exchanged, and some tools copy much.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from sap_hf.planning.cost import BACKWARD_FLOPS, Float64, Shape, beside, in_stages
from sap_hf.planning.hardware import Hardware
from sap_hf.planning.heads import in_turns
from sap_hf.planning.wires import link_seconds


@dataclasses.dataclass(frozen=True)
class Machine:
    """A Hardware and the constants that the plan's cost model does without.

    Attributes:
        group_cast_bytes_per_s: what MagiAttention's own exchange reaches between nodes, row by row; it does not slow
            the kernels beside it.
        block_seconds: starting one block of a backward kernel, whether or not it finds something to do.
        eager_bytes_per_s: memory read plus written by PyTorch's gather, scatter, add and transpose, one by one.
        ring_seconds: fixed cost of a step of a ring, which waits for what was sent and starts the next.
    """

    hardware: Hardware
    group_cast_bytes_per_s: float = math.inf
    block_seconds: float = 0.0
    eager_bytes_per_s: float = math.inf
    ring_seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What an attention kernel computes at least: tiles of `q_tile` rows and `k_tile` keys, forward and backward.

    Attributes:
        packs: query heads of one kv head fill a forward tile together (FlashAttention-3 does so for varlen calls).
        merges: tiles of one call may have the same queries; their parts are merged inside.
        merge_bytes: memory traffic of merging a part, per element of out.
        empty_blocks: a varlen backward starts a block for every key tile of its longest segment in every segment.
        backward_bytes: memory traffic of a backward call around its main kernel, per element of its queries.
    """

    q_tile: int = 128
    k_tile: int = 128
    backward_q_tile: int = 64
    packs: bool = True
    merges: bool = False
    # A part of out is read, and the sum is read and written, in float32; dq likewise in the backward.
    merge_bytes: float = 12.0
    empty_blocks: bool = True
    # out and dout are read (2 + 2), dq is cleared in float32 (4), then read (4) and written (2).
    backward_bytes: float = 14.0

    def work(self, q: Float64, k: Float64, causal: bool | NDArray[np.bool_], heads_per_kv: int) -> Float64:
        """(..., 4): the pairs and tiled query rows that segments of q rows on k keys compute, and the backward's pairs
        and tiled keys: a forward begins and ends once for each tile of queries, a backward for each tile of keys.

        Causal segments end at the same row. A tile has as many keys as its last row sees, rounded up: half a tile of
        keys and half a tile of rows more than needed, on average, but never more than all. No keys, no work.
        """
        most = np.ceil(k / self.k_tile) * self.k_tile
        columns = []
        for tile in self._tiles(heads_per_kv):
            rows = np.where(k > 0, np.ceil(q / tile) * tile, 0)
            keys = k - (q - 1) / 2 + (self.k_tile + tile) / 2 - 1
            columns += [rows * np.where(causal, np.minimum(keys, most), most), rows]
        columns[3] = np.where(q > 0, most, 0)
        return np.stack(columns, axis=-1)

    def all_pairs(self, q: Float64, k: Float64, count: Float64, heads_per_kv: int) -> Float64:
        """(R, S, 4): `work` of full segments, summed over documents: the rows of each of R ranks on S ranks' keys.

        Args:
            q: (N, R) query rows of each document. k: (N, S) keys. count: (N, 1) documents of that kind.
        """
        most = np.ceil(k / self.k_tile) * self.k_tile * count
        rows, rows_back = (np.ceil(q / tile) * tile for tile in self._tiles(heads_per_kv))
        some_q, some_k = (q > 0).astype(np.float64), (k > 0) * count
        columns = (rows.T @ most, rows.T @ some_k, rows_back.T @ most, some_q.T @ most)
        return np.stack(columns, axis=-1)

    def blocks(self, segments: float | Float64, longest: Float64) -> Float64:
        """Blocks that a varlen backward call starts per head, on segments of at most `longest` keys."""
        tiles: Float64 = np.ceil(longest / self.k_tile) * segments * self.empty_blocks
        return tiles

    def _tiles(self, heads_per_kv: int) -> tuple[int, int]:
        return max(1, self.q_tile // heads_per_kv) if self.packs else self.q_tile, self.backward_q_tile


FA3 = Kernel()
# MagiAttention's kernel: FlashAttention-3's tiles, but the benchmark ran it without packing heads. It adds to
# a float32 sum as it ends, and takes its tiles from a list.
FFA = Kernel(packs=False, merges=True, merge_bytes=8.0, empty_blocks=False)
EXACT = Kernel(1, 1, 1, packs=False, backward_bytes=0.0)


@dataclasses.dataclass(frozen=True, eq=False)
class Wire:
    """What each rank's links carry, all (S, W): bytes inside the node and to other nodes, messages, bytes packed."""

    inside: Float64
    outside: Float64
    messages: Float64
    packed: Float64

    @classmethod
    def none(cls, stages: int, ranks: int) -> Wire:
        return cls(*np.zeros((4, stages, ranks)))

    def seconds(self, hardware: Hardware, network_bytes_per_s: float = math.inf, turns: int = 1) -> Float64:
        """(S, W): both links at the same time, then what is fixed, then the packing. What leaves a node and what comes
        count as one where its ranks share a network card.

        Args:
            network_bytes_per_s: what this exchange reaches between nodes, where that is less than the links have.
            turns: how often it begins, with as many messages each time.
        """
        link = link_seconds(self.inside, self.outside, self.outside, hardware)
        if network_bytes_per_s < hardware.network_bytes_per_s:
            link = np.maximum(link, self.outside / network_bytes_per_s)
        fixed = self.messages * hardware.message_seconds + (self.messages > 0) * hardware.step_seconds
        return link + turns * fixed + self.packed / hardware.copy_bytes_per_s


class Timed(Protocol):
    """What a peer does for one layer."""

    def pairs(self) -> Float64:
        """(W,) query-key pairs that each rank computes in the forward, times its heads; tiles count as a whole."""

    def seconds(self, machine: Machine) -> tuple[Float64, Float64]:
        """(W,) seconds until each rank is done, forward and backward; all begin together."""


@dataclasses.dataclass(frozen=True, eq=False)
class Load:
    """One layer's forward on W ranks, in S stages; the backward follows from it.

    Attributes:
        shape: the heads that a rank computes.
        work: (S, W, 4) of Kernel.work; rows, calls, blocks: (S, W) merged query rows, kernel calls, and blocks per head
            that their backward starts.
        there, back: what travels before each stage's kernels, and home in the backward.
        pace: own (a rank waits for its rows alone, next rows travel meanwhile) | lockstep (a stage ends when the
            slowest rank's kernels and wire do) | blocking (rows travel first, then kernels run).
        merged: the kernel's caller merges parts; where it does not, `copied` holds what is done instead.
        slots, whole: of the Schedule.
        heads: the exchanges of heads around the layer, there, then back, and the other way round in the backward; of
            each turn, where there is a share.
        share: (turns, W) part of a rank's heads that is computed in each turn, while other heads travel.
        copied, copied_back: (S, W) bytes that PyTorch reads and writes beside the kernels.
        group_cast: the exchange is MagiAttention's own.
    """

    shape: Shape
    work: Float64
    rows: Float64
    calls: Float64
    blocks: Float64
    there: Wire
    back: Wire
    kernel: Kernel = FA3
    pace: str = "own"
    merged: bool = True
    slots: int | None = None
    whole: bool = False
    heads: Wire | None = None
    share: Float64 | None = None
    copied: Float64 | float = 0.0
    copied_back: Float64 | float = 0.0
    group_cast: bool = False

    def spread(self, size: int) -> Load:
        """The same on `size` ranks in place of each one; `heads` stay as they are."""

        def repeated(of: Load | Wire, *names: str) -> dict[str, Any]:
            values = (np.broadcast_to(getattr(of, name), self.rows.shape) for name in names)
            return {name: np.repeat(value, size, axis=1) for name, value in zip(names, values)}

        columns = ("inside", "outside", "messages", "packed")
        return dataclasses.replace(
            self,
            work=np.repeat(self.work, size, axis=1),
            there=Wire(**repeated(self.there, *columns)),
            back=Wire(**repeated(self.back, *columns)),
            **repeated(self, "rows", "calls", "blocks", "copied", "copied_back"),
        )

    def pairs(self) -> Float64:
        """(W,) query-key pairs that each rank computes in the forward, times its heads."""
        total: Float64 = self.work[..., 0].sum(axis=0) * self.shape.num_heads
        return total

    @property
    def turns(self) -> int:
        """Parts of the heads that are computed one after the other."""
        return 1 if self.share is None else len(self.share)

    def busy(self, machine: Machine) -> tuple[Float64, Float64]:
        """(S, W) seconds of kernels and copies, forward and backward."""
        hardware, elements = machine.hardware, self.shape.num_heads * self.shape.head_dim
        start = self.turns * self.calls * hardware.call_seconds
        merge = self.merged * self.rows * (self.kernel.merge_bytes * elements / hardware.copy_bytes_per_s)
        around = self.rows * (self.kernel.backward_bytes * elements / hardware.copy_bytes_per_s)
        ends = np.array([hardware.tile_keys, hardware.tile_rows])
        flops = (self.work[..., ::2] + ends * self.work[..., 1::2]) * self.shape.flops_per_pair
        busy = flops[..., 0] / hardware.flops_per_s + start + merge + self.copied / machine.eager_bytes_per_s
        # FlashAttention's backward is three kernels: one before the main one, one after it.
        busy_back = (
            flops[..., 1] * (BACKWARD_FLOPS / hardware.backward_flops_per_s)
            + 3 * start
            + merge
            + around
            + self.blocks * (machine.block_seconds * self.shape.num_heads)
            + self.copied_back / machine.eager_bytes_per_s
        )
        return busy, busy_back

    def seconds(self, machine: Machine) -> tuple[Float64, Float64]:
        """(W,) seconds until each rank is done, forward and backward; all begin together."""
        hardware = machine.hardware
        busy, busy_back = self.busy(machine)
        reached = math.inf
        if self.group_cast:
            reached = machine.group_cast_bytes_per_s
        elif self.pace == "lockstep":
            step = machine.ring_seconds * (self.there.messages + self.back.messages > 0)
            busy, busy_back = busy + step, busy_back + step
        there, back = (way.seconds(hardware, reached, self.turns) for way in (self.there, self.back))
        taken = 0.0 if self.group_cast else hardware.contention
        if self.pace == "own":
            # Stage 0 is local.
            forward, backward = in_stages(
                *(of[:, None] for of in (busy, busy_back, there[1:], back[1:])),
                contention=taken,
                slots=np.array([min(self.slots or len(busy), len(busy))]),
                whole=np.array([self.whole]),
            )
            forward, backward = forward[0], backward[0]
        else:
            forward, backward = _PACES[self.pace](busy, busy_back, there, back, taken)
        heads = Wire.none(2, forward.size) if self.heads is None else self.heads
        if self.share is None:
            around = heads.seconds(hardware).sum(axis=0)
            return forward + around, backward + around
        # As in the plan's model nothing goes on beside the start of an exchange of heads.
        come, go = (heads.seconds(hardware) - hardware.step_seconds).reshape(2, self.turns, -1)
        starts = 2 * self.turns * hardware.blocking_seconds
        links = there.sum(axis=0), (there + back).sum(axis=0)
        return (
            starts + in_turns(forward, links[0], come, go, self.share, taken),
            starts + in_turns(backward, links[1], go, come, self.share, taken),
        )


def _lockstep(
    busy: Float64, busy_back: Float64, there: Float64, back: Float64, taken: float
) -> tuple[Float64, Float64]:
    """While a stage is computed the next one's rows travel; in the backward dK/dV travel beside them."""
    ahead = np.concatenate([there[1:], np.zeros_like(there[:1])])
    forward = there[0].max() + np.maximum(beside(busy, ahead, taken), ahead).max(axis=1).sum()
    both = ahead + back
    backward = there[0].max() + np.maximum(beside(busy_back, both, taken), both).max(axis=1).sum()
    return np.full(busy.shape[1], forward), np.full(busy.shape[1], backward)


def _blocking(
    busy: Float64, busy_back: Float64, there: Float64, back: Float64, taken: float
) -> tuple[Float64, Float64]:
    """An exchange ends for all ranks at once."""
    arrived = there.max(axis=1).sum()
    forward = arrived + busy.sum(axis=0)
    home = arrived + busy_back.sum(axis=0).max() + back.max(axis=1).sum()
    return forward, np.full_like(forward, home)


_PACES = {"lockstep": _lockstep, "blocking": _blocking}
