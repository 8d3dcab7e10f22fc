"""Workloads: named distributions of document lengths, to plan and to measure with.

(name, rows, rng) -> lengths of one pack. numpy only. Documents are drawn one after the other until the pack is full,
the last one is cut to fit, and their order is shuffled.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sap_hf.config import nearest
from sap_hf.errors import ConfigError
from sap_hf.planning.documents import Int64

Draw = Callable[[np.random.Generator, int], Int64]

# (shortest, longest, documents): the histogram that MagiAttention publishes with its distributed attention benchmark
# (exps/dist_attn/benchmark/datasets/default/doc_length_distribution.csv).
MAGI = (
    (1, 10, 30254),
    (11, 50, 391188),
    (51, 100, 699596),
    (101, 200, 1377757),
    (201, 500, 3794735),
    (501, 1024, 3316785),
    (1025, 2048, 2106566),
    (2049, 4096, 988525),
    (4097, 8192, 410002),
    (8193, 16384, 173574),
    (16385, 32768, 115007),
    (32769, 65536, 18428),
    (65537, 131072, 22513),
    (131073, 196608, 18284),
)
# Per cent of documents below 1K, from there below 4K and below 8K rows, and the rest to 32K.
CHATQA2 = ((64, 1024, 21.9), (1024, 4096, 9.6), (4096, 8192, 8.9), (8192, 32768, 59.6))


def pack(name: str, rows: int, rng: np.random.Generator) -> Int64:
    """Lengths (n,) int64 of one pack's documents in random order; they sum to `rows`.

    Args:
        name: one of WORKLOADS.
        rng: numpy's generator; the same state gives the same pack.

    Raises:
        ConfigError: no such workload, or rows below 1.
    """
    if name not in WORKLOADS:
        raise ConfigError(
            f"workload {name!r} is not one of {', '.join(WORKLOADS)}.{nearest(name, list(WORKLOADS))}"
        )
    if rows < 1:
        raise ConfigError(f"rows={rows}: a pack holds at least one row.")
    return WORKLOADS[name](rng, rows)


def magi(rng: np.random.Generator, rows: int) -> Int64:
    """MagiAttention's histogram, documents cut at a quarter of the pack, as in its published charts."""
    longest = max(1, rows // 4)
    return _fill(rng, rows, lambda n: _histogram(rng, n), longest)


def magi_uncapped(rng: np.random.Generator, rows: int) -> Int64:
    """MagiAttention's histogram; one document may fill the pack."""
    return _fill(rng, rows, lambda n: _histogram(rng, n))


def megatron(rng: np.random.Generator, rows: int) -> Int64:
    """Lognormal with mean 1024 and sigma 1.5, clipped to 128..8192: Megatron-LM's mock data set of varying lengths."""
    location = np.log(1024) - 1.5**2 / 2
    return _fill(rng, rows, lambda n: np.clip(rng.lognormal(location, 1.5, n), 128, 8192).astype(np.int64))


def chatqa2(rng: np.random.Generator, rows: int) -> Int64:
    """Long-context fine-tuning, after the length shares published for ChatQA2's data: most documents have 8K to 32K
    rows. Log-uniform inside each bin.
    """
    low, high, share = (np.array(column, np.float64) for column in zip(*CHATQA2))

    def draw(n: int) -> Int64:
        bins = rng.choice(len(share), n, p=share / share.sum())
        return np.exp(rng.uniform(np.log(low[bins]), np.log(high[bins]))).astype(np.int64)

    return _fill(rng, rows, draw)


def short(rng: np.random.Generator, rows: int) -> Int64:
    """Chat: lognormal with median 400 and sigma 0.8, clipped to 16..4096."""
    return _fill(rng, rows, lambda n: np.clip(rng.lognormal(np.log(400), 0.8, n), 16, 4096).astype(np.int64))


def one(rng: np.random.Generator, rows: int) -> Int64:
    """One document: nothing to gain but balance."""
    return np.array([rows], np.int64)


def one_row(rng: np.random.Generator, rows: int) -> Int64:
    """Adversarial: documents of one row; nothing has to move."""
    return np.ones(rows, np.int64)


def just_over(rng: np.random.Generator, rows: int) -> Int64:
    """Adversarial: documents of C + 1 rows for 8 ranks of C rows: none fits a rank by one row."""
    return _fill(rng, rows, lambda n: np.full(n, -(-rows // 8) + 1))


def half(rng: np.random.Generator, rows: int) -> Int64:
    """Adversarial: one document of half the pack, the rest as in `short`."""
    long = max(1, rows // 2)
    if rows == long:
        return one(rng, rows)
    lengths = np.append(short(rng, rows - long), long)
    rng.shuffle(lengths)
    return lengths


def padding(rng: np.random.Generator, rows: int) -> Int64:
    """Adversarial: the last third of the pack, more than whole ranks, is padding that counts as one document.

    A collator that pads to a fixed length and does not mark it gives such packs. Here alone the order is kept.
    """
    tail = max(1, rows // 3)
    return np.append(short(rng, rows - tail), tail) if rows > tail else one(rng, rows)


def _histogram(rng: np.random.Generator, n: int) -> Int64:
    low, high, count = np.array(MAGI, np.int64).T
    bins = rng.choice(len(count), n, p=count / count.sum())
    lengths: Int64 = rng.integers(low[bins], high[bins] + 1)
    return lengths


def _fill(
    rng: np.random.Generator, rows: int, draw: Callable[[int], Int64], longest: int | None = None
) -> Int64:
    """Documents drawn in blocks until they fill `rows`; the last one is cut, then the order is shuffled."""
    drawn: list[Int64] = []
    total = 0
    while total < rows:
        block = draw(64)
        drawn.append(block if longest is None else np.minimum(block, longest))
        total += int(drawn[-1].sum())
    lengths = np.concatenate(drawn)
    ends = np.cumsum(lengths)
    last = int(np.searchsorted(ends, rows))
    lengths = lengths[: last + 1]
    lengths[last] -= ends[last] - rows
    rng.shuffle(lengths)
    return lengths


WORKLOADS: dict[str, Draw] = {
    "magi": magi,
    "magi_uncapped": magi_uncapped,
    "megatron": megatron,
    "chatqa2": chatqa2,
    "short": short,
    "one": one,
    "one_row": one_row,
    "just_over": just_over,
    "half": half,
    "padding": padding,
}
