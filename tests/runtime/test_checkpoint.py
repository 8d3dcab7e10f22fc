"""Gradient checkpointing: the recompute takes out and lse from the forward instead of communicating again."""

import dataclasses

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from sap_hf.runtime import attention, transport
from sap_hf.runtime.layer import Kept
from tests.dist import run_ranks
from tests.runtime.doubles import CountingTransport, LateTransport
from tests.runtime.parity import Case, inputs

WORLD = 2
CASE = Case(lengths=(3, 9, 2), heads=4, kv_heads=2, strategy="sap", layout="contiguous")
HEADS = dataclasses.replace(CASE, ulysses_size=2)
CASES = {"rows": CASE, "heads": HEADS, "turns": dataclasses.replace(HEADS, kv_heads=4, turns=2)}
# Whether the checkpoint is reentrant, None for no checkpoint.
WAYS = [(reentrant, remote_kv) for reentrant in (None, True, False) for remote_kv in ("refetch", "keep")]


class Counted(CountingTransport, LateTransport):
    """Counts, and delivers as late as it may."""

    def __init__(self):
        LateTransport.__init__(self)
        CountingTransport.__init__(self)


def run(rank, world):
    """(bytes, gradients) of a layer per case and way: forward, backward."""
    results = {}
    with transport.using(Counted()) as counting:
        for name, case in CASES.items():
            given, plan = inputs(case, world), case.plan(world)
            rows = torch.from_numpy(plan.rows(rank))
            for reentrant, remote_kv in WAYS:
                leaves = [tensor[rows].requires_grad_() for tensor in (given.q, given.k, given.v)]
                kept = None if reentrant is None else Kept()

                def layer(q, k, v, plan=plan, kept=kept, remote_kv=remote_kv):
                    # sin saves its input: what comes after attention needs out again, as a projection does.
                    return attention(q * 1.0, k * 1.0, v * 1.0, plan, kept=kept, remote_kv=remote_kv).sin()

                out = (
                    layer(*leaves)
                    if reentrant is None
                    else checkpoint(layer, *leaves, use_reentrant=reentrant)
                )
                forward = counting.take()
                out.backward(given.dout[rows])
                tensors = [out.detach(), *(leaf.grad for leaf in leaves)]
                results[name, reentrant, remote_kv] = forward, counting.take(), tensors
    return results


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(run, WORLD)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("reentrant", "remote_kv"), [way for way in WAYS if way[0] is not None])
def test_the_recompute_fetches_no_row_again_and_changes_no_bit(ranks, name, reentrant, remote_kv):
    for results in ranks:
        plain_forward, plain_backward, plain = results[name, None, "refetch"]
        forward, backward, tensors = results[name, reentrant, remote_kv]
        assert plain_forward + plain_backward > 0
        # A plain layer's bytes: remote K/V once forward, once backward, dK/dV home. No third K/V. Heads are exchanged
        # once more, unless they are kept.
        again = plain_forward if name != "rows" and remote_kv == "refetch" else 0
        assert (forward, backward) == (plain_forward, plain_backward + again)
        for tensor, expected in zip(tensors, plain):
            assert torch.equal(tensor, expected)


def test_a_case_moves_rows_to_one_rank_only():
    moved = dataclasses.replace(CASE).plan(WORLD).rows_moved
    assert moved[0, 1] > 0
    assert moved[1, 0] == 0
