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


def _readers(p: Problem, runs: Int64, owner: Int64) -> list[tuple[int, int]]:
    """Pairs of ranks of which one reads rows of the other, those that read most first."""
    part = np.flatnonzero(runs[:, 2] - runs[:, 1] < p.lengths[runs[:, 0]])
    part = part[np.lexsort((runs[part, 1], runs[part, 0]))]
    document, start, stop = runs[part].T.tolist()
    rank = owner[part].tolist()
    read: dict[tuple[int, int], int] = {}
    for i, reader in enumerate(rank):
        for j in range(i - 1, -1, -1):
            if document[j] != document[i]:
                break
            if rank[j] != reader:
                pair = min(rank[j], reader), max(rank[j], reader)
                read[pair] = read.get(pair, 0) + stop[j] - start[j]
    return sorted(read, key=lambda pair: (-read[pair], pair))
