"""Wires: how long the rows of schedules travel, by each delivery.

(Bundle, Shape, Hardware) -> Wires. It decides between deliveries, so it is the same to the last bit on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sap_hf.planning.cost import Float64, Shape, Wires
from sap_hf.planning.documents import Int64
from sap_hf.planning.hardware import Hardware
from sap_hf.planning.schedule import Bundle, sum_by


def wire_seconds(bundle: Bundle, names: Sequence[str], shape: Shape, hardware: Hardware) -> Wires:
    """Each stage by the delivery among `names` that takes least there and back, the earlier one on a tie.

    Inside the node and between nodes different links carry the rows, at the same time. An all-gather brings every row
    to a node once, spread over its ranks, its own ones too (NCCL's and gloo's ring); dK/dV come home by an all-to-all.
    """
    cp_size, stages, node = bundle.cp_size, bundle.stages, hardware.ranks_per_node
    # [stage, schedule, rank]
    each = (stages, len(bundle.schedules), cp_size)
    size = stages * each[1] * cp_size
    if not stages:
        none = np.zeros(each)
        return Wires(((),) * each[1], none, none, none, np.zeros(each[1:]))
    source, destination, start, stop = bundle.transfers
    amount = (stop - start) * shape.bytes_per_row
    at = ((bundle.transfer_step - 1) * each[1] + bundle.transfer_number) * cp_size
    sender, receiver = at + source, at + destination
    # [inside or outside the node, ...]
    outside = (source // node != destination // node) * size
    sent, received = (
        sum_by(outside + rank, amount, 2 * size).reshape(2, *each) for rank in (sender, receiver)
    )
    busiest = np.maximum(sent, received)
    link = link_seconds(busiest[0], sent[1], received[1], hardware)
    ways: list[tuple[Float64, ...]] = []
    for name in names:
        if name == "p2p":
            messages = [np.bincount(rank, minlength=size) for rank in (sender, receiver)]
            starts = _starts(np.maximum(*messages).reshape(each), hardware)
            ways.append((link + starts, link + starts, starts))
            continue
        # Rows of many places are read and written once more, to lie together when they are sent. Their gradients do.
        peers = np.zeros(size * cp_size, bool)
        peers[sender * cp_size + destination] = True
        sends, to = np.divmod(peers.nonzero()[0], cp_size)
        receives = sends // cp_size * cp_size + to
        count = np.maximum(*(np.bincount(of, minlength=size) for of in (sends, receives))).reshape(each)
        packed = sent.sum(axis=0) * 2 / hardware.copy_bytes_per_s
        starts = _starts(count, hardware)
        there, back = link + packed + starts, link + starts
        if name == "all_gather":
            ranks = min(node, cp_size)
            # A ring through all ranks: what a node receives passes it once, over the links of all its ranks.
            total = busiest.sum(axis=0)
            near, far = (total * (ranks - 1) // ranks, total // ranks) if node < cp_size else busiest
            hops = ranks + cp_size // ranks - 2
            there = link_seconds(near, far, far, hardware) + hardware.step_seconds
            there = (there + hops * hardware.message_seconds) * (count.max(axis=-1, keepdims=True) > 0)
        ways.append((there, back, starts))
    best = np.array([there.max(axis=-1) + back.max(axis=-1) for there, back, _ in ways]).argmin(axis=0)
    there, back, starts = (np.choose(best[..., None], way) for way in zip(*ways))
    all_sent, all_received = sent.sum(axis=1), received.sum(axis=1)
    inside = np.maximum(all_sent[0], all_received[0])
    return Wires(
        tuple(
            tuple(names[way] for way in best[: of.stages, number].tolist())
            for number, of in enumerate(bundle.schedules)
        ),
        there,
        back,
        starts,
        link_seconds(inside, all_sent[1], all_received[1], hardware),
    )


def gather_link_seconds(held: Int64, shape: Shape, hardware: Hardware) -> tuple[Float64, Float64]:
    """(W,) seconds that links need at least to bring all ranks' (W,) `held` rows to every rank, and dK/dV home."""
    cp_size, node = len(held), hardware.ranks_per_node
    nodes = np.arange(cp_size) // node
    ranks = np.bincount(nodes)[nodes]
    near = sum_by(nodes, held, int(nodes[-1]) + 1)[nodes]
    inside = np.maximum(held * (ranks - 1), near - held)
    outside = np.maximum(held * (cp_size - ranks), held.sum() - near)
    inside, outside = inside * shape.bytes_per_row, outside * shape.bytes_per_row
    home = link_seconds(inside, outside, outside, hardware)
    if node >= cp_size:
        return home, home
    total = inside + outside
    once = link_seconds(total * (node - 1) // node, total // node, total // node, hardware)
    return np.minimum(once, home), home


def link_seconds(
    inside: Float64 | Int64, sent: Float64 | Int64, received: Float64 | Int64, hardware: Hardware
) -> Float64:
    """(..., W) seconds of bytes inside the node, and of those that leave for other nodes and come from them.

    Both travel at the same time, and in both directions. Ranks of one node share its way to other nodes.
    """
    ranks, node = inside.shape[-1], hardware.ranks_per_node
    if node >= ranks:
        return inside / hardware.node_bytes_per_s
    first = np.arange(0, ranks, node)
    of_node = (np.add.reduceat(way, first, axis=-1) for way in (sent, received))
    shared = np.repeat(np.maximum(*of_node), np.diff(first, append=ranks), axis=-1)
    # A rank has its share at least, and no more than a rank alone; with the node's last byte it is done, too.
    own = np.maximum(sent, received)
    done = np.minimum(own / hardware.network_bytes_per_s, shared / (hardware.network_bytes_per_s * node))
    network = np.maximum(own / hardware.network_alone_bytes_per_s, done)
    seconds: Float64 = np.maximum(inside / hardware.node_bytes_per_s, network)
    return seconds


def _starts(messages: Int64, hardware: Hardware) -> Float64:
    """What it costs to start that many messages as one group."""
    total: Float64 = messages * hardware.message_seconds + hardware.step_seconds * (messages > 0)
    return total
