"""Wires: how long the rows of schedules travel, by each delivery.

(Bundle, Shape, Hardware) -> Wires. It decides between deliveries, so it is the same to the last bit on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

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
        return Wires(((),) * each[1], none, none, none)
    source, destination, start, stop = bundle.transfers
    amount = (stop - start) * shape.bytes_per_row
    at = ((bundle.transfer_step - 1) * each[1] + bundle.transfer_number) * cp_size
    sender, receiver = at + source, at + destination
    # [inside or outside the node, ...]
    outside = _leaves(source, destination, cp_size, node) * size
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
        pairs = peers.nonzero()[0]
        sends = pairs // cp_size
        receives = sends // cp_size * cp_size + pairs - sends * cp_size
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
    # [delivery; there, back or starts; stage, schedule, rank]
    all_ways = np.array(ways)
    best = all_ways[:, :2].max(axis=-1).sum(axis=1).argmin(axis=0)
    chosen = all_ways[best, :, np.arange(stages)[:, None], np.arange(each[1])]
    there, back, starts = chosen.transpose(2, 0, 1, 3)
    return Wires(
        tuple(
            tuple(names[way] for way in best[: of.stages, number].tolist())
            for number, of in enumerate(bundle.schedules)
        ),
        there,
        back,
        starts,
    )


def transfer_link_seconds(transfers: Int64, cp_size: int, shape: Shape, hardware: Hardware) -> Float64:
    """(W,) seconds that the bytes of transfers take on a rank's links at least, one way, in however many stages.

    A rank has its node's way to others to itself: what ranks share of it, another one may need in another stage.
    """
    source, destination, start, stop = transfers.T
    outside = _leaves(source, destination, cp_size, hardware.ranks_per_node) * cp_size
    amount = (stop - start) * shape.bytes_per_row
    sent, received = (
        sum_by(outside + rank, amount, 2 * cp_size).reshape(2, cp_size) for rank in (source, destination)
    )
    inside, own = np.maximum(sent, received)
    least: Float64 = np.maximum(inside / hardware.node_bytes_per_s, own / hardware.network_alone_bytes_per_s)
    return least


def gather_link_seconds(held: Int64, shape: Shape, hardware: Hardware) -> tuple[Float64, Float64]:
    """(W,) seconds that links need at least to bring all ranks' (W,) `held` rows to every rank, and dK/dV home."""
    cp_size, node = len(held), hardware.ranks_per_node
    if node >= cp_size:
        inside = np.maximum(held * (cp_size - 1), held.sum() - held) * shape.bytes_per_row
        home = inside / hardware.node_bytes_per_s
        return home, home
    nodes = np.arange(cp_size) // node
    ranks = np.bincount(nodes)[nodes]
    near = sum_by(nodes, held, int(nodes[-1]) + 1)[nodes]
    inside = np.maximum(held * (ranks - 1), near - held)
    outside = np.maximum(held * (cp_size - ranks), held.sum() - near)
    inside, outside = inside * shape.bytes_per_row, outside * shape.bytes_per_row
    home = link_seconds(inside, outside, outside, hardware)
    total = inside + outside
    once = link_seconds(total * (node - 1) // node, total // node, total // node, hardware)
    return np.minimum(once, home), home


def _leaves(source: Int64, destination: Int64, cp_size: int, node: int) -> NDArray[np.bool_] | bool:
    """(n,) whether a transfer goes to another node."""
    if node >= cp_size:
        return False
    of = np.arange(cp_size) // node
    leaves: NDArray[np.bool_] = of.take(source) != of.take(destination)
    return leaves


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
    shared = np.maximum(*of_node)[..., np.arange(ranks) // node]
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
