"""plan(): from document lengths and a number of ranks to a Plan, choosing whatever was left to "auto"."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

from sap_hf.config import (
    DELIVERIES,
    LAYOUTS,
    STRATEGIES,
    check_choice,
    check_delivery,
    check_remote_rows,
)
from sap_hf.errors import ConfigError, DocumentError, LayoutError
from sap_hf.planning.balance import balanced, portfolio
from sap_hf.planning.cost import Shape
from sap_hf.planning.documents import Documents, Int64
from sap_hf.planning.hardware import Hardware, find_hardware
from sap_hf.planning.layout import LAYOUTS as MAKERS
from sap_hf.planning.layout import Layout
from sap_hf.planning.plan import Plan, Planner, Window
from sap_hf.strategies.all_gather import all_gather
from sap_hf.strategies.ring import ring
from sap_hf.strategies.sap import sap

PLANNERS: dict[str, Planner] = {"sap": sap, "all_gather": all_gather, "ring": ring}
# Stage counts that are weighed: more stages hide more of the way behind remote work, and start more messages.
STAGES = (2, 4)
# Waiting below this part of the work is not worth weighing stages for.
WAITING = 0.01
# What is passed over is slower than the best one by more than the rounding of either sum.
SURE = 1 + 1e-9


def plan(
    lengths: Sequence[int] | Int64 | None = None,
    *,
    cu_seqlens: Sequence[int] | Int64 | None = None,
    cp_size: int,
    ulysses_size: int | str = 1,
    strategy: str = "auto",
    layout: str = "auto",
    delivery: str = "auto",
    max_remote_rows: int | None = None,
    window: int | Mapping[Window, int] | None = None,
    num_heads: int = 32,
    num_kv_heads: int = 8,
    head_dim: int = 128,
    bytes_per_element: int = 2,
    hardware: Hardware | str | None = None,
) -> Plan:
    """Plan how `cp_size` ranks attend to one pack of documents.

    Args:
        lengths: rows of each document, in pack order. Give this or `cu_seqlens`.
        cu_seqlens: (N+1,) borders of the documents, from 0 to T.
        cp_size: ranks that share the pack.
        ulysses_size: of these, ranks that exchange heads instead of rows; 1 in this version.
        strategy: auto | sap | all_gather | ring.
        layout: auto | contiguous | zigzag | balanced.
        delivery: auto | p2p | all_to_all | all_gather (with strategy all_gather).
        max_remote_rows: rows of other ranks that a rank holds at once, at least 2; None for no limit.
        window: keys a query sees, itself included, or {window: number of layers}; None is full attention.
        num_heads, num_kv_heads, head_dim, bytes_per_element: the layer, for modelled seconds and bytes.
        hardware: a preset's name, a YAML file of its fields, or a Hardware; None is h100 with 8 ranks per node.

    Raises:
        DocumentError: lengths or cu_seqlens that do not describe whole documents, or both given.
        LayoutError: cp_size or head_dim below 1, or heads that are not a multiple of the kv heads.
        ConfigError: a strategy, layout, delivery, window or preset that does not exist or cannot be combined.
    """
    if lengths is not None and cu_seqlens is None:
        documents = Documents.from_lengths(lengths)
    elif cu_seqlens is not None and lengths is None:
        documents = Documents.from_cu_seqlens(cu_seqlens)
    else:
        raise DocumentError("Give either lengths or cu_seqlens: exactly one of them describes the pack.")
    if ulysses_size not in (1, "auto"):
        raise ConfigError(f"ulysses_size={ulysses_size}: this version does not exchange heads. Use 1.")
    windows = dict(window) if isinstance(window, Mapping) else {window: 1}
    shape = Shape(num_heads, num_kv_heads, head_dim, bytes_per_element)
    return make_plan(
        documents,
        cp_size,
        strategy,
        layout,
        windows,
        delivery,
        shape,
        find_hardware(hardware),
        max_remote_rows,
    )


def make_plan(
    documents: Documents,
    cp_size: int,
    strategy: str,
    layout: str,
    windows: Mapping[Window, int],
    delivery: str,
    shape: Shape,
    hardware: Hardware,
    max_remote_rows: int | None = None,
) -> Plan:
    """`plan` for documents that exist already; "auto" takes the least modelled time, the earlier one on a tie."""
    return min(
        candidates(
            documents,
            cp_size,
            strategy,
            layout,
            windows,
            delivery,
            shape,
            hardware,
            max_remote_rows,
            prune=True,
        ),
        key=lambda made: made.seconds,
    )


def candidates(
    documents: Documents,
    cp_size: int,
    strategy: str,
    layout: str,
    windows: Mapping[Window, int],
    delivery: str,
    shape: Shape,
    hardware: Hardware,
    max_remote_rows: int | None = None,
    prune: bool = False,
) -> Iterator[Plan]:
    """Every plan that `make_plan` weighs, in its order: it returns the first of those with the least modelled time.

    Args:
        prune: pass over what cannot be faster than something that has been yielded before.

    Raises:
        LayoutError, ConfigError: as `plan`.
    """
    if isinstance(cp_size, bool) or not isinstance(cp_size, int) or cp_size < 1:
        raise LayoutError(f"cp_size={cp_size!r}: a pack is shared by at least one rank.")
    heads, kv_heads = shape.num_heads, shape.num_kv_heads
    if kv_heads < 1 or heads < 1 or heads % kv_heads:
        raise LayoutError(f"num_heads={heads} is not a multiple of num_kv_heads={kv_heads}.")
    if shape.head_dim < 1:
        raise LayoutError(f"head_dim={shape.head_dim}: a head has at least one element.")
    check_choice("strategy", strategy, STRATEGIES)
    check_choice("layout", layout, LAYOUTS)
    check_choice("delivery", delivery, DELIVERIES)
    check_delivery(strategy, delivery)
    check_remote_rows(max_remote_rows)
    for window in windows:
        if window is not None and window < 1:
            raise ConfigError(f"window={window}: a query sees at least itself. Use None for full attention.")
    if not windows:
        raise ConfigError("window={} names no layer. Use None for full attention.")
    if strategy == "auto" and delivery == "all_gather":
        strategy = "all_gather"
    first = "sap" if strategy == "auto" else strategy
    weighed = [
        Plan(
            documents=documents,
            placement=placement,
            strategy=first,
            planner=PLANNERS[first],
            windows=windows,
            delivery=delivery,
            shape=shape,
            hardware=hardware,
            max_remote_rows=max_remote_rows,
        )
        for placement in placements(documents, cp_size, layout, windows)
    ]
    best = math.inf
    # The most even first: its time is the least that is known before a schedule is made.
    for made in sorted(weighed, key=lambda made: made.kernel_seconds):
        if prune and made.kernel_seconds > best * SURE:
            return
        for variant in _variants(made, strategy, prune, best):
            best = min(best, variant.seconds)
            yield variant


def _variants(made: Plan, strategy: str, prune: bool, best: float) -> Iterator[Plan]:
    """The plan and, where a rank waits for rows in it, the same placement in more stages and as an all-gather."""
    yield made
    if made.strategy != "sap" or made.seconds <= (1 + WAITING) * made.busy_seconds:
        return
    best = min(best, made.seconds) * SURE if prune else math.inf
    if made.least_seconds <= best:
        yield from (dataclasses.replace(made, stages=stages) for stages in STAGES)
    if strategy == "auto" and made.max_remote_rows is None and made.least_gathered_seconds <= best:
        yield dataclasses.replace(made, strategy="all_gather", planner=all_gather)


def placements(
    documents: Documents, cp_size: int, layout: str, windows: Mapping[Window, int]
) -> list[Layout]:
    """The layouts that `layout` stands for: one, or for "auto" all that are weighed."""
    if layout in MAKERS:
        return [MAKERS[layout](documents.rows, cp_size)]
    if layout == "balanced":
        return [balanced(documents, cp_size, windows)]
    neighbours = [make(documents.rows, cp_size) for make in MAKERS.values()]
    return neighbours + portfolio(documents, cp_size, windows)
