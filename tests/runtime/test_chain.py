"""A recurrence and a convolution over a row that ranks share equal those over the whole row, gradients too."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from sap_hf.runtime.chain import Chain
from tests.dist import run_ranks

ROWS, WIDTH, REACH = 5, 3, 2


def run(x: torch.Tensor, decay: torch.Tensor, taps: torch.Tensor, chain: Chain) -> torch.Tensor:
    """A convolution, and then a recurrence over its result."""
    before = chain.shift(x[-REACH:])
    reached = torch.cat([before, x])
    mixed = sum(tap * reached[i : i + len(x)] for i, tap in enumerate(taps))
    state = chain.receive(mixed, (WIDTH,), x.dtype)
    out = []
    for row in mixed:
        state = torch.sigmoid(decay * row) * state + row
        out.append(state * row)
    return chain.send(torch.stack(out), state)


def inputs(world: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((world * ROWS, WIDTH), (WIDTH,), (REACH + 1, WIDTH), (world * ROWS, WIDTH))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


def on_rank(rank: int, world: int) -> list[torch.Tensor]:
    x, decay, taps, wanted = inputs(world)
    mine = slice(rank * ROWS, (rank + 1) * ROWS)
    x, decay, taps = (each.requires_grad_() for each in (x[mine].clone(), decay, taps))
    chain = Chain(dist.group.WORLD, rank - 1 if rank > 0 else None, rank + 1 if rank < world - 1 else None)
    # Twice: two layers' messages must not be mixed up.
    out = run(run(x, decay, taps, chain), decay, taps, chain)
    out.backward(wanted[mine])
    return [each.detach() for each in (out, x.grad, decay.grad, taps.grad)]


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_give_what_the_whole_row_does(world: int) -> None:
    x, decay, taps, wanted = inputs(world)
    for each in (x, decay, taps):
        each.requires_grad_()
    alone = Chain(None, None, None)
    truth = run(run(x, decay, taps, alone), decay, taps, alone)
    truth.backward(wanted)
    found = run_ranks(on_rank, world, poison=True)
    for place, expected in enumerate((truth, x.grad)):
        assert torch.allclose(torch.cat([each[place] for each in found]), expected, rtol=0, atol=1e-11)
    for place, expected in enumerate((decay.grad, taps.grad), 2):
        assert torch.allclose(sum(each[place] for each in found), expected, rtol=0, atol=1e-11)


def from_frozen_rows(rank: int, world: int) -> bool:
    """Of a state that needs no gradient, none is sent and none is waited for."""
    chain = Chain(dist.group.WORLD, rank - 1 if rank > 0 else None, rank + 1 if rank < world - 1 else None)
    x, weight = torch.ones(WIDTH), torch.ones(WIDTH, requires_grad=True)
    state = chain.receive(x, (WIDTH,), x.dtype) + x
    chain.send(weight * state, state).sum().backward()
    return bool((weight.grad == rank + 1).all())


def test_a_state_without_gradients_sends_none_back() -> None:
    assert all(run_ranks(from_frozen_rows, 3))
