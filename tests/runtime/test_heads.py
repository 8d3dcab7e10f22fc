"""The exchange of heads for rows: what arrives is what the neighbours hold, and goes home as it came, turn by turn."""

import pytest
import torch
import torch.distributed as dist

from sap_hf.planning.heads import split_turns
from sap_hf.runtime.heads import HeadExchange
from tests.dist import run_ranks

ROWS, D, DV = 5, 6, 4


def material(world, heads, kv_heads):
    torch.manual_seed(0)
    shapes = [(heads, D), (kv_heads, D), (kv_heads, DV)]
    return [torch.randn(world * ROWS, *shape, dtype=torch.float64) for shape in shapes]


def exchange(rank, world, size, heads, kv_heads, turns):
    whole, case = material(world, heads, kv_heads), (size, heads, kv_heads, turns)
    own = slice(rank * ROWS, (rank + 1) * ROWS)
    first = rank - rank % size
    neighbours = slice(first * ROWS, (first + size) * ROWS)
    there = [
        HeadExchange(dist.group.WORLD, rank, split) for split in split_turns(heads, kv_heads, size, turns)
    ]
    coming = [turn.to_heads(*(tensor[own] for tensor in whole)) for turn in there]
    # All turns are on the way before the first one is waited for.
    home = []
    for turn, way in zip(there, coming, strict=True):
        got, its = way.wait(), turn.mine
        expected = [t[neighbours, r] for t, r in zip(whole, (its.q, its.kv, its.kv), strict=True)]
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), case
        home.append((turn.to_rows(got), turn.to_rows(got[:1])))
    for turn, (all_three, alone) in zip(there, home, strict=True):
        came, queries = all_three.wait(), alone.wait()
        for at, its in enumerate(turn.heads):
            expected = [t[own, r] for t, r in zip(whole, (its.q, its.kv, its.kv), strict=True)]
            assert all(torch.equal(a, b) for a, b in zip(came[3 * at : 3 * at + 3], expected, strict=True))
            assert torch.equal(queries[at], expected[0]), case


# By ranks: those that exchange heads, heads, kv heads, turns.
CASES = {
    3: [(3, 4, 1, 1), (3, 9, 9, 2)],
    4: [(2, 8, 2, 1), (4, 8, 2, 1), (2, 9, 3, 1), (2, 9, 3, 2), (4, 9, 3, 1), (2, 8, 8, 3)],
}


def exchange_all(rank, world):
    for case in CASES[world]:
        exchange(rank, world, *case)


@pytest.mark.parametrize("world", CASES, ids=lambda world: f"W{world}")
def test_heads_travel_and_go_home(world):
    run_ranks(exchange_all, world)
