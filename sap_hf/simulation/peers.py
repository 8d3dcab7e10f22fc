"""Peers: what other tools do with a pack, each a function (Documents, ranks, Shape, ranks per node) -> what is timed.

Read from the baselines of SandAI-org/MagiAttention (exps/dist_attn/baselines), which wrap Megatron-LM's and
TransformerEngine's parts: what is computed and moved, in which order, and what PyTorch copies around the kernels, which
there are varlen calls on gathered rows.
"""

from __future__ import annotations

import dataclasses
import heapq

import numpy as np

from sap_hf.planning.cost import Shape
from sap_hf.planning.documents import Documents
from sap_hf.planning.layout import Layout, contiguous
from sap_hf.simulation.rings import chunked, even_heads, exchange_heads, kinds, row_bytes
from sap_hf.simulation.scheduled import executed, load
from sap_hf.simulation.timing import FA3, FFA, Kernel, Load, Wire
from sap_hf.strategies.sap import sap

# Rows per chunk, and stages of remote rows, of MagiAttention in the benchmark.
MAGI_CHUNK = 2048
MAGI_STAGES = 2


def ulysses(documents: Documents, ranks: int, shape: Shape, node: int, kernel: Kernel = FA3) -> Load:
    """Ranks exchange rows for heads, attend to whole documents, and exchange back (DeepSpeed-Ulysses).

    Raises:
        LayoutError: heads that `ranks` does not divide.
    """
    local = even_heads(shape, ranks)
    rows = documents.rows / ranks
    found, count = kinds(documents)
    lengths = found.astype(np.float64)
    work = kernel.work(lengths, lengths, True, local.num_heads // local.num_kv_heads)
    work = (work * count).sum(axis=0)
    # Gathered: q, k, v; scattered into zeros: out. The backward gathers q, out, dout, k, v, and scatters dq, dk, dv.
    q_bytes, kv_bytes = row_bytes(shape, local, ranks)
    copied, copied_back = 5 * q_bytes + 2 * kv_bytes, 9 * q_bytes + 5 * kv_bytes
    moved = 4 * (2 * q_bytes + kv_bytes)
    one = np.ones((1, ranks))
    return Load(
        local,
        np.tile(work, (1, ranks, 1)),
        one * documents.rows,
        one,
        one * kernel.blocks(len(documents), lengths.max()),
        Wire.none(1, ranks),
        Wire.none(1, ranks),
        kernel,
        pace="blocking",
        merged=False,
        heads=exchange_heads(shape, local, rows, ranks, node, ranks),
        copied=one * rows * (copied + moved),
        copied_back=one * rows * (copied_back + moved),
    )


def ring_allgather(documents: Documents, ranks: int, shape: Shape, node: int, kernel: Kernel = FA3) -> Load:
    """Every document zigzag over all ranks; all K and V are gathered, then two calls (Llama 3, arXiv:2407.21783)."""
    lengths, count = kinds(documents)
    valid, part = chunked(lengths, 2 * ranks)
    group = shape.num_heads // shape.num_kv_heads
    seen = np.cumsum(valid, axis=1)
    seen = np.where(valid > 0, seen, 0)
    calls = (kernel.work(valid, seen, True, group) * count[..., None]).sum(axis=0)
    work = (calls[:ranks] + calls[::-1][:ranks])[None]
    keys = (seen * count).sum(axis=0)
    keys = keys[:ranks] + keys[::-1][:ranks]
    longest = kernel.blocks(len(documents), seen.max(axis=0))
    rows = 2 * float((part * count[:, 0]).sum())
    total = rows * ranks
    q_bytes, kv_bytes = row_bytes(shape, shape, 1)
    # Gathered rows are put in order; each half of q is cut out, gathered, padded and put back.
    copied = q_bytes * rows * 9 + kv_bytes * (2 * total + 2 * keys)
    # dk and dv of all rows are cleared, padded and added in both calls, and put in order for the reduce-scatter.
    copied_back = q_bytes * rows * 14 + kv_bytes * ((2 + 1 + 2 * (1 + 3) + 2) * total + 4 * keys)
    one = np.ones((1, ranks))
    size = min(node, ranks)
    amount = rows * kv_bytes
    # A ring over all ranks, as many of them side by side as there are links to other nodes.
    across = amount * (ranks - size) / size
    wire = Wire(one * amount * (ranks - 1), one * across, one * 2 * (ranks - 1), 0 * one)
    return Load(
        shape,
        work,
        one * rows,
        2 * one,
        (longest[:ranks] + longest[::-1][:ranks])[None],
        wire,
        wire,
        kernel,
        pace="blocking",
        merged=False,
        copied=one * copied,
        copied_back=one * copied_back,
    )


def magi_a2av(documents: Documents, ranks: int, shape: Shape, node: int, kernel: Kernel = FFA) -> Load:
    """Chunks placed by a heap; the rows that are read travel by all-to-all, in two stages (MagiAttention)."""
    schedule = sap(documents, heap_of_chunks(documents, ranks), None, MAGI_STAGES)
    steps = tuple(dataclasses.replace(step, delivery="all_to_all") for step in schedule.steps)
    return load(dataclasses.replace(schedule, steps=steps), ranks, shape, node, kernel)


def magi_native(documents: Documents, ranks: int, shape: Shape, node: int, kernel: Kernel = FFA) -> Load:
    """The same; a row goes to each other node once, by MagiAttention's own kernels."""
    schedule = sap(documents, heap_of_chunks(documents, ranks), None, MAGI_STAGES)
    return load(schedule, ranks, shape, node, kernel, group_cast=True)


def contiguous_needed(
    documents: Documents, ranks: int, shape: Shape, node: int, kernel: Kernel = FA3
) -> Load:
    """Neighbouring rows stay together; only rows that are read travel (as in NeMo Automodel). By our executor."""
    layout = contiguous(documents.rows, ranks)
    return executed(sap(documents, layout, whole=True), ranks, shape, node, kernel)


def heap_of_chunks(documents: Documents, ranks: int, rows: int = MAGI_CHUNK) -> Layout:
    """Chunks of the pack, busiest first, each to the rank with least work that still has room."""
    share = -(-documents.rows // ranks)
    rows = min(rows, share)
    while share % rows:
        rows -= 1
    edges = np.arange(0, ranks * share + 1, rows)
    ends = documents.cu_seqlens
    # Work up to each edge: whole documents before it, and the part of the one that it cuts.
    at = np.minimum(edges, documents.rows)
    document = np.minimum(documents.index_of(at), len(documents) - 1)
    whole = np.append(0, np.cumsum(documents.lengths * (documents.lengths + 1) // 2))
    inside = at - ends[document]
    work = np.diff(whole[document] + inside * (inside + 1) // 2)
    heap = [(0, rank) for rank in range(ranks)]
    owner = np.zeros(len(work), np.int64)
    held = np.zeros(ranks, np.int64)
    for chunk in np.argsort(-work, kind="stable").tolist():
        load_, rank = heapq.heappop(heap)
        owner[chunk] = rank
        held[rank] += rows
        if held[rank] < share:
            heapq.heappush(heap, (load_ + int(work[chunk]), rank))
    order = np.argsort(owner, kind="stable")
    segments = np.stack([owner, edges[:-1], edges[1:]], axis=1)[order]
    return Layout("heap", ranks, share, segments)
