"""The same batch twice gives the same bits, out and gradients, whenever and in whatever order messages arrive.

In float32, where the order of a sum is seen. Rows are read by several ranks, whose gradients meet at the owner.
"""

import dataclasses
import functools
import itertools
import random
import time

import numpy as np
import pytest
import torch

from sap_hf.runtime import transport
from tests.dist import run_ranks
from tests.runtime.doubles import LateTransport
from tests.runtime.parity import TENSORS, run_case
from tests.runtime.test_parity import SETTINGS, cases_with

WORLD = 4
LONGEST_SECONDS = 0.002
# strategy, delivery, stages, max_remote_rows, remote_kv
STAGED = itertools.product(("sap",), ("p2p", "all_to_all"), (1, 2, 4), (None,), ("refetch", "keep"))
WAYS = list(dict.fromkeys([*SETTINGS, *STAGED]))
# Heads exchanged in turns; of nine over three, two ranks compute one kv head, in different turns.
HEADS = [("turns", heads, kv_heads) for heads, kv_heads in ((8, 4), (9, 3))]
PACKS = {((24,), "contiguous"), ((24,), "balanced"), ((3, 14, 2, 9, 1, 1, 6, 12), "zigzag")}


class UnsteadyTransport(LateTransport):
    """Late by another time, and with the peers in another order, at every exchange of every rank."""

    def __init__(self, rank):
        super().__init__()
        self.draw = random.Random(rank)

    def post(self, sends, receives, group):
        time.sleep(self.draw.uniform(0, LONGEST_SECONDS))
        return super().post(self._shuffled(sends), self._shuffled(receives), group)

    def post_all_to_all(self, *exchange):
        time.sleep(self.draw.uniform(0, LONGEST_SECONDS))
        return super().post_all_to_all(*exchange)

    def post_all_gather(self, *exchange):
        time.sleep(self.draw.uniform(0, LONGEST_SECONDS))
        return super().post_all_gather(*exchange)

    def _shuffled(self, messages):
        """Between two ranks messages match in order: only the peers change places."""
        peers = sorted({peer for peer, _ in messages})
        self.draw.shuffle(peers)
        return sorted(messages, key=lambda message: peers.index(message[0]))


@functools.cache
def cases(way):
    settings, changes = way, {}
    if way in HEADS:
        settings = SETTINGS[0]
        changes = {"ulysses_size": 2, "turns": 2, "heads": way[1], "kv_heads": way[2]}
    return [
        dataclasses.replace(case, dtype="float32", **changes)
        for case in cases_with(*settings)
        if not case.options and (case.lengths, case.layout) in PACKS
    ]


def repeat(rank, world):
    """By way: what differs from the first of several runs, as (case, which run, tensor)."""
    transports = {
        "again": transport.Transport(),
        "late": LateTransport(),
        "unsteady": UnsteadyTransport(rank),
    }
    found = {way: [] for way in (*WAYS, *HEADS)}
    for way in found:
        for case in cases(way):
            first = run_case(rank, world, case)
            for name, double in transports.items():
                with transport.using(double):
                    again = run_case(rank, world, case)
                found[way] += [(case, name, x) for x in TENSORS if not torch.equal(first[x], again[x])]
    return found


@pytest.fixture(scope="module")
def differences():
    return run_ranks(repeat, WORLD, poison=True, timeout=90)


@pytest.mark.parametrize("way", [*WAYS, *HEADS], ids=lambda way: "-".join(map(str, way)))
def test_out_and_gradients_are_the_same_bits_again(differences, way):
    assert [by_rank[way] for by_rank in differences] == [[]] * WORLD


@pytest.mark.parametrize("way", WAYS, ids=lambda way: "-".join(map(str, way)))
def test_gradients_of_several_readers_meet_at_an_owner(way):
    # Two addends have one sum in either order; with its own gradient an owner of two readers has three.
    for case in cases(way):
        transfers = case.plan(WORLD).schedule().transfers
        readers = np.zeros(sum(case.lengths), np.int64)
        for _, _, start, stop in transfers:
            readers[start:stop] += 1
        assert readers.max() >= 2, case
