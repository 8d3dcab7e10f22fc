"""Heads: which attention heads each of U ranks computes when they exchange heads for rows (DeepSpeed-Ulysses).

(query heads, kv heads, U) -> one Heads per rank. Query heads are dealt out in order, as evenly as whole heads allow;
a rank gets every kv head that its query heads read, so a kv head may go to several ranks.
"""

from __future__ import annotations

import dataclasses
import functools
from itertools import groupby

from sap_hf.errors import LayoutError


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
