"""Scheduled: a Schedule as a Load, for our own plans and for peers that move only the rows that are read.

Schedule -> Load, Plan -> Load: local steps are stage 0, every tile is one segment of a kernel call.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from sap_hf.planning.cost import Float64, Shape, copied_bytes, tile_rows
from sap_hf.planning.documents import Int64
from sap_hf.planning.heads import head_bytes, head_shares
from sap_hf.planning.plan import Plan
from sap_hf.planning.schedule import (
    DESTINATION,
    K_START,
    K_STOP,
    Q_START,
    Q_STOP,
    RANK,
    SOURCE,
    START,
    STOP,
    Bundle,
    Schedule,
    Step,
    is_full,
)
from sap_hf.simulation.timing import FA3, Kernel, Load, Wire


def load(
    schedule: Schedule, ranks: int, shape: Shape, node: int, kernel: Kernel = FA3, group_cast: bool = False
) -> Load:
    """The schedule of a layer with full attention as a Load.

    Args:
        node: ranks per node.
        kernel: one that merges inside a call reads and writes a query row once a stage, however many tiles it is in.
        group_cast: not the steps' deliveries but MagiAttention's own exchange carries all transfers.
    """
    stages = [[step for step in schedule.steps if not len(step.transfers)]]
    stages += [[step] for step in schedule.steps if len(step.transfers)]
    work, rows, calls, blocks = (np.zeros((len(stages), ranks, *more)) for more in ((4,), (), (), ()))
    wires = np.zeros((2, 4, len(stages), ranks))
    for i, steps in enumerate(stages):
        for step in steps:
            tiles, full = step.tiles, is_full(step.tiles)
            q = (tiles[:, Q_STOP] - tiles[:, Q_START]).astype(np.float64)
            k = (tiles[:, K_STOP] - tiles[:, K_START]).astype(np.float64)
            segments = kernel.work(q, k, ~full, shape.num_heads // shape.num_kv_heads)
            np.add.at(work[i], tiles[:, RANK], segments)
            key = tiles[:, RANK] * (int(tiles[:, Q_STOP].max(initial=0)) + 1) + tiles[:, Q_START]
            once = np.unique(key, return_index=True)[1] if kernel.merges else slice(None)
            np.add.at(rows[i], tiles[once, RANK], q[once])
            # Causal tiles are one call, full ones another.
            call = tiles[:, RANK], full.astype(np.int64)
            segments_of, longest = np.zeros((2, ranks, 2))
            np.add.at(segments_of, call, 1)
            np.maximum.at(longest, call, k)
            calls[i] += (segments_of > 0).sum(axis=1)
            blocks[i] += kernel.blocks(segments_of, longest).sum(axis=1)
            if len(step.transfers):
                for way in (0, 1):
                    wires[way, :, i] += _wire(step, ranks, shape.bytes_per_row, node, way == 1, group_cast)
    there, back = Wire(*wires[0]), Wire(*wires[1])
    return Load(
        shape,
        work,
        rows,
        calls,
        blocks,
        there,
        back,
        kernel,
        slots=schedule.slots,
        whole=schedule.whole,
        group_cast=group_cast,
    )


def planned(plan: Plan, kernel: Kernel = FA3) -> Load:
    """A Plan's layers with full attention; with ulysses_size U, on all U ranks that share what they hold."""
    groups, size = plan.placement.cp_size, plan.ulysses_size
    node = plan.outer_hardware.ranks_per_node
    made = executed(plan.schedule(None), groups, plan.outer_shape, node, kernel)
    if size == 1:
        return made
    inside = np.arange(size) // plan.hardware.ranks_per_node
    same = inside == inside[:, None]
    columns: list[list[Float64]] = [[], [], [], []]
    packed = np.zeros(size)
    for sent in head_bytes(plan.shape, size, plan.rows_per_rank, plan.turns):
        near, far = np.where(same, sent, 0), np.where(same, 0, sent)
        links = (np.maximum(part.sum(axis=1), part.sum(axis=2)) for part in (near, far))
        for column, of in zip(
            columns, (*links, np.full(sent.shape[:2], size - 1.0), np.zeros(sent.shape[:2]))
        ):
            column.append(of)
        # Heads that leave together are put together first, and taken apart where they arrive.
        packed += 2 * (sent.sum(axis=(0, 1)) + sent.sum(axis=(0, 2)))
    spread = made.spread(size)
    around = np.zeros_like(spread.rows)
    around[0] = np.tile(packed, groups)
    return dataclasses.replace(
        spread,
        # Of all turns there, then back.
        heads=Wire(*(np.tile(np.concatenate(column), groups) for column in columns)),
        share=np.tile(head_shares(plan.shape, size, plan.turns), groups),
        copied=spread.copied + around,
        copied_back=spread.copied_back + around,
    )


def executed(schedule: Schedule, ranks: int, shape: Shape, node: int, kernel: Kernel = FA3) -> Load:
    """`load` with everything that `runtime.attention` copies around the kernels."""
    made = load(schedule, ranks, shape, node, kernel)
    held = tile_rows(Bundle.of([schedule], ranks))
    copied, copied_back = (copies[:, 0].astype(np.float64) for copies in copied_bytes(held, shape))
    # What it packs before dK/dV leave is among its copies.
    back = dataclasses.replace(made.back, packed=np.zeros_like(made.back.packed))
    return dataclasses.replace(made, merged=False, back=back, copied=copied, copied_back=copied_back)


def _wire(
    step: Step, ranks: int, bytes_per_row: int, node: int, returning: bool, group_cast: bool
) -> tuple[Float64, ...]:
    """The four columns of Wire, (W,) each, as `planning.wires.wire_seconds` counts them.

    In a group cast a row goes to another node once and is handed on inside, by kernels that read rows where they lie.
    """
    source, destination = step.transfers[:, SOURCE], step.transfers[:, DESTINATION]
    amount = (step.transfers[:, STOP] - step.transfers[:, START]) * bytes_per_row
    outside = (source // node != destination // node).astype(np.int64)
    sent, received, messages = (np.zeros((ranks, 2)) for _ in range(3))
    np.add.at(sent, (source, outside), amount)
    np.add.at(received, (destination, outside), amount)
    np.add.at(messages[:, 0], source, 1)
    np.add.at(messages[:, 1], destination, 1)
    peers = np.zeros((ranks, ranks), bool)
    peers[source, destination] = True
    within, across = np.maximum(sent, received).T
    count = np.maximum(peers.sum(axis=0), peers.sum(axis=1)).astype(np.float64)
    none = np.zeros(ranks)
    if group_cast:
        once = _once_per_node(step.transfers, ranks, node) * bytes_per_row
        # The ranks of a node share what it receives.
        share = once.sum(axis=0) / min(node, ranks)
        across = np.maximum(once.sum(axis=1), share[np.arange(ranks) // node])
        # A kernel, not messages: its cost does not grow with the number of peers.
        return received.sum(axis=1), across, np.minimum(count, 1), none
    if step.delivery == "all_gather" and not returning:
        size = min(node, ranks)
        hops = none + (size + ranks // size - 2)
        if node < ranks:
            # A ring through all ranks: what a node receives passes it once, over the links of all its ranks.
            within, across = (within + across) * (size - 1) / size, (within + across) / size
        return within, across, hops, none
    if step.delivery == "p2p":
        return within, across, messages.max(axis=1), none
    return within, across, count, 2 * (received if returning else sent).sum(axis=1)


def _once_per_node(transfers: Int64, ranks: int, node: int) -> Float64:
    """(W, nodes) rows that each rank has to send to each other node, every row once."""
    source, target = transfers[:, SOURCE], transfers[:, DESTINATION] // node
    keep = source // node != target
    key, start, stop = (source * ranks + target)[keep], transfers[keep, START], transfers[keep, STOP]
    order = np.lexsort((start, key))
    key, start, stop = key[order], start[order], stop[order]
    # Rows already counted: the furthest stop so far inside one key; keys are lifted apart so that one scan does it.
    lift = key * (int(stop.max(initial=0)) + 1)
    reach = np.maximum.accumulate(np.append(0, stop + lift)[:-1])
    fresh = np.maximum(stop + lift - np.maximum(start + lift, reach), 0)
    rows = np.zeros((ranks, -(-ranks // node)))
    np.add.at(rows, (key // ranks, key % ranks), fresh)
    return rows
