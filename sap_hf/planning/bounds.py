"""Bounds: seconds that plans of one placement do not go below, known before they are weighed.

(Plan, what its ranks hold) -> seconds. What takes longer than a plan that has been found is not derived at all. Sums
are in another order than those of `cost`: bounds hold up to rounding.
"""

from __future__ import annotations

import numpy as np

from sap_hf.planning import cost
from sap_hf.planning.cost import Float64
from sap_hf.planning.documents import Int64
from sap_hf.planning.plan import Plan
from sap_hf.planning.schedule import RANK, Schedule, sum_by, tile_pairs
from sap_hf.planning.wires import gather_link_seconds, transfer_link_seconds


def even_seconds(plan: Plan, pairs: int) -> float:
    """What `pairs` in all take at least, however evenly they are placed."""
    share, rows = (np.array([of // plan.placement.cp_size]) for of in (pairs, plan.documents.rows))
    return float(kernel_seconds(plan, share, rows))


def kernel_seconds(plan: Plan, pairs: Int64, rows: Int64) -> Float64:
    """(...) the kernels alone on the busiest rank: no schedule is faster.

    Args:
        pairs, rows: (..., groups) that ranks of a placement hold, as `work_held` counts them.
    """
    layers = sum(plan.windows.values())
    return _and_heads(plan, cost.kernel_seconds(pairs, rows, layers, plan.outer_shape, plan.hardware))


def moving_seconds(plan: Plan, pairs: Int64, rows: Int64) -> float:
    """In any number of stages: kernels, and the way of the rows that the planner moves, and of their dK/dV."""
    way = np.zeros(len(rows))
    for made, count in _in_parts(plan):
        way += count * _link_seconds(plan, made)
    return _kernels_and_ways(plan, pairs, rows, way, 2 * way)


def gathering_seconds(plan: Plan, pairs: Int64, rows: Int64) -> float:
    """In one stage, which brings every row to every rank, maybe by a collective: what reads them comes after it.

    Args:
        plan: one by `sap`, whose tiles in parts read as little of other ranks as any.
    """
    there, home = gather_link_seconds(rows, plan.outer_shape, plan.outer_hardware)
    layers, none = sum(plan.windows.values()), np.zeros_like(rows)
    after = none.copy()
    for made, count in _in_parts(plan):
        for step in made.steps[1:]:
            after += count * sum_by(step.tiles[:, RANK], tile_pairs(step.tiles, made.window), len(rows))
    forward, backward = cost.kernel_parts(after, none, none, plan.outer_shape, plan.hardware)
    there, back = layers * there + forward, layers * (there + home) + backward
    return _kernels_and_ways(plan, pairs, rows, there, back)


def gathers_faster(plan: Plan, rows: Int64) -> bool:
    """Whether a collective could bring every row to every rank, and dK/dV home, in less time than the rows take.

    Args:
        rows: (groups,) that ranks hold.
    """
    there, home = gather_link_seconds(rows, plan.outer_shape, plan.outer_hardware)
    taken = (layer.costs.wires.seconds[layer.number] for layer in plan.layers)
    return any((there + home).max() < seconds.max() for seconds in taken)


def staged_seconds(plan: Plan) -> float:
    """What the same tiles take at least, in however many stages the same rows arrive."""
    least = plan.of_all(
        [layer.costs.least(layer.number, _link_seconds(plan, layer.planned)) for layer in plan.layers]
    )
    return float(_and_heads(plan, least))


def saved_by_turns(plan: Plan) -> float:
    """What more turns of exchanged heads save at most; 0 where they save nothing."""
    if plan.ulysses_size == 1:
        return 0.0
    layers = sum(plan.windows.values())
    return float((layers * plan.heads.exposed - plan.least_heads).max())


def _in_parts(plan: Plan) -> list[tuple[Schedule, int]]:
    """The schedule in one stage, with keys in parts, of each window, and how many layers have it."""
    return [
        (plan.planner(plan.documents, plan.placement, plan.seen(window), 1, False), count)
        for window, count in plan.windows.items()
    ]


def _link_seconds(plan: Plan, made: Schedule) -> Float64:
    """(groups,) seconds that all rows of a schedule take on a rank's links, one way."""
    groups = plan.placement.cp_size
    return transfer_link_seconds(made.transfers, groups, plan.outer_shape, plan.outer_hardware)


def _kernels_and_ways(plan: Plan, pairs: Int64, rows: Int64, there: Float64, back: Float64) -> float:
    layers = sum(plan.windows.values())
    seconds = cost.moving_seconds(pairs, rows, layers, (there, back), plan.outer_shape, plan.hardware)
    return float(_and_heads(plan, seconds))


def _and_heads(plan: Plan, seconds: Float64) -> Float64:
    """(...) of the busiest of (..., groups) ranks, and what the exchanges of heads take on theirs."""
    total: Float64 = seconds.max(axis=-1) + plan.least_heads.max()
    return total
