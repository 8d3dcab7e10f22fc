"""Chart: MagiAttention's published benchmark of context-parallel attention on H100, as data, with its packs.

Source: docs/source/blog/cp_benchmark.md of SandAI-org/MagiAttention, "Distributed Level", varlen causal mask on H100,
read off the bars to about 5 TFLOP/s; settings and packs after exps/dist_attn of the same repository.
"""

from __future__ import annotations

import functools

import numpy as np

from sap_hf.planning.cost import Shape
from sap_hf.planning.documents import Documents
from sap_hf.planning.workloads import MAGI

SHAPE = Shape(num_heads=64, num_kv_heads=8, head_dim=128, bytes_per_element=2)
ROWS_PER_RANK = 8192
PER_NODE = 8
RANKS = (8, 16, 32, 64)
PACKS = 20
SEED = 42

# TFLOP/s per GPU at RANKS, forward and backward; useful causal pairs alone count.
PUBLISHED = {
    "ulysses": ((278, 199, 186, 163), (332, 294, 276, 248)),
    "ring_p2p": ((89, 68, 47, 28), (97, 86, 57, 29)),
    "ring_allgather": ((288, 292, 240, 180), (178, 155, 104, 55)),
    "usp": ((260, 252, 255, 191), (325, 308, 284, 195)),
    "loongtrain": ((258, 251, 208, 193), (320, 253, 179, 171)),
    "hybrid_dcp": ((277, 222, 190, 160), (226, 219, 190, 163)),
    "magi_a2av": ((387, 305, 275, 206), (335, 353, 325, 242)),
    "magi_native": ((459, 426, 314, 237), (360, 371, 333, 264)),
}


@functools.cache
def packs(ranks: int) -> tuple[Documents, ...]:
    """The benchmark's packs for that many ranks, drawn as its sampler draws them: same histogram, order and seed.

    Every document has the middle length of its bin and is split into parts of a quarter of the pack. All parts are
    shuffled and cut into packs, and the packs are shuffled.
    """
    rows = ROWS_PER_RANK * ranks
    longest = rows // 4
    low, high, count = np.array(MAGI, np.int64).T
    middle = (low + high) // 2
    rest = middle % longest
    whole = np.repeat(longest, int((middle // longest * count).sum()))
    parts = np.concatenate([whole, np.repeat(rest[rest > 0], count[rest > 0])]).astype(np.int32)
    rng = np.random.default_rng(SEED)
    rng.shuffle(parts)
    ends = np.cumsum(parts, dtype=np.int64)
    # A list is shuffled with other draws than an array; the benchmark shuffles a list.
    order = list(range(int(ends[-1]) // rows))
    rng.shuffle(order)
    made = []
    for i in order[:PACKS]:
        first, last = np.searchsorted(ends, [i * rows, (i + 1) * rows], side="right")
        borders = np.union1d(ends[first:last], [i * rows, (i + 1) * rows]) - i * rows
        made.append(Documents.from_cu_seqlens(borders, rows))
    return tuple(made)
