"""Plan: one placement of a pack's rows, and one schedule per window in the model.

A Plan is data: a pure function of documents, layout and options, the same on every rank without a word exchanged.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from sap_hf.errors import ConfigError, LayoutError
from sap_hf.planning import cost
from sap_hf.planning.documents import Documents, Int64
from sap_hf.planning.hardware import Hardware
from sap_hf.planning.heads import HeadSeconds, head_seconds, least_head_seconds, rank_shapes
from sap_hf.planning.layout import Layout
from sap_hf.planning.schedule import DESTINATION, START, STOP, Bundle, Schedule, sum_by
from sap_hf.planning.wires import wire_seconds

Window = int | None
Planner = Callable[[Documents, Layout, Window, int, bool], Schedule]


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """A layer of one window: its schedule without deliveries, and where among other schedules it is weighed."""

    planned: Schedule
    costs: cost.LayerCosts
    number: int

    @functools.cached_property
    def schedule(self) -> Schedule:
        """The schedule with the fastest deliveries: of the many that are weighed few are asked for."""
        names = iter(self.costs.wires.deliveries[self.number])
        steps = tuple(
            dataclasses.replace(step, delivery=next(names)) if len(step.transfers) else step
            for step in self.planned.steps
        )
        return dataclasses.replace(self.planned, steps=steps)


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """How `cp_size` ranks attend to one pack together.

    Attributes:
        documents: the pack.
        placement: who holds which rows; with ulysses_size U, a rank of it is U neighbouring ranks of the cp group.
        strategy: what "auto" chose, or what was asked for.
        planner: (documents, layout, window, stages, whole) -> Schedule.
        windows: {window: number of layers}; None is full attention.
        delivery: p2p | all_to_all | all_gather, how the transfers travel; auto: the fastest one, stage by stage.
        shape, hardware: what the modelled seconds and bytes are for.
        stages: parts in which remote rows arrive.
        whole: every query is computed at once, when all its keys are there; all of them are held then.
        max_remote_rows: rows of other ranks that a rank holds at once; more stages keep to it. None: no limit.
        ulysses_size: U, neighbouring ranks that exchange heads: each computes a part of the heads, on all their rows.
        turns: parts of a rank's kv heads that are computed one after the other: the exchange of the others goes on
            meanwhile. Fewer where a rank has fewer kv heads.
        recomputed: gradient checkpointing runs the layers twice, and the recompute exchanges heads again.
    """

    documents: Documents
    placement: Layout
    strategy: str
    planner: Planner
    windows: Mapping[Window, int]
    delivery: str
    shape: cost.Shape
    hardware: Hardware
    stages: int = 1
    whole: bool = False
    max_remote_rows: int | None = None
    ulysses_size: int = 1
    turns: int = 1
    recomputed: bool = False
    _layers: dict[Window, Layer] = dataclasses.field(default_factory=dict, init=False, repr=False)
    # What the runtime derives from a plan (compiled programs, device tensors) lives as long as the plan.
    derived: dict[object, object] = dataclasses.field(default_factory=dict, init=False, repr=False)

    @property
    def layout(self) -> str:
        """The layout's name: what "auto" chose, or what was asked for."""
        return self.placement.name

    @property
    def cp_size(self) -> int:
        """Ranks that share the pack."""
        return self.placement.cp_size * self.ulysses_size

    @property
    def rows_per_rank(self) -> int:
        """C: rows that each rank holds, padding included."""
        return self.placement.rows_per_rank // self.ulysses_size

    def rows(self, rank: int) -> Int64:
        """(C,) int64 ids of the pack rows that `rank` holds, in its order; ids at or beyond T are padding."""
        if not 0 <= rank < self.cp_size:
            raise LayoutError(f"rank {rank}: the ranks of this plan are 0 to {self.cp_size - 1}.")
        group, inside = divmod(rank, self.ulysses_size)
        return self.placement.rows(group)[inside * self.rows_per_rank :][: self.rows_per_rank]

    @functools.cached_property
    def outer_shape(self) -> cost.Shape:
        """The layer as the busiest rank computes it, once heads are exchanged."""
        shapes = rank_shapes(self.shape, self.ulysses_size)
        return max(shapes, key=lambda shape: (shape.num_heads, shape.num_kv_heads))

    @property
    def outer_hardware(self) -> Hardware:
        """The machine as `placement` sees it: each of its ranks is one of the U that hold its rows."""
        return _of_groups(self.hardware, self.ulysses_size)

    def schedule(self, window: Window = None) -> Schedule:
        """The schedule of layers with this window; derived once.

        Raises:
            ConfigError: no number of stages keeps to `max_remote_rows`.
        """
        return self.layer(window).schedule

    def layer(self, window: Window) -> Layer:
        """The layer of this window; derived once, as `schedule`."""
        window = self.seen(window)
        if window not in self._layers:
            _weigh([self], window)
        return self._layers[window]

    def seen(self, window: Window) -> Window:
        """None for a window that all documents fit in."""
        return None if window is not None and window >= int(self.documents.lengths.max()) else window

    def _within_budget(self, window: Window) -> Schedule:
        """As many stages as asked for or, two of them held at a time, as `max_remote_rows` needs."""
        made = self.planner(self.documents, self.placement, window, self.stages, self.whole)
        limit, groups = self.max_remote_rows, self.placement.cp_size
        if limit is None or (received := _held(made, groups)) <= limit:
            return made
        # Parts are not always equal: a window layer receives what it needs of one document at once.
        for finer in (1, 2, 4, 16):
            stages = -(-received * finer // (limit // 2))
            made = self.planner(self.documents, self.placement, window, max(stages, self.stages), False)
            made = dataclasses.replace(made, slots=min(2, made.stages))
            if _held(made, groups) <= limit:
                return made
        raise ConfigError(
            f"max_remote_rows={limit}: with {self.strategy}{'' if window is None else f' and window {window}'} a rank "
            f"still holds {_held(made, groups)} rows of others in {made.stages} stages.\n"
            "  Raise max_remote_rows, or use strategy sap."
        )

    @property
    def _ways(self) -> tuple[str, ...]:
        """The deliveries that each stage is weighed with."""
        if self.delivery != "auto":
            return (self.delivery,)
        # The collective gathers over the whole cp group, not over the ranks that compute the same heads.
        gathers = self.strategy == "all_gather" and self.ulysses_size == 1
        return ("p2p", "all_to_all", *(("all_gather",) if gathers else ()))

    @property
    def deliveries(self) -> tuple[str, ...]:
        """How each stage of a layer with the widest window travels."""
        return tuple(step.delivery for step in self.widest.steps if len(step.transfers))

    @property
    def widest(self) -> Schedule:
        """The schedule of the widest window in the model: every other one moves a part of its rows."""
        return self.schedule(None if None in self.windows else max(w for w in self.windows if w is not None))

    @functools.cached_property
    def rows_moved(self) -> Int64:
        """(W, W) int64 rows sent [source, destination] in one layer's forward (the layer with the widest window)."""
        # Ranks that compute the same heads send to each other.
        moved = self.widest.rows_moved(self.placement.cp_size)
        return np.kron(moved, np.eye(self.ulysses_size, dtype=np.int64))

    @functools.cached_property
    def pairs(self) -> Int64:
        """(W,) int64 query-key pairs on each rank, heads ignored, over the layers in `windows`."""
        groups = self.placement.cp_size
        pairs = sum(
            (count * self.schedule(window).pairs(groups) for window, count in self.windows.items()),
            np.zeros(groups, np.int64),
        )
        return np.repeat(pairs, self.ulysses_size)

    @property
    def imbalance(self) -> float:
        """Busiest rank's pairs times heads over the mean; 1.0 is perfect."""
        heads = [shape.num_heads for shape in rank_shapes(self.shape, self.ulysses_size)]
        work = self.pairs * np.tile(heads, self.placement.cp_size)
        return float(work.max() / work.mean()) if work.any() else 1.0

    @property
    def lower_bound_rows(self) -> int:
        """Rows that must move in all: for the contiguous layout its own bound, else one that no placement beats."""
        if self.layout == "contiguous":
            bound = _contiguous_bound(self.documents, self.placement, self.widest.window)
        else:
            rows = self.placement.rows_per_rank
            bound = _placement_bound(self.documents.lengths, rows, self.widest.window)
        return bound * self.ulysses_size

    @property
    def all_gather_rows(self) -> int:
        """Rows that an all-gather of the same pack moves in all."""
        return self.documents.rows * (self.cp_size - 1)

    @functools.cached_property
    def layer_seconds(self) -> cost.Seconds:
        """(W,) modelled seconds of all layers in `windows`, forward and backward, compute and waiting."""
        return cost.Seconds(*self._with_heads([(layer, layer.number) for layer in self.layers]))

    def _with_heads(self, layers: list[tuple[Layer, int | slice]]) -> cost.Float64:
        """(4, ..., W) the fields of Seconds over all layers, exchanges of heads included.

        Args:
            layers: of each window, and which of the schedules that it is weighed among.
        """
        turns = 1 if self.ulysses_size == 1 else len(self.heads.share)
        every = []
        for layer, which in layers:
            seconds = layer.costs.seconds(turns)[:, which]
            if self.ulysses_size > 1:
                links = layer.costs.links(turns)[:, which]
                seconds = self.heads.with_layer(seconds, links, self.hardware.contention)
            every.append(seconds)
        return self.of_all(every)

    @property
    def layers(self) -> list[Layer]:
        """The layer of each window."""
        return [self.layer(window) for window in self.windows]

    def of_all(self, layers: list[cost.Float64]) -> cost.Float64:
        """Over all layers, from one layer of each window; arrays of one shape."""
        total: cost.Float64 = sum(count * layer for count, layer in zip(self.windows.values(), layers))  # type: ignore[assignment]
        return total

    @property
    def heads(self) -> HeadSeconds:
        """Of one layer's exchanges of heads."""
        return head_seconds(*self._exchanged, self.turns)

    @property
    def _exchanged(self) -> tuple[cost.Shape, int, int, Hardware, bool]:
        return self.shape, self.ulysses_size, self.rows_per_rank, self.hardware, self.recomputed

    @property
    def least_heads(self) -> cost.Float64:
        """(U,) seconds that exchanged heads add at least, in any number of turns."""
        if self.ulysses_size == 1:
            return np.zeros(1)
        return sum(self.windows.values()) * least_head_seconds(*self._exchanged)

    @functools.cached_property
    def seconds(self) -> float:
        """Modelled seconds of the slowest rank, forward and backward, over the layers in `windows`."""
        return float(self.layer_seconds.total.max())

    @functools.cached_property
    def busy_seconds(self) -> float:
        """Of these, what the busiest rank computes: no stages and no delivery can be faster."""
        return float((self.layer_seconds.forward + self.layer_seconds.backward).max())

    def in_turns(self, turns: int) -> Plan:
        """The same schedules with heads computed in so many turns."""
        made = dataclasses.replace(self, turns=turns)
        made._layers.update(self._layers)
        return made

    @functools.cached_property
    def peak_bytes(self) -> int:
        """Bytes that a layer holds beside q, k, v, out and dout of a rank's rows, on the busiest rank at its peak.

        The buffers of the exchanges, what arrives in them, parts until they are merged, dq, dk and dv; with exchanged
        heads also the neighbours' q, k, v and out, which every layer keeps until its backward. Not in it: what a kernel
        allocates for itself, attention sinks, copies in autocast's dtype, and rows that remote_kv="keep" holds.
        """
        from sap_hf.planning.compile import compile_program
        from sap_hf.planning.memory import peak_bytes

        return max(
            max(peak_bytes(compile_program(self, rank, window), self.shape, self.ulysses_size, self.turns))
            for window in self.windows
            for rank in range(self.cp_size)
        )

    @functools.cached_property
    def digest(self) -> int:
        """64-bit identity of placement, schedules and delivery: equal digests mean equal plans."""
        state = hashlib.blake2b(digest_size=8)
        state.update(f"{self.strategy} {self.ulysses_size} {self.turns} {self.cp_size}".encode())
        state.update(np.ascontiguousarray(self.documents.cu_seqlens, "<i8").data)
        state.update(np.ascontiguousarray(self.placement.segments, "<i8").data)
        for window in sorted(self.windows, key=lambda w: -1 if w is None else w):
            schedule = self.schedule(window)
            state.update(f"window {window} slots {schedule.slots} whole {schedule.whole}".encode())
            for step in schedule.steps:
                state.update(step.delivery.encode())
                state.update(np.ascontiguousarray(step.transfers, "<i8").data)
                state.update(np.ascontiguousarray(step.tiles, "<i8").data)
        return int.from_bytes(state.digest(), "little")

    def __str__(self) -> str:
        from sap_hf.planning.render import picture

        return picture(self)


def weigh(plans: Sequence[Plan]) -> None:
    """Derive what plans of one placement, strategy and delivery are compared by: all at once takes little longer.

    Raises:
        ConfigError: no number of stages keeps to `max_remote_rows`.
    """
    first = plans[0]
    for window in dict.fromkeys(map(first.seen, first.windows)):
        _weigh(plans, window)
    everyone = slice(None)
    forward, exposed, backward, exposed_back = first._with_heads(
        [(layer, everyone) for layer in first.layers]
    )
    totals = (forward + exposed + backward + exposed_back).max(axis=-1).tolist()
    for plan, seconds, busy in zip(plans, totals, (forward + backward).max(axis=-1).tolist()):
        # Their cached properties, all at once.
        vars(plan).update(seconds=seconds, busy_seconds=busy)


def _weigh(plans: Sequence[Plan], window: Window) -> None:
    first = plans[0]
    bundle = Bundle.of([plan._within_budget(window) for plan in plans], first.placement.cp_size)
    wires = wire_seconds(bundle, first._ways, first.outer_shape, first.outer_hardware)
    costs = cost.LayerCosts(bundle, wires, first.outer_shape, first.hardware)
    for number, (plan, made) in enumerate(zip(plans, bundle.schedules)):
        plan._layers[window] = Layer(made, costs, number)


# Candidates are many, machines few.
@functools.lru_cache(maxsize=64)
def _of_groups(whole: Hardware, size: int) -> Hardware:
    ranks = max(1, whole.ranks_per_node // size)
    # All `size` ranks of a group send at the same time.
    alone = min(whole.network_alone_bytes_per_s, whole.network_bytes_per_s * ranks)
    return dataclasses.replace(whole, ranks_per_node=ranks, network_alone_bytes_per_s=alone)


def _contiguous_bound(documents: Documents, layout: Layout, window: Window) -> int:
    """Sum over ranks of the rows between the start of the document that its first row is in, and that row."""
    first = np.arange(layout.cp_size) * layout.rows_per_rank
    first = first[first < documents.rows]
    needed = first - documents.cu_seqlens[documents.index_of(first)]
    return int((needed if window is None else np.minimum(needed, window - 1)).sum())


def _placement_bound(lengths: Int64, rows_per_rank: int, window: Window) -> int:
    """Any placement: a document of L rows needs m = ceil(L/C) ranks, which need (m-1)(L - Cm/2) rows of each other."""
    ranks = -(-lengths // rows_per_rank)
    if window is not None:
        # Each of the m-1 borders inside a document needs at least one row from its other side.
        return int((ranks - 1).sum()) if window > 1 else 0
    return int((((ranks - 1) * (2 * lengths - rows_per_rank * ranks) + 1) // 2).sum())


def _held(schedule: Schedule, cp_size: int) -> int:
    """Rows of other ranks that the fullest rank has room for: its slots, each as large as its largest stage."""
    received = [step.transfers for step in schedule.steps if len(step.transfers)]
    if not received:
        return 0
    rows = np.stack(
        [sum_by(sent[:, DESTINATION], sent[:, STOP] - sent[:, START], cp_size) for sent in received]
    )
    slots = schedule.slots or len(rows)
    return int(np.stack([rows[i::slots].max(axis=0) for i in range(slots)]).sum(axis=0).max())
