"""The exchange of heads for rows: what arrives is what the neighbours hold, and gradients come back whole."""

import pytest
import torch
import torch.distributed as dist

from sap_hf.runtime.heads import HeadExchange
from tests.dist import run_ranks

ROWS, D, DV = 5, 6, 4


def material(world, heads, kv_heads):
    torch.manual_seed(0)
    shapes = [(heads, D), (kv_heads, D), (kv_heads, DV)]
    return [torch.randn(world * ROWS, *shape, dtype=torch.float64) for shape in shapes]


def exchange(rank, world, size, heads, kv_heads):
    whole, case = material(world, heads, kv_heads), (size, heads, kv_heads)
    own = slice(rank * ROWS, (rank + 1) * ROWS)
    q, k, v = (tensor[own].clone().requires_grad_() for tensor in whole)
    there = HeadExchange.of(q, k, dist.group.WORLD, rank, size)
    its, first = there.mine, rank - rank % size
    neighbours = slice(first * ROWS, (first + size) * ROWS)
    got = there.scatter(q, k, v)
    expected = [t[neighbours, r] for t, r in zip(whole, (its.q, its.kv, its.kv), strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), case

    # Query heads come back as they went.
    back = there.gather(got[0])
    assert torch.equal(back, q), case
    # Every element weighs what its row and head say, so a misplaced gradient shows.
    weights = material(world, heads, kv_heads)
    (back * weights[0][own]).sum().backward(retain_graph=True)
    assert torch.equal(q.grad, weights[0][own]), case
    sum((t * w[neighbours, its.kv]).sum() for t, w in zip(got[1:], weights[1:], strict=True)).backward()
    copies = torch.zeros(kv_heads, dtype=torch.float64)
    for part in there.heads:
        copies[part.kv] += 1
    for tensor, weight in zip((k, v), weights[1:], strict=True):
        torch.testing.assert_close(tensor.grad, weight[own] * copies[:, None], rtol=1e-14, atol=0)


# By ranks: those that exchange heads, heads, kv heads.
CASES = {3: [(3, 4, 1)], 4: [(2, 8, 2), (4, 8, 2), (2, 9, 3), (4, 9, 3)]}


def exchange_all(rank, world):
    for case in CASES[world]:
        exchange(rank, world, *case)


@pytest.mark.parametrize("world", CASES, ids=lambda world: f"W{world}")
def test_heads_travel_and_gradients_return(world):
    run_ranks(exchange_all, world)
