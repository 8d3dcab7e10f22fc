"""Stretches of documents on a line of ranks: what mixes tokens gives what every document alone does."""

from __future__ import annotations

import pytest
import torch

import sap_hf
from sap_hf.models.interface import Shard
from sap_hf.models.mixers import line_of
from sap_hf.runtime.group import ALONE, world
from tests.dist import run_ranks

WIDTH, REACH = 3, 2
PACKS = {
    "documents over three ranks": (3, 17, 2, 2),
    "documents that end at the borders of shards": (6, 6, 5, 1, 6),
    "one row each, and padding": (1, 1, 1, 4, 1, 1, 13),
    "a document that begins just before a border": (5, 7, 7, 3),
}


def document_alone(x: torch.Tensor, decay: torch.Tensor, taps: torch.Tensor) -> torch.Tensor:
    reached = torch.cat([torch.zeros_like(x[:1]).expand(REACH, -1), x])
    mixed = sum(tap * reached[i : i + len(x)] for i, tap in enumerate(taps))
    return recur(mixed, torch.zeros_like(x[0]), decay)[0]


def recur(rows: torch.Tensor, state: torch.Tensor, decay: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    out = []
    for row in rows:
        state = torch.sigmoid(decay * row) * state + row
        out.append(state * row)
    return torch.stack(out), state


def inputs(rows: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((rows, WIDTH), (WIDTH,), (REACH + 1, WIDTH), (rows, WIDTH))
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


def on_rank(
    rank: int, size: int, packs: list[tuple[int, ...]], ulysses_size: int
) -> list[list[torch.Tensor]]:
    return [_one_pack(rank, size, lengths, ulysses_size) for lengths in packs]


def _one_pack(rank: int, size: int, lengths: tuple[int, ...], ulysses_size: int) -> list[torch.Tensor]:
    plan = sap_hf.plan(lengths, cp_size=size, layout="contiguous", ulysses_size=ulysses_size)
    x, decay, taps, wanted = inputs(plan.rows_per_rank * size)
    x, wanted = x[plan.rows(rank)], wanted[plan.rows(rank)]
    x, decay, taps = (each.requires_grad_() for each in (x, decay, taps))
    line = line_of(Shard(plan, world() if size > 1 else ALONE, sap_hf.SapConfig()), x.device)
    spaced, kept = line.spaced(x[None], REACH)
    mixed = sum(tap * spaced[0, i : spaced.shape[1] - REACH + i] for i, tap in enumerate(taps))[kept - REACH]
    state = line.receive(mixed, (WIDTH,), x.dtype)
    outs = []
    for rows in mixed.split(torch.tensor(line.cu_seqlens).diff().tolist()):
        out, last = recur(rows, state, decay)
        outs.append(out)
        state = torch.zeros_like(state)
    out = line.send(torch.cat(outs), last)
    used = torch.from_numpy(plan.rows(rank) < plan.documents.rows)[:, None]
    (out * used).backward(wanted)
    return [each.detach() for each in (out, x.grad, decay.grad, taps.grad)]


@pytest.mark.parametrize(("size", "ulysses_size"), [(1, 1), (2, 1), (4, 1), (4, 2)])
def test_documents_on_ranks_equal_documents_alone(size: int, ulysses_size: int) -> None:
    packs = list(PACKS.values())
    if size == 1:
        found = [on_rank(0, 1, packs, 1)]
    else:
        found = run_ranks(on_rank, size, packs, ulysses_size, poison=True)
    for at, lengths in enumerate(packs):
        rows = sum(lengths)
        x, decay, taps, wanted = inputs(len(found) * len(found[0][at][0]))
        for each in (x, decay, taps):
            each.requires_grad_()
        truth = torch.cat([document_alone(part, decay, taps) for part in x[:rows].split(list(lengths))])
        truth.backward(wanted[:rows])
        for place, expected in enumerate((truth, x.grad[:rows])):
            whole = torch.cat([each[at][place] for each in found])[:rows]
            assert torch.allclose(whole, expected, rtol=0, atol=1e-11), lengths
        for place, expected in enumerate((decay.grad, taps.grad), 2):
            assert torch.allclose(sum(each[at][place] for each in found), expected, rtol=0, atol=1e-11), (
                lengths
            )


def test_rows_that_are_not_neighbours_are_refused() -> None:
    plan = sap_hf.plan([9, 7], cp_size=2, layout="zigzag")
    with pytest.raises(sap_hf.errors.UnsupportedAttention, match="Set layout='contiguous'"):
        line_of(Shard(plan, ALONE, sap_hf.SapConfig()), torch.device("cpu"))


def test_a_shard_shorter_than_the_reach_is_refused() -> None:
    plan = sap_hf.plan([1], cp_size=1, layout="contiguous")
    line = line_of(Shard(plan, ALONE, sap_hf.SapConfig()), torch.device("cpu"))
    with pytest.raises(sap_hf.errors.UnsupportedAttention, match=r"holds 1 rows, and .* reaches 2 rows back"):
        line.halo(torch.zeros(1, 1, WIDTH), REACH)
