"""Gradient checkpointing: the recompute takes out and lse from the forward instead of communicating again."""

import dataclasses

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from sap_hf.runtime import attention, transport
from sap_hf.runtime.attention import Kept
from tests.dist import run_ranks
from tests.runtime.doubles import CountingTransport
from tests.runtime.parity import Case, inputs

WORLD = 2
CASE = Case(lengths=(3, 9, 2), heads=4, kv_heads=2, strategy="sap", layout="contiguous")
WAYS = [(reentrant, remote_kv) for reentrant in (True, False) for remote_kv in ("refetch", "keep")]


def run(rank, world, ways):
    """(bytes, gradients) of a checkpointed layer per way: forward, backward, and without checkpointing."""
    given, plan = inputs(CASE, world), CASE.plan(world)
    rows = torch.from_numpy(plan.rows(rank))
    results = []
    with transport.using(CountingTransport()) as counting:
        for reentrant, remote_kv in [(None, "refetch"), *ways]:
            leaves = [tensor[rows].requires_grad_() for tensor in (given.q, given.k, given.v)]
            kept = None if reentrant is None else Kept()

            def layer(q, k, v, kept=kept, remote_kv=remote_kv):
                return attention(q * 1.0, k * 1.0, v * 1.0, plan, kept=kept, remote_kv=remote_kv)

            out = layer(*leaves) if reentrant is None else checkpoint(layer, *leaves, use_reentrant=reentrant)
            forward = counting.take()
            out.backward(given.dout[rows])
            results.append((forward, counting.take(), [out.detach(), *(leaf.grad for leaf in leaves)]))
    return results


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(run, WORLD, WAYS)


@pytest.mark.parametrize("way", range(len(WAYS)), ids=[f"reentrant={r}-{kv}" for r, kv in WAYS])
def test_the_recompute_moves_no_byte_and_changes_no_bit(ranks, way):
    for results in ranks:
        plain_forward, plain_backward, plain = results[0]
        forward, backward, tensors = results[way + 1]
        assert plain_forward + plain_backward > 0
        # A plain layer's bytes: remote K/V once forward, once backward, dK/dV home. No third K/V.
        assert (forward, backward) == (plain_forward, plain_backward)
        for tensor, expected in zip(tensors, plain):
            assert torch.equal(tensor, expected)


def test_a_case_moves_rows_to_one_rank_only():
    moved = dataclasses.replace(CASE).plan(WORLD).rows_moved
    assert moved[0, 1] > 0
    assert moved[1, 0] == 0
