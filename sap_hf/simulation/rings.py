"""Rings: documents in zigzag over places, K and V passed on from place to place, alone or with Ulysses inside.

(Documents, ranks, Shape, ranks per node) -> Load. Ring attention (arXiv:2310.01889) as TransformerEngine runs it, USP
(arXiv:2405.07719) and LoongTrain (arXiv:2406.18485), read from the baselines of SandAI-org/MagiAttention.
"""

from __future__ import annotations

import numpy as np

from sap_hf.errors import LayoutError
from sap_hf.planning.cost import Float64, Shape
from sap_hf.planning.documents import Documents, Int64
from sap_hf.simulation.timing import FA3, Kernel, Load, Wire


def even_heads(shape: Shape, size: int) -> Shape:
    """Heads of a rank after an exchange among `size` ranks; kv heads are replicated where they do not last."""
    if shape.num_heads % size:
        raise LayoutError(f"num_heads={shape.num_heads}: {size} ranks cannot share them evenly.")
    kv_heads = max(1, shape.num_kv_heads // size)
    return Shape(shape.num_heads // size, kv_heads, shape.head_dim, shape.bytes_per_element)


def row_bytes(shape: Shape, local: Shape, size: int) -> tuple[int, int]:
    """Bytes of one row's q, and of its k and v as they travel: replicated where kv heads do not last."""
    element = shape.head_dim * shape.bytes_per_element
    return shape.num_heads * element, 2 * local.num_kv_heads * size * element


def exchange_heads(shape: Shape, local: Shape, rows: float, size: int, node: int, ranks: int) -> Wire:
    """What each of `size` neighbours sends of q, k, v and out of its `rows`; alike in the backward. (1, ranks) each."""
    q_bytes, kv_bytes = row_bytes(shape, local, size)
    amount = rows * (2 * q_bytes + kv_bytes) / size
    inside = min(size, node)
    one = np.ones((1, ranks))
    return Wire(
        one * amount * (inside - 1), one * amount * (size - inside), one * 4 * (size - 1), np.zeros_like(one)
    )


def kinds(documents: Documents) -> tuple[Int64, Float64]:
    """(M,) the lengths that there are, and (M, 1) how many documents have each."""
    lengths, count = np.unique(documents.lengths, return_counts=True)
    return lengths, count[:, None].astype(np.float64)


def chunked(lengths: Int64, parts: int) -> tuple[Float64, Int64]:
    """(M, parts) rows of each length's parts, equal until they run out, and (M,) ceil(length / parts)."""
    size = -(-lengths // parts)
    return np.clip(lengths[:, None] - size[:, None] * np.arange(parts), 0, size[:, None]).astype(
        np.float64
    ), size


def ring_p2p(documents: Documents, ranks: int, shape: Shape, node: int, kernel: Kernel = FA3) -> Load:
    """Every document zigzag over all ranks; all K and V travel around the ring."""
    return ring(documents, ranks, 1, shape, node, kernel)


def usp(documents: Documents, ranks: int, shape: Shape, node: int, kernel: Kernel = FA3) -> Load:
    """Ulysses inside the node, a ring over the nodes."""
    return ring(documents, ranks, min(node, ranks), shape, node, kernel)


def loongtrain(documents: Documents, ranks: int, shape: Shape, node: int, kernel: Kernel = FA3) -> Load:
    """USP with two rings, one inside windows of nodes and one over the windows."""
    inner = min(node, ranks)
    size = ranks // inner
    windows = max(w for w in range(1, size + 1) if size % w == 0 and w * w <= size)
    return ring(documents, ranks, inner, shape, node, kernel, windows)


def ring(
    documents: Documents,
    ranks: int,
    inner: int,
    shape: Shape,
    node: int,
    kernel: Kernel = FA3,
    windows: int | None = None,
) -> Load:
    """Every document zigzag over `ranks / inner` places, each of which is `inner` ranks that share the heads.

    Args:
        windows: places are passed through in so many windows, by two rings; None is one ring.
    """
    local = even_heads(shape, inner)
    size, group = ranks // inner, local.num_heads // local.num_kv_heads
    lengths, count = kinds(documents)
    valid, part = chunked(lengths, 2 * size)
    first, second = valid[:, :size], valid[:, ::-1][:, :size]
    both = first + second
    # A place's rows with each document padded to 2 * size equal parts, as all ranks store and copy them.
    rows = 2 * float((part * count[:, 0]).sum())
    # [place, source]: all queries on the source's first part if it lies before, else the second half on all its keys.
    early, late = (kernel.all_pairs(q, k, count, group) for q, k in ((both, first), (second, both)))
    place = np.arange(size)
    source = (place - place[1:, None]) % size
    before = source < place
    stages = size + (windows or 0) * (size > 1)
    work, q_share, k_share = np.zeros((stages, size, 4)), np.zeros((stages, size)), np.zeros((stages, size))
    work[0], q_share[0], k_share[0] = (
        (kernel.work(both, both, True, group) * count[..., None]).sum(axis=0),
        1,
        1,
    )
    work[1:size] = np.where(before[..., None], early[place, source], late[place, source])
    q_share[1:size], k_share[1:size] = np.where(before, 1.0, 0.5), np.where(before, 0.5, 1.0)
    longest = np.zeros((stages, size))
    longest[0] = both.max(axis=0)
    longest[1:size] = np.where(before, first.max(axis=0)[source], both.max(axis=0)[source])
    half_q, half_k = q_share == 0.5, k_share == 0.5

    q_bytes, kv_bytes = (amount * rows / inner for amount in row_bytes(shape, local, inner))
    # Gathered and padded around each call, halves cut out, and each step's out corrected into the sum.
    copied = q_bytes * (8 * q_share + half_q) + kv_bytes * (2 * k_share + half_k)
    # Of q, out and dout; dq is added to the sum, dk and dv are put together and added to what has travelled.
    copied_back = q_bytes * (12 * q_share + 3 * half_q) + kv_bytes * (10 * k_share + half_k)
    heads = None
    if inner > 1:
        heads = exchange_heads(shape, local, rows / inner, inner, node, ranks)
        moved = 4 * (2 * q_bytes + kv_bytes)
        copied[0] += moved
        copied_back[0] += moved

    # A place receives through the link that the one before it sends through.
    last = (place + 1) * inner % node == 0
    far = (last | np.roll(last, 1)) & (ranks > node)
    there, back = (
        Wire(
            hops * kv_bytes * np.full(size, inner < node),
            hops * kv_bytes * far,
            (hops > 0) * np.ones(size),
            np.zeros((stages, size)),
        )
        for hops in _hops(size, windows)
    )
    return Load(
        local,
        work,
        q_share * rows,
        np.ceil(q_share),
        kernel.blocks(len(documents), longest),
        there,
        back,
        kernel,
        pace="lockstep",
        merged=False,
        heads=heads,
        copied=copied,
        copied_back=copied_back,
    ).spread(inner)


def _hops(size: int, windows: int | None) -> tuple[Float64, Float64]:
    """(S, 1) times that K and V travel from place to place before each stage, and dK and dV after it.

    Between two places both directions share a communicator, and go one after the other.
    """

    def hop(members: int) -> float:
        return 2.0 if members == 2 else float(members > 1)

    stages = size + (windows or 0) * (size > 1)
    there, back = np.zeros((stages, 1)), np.zeros((stages, 1))
    if windows is None or size == 1:
        there[1:], back[1:] = hop(size), hop(size)
        return there, back
    length = size // windows
    there[1:size], back[:size] = hop(length), hop(length)
    # The next window's first rows travel all through a window.
    there[length:size:length] = hop(windows) / length
    # dK and dV take one hop more in each window, while nothing is computed, and one to the next window.
    back[length - 1 : size : length] = 0
    back[size:] = hop(length) + hop(windows)
    return there, back
