"""plan(): from document lengths and a number of ranks to a Plan, choosing whatever was left to "auto"."""

from __future__ import annotations

import dataclasses
import functools
import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from sap_hf.config import (
    DELIVERIES,
    LAYOUTS,
    STRATEGIES,
    check_choice,
    check_delivery,
    check_remote_rows,
    check_ulysses_size,
)
from sap_hf.errors import ConfigError, DocumentError, LayoutError
from sap_hf.planning import bounds
from sap_hf.planning.balance import balanced, portfolio
from sap_hf.planning.balance_swap import Problem
from sap_hf.planning.cost import Shape
from sap_hf.planning.documents import Documents, Int64
from sap_hf.planning.hardware import PRESETS, Hardware, find_hardware
from sap_hf.planning.heads import TURNS, split_heads
from sap_hf.planning.layout import LAYOUTS as MAKERS
from sap_hf.planning.layout import Layout, contiguous, pairs_upto, work_held
from sap_hf.planning.plan import Plan, Planner, Window, weigh
from sap_hf.strategies.all_gather import all_gather
from sap_hf.strategies.ring import ring
from sap_hf.strategies.sap import sap

# A group of one rank has nothing to move: any planner would do for ulysses.
PLANNERS: dict[str, Planner] = {"sap": sap, "all_gather": all_gather, "ring": ring, "ulysses": sap}
# Stage counts that are weighed, with queries whole and with keys in parts: more stages hide more of the way behind
# remote work, and start more messages. A whole query waits for its last row anyway.
STAGES = {True: (2,), False: (2, 4)}
# Waiting below this part of the work is not worth weighing stages for.
WAITING = 0.01
# What is passed over is slower than the best one by more than the rounding of either sum.
SURE = 1 + 1e-9


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be planned, and what may be chosen for it; `plan` explains each.

    Attributes:
        windows: {window: number of layers}; None is full attention.
        recomputed: as in Plan.
    """

    documents: Documents
    cp_size: int
    _: dataclasses.KW_ONLY
    strategy: str = "auto"
    layout: str = "auto"
    windows: Mapping[Window, int] = dataclasses.field(default_factory=lambda: {None: 1})
    delivery: str = "auto"
    shape: Shape = dataclasses.field(default_factory=Shape)
    hardware: Hardware = PRESETS["h100"]
    max_remote_rows: int | None = None
    ulysses_size: int | str = 1
    recomputed: bool = False

    def check(self) -> None:
        """Refuse what no plan can be made for.

        Raises:
            LayoutError, ConfigError: as `plan`.
        """
        if isinstance(self.cp_size, bool) or not isinstance(self.cp_size, int) or self.cp_size < 1:
            raise LayoutError(f"cp_size={self.cp_size!r}: a pack is shared by at least one rank.")
        heads, kv_heads = self.shape.num_heads, self.shape.num_kv_heads
        if kv_heads < 1 or heads < 1 or heads % kv_heads:
            raise LayoutError(f"num_heads={heads} is not a multiple of num_kv_heads={kv_heads}.")
        if self.shape.head_dim < 1:
            raise LayoutError(f"head_dim={self.shape.head_dim}: a head has at least one element.")
        check_choice("strategy", self.strategy, STRATEGIES)
        check_choice("layout", self.layout, LAYOUTS)
        check_choice("delivery", self.delivery, DELIVERIES)
        check_delivery(self.strategy, self.delivery)
        check_remote_rows(self.max_remote_rows)
        check_ulysses_size(self.ulysses_size)
        for window in self.windows:
            if window is not None and window < 1:
                raise ConfigError(
                    f"window={window}: a query sees at least itself. Use None for full attention."
                )
        if not self.windows:
            raise ConfigError("window={} names no layer. Use None for full attention.")


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
        ulysses_size: of these, neighbouring ranks that exchange heads instead of rows; auto: the least modelled time.
        strategy: auto | sap | all_gather | ring | ulysses, which is ulysses_size = cp_size.
        layout: auto | contiguous | zigzag | balanced.
        delivery: auto | p2p | all_to_all | all_gather (with strategy all_gather).
        max_remote_rows: rows of other ranks that a rank holds at once, at least 2; None for no limit.
        window: keys a query sees, itself included, or {window: number of layers}; None is full attention.
        num_heads, num_kv_heads, head_dim, bytes_per_element: the layer, for modelled seconds and bytes.
        hardware: a preset's name, a YAML file of its fields, or a Hardware; None is h100 with 8 ranks per node.

    Raises:
        DocumentError: lengths or cu_seqlens that do not describe whole documents, or both given.
        LayoutError: cp_size or head_dim below 1, heads that are not a multiple of the kv heads, or a ulysses_size that
            does not divide cp_size or is above the number of query heads.
        ConfigError: a strategy, layout, delivery, window or preset that does not exist or cannot be combined.
    """
    if lengths is not None and cu_seqlens is None:
        documents = Documents.from_lengths(lengths)
    elif cu_seqlens is not None and lengths is None:
        documents = Documents.from_cu_seqlens(cu_seqlens)
    else:
        raise DocumentError("Give either lengths or cu_seqlens: exactly one of them describes the pack.")
    return make_plan(
        Request(
            documents,
            cp_size,
            strategy=strategy,
            layout=layout,
            windows=dict(window) if isinstance(window, Mapping) else {window: 1},
            delivery=delivery,
            shape=Shape(num_heads, num_kv_heads, head_dim, bytes_per_element),
            hardware=find_hardware(hardware),
            max_remote_rows=max_remote_rows,
            ulysses_size=ulysses_size,
        )
    )


@dataclasses.dataclass(frozen=True)
class Branch:
    """Candidates that have something in common.

    Attributes:
        least: seconds that none of them goes below.
        grow: the candidates, and smaller branches of them, in the order in which they are weighed.
    """

    least: float
    grow: Callable[[], Iterable[Plan | Branch]]


def make_plan(request: Request) -> Plan:
    """The candidate with the least modelled time, the earlier one on a tie.

    Branches grow in the order of what they take at least, until that is more than something which has been found.
    """
    best: tuple[float, tuple[int, ...], Plan] | None = None
    waiting: list[tuple[float, tuple[int, ...], Branch]] = [(0.0, (), tree(request))]
    while waiting and (best is None or waiting[0][0] <= best[0] * SURE):
        least, place, branch = heapq.heappop(waiting)
        for number, grown in enumerate(branch.grow()):
            where = (*place, number)
            if isinstance(grown, Branch):
                heapq.heappush(waiting, (max(least, grown.least), where, grown))
            elif best is None or (grown.seconds, where) < best[:2]:
                best = (grown.seconds, where, grown)
    assert best is not None
    return best[2]


def candidates(request: Request) -> Iterator[Plan]:
    """Every plan that `make_plan` weighs, in its order: it returns the first of those with the least modelled time.

    Raises:
        LayoutError, ConfigError: as `plan`.
    """
    return _leaves(tree(request))


def _leaves(branch: Branch) -> Iterator[Plan]:
    for grown in branch.grow():
        if isinstance(grown, Branch):
            yield from _leaves(grown)
        else:
            yield grown


def tree(request: Request) -> Branch:
    """All candidates: by numbers of ranks that exchange heads, by placements, and by what is done with each of them."""
    request.check()
    strategy, windows, documents = request.strategy, request.windows, request.documents
    if strategy == "auto" and request.delivery == "all_gather":
        strategy = "all_gather"
    heads = request.shape.num_heads
    sizes = degrees(request.cp_size, request.ulysses_size, strategy, request.delivery, heads)
    pairs = int(pairs_upto(documents.lengths, windows).sum())

    def planned(size: int, placement: Layout) -> Plan:
        first = "ulysses" if size == request.cp_size > 1 else "sap" if strategy == "auto" else strategy
        return Plan(
            documents=documents,
            placement=placement,
            strategy=first,
            planner=PLANNERS[first],
            windows=windows,
            delivery=request.delivery,
            shape=request.shape,
            hardware=request.hardware,
            max_remote_rows=request.max_remote_rows,
            whole=True,
            ulysses_size=size,
            recomputed=request.recomputed,
        )

    def of_size(size: int) -> Branch:
        groups, even = request.cp_size // size, 0.0
        if len(sizes) > 1:
            even = bounds.even_seconds(planned(size, contiguous(documents.rows, groups, size)), pairs)
        return Branch(even, lambda: placed(size, groups))

    def placed(size: int, groups: int) -> Iterator[Branch]:
        node = max(1, request.hardware.ranks_per_node // size)
        layouts = placements(documents, groups, request.layout, windows, size, node)
        weighed = [planned(size, layout) for layout in layouts]
        work, rows = work_held(documents, layouts, windows)
        # The most even first: its time is the least that is known before rows are moved.
        least = bounds.kernel_seconds(weighed[0], work, rows).tolist()
        for number in sorted(range(len(weighed)), key=least.__getitem__):
            held = work[number], rows[number]
            yield Branch(least[number], functools.partial(moved, weighed[number], least[number], held))

    def moved(made: Plan, least: float, held: tuple[Int64, Int64]) -> Iterator[Branch]:
        # Among groups nothing is gathered by a collective: it would be the same messages, and more of them.
        gathers = strategy == "auto" and made.max_remote_rows is None and made.ulysses_size == 1
        # Where rows are limited, whether they can be at all is found only by weighing.
        if made.strategy == "sap" and made.max_remote_rows is None:
            moving = bounds.moving_seconds(made, *held)
            least = (
                min(moving, bounds.gathering_seconds(made, *held)) if gathers and moving > least else moving
            )
        yield Branch(least, lambda: _variants(made, held if gathers else None))

    return Branch(0.0, lambda: map(of_size, sizes))


def degrees(cp_size: int, ulysses_size: int | str, strategy: str, delivery: str, heads: int) -> list[int]:
    """The numbers of ranks among which heads may be exchanged, fewest first.

    Args:
        heads: query heads.

    Raises:
        LayoutError: `ulysses_size` does not divide `cp_size`, or there are fewer heads.
        ConfigError: it contradicts strategy or delivery.
    """
    if strategy == "ulysses":
        if ulysses_size not in ("auto", cp_size):
            raise ConfigError(
                f"strategy='ulysses' exchanges heads among all cp_size={cp_size} ranks, not among ulysses_size="
                f"{ulysses_size}. Use ulysses_size='auto', or strategy='sap'."
            )
        ulysses_size = cp_size
    if ulysses_size == "auto":
        # A collective that gathers all rows knows no groups.
        most = 1 if delivery == "all_gather" else min(cp_size, heads)
        return [size for size in range(1, most + 1) if cp_size % size == 0]
    size = int(ulysses_size)
    if cp_size % size:
        fits = [n for n in range(1, cp_size + 1) if cp_size % n == 0]
        raise LayoutError(
            f"ulysses_size={size} does not divide cp_size={cp_size}.\n  Use one of {', '.join(map(str, fits))}."
        )
    split_heads(heads, 1, size)
    if size > 1 and delivery == "all_gather":
        raise ConfigError(
            f"delivery='all_gather' gathers rows over all ranks, ulysses_size={size} only over those with the same "
            "heads. Use delivery='auto'."
        )
    return [size]


def _variants(made: Plan, gathered: tuple[Int64, Int64] | None) -> Iterator[Plan | Branch]:
    """The placement with every query whole, as it is made, and with its keys in parts, in one stage or more, and as an
    all-gather.

    The local ones of its parts hide the way of the others.

    Args:
        gathered: work and rows that ranks hold, where an all-gather is weighed, too.
    """
    if made.placement.cp_size == 1 or made.strategy not in ("sap", "all_gather"):
        yield from _turned(_weighed([made]))
        return
    parts = [dataclasses.replace(made, whole=False)] if None in made.windows else []
    finer = [dataclasses.replace(made, stages=stages) for stages in STAGES[True]]
    first = _weighed([made, *(finer if made.strategy == "sap" else []), *parts])
    yield from _turned(first)
    waits = [form for form in first if form.seconds > (1 + WAITING) * form.busy_seconds]
    if gathered and waits and bounds.gathers_faster(waits[0], gathered[1]):
        yield Branch(
            bounds.gathering_seconds(made, *gathered),
            lambda: _weighed(
                [
                    dataclasses.replace(form, strategy="all_gather", planner=all_gather)
                    for form in (made, *parts)
                ]
            ),
        )
    if made.strategy == "sap" and parts and parts[0] in waits:
        yield Branch(
            bounds.staged_seconds(parts[0]),
            lambda: _turned(
                _weighed([dataclasses.replace(parts[0], stages=stages) for stages in STAGES[False]])
            ),
        )


def _turned(plans: list[Plan]) -> Iterator[Plan | Branch]:
    """Plans and, where heads are exchanged, the same with some of these computed after the others."""
    yield from plans
    if (saved := bounds.saved_by_turns(plans[0])) > 0:
        least = min(plan.seconds for plan in plans) - saved
        yield Branch(least, lambda: [plan.in_turns(turns) for plan in plans for turns in TURNS[1:]])


def _weighed(plans: list[Plan]) -> list[Plan]:
    weigh(plans)
    return plans


def placements(
    documents: Documents,
    cp_size: int,
    layout: str,
    windows: Mapping[Window, int],
    multiple: int = 1,
    node: int | None = None,
) -> list[Layout]:
    """The layouts that `layout` stands for: one, or for "auto" all that are weighed.

    Args:
        multiple: of which the rows of a rank are one.
        node: ranks of one node, among which rows move faster; None where all links are alike.
    """
    if layout in MAKERS:
        return [MAKERS[layout](documents.rows, cp_size, multiple)]
    if cp_size == 1:
        return [contiguous(documents.rows, cp_size, multiple)]
    p = Problem(documents.lengths, cp_size, windows, multiple, node or cp_size)
    if layout == "balanced":
        return [balanced(documents, p)]
    neighbours = [make(documents.rows, cp_size, multiple) for make in MAKERS.values()]
    return neighbours + portfolio(documents, p)
