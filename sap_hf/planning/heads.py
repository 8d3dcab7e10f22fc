"""Heads: which attention heads each of U ranks computes when they exchange heads for rows, and what that costs.

As in DeepSpeed-Ulysses (arXiv 2309.14509). (query heads, kv heads, U) -> one Heads per rank. Query heads are dealt out
in order, as evenly as whole heads allow; a rank gets every kv head that its query heads read, so a kv head may go to
to several ranks.
"""

from __future__ import annotations

import dataclasses
import functools
from itertools import groupby

import numpy as np

from sap_hf.errors import LayoutError
from sap_hf.planning.cost import Float64, Shape, beside
from sap_hf.planning.hardware import Hardware

# Numbers of turns that are weighed.
TURNS = (1, 2)


@dataclasses.dataclass(frozen=True)
class Heads:
    """One rank's heads.

    Attributes:
        q, kv: ranges of query heads and of kv heads.
        readers: for each of its kv heads, how many of its query heads read it; they follow each other.
    """

    q: slice
    kv: slice
    readers: tuple[int, ...]

    @property
    def q_count(self) -> int:
        """Query heads."""
        return int(self.q.stop - self.q.start)

    @property
    def kv_count(self) -> int:
        """Kv heads."""
        return int(self.kv.stop - self.kv.start)

    @property
    def even(self) -> bool:
        """Whether every kv head has equally many readers, as kernels for grouped queries expect."""
        return len(set(self.readers)) == 1


@functools.lru_cache
def split_heads(num_heads: int, num_kv_heads: int, ulysses_size: int) -> tuple[Heads, ...]:
    """The heads of each of `ulysses_size` ranks: the first ones have one query head more where it does not divide.

    Raises:
        LayoutError: more ranks than query heads.
    """
    if not 1 <= ulysses_size <= num_heads:
        raise LayoutError(
            f"ulysses_size={ulysses_size}: {num_heads} query heads go to at most {num_heads} ranks, whole.\n"
            f"  Use ulysses_size={num_heads} or less, and let rows be shared by the others."
        )
    group = num_heads // num_kv_heads
    least, more = divmod(num_heads, ulysses_size)
    found, start = [], 0
    for rank in range(ulysses_size):
        stop = start + least + (rank < more)
        read = [head // group for head in range(start, stop)]
        readers = tuple(len(list(same)) for _, same in groupby(read))
        found.append(Heads(slice(start, stop), slice(read[0], read[-1] + 1), readers))
        start = stop
    return tuple(found)


@functools.lru_cache
def split_turns(
    num_heads: int, num_kv_heads: int, ulysses_size: int, turns: int
) -> tuple[tuple[Heads, ...], ...]:
    """The heads of each rank in each of `turns`, one after the other: kv heads in order, the first turns have one more.

    In fewer turns where a rank has fewer kv heads.
    """
    split = split_heads(num_heads, num_kv_heads, ulysses_size)
    turns = min(turns, *(its.kv_count for its in split))
    return tuple(zip(*(_in_turns(its, turns) for its in split), strict=True))


def _in_turns(its: Heads, turns: int) -> list[Heads]:
    least, more = divmod(its.kv_count, turns)
    found, kv, q = [], its.kv.start, its.q.start
    for turn in range(turns):
        count = least + (turn < more)
        readers = its.readers[kv - its.kv.start :][:count]
        found.append(Heads(slice(q, q + sum(readers)), slice(kv, kv + count), readers))
        kv, q = kv + count, q + sum(readers)
    return found


@functools.lru_cache
def rank_shapes(shape: Shape, ulysses_size: int) -> tuple[Shape, ...]:
    """What each of the ranks computes after the exchange."""
    return tuple(
        dataclasses.replace(shape, num_heads=its.q_count, num_kv_heads=its.kv_count)
        for its in split_heads(shape.num_heads, shape.num_kv_heads, ulysses_size)
    )


def head_bytes(shape: Shape, ulysses_size: int, rows: int, turns: int = 1) -> tuple[Float64, Float64]:
    """(turns, U, U) bytes that each rank sends [source, destination] for q, k, v of its rows, and for out."""
    split = split_turns(shape.num_heads, shape.num_kv_heads, ulysses_size, turns)
    element = rows * shape.head_dim * shape.bytes_per_element
    there = np.array(
        [[(its.q_count + 2 * its.kv_count) * element for its in turn] for turn in split], np.float64
    )
    back = np.array([[its.q_count * element for its in turn] for turn in split], np.float64)
    others = 1 - np.eye(ulysses_size)
    return others * there[:, None], others * back[:, :, None]


def head_shares(shape: Shape, ulysses_size: int, turns: int) -> Float64:
    """(turns, U) part of each rank's query heads that is computed in each turn."""
    split = split_turns(shape.num_heads, shape.num_kv_heads, ulysses_size, turns)
    queries = np.array([[its.q_count for its in turn] for turn in split], np.float64)
    shares: Float64 = queries / queries.sum(axis=0)
    return shares


@dataclasses.dataclass(frozen=True, eq=False)
class HeadSeconds:
    """What a forward's exchanges of heads take, in n turns; a backward's move the same bytes the other way.

    Attributes:
        there, back: (n, U) seconds that q, k and v of each turn travel, and out.
        around: (U,) of what does not go on beside kernels: copies, and the start of each exchange.
        share: (n, U) part of a rank's query heads that is computed in each turn.
        again: whether a recompute exchanges them once more.
    """

    there: Float64
    back: Float64
    around: Float64
    share: Float64
    again: bool

    @functools.cached_property
    def exposed(self) -> Float64:
        """(U,) what no kernel hides, forward and backward: the first turn's heads come, the last one's results go."""
        ends = self.there[0] + self.there[-1] + self.back[0] + self.back[-1]
        seconds: Float64 = ends + 2 * self.around + self._recompute
        return seconds

    @property
    def _recompute(self) -> Float64:
        """(U,) with nothing beside them."""
        alone: Float64 = self.there.sum(axis=0) + self.back.sum(axis=0) + self.around
        return alone * self.again

    def with_layer(self, seconds: Float64, links: Float64, contention: float) -> Float64:
        """(4, ..., groups * U) the fields of Seconds of layers, heads included.

        Args:
            seconds: (4, ..., groups) of all turns without heads.
            links, contention: as of `in_turns`, forward and backward.
        """
        made = np.repeat(seconds[..., None], self.around.size, axis=-1)
        for way, (come, go) in enumerate(((self.there, self.back), (self.back, self.there))):
            busy, exposed = made[2 * way : 2 * way + 2]
            total = in_turns(busy + exposed, links[way, ..., None], come, go, self.share, contention)
            exposed[:] = total + self.around - busy
        made[3] += self._recompute
        return made.reshape(*seconds.shape[:-1], -1)


def in_turns(
    seconds: Float64, links: Float64, come: Float64, go: Float64, share: Float64, contention: float
) -> Float64:
    """(..., U) seconds of a layer's forward, or backward, with the exchanges of heads in n turns.

    Beside a turn the heads of the next one and the results of the one before travel, while its own rows do not.

    Args:
        seconds: (..., U) of all turns without heads; of these, links: rows are on the way.
        come, go: (n, U) seconds that heads of each turn travel, and results.
        share: (n, U) part of the layer that is computed in each turn.
        contention: of the Hardware.
    """
    free = np.maximum(seconds - links, 0)
    total: Float64 = seconds - free + come[0] + go[-1]
    beside_it = np.zeros_like(come)
    beside_it[:-1] += come[1:]
    beside_it[1:] += go[:-1]
    for part, wire in zip(share, beside_it, strict=True):
        total += np.maximum(beside(part * free, wire, contention), wire)
    return total


@functools.lru_cache
def head_seconds(
    shape: Shape, ulysses_size: int, rows: int, hardware: Hardware, recomputed: bool = False, turns: int = 1
) -> HeadSeconds:
    """What exchanging the heads of a layer takes.

    Args:
        rows: of each rank.
        recomputed, turns: as in Plan.
    """
    node = np.arange(ulysses_size) // hardware.ranks_per_node
    inside = node == node[:, None]
    ways, around = [], np.zeros(ulysses_size)
    for sent in head_bytes(shape, ulysses_size, rows, turns):
        near, far = np.where(inside, sent, 0), np.where(inside, 0, sent)
        link = np.maximum(
            np.maximum(near.sum(axis=1), near.sum(axis=2)) / hardware.node_bytes_per_s,
            np.maximum(far.sum(axis=1), far.sum(axis=2)) / hardware.network_bytes_per_s,
        )
        ways.append(link + (ulysses_size - 1) * hardware.message_seconds)
        # Heads that leave together are put together first, and taken apart where they arrive.
        around += 2 * (sent.sum(axis=(0, 1)) + sent.sum(axis=(0, 2))) / hardware.copy_bytes_per_s
        around += len(sent) * hardware.blocking_seconds
    there, back = ways
    return HeadSeconds(there, back, around, head_shares(shape, ulysses_size, turns), recomputed)


@functools.lru_cache
def least_head_seconds(
    shape: Shape, ulysses_size: int, rows: int, hardware: Hardware, recomputed: bool = False
) -> Float64:
    """(U,) seconds that exchanged heads add at least to a layer's forward and backward, in any number of TURNS."""
    each = (head_seconds(shape, ulysses_size, rows, hardware, recomputed, turns) for turns in TURNS)
    least: Float64 = np.min([seconds.exposed for seconds in each], axis=0)
    return least
