"""Neighbours: which ranks of a placement become those of one node, whose links to each other are faster.

Problem, runs and the rank of each -> a new number for every rank. What is cut afterwards goes to the same node first:
a node gives away, or takes, little more than what it has too much or too little of in all.
"""

from __future__ import annotations

import numpy as np

from sap_hf.planning.balance_swap import Problem
from sap_hf.planning.documents import Int64
from sap_hf.planning.schedule import sum_by


def into_nodes(p: Problem, runs: Int64, owner: Int64) -> Int64:
    """Ranks that read most of each other's rows into one node, all others so that nodes have even work.

    Args:
        runs: (n, 3) document, start, stop. owner: (n,) the rank of each.

    Returns:
        (W,) the new number of each rank.
    """
    work = sum_by(owner, p.upto(runs[:, 2]) - p.upto(runs[:, 1]), p.cp_size).tolist()
    team = [[rank] for rank in range(p.cp_size)]
    for one, other in _readers(p, runs, owner):
        mine, theirs = team[one], team[other]
        if mine is not theirs and len(mine) + len(theirs) <= p.node:
            mine += theirs
            for rank in theirs:
                team[rank] = mine
    teams = [mine for rank, mine in enumerate(team) if mine[0] == rank]
    teams.sort(key=lambda ranks: (-len(ranks), -sum(work[rank] for rank in ranks), ranks[0]))
    free = [list(p.near[first]) for first in range(0, p.cp_size, p.node)]
    load = [0] * len(free)
    number = np.zeros(p.cp_size, np.int64)
    for ranks in teams:
        # A team for which no node has enough left is split.
        while ranks:
            count = min(len(ranks), max(map(len, free)))
            to = min((n for n in range(len(free)) if len(free[n]) >= count), key=load.__getitem__)
            for rank in ranks[:count]:
                number[rank] = free[to].pop(0)
                load[to] += work[rank]
            ranks = ranks[count:]
    return number


def _readers(p: Problem, runs: Int64, owner: Int64) -> list[list[int]]:
    """Pairs of ranks of which one reads rows of the other, those that read most first."""
    part = runs[:, 2] - runs[:, 1] < p.lengths[runs[:, 0]]
    (document, start, stop), rank = runs[part].T, owner[part]
    order = np.lexsort((start, document))
    document, rows, rank = document[order], (stop - start)[order], rank[order]
    # A run reads the rows of all runs before it in its document.
    first = np.searchsorted(document, document)
    before = np.arange(len(document)) - first
    reader = np.repeat(np.arange(len(document)), before)
    read = np.arange(len(reader)) - np.repeat(np.cumsum(before) - before - first, before)
    one, other = np.minimum(rank[reader], rank[read]), np.maximum(rank[reader], rank[read])
    amount = sum_by(one * p.cp_size + other, rows[read] * (one < other), p.cp_size**2)
    pair = np.argsort(-amount, kind="stable")[: int((amount > 0).sum())]
    pairs: list[list[int]] = np.stack(np.divmod(pair, p.cp_size), axis=1).tolist()
    return pairs
