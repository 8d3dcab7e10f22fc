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
from sap_hf.planning.cost import Float64, Shape
from sap_hf.planning.hardware import Hardware


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


def head_bytes(shape: Shape, ulysses_size: int, rows: int) -> tuple[Float64, Float64]:
    """(U, U) bytes that each rank sends [source, destination] for q, k, v of its rows, and for out."""
    heads = split_heads(shape.num_heads, shape.num_kv_heads, ulysses_size)
    element = rows * shape.head_dim * shape.bytes_per_element
    there = np.array([(its.q_count + 2 * its.kv_count) * element for its in heads], np.float64)
    back = np.array([its.q_count * element for its in heads], np.float64)
    others = 1 - np.eye(ulysses_size)
    return others * there, others * back[:, None]


@functools.lru_cache
def head_seconds(shape: Shape, ulysses_size: int, rows: int, hardware: Hardware) -> Float64:
    """(U,) seconds of both exchanges of a forward; those of a backward move the same bytes the other way.

    Args:
        rows: of each rank.
    """
    if ulysses_size == 1:
        return np.zeros(1)
    node = np.arange(ulysses_size) // hardware.ranks_per_node
    inside = node == node[:, None]
    seconds = np.zeros(ulysses_size)
    for sent in head_bytes(shape, ulysses_size, rows):
        near, far = np.where(inside, sent, 0), np.where(inside, 0, sent)
        link = np.maximum(
            np.maximum(near.sum(axis=0), near.sum(axis=1)) / hardware.node_bytes_per_s,
            np.maximum(far.sum(axis=0), far.sum(axis=1)) / hardware.network_bytes_per_s,
        )
        # Heads that leave together are put together first, and taken apart where they arrive.
        copied = 2 * (sent.sum(axis=0) + sent.sum(axis=1)) / hardware.copy_bytes_per_s
        started = hardware.blocking_seconds + (ulysses_size - 1) * hardware.message_seconds
        seconds += link + copied + started
    return seconds
