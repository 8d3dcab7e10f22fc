"""Calibrate: what this machine computes, copies and sends in a second, measured with the code that will run on it.

All ranks of the run -> one Hardware, the same on every rank. All ranks measure at the same time, as in training, and
the slowest one counts.
"""

from __future__ import annotations

import math
import socket
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from sap_hf.errors import LayoutError
from sap_hf.kernels import Scoring, Segments, pick
from sap_hf.planning.cost import BACKWARD_FLOPS, Shape
from sap_hf.planning.hardware import Hardware
from sap_hf.runtime import transport
from sap_hf.runtime.group import ranks_per_node

# A mean over this long: processes under a CPU quota run fast for a moment and then not at all.
SECONDS = 1.0
# A single call or message grows until it takes this long: what it costs to begin is then small beside it.
LONG = 0.05
MOST_ROWS = 16_384
MOST_BYTES = 1 << 28
FEW_ROWS = 16
SMALL_BYTES = 1 << 10
MESSAGES = 8
# Rows of a short document.
DOCUMENT = 256


def calibrate(name: str, shape: Shape, device: torch.device) -> Hardware:
    """Measure this run's ranks; every rank of the default process group calls it.

    Args:
        name: of the Hardware, for tables.
        shape: the attention layer to compute: a kernel's flop/s depend on its heads.
        device: where this rank computes. bfloat16 on CUDA, float32 elsewhere.

    Returns:
        Hardware. With a single node its network is the node's own.

    Raises:
        LayoutError: fewer than two ranks, or nodes with different numbers of ranks.
    """
    world = dist.get_world_size()
    if world < 2:
        raise LayoutError(
            "calibration with 1 process: nothing can be sent. Start it with torchrun --nproc-per-node N."
        )
    per_node = agreed_ranks_per_node()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    call, (forward, tile_keys), (backward, tile_rows), compute = _kernel(shape, device, dtype)
    first, message = message_costs(device)
    node = link_bytes_per_s(1, per_node, device, first) if per_node > 1 else None
    network, alone = (
        link_bytes_per_s(per_node, world, device, first, one_in=senders) if world > per_node else None
        for senders in (1, per_node)
    )
    # The furthest links are those that are worth hiding.
    far = (per_node, world, network) if network is not None else (1, per_node, node or 0.0)
    return Hardware(
        name=name,
        flops_per_s=forward,
        backward_flops_per_s=backward,
        copy_bytes_per_s=_copy_bytes_per_s(device),
        call_seconds=call,
        tile_keys=tile_keys,
        tile_rows=tile_rows,
        node_bytes_per_s=node or network or 0.0,
        network_bytes_per_s=network or node or 0.0,
        network_alone_bytes_per_s=max(alone or 0.0, network or node or 0.0),
        message_seconds=message,
        step_seconds=max(first - message, message),
        blocking_seconds=max(_blocking_seconds(compute, per_node, device), first),
        contention=_contention(compute, *far, device),
        ranks_per_node=per_node,
    )


def agreed_ranks_per_node() -> int:
    """What the launcher says, or how many ranks follow each other on one host."""
    given = ranks_per_node()
    hosts: list[tuple[str, int | None]] = [("", None)] * dist.get_world_size()
    dist.all_gather_object(hosts, (socket.gethostname(), given))
    sizes = {size for _, size in hosts} if given else {hosts.count(host) for host in hosts}
    if len(sizes) > 1 or not sizes:
        raise LayoutError(
            f"nodes have {', '.join(map(str, sorted(sizes, key=str)))} ranks: one number is needed."
        )
    return int(sizes.pop() or 1)


def _mean_seconds(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the slowest rank's mean over about SECONDS; all ranks call it equally often."""

    def run(count: int) -> float:
        dist.barrier()
        started = time.perf_counter()
        for _ in range(count):
            function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        spent = torch.tensor((time.perf_counter() - started) / count, dtype=torch.float64, device=device)
        dist.all_reduce(spent, op=dist.ReduceOp.MAX)
        return float(spent)

    run(1)
    return run(min(max(math.ceil(SECONDS / run(3)), 3), 10_000))


def _kernel(
    shape: Shape, device: torch.device, dtype: torch.dtype
) -> tuple[float, tuple[float, float], tuple[float, float], Callable[[], object]]:
    """Seconds to begin a call; flop/s and what a row costs beyond its pairs, forward and backward; a long forward."""
    kernel, _ = pick(
        "auto",
        device_type=device.type,
        dtype=dtype,
        head_dim=shape.head_dim,
        value_dim=shape.head_dim,
        softcap=None,
        window=None,
    )
    scoring = Scoring(shape.head_dim**-0.5)

    def seconds(rows: int, document: int) -> tuple[float, float, Callable[[], object]]:
        q, dout = (
            torch.randn(rows, shape.num_heads, shape.head_dim, device=device, dtype=dtype) for _ in range(2)
        )
        k, v = (
            torch.randn(rows, shape.num_kv_heads, shape.head_dim, device=device, dtype=dtype)
            for _ in range(2)
        )
        borders = range(0, rows + 1, document)
        segments = Segments.build(borders, borders, causal=True, device=device)
        out, lse = kernel.forward(q, k, v, segments, scoring)
        out = out.to(dtype)

        def compute() -> object:
            return kernel.forward(q, k, v, segments, scoring)

        return (
            _mean_seconds(compute, device),
            _mean_seconds(lambda: kernel.backward(dout, q, k, v, out, lse, segments, scoring), device),
            compute,
        )

    call = seconds(FEW_ROWS, FEW_ROWS)[0]
    rows = 8 * FEW_ROWS
    *long, compute = seconds(rows, rows)
    while long[0] < LONG and rows < MOST_ROWS:
        rows *= 2
        *long, compute = seconds(rows, rows)
    document = min(DOCUMENT, rows // 2)
    short = seconds(rows, document)[:2]
    forward, backward = (
        rate_and_row(rows, document, one - call, many - call, factor * shape.flops_per_pair)
        for one, many, factor in zip(long, short, (1, BACKWARD_FLOPS))
    )
    return call, forward, backward, compute


def rate_and_row(
    rows: int, document: int, one: float, many: float, flops_per_pair: float
) -> tuple[float, float]:
    """flop/s, and the pairs that take as long as what a row costs beyond its own.

    Args:
        one, many: seconds of so many rows as one document, and as documents of `document` rows.
    """
    pairs, fewer = (rows * (length + 1) / 2 for length in (rows, document))
    one = max(one, 1e-9)
    if many * pairs <= one * fewer or many >= one:
        # Short documents are no slower than their pairs, or the machine is too noisy to tell.
        return pairs * flops_per_pair / one, 0.0
    per_pair = (one - many) / (pairs - fewer)
    return flops_per_pair / per_pair, (one / per_pair - pairs) / rows


def _copy_bytes_per_s(device: torch.device) -> float:
    """Bytes read and written by gathering rows, as they are packed for sending."""
    rows = torch.randn(1 << (18 if device.type == "cuda" else 14), 256, device=device)
    index = torch.randperm(len(rows), device=device)
    return 2 * rows.nbytes / _mean_seconds(lambda: rows.index_select(0, index), device)


def _contention(
    compute: Callable[[], object], peer_distance: int, span: int, rate: float, device: torch.device
) -> float:
    """Part of its speed that `compute` loses beside an exchange that takes half as long."""
    alone = _mean_seconds(compute, device)
    size = min(max(int(rate * alone / 2), SMALL_BYTES), MOST_BYTES)
    exchange = _exchange(peer_distance, span, size, 1, device)
    both = _exchange(peer_distance, span, size, 1, device, compute)
    return min(max((both - max(alone, exchange)) / min(alone, exchange), 0.0), 0.9)


def _blocking_seconds(compute: Callable[[], object], per_node: int, device: torch.device) -> float:
    """What a small exchange among neighbours adds to what is computed before it."""
    span = per_node if per_node > 1 else dist.get_world_size()

    def added() -> float:
        alone = _mean_seconds(compute, device)
        return _exchange(1, span, SMALL_BYTES, 1, device, before=compute) - alone

    # A small difference of two long times: one of them taken in a bad moment would decide.
    return statistics.median(added() for _ in range(3))


def _exchange(
    peer_distance: int,
    span: int,
    size: int,
    messages: int,
    device: torch.device,
    beside: Callable[[], object] = lambda: None,
    before: Callable[[], object] = lambda: None,
    one_in: int = 1,
) -> float:
    """Seconds of one exchange in which every rank sends to the one `peer_distance` further within each `span`.

    Args:
        beside: what is computed while it is under way. before: what is computed first.
        one_in: of so many neighbours only the first one sends and receives.
    """
    rank, group = dist.get_rank(), dist.group.WORLD
    assert group is not None
    first = rank - rank % span
    there = first + (rank - first + peer_distance) % span
    here = first + (rank - first - peer_distance) % span
    leaving, coming = (torch.zeros(messages, size, dtype=torch.uint8, device=device) for _ in range(2))

    def exchange() -> None:
        sends, receives = [(there, part) for part in leaving], [(here, part) for part in coming]
        if rank % one_in:
            sends, receives = [], []
        before()
        pending = transport.current().post(sends, receives, group)
        beside()
        pending.wait()

    return _mean_seconds(exchange, device)


def message_costs(device: torch.device) -> tuple[float, float]:
    """Seconds of an exchange of one small message, and of each further one."""
    world = dist.get_world_size()
    one = _exchange(1, world, SMALL_BYTES, 1, device)
    many = _exchange(1, world, SMALL_BYTES, MESSAGES, device)
    return one, max((many - one) / (MESSAGES - 1), one / 100)


def link_bytes_per_s(
    peer_distance: int, span: int, device: torch.device, start: float, one_in: int = 1
) -> float:
    """Per rank and direction, all ranks sending at once, or one in so many."""
    size = 1 << 16
    seconds = _exchange(peer_distance, span, size, 1, device, one_in=one_in)
    while seconds - start < LONG and size < MOST_BYTES:
        size *= 4
        seconds = _exchange(peer_distance, span, size, 1, device, one_in=one_in)
    return size / max(seconds - start, 1e-9)
