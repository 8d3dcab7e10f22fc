"""Compile: a plan's schedule becomes one rank's program.

(Plan, rank, window) -> Program. Every rank compiles its own from the same plan: what one sends, the other receives, in
the same order, cut alike.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from sap_hf.planning.documents import Int64
from sap_hf.planning.layout import cut
from sap_hf.planning.plan import Plan, Window
from sap_hf.planning.program import Call, Exchange, Message, Operation, Program, Rows
from sap_hf.planning.schedule import (
    DESTINATION,
    K_START,
    K_STOP,
    NO_TILES,
    Q_START,
    Q_STOP,
    RANK,
    SOURCE,
    START,
    STOP,
    Step,
    is_full,
    tile_pairs,
)


def compile_program(plan: Plan, rank: int, window: Window = None) -> Program:
    """The program of `rank` for layers with this window.

    With an exchange of heads, `rank` does what the group of ranks that hold its rows would do together, on its own
    heads; its peers are the ranks of other groups that have the same heads.
    """
    group, inside = divmod(rank, plan.ulysses_size)
    program = _compile(plan, group, window)
    if plan.ulysses_size == 1:
        return program

    def there(messages: tuple[Message, ...]) -> tuple[Message, ...]:
        return tuple(dataclasses.replace(m, peer=m.peer * plan.ulysses_size + inside) for m in messages)

    exchanges = (
        dataclasses.replace(exchange, sends=there(exchange.sends), receives=there(exchange.receives))
        for exchange in program.exchanges
    )
    return dataclasses.replace(program, rank=rank, cp_size=plan.cp_size, exchanges=tuple(exchanges))


def _compile(plan: Plan, rank: int, window: Window) -> Program:
    """The program of one rank of the placement.

    Until it is known which of its C rows lie in the buffer, a row of its own is counted from 0 and one of the buffer
    from C.
    """
    schedule, placement = plan.schedule(window), plan.placement
    size = placement.rows_per_rank
    pieces = cut(plan.documents, placement)
    mine = pieces.rank == rank
    own = np.stack([pieces.start[mine], pieces.stop[mine], pieces.local[mine]], axis=1)
    own = own[np.argsort(own[:, 0], kind="stable")]
    local_of = np.zeros(placement.cp_size, dtype=object)
    for source in range(placement.cp_size):
        theirs = pieces.rank == source
        local_of[source] = (pieces.start[theirs], pieces.local[theirs])

    stages = [step for step in schedule.steps if len(step.transfers)]
    gathers = any(step.delivery == "all_gather" for step in stages)
    slots = schedule.slots or max(len(stages), 1)
    room = [0] * slots
    for i, step in enumerate(stages):
        room[i % slots] = max(room[i % slots], _received(step, rank, plan))
    base = [0 if gathers else sum(room[:slot]) for slot in range(slots)]

    exchanges: list[Exchange] = []
    calls: list[_Call] = []

    def add(tiles: Int64, held: Int64) -> list[int]:
        made = _calls(tiles[tiles[:, RANK] == rank], held[np.argsort(held[:, 0], kind="stable")])
        calls.extend(made)
        return list(range(len(calls) - len(made), len(calls)))

    local = np.concatenate([NO_TILES, *(step.tiles for step in schedule.steps if not len(step.transfers))])
    local = _in_order(local[local[:, RANK] == rank], own)
    own_calls = add(local, own)
    held, remote = own, []
    for step in stages:
        exchange, arrived = _exchange(step, rank, plan, local_of, base[len(exchanges) % slots])
        exchanges.append(exchange)
        arrived[:, 2] += size
        held = np.concatenate([held if schedule.whole else own, arrived])
        remote.append(add(step.tiles, held))
    halves = (own_calls, list[int]())
    # With nothing to hide, half a call is only a call more.
    if any(exchange.sends or exchange.receives for exchange in exchanges):
        early, late = _halves(local, schedule.window)
        halves = (add(early, own), add(late, own)) if len(early) else ([], own_calls)
    backward = _backward(*halves, remote, slots, schedule.whole)

    added_to = [calls[operation.at] for operation in backward if operation.kind == "attend"]
    kept = np.arange(size) if gathers else _kept(exchanges, added_to, size)
    start = rank * size if gathers else sum(room)
    at = np.full(size, -1)
    at[kept] = start + np.arange(len(kept))
    return Program(
        rank=rank,
        cp_size=placement.cp_size,
        window=schedule.window,
        rows=size,
        kept=Rows.of(kept),
        own=slice(start, start + len(kept)),
        buffer_rows=sum(room) + (0 if gathers else len(kept)),
        slots=slots,
        exchanges=tuple(_placed(exchange, at) for exchange in exchanges),
        calls=tuple(call.placed(at) for call in calls),
        forward=_forward(own_calls, remote, slots),
        backward=backward,
        backward_kept=_backward([], own_calls, remote, slots, schedule.whole, fetch=False),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Call:
    """A Call whose keys are counted as `_compile` counts rows."""

    causal: bool
    q: Int64
    k: Int64
    cu_q: Int64
    cu_k: Int64

    def placed(self, at: Int64) -> Call:
        """The Call, where own row i lies in buffer row at[i], -1 for none."""
        size = len(at)
        local = bool((self.k < size).all())
        in_buffer = np.where(self.k < size, at[np.minimum(self.k, size - 1)], self.k - size)
        added = np.flatnonzero(in_buffer >= 0)
        k, sums = Rows.of(self.k if local else in_buffer), Rows.of(in_buffer[added])
        return Call(self.causal, local, Rows.of(self.q), k, self.cu_q, self.cu_k, (Rows.of(added), sums))


def _kept(exchanges: list[Exchange], calls: list[_Call], size: int) -> Int64:
    """Which of the rank's own rows lie in the buffer, in its order.

    Those that are read beside received rows come first, next to these: what a call reads may then lie together. But
    rows that leave as one message do.
    """
    parts, beside = np.zeros(size, np.int64), np.zeros(size, bool)
    for call in calls:
        own = call.k[call.k < size]
        parts += np.bincount(own, minlength=size)
        if len(own) < len(call.k):
            beside[own] = True
    sent = np.zeros(size, bool)
    runs = [np.arange(m.start, m.stop) for e in exchanges if e.packed is None for m in e.sends]
    for leaving in (*runs, *(e.packed for e in exchanges if e.packed is not None)):
        sent[leaving] = True
    kept = np.flatnonzero(beside | sent | (parts > 1))
    order = np.argsort(~beside[kept], kind="stable")
    place = np.empty(size, np.int64)
    place[kept[order]] = np.arange(len(kept))
    return kept[order] if all((np.diff(place[run]) == 1).all() for run in runs) else kept


def _placed(exchange: Exchange, at: Int64) -> Exchange:
    """The exchange, where own row i lies in buffer row at[i]."""
    if exchange.packed is not None:
        return dataclasses.replace(exchange, packed=at[exchange.packed])
    starts = [int(at[m.start]) for m in exchange.sends]
    sends = (Message(m.peer, start, start + m.stop - m.start) for m, start in zip(exchange.sends, starts))
    return dataclasses.replace(exchange, sends=tuple(sends))


def _received(step: Step, rank: int, plan: Plan) -> int:
    """Buffer rows that the stage fills on this rank; an all-gather also writes the rank's own rows and padding."""
    if step.delivery == "all_gather":
        return plan.placement.rows_per_rank * plan.placement.cp_size
    incoming = step.transfers[step.transfers[:, DESTINATION] == rank]
    return int((incoming[:, STOP] - incoming[:, START]).sum())


def _in_order(tiles: Int64, held: Int64) -> Int64:
    """Tiles in the order in which the rank holds their queries."""
    piece = np.searchsorted(held[:, 0], tiles[:, Q_START], side="right") - 1
    return tiles[np.argsort(held[piece, 2] + tiles[:, Q_START] - held[piece, 0], kind="stable")]


def _halves(tiles: Int64, window: Window) -> tuple[Int64, Int64]:
    """Local tiles in two parts of about the same work: one hides the second fetch, one what travels home."""
    upto = np.concatenate([[0], np.cumsum(tile_pairs(tiles, window))])
    middle = int(np.abs(2 * upto - upto[-1])[:-1].argmin()) if len(tiles) else 0
    return tiles[:middle], tiles[middle:]


def _exchange(step: Step, rank: int, plan: Plan, local_of: Int64, base: int) -> tuple[Exchange, Int64]:
    """This rank's messages, and where received rows land [(start, stop, buffer row)], the first one at `base`."""
    transfers, size = step.transfers, plan.placement.rows_per_rank
    incoming = transfers[transfers[:, DESTINATION] == rank]
    if step.delivery == "all_gather":
        slots = incoming[:, SOURCE] * size + _local(local_of, incoming[:, SOURCE], incoming[:, START])
        arrived = np.stack([incoming[:, START], incoming[:, STOP], slots], axis=1)
        others = [peer for peer in range(plan.placement.cp_size) if peer != rank]
        sends = tuple(Message(peer, 0, size) for peer in others)
        receives = tuple(Message(peer, peer * size, (peer + 1) * size) for peer in others)
        return Exchange(step.delivery, sends, receives, None), arrived
    packed = step.delivery == "all_to_all"
    # In row order a tile's remote keys lie side by side and are read as they came; a packed message is one per source.
    keys = (incoming[:, START], incoming[:, SOURCE]) if packed else (incoming[:, START],)
    incoming = incoming[np.lexsort(keys)]
    rows = incoming[:, STOP] - incoming[:, START]
    slots = base + np.cumsum(rows) - rows
    arrived = np.stack([incoming[:, START], incoming[:, STOP], slots], axis=1)
    outgoing = transfers[transfers[:, SOURCE] == rank]
    outgoing = outgoing[np.lexsort((outgoing[:, START], outgoing[:, DESTINATION]))]
    own = _local(local_of, np.full(len(outgoing), rank), outgoing[:, START])
    sizes = outgoing[:, STOP] - outgoing[:, START]
    far = _local(local_of, incoming[:, SOURCE], incoming[:, START])
    if packed:
        at = np.cumsum(sizes) - sizes
        sends = _merge(outgoing[:, DESTINATION], at, at, sizes)
        receives = _merge(incoming[:, SOURCE], slots, slots, rows)
        return Exchange(step.delivery, sends, receives, _spans(own, sizes)), arrived
    # Sender and receiver must cut runs alike: a run ends where rows are no longer neighbours on either side. The
    # receiver's slots are neighbours exactly where its sorted rows are, so both can be told from the transfers.
    sends = _runs(transfers, rank, local_of, plan.placement.cp_size)
    receives = _merge(incoming[:, SOURCE], slots, far, rows)
    return Exchange(step.delivery, sends, receives, None), arrived


def _runs(transfers: Int64, rank: int, local_of: Int64, cp_size: int) -> tuple[Message, ...]:
    """The messages that `rank` sends, cut and ordered as each receiver cuts and orders its receives."""
    sends: list[Message] = []
    for peer in range(cp_size):
        incoming = transfers[transfers[:, DESTINATION] == peer]
        if not (incoming[:, SOURCE] == rank).any():
            continue
        incoming = incoming[np.lexsort((incoming[:, START],))]
        rows = incoming[:, STOP] - incoming[:, START]
        slots = np.cumsum(rows) - rows
        own = _local(local_of, incoming[:, SOURCE], incoming[:, START])
        mine = incoming[:, SOURCE] == rank
        runs = _merge(incoming[mine, SOURCE], own[mine], slots[mine], rows[mine])
        sends += [dataclasses.replace(run, peer=peer) for run in runs]
    return tuple(sends)


def _merge(peer: Int64, start: Int64, other: Int64, rows: Int64) -> tuple[Message, ...]:
    """Messages from consecutive ranges, joined where the peer is the same and both sides continue."""
    messages: list[Message] = []
    next_other = -1
    for p, a, b, n in zip(peer.tolist(), start.tolist(), other.tolist(), rows.tolist(), strict=True):
        if messages and messages[-1].peer == p and messages[-1].stop == a and next_other == b:
            messages[-1] = Message(p, messages[-1].start, a + n)
        else:
            messages.append(Message(p, a, a + n))
        next_other = b + n
    return tuple(messages)


def _local(local_of: Int64, owner: Int64, start: Int64) -> Int64:
    """Where each row `start` lies among the rows of its owner."""
    local = np.zeros(len(start), np.int64)
    for source in np.unique(owner):
        chosen = owner == source
        starts, offsets = local_of[source]
        piece = np.searchsorted(starts, start[chosen], side="right") - 1
        local[chosen] = offsets[piece] + start[chosen] - starts[piece]
    return local


def _spans(start: Int64, sizes: Int64) -> Int64:
    """Concatenation of [start, start + size) over all ranges."""
    before = np.cumsum(sizes) - sizes
    index: Int64 = np.arange(int(sizes.sum())) + np.repeat(start - before, sizes)
    return index


def _lookup(held: Int64, start: Int64, stop: Int64) -> tuple[Int64, Int64]:
    """Places of the row ranges [start, stop), concatenated, and the size of each range."""
    first = np.searchsorted(held[:, 0], start, side="right") - 1
    last = np.searchsorted(held[:, 0], stop, side="left")
    count = last - first
    which = np.repeat(np.arange(len(start)), count)
    piece = np.arange(len(which)) - np.repeat(np.cumsum(count) - count, count) + np.repeat(first, count)
    low = np.maximum(held[piece, 0], start[which])
    high = np.minimum(held[piece, 1], stop[which])
    index = _spans(held[piece, 2] + low - held[piece, 0], high - low)
    sizes = stop - start
    assert len(index) == sizes.sum(), "a tile reads rows that its rank does not hold"
    return index, sizes


def _calls(tiles: Int64, held: Int64) -> list[_Call]:
    """Kernel calls for one rank's tiles: the causal ones in one, the full ones in another."""
    full = is_full(tiles)
    calls = []
    for causal, chosen in ((True, tiles[~full]), (False, tiles[full])):
        if not len(chosen):
            continue
        if causal:
            assert (chosen[:, K_STOP] == chosen[:, Q_STOP]).all(), (
                "a causal tile's keys must end where its queries do"
            )
            chosen = _in_order(chosen, held)
        else:
            # Tiles that read the same keys become one segment: every K row is then read once per call.
            chosen = chosen[np.lexsort((chosen[:, Q_START], chosen[:, K_START]))]
        q, q_sizes = _lookup(held, chosen[:, Q_START], chosen[:, Q_STOP])
        new = np.ones(len(chosen), bool)
        if not causal:
            new[1:] = (np.diff(chosen[:, K_START]) != 0) | (np.diff(chosen[:, K_STOP]) != 0)
        k, k_sizes = _lookup(held, chosen[new, K_START], chosen[new, K_STOP])
        q_sizes = np.add.reduceat(q_sizes, np.flatnonzero(new))
        calls.append(_Call(causal, q, k, _borders(q_sizes), _borders(k_sizes)))
    return calls


def _borders(sizes: Int64) -> Int64:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])


def _forward(local: list[int], remote: list[list[int]], slots: int) -> tuple[Operation, ...]:
    """As many exchanges as there are slots are posted first; each stage's calls run as soon as its rows are there."""
    order = [Operation("post", at) for at in range(min(slots, len(remote)))]
    order += [Operation("attend", call) for call in local]
    for at, calls in enumerate(remote):
        order.append(Operation("wait", at))
        order += [Operation("attend", call) for call in calls]
        if at + slots < len(remote):
            order.append(Operation("post", at + slots))
    return tuple(order)


def _backward(
    early: list[int], late: list[int], remote: list[list[int]], slots: int, whole: bool, fetch: bool = True
) -> tuple[Operation, ...]:
    """The early local calls hide the fetch. Then the stages, so that dK/dV travel home while the late calls run.

    Args:
        whole: calls add to the gradients of earlier stages' rows: none goes home before the last stage's have run.
    """
    order = [Operation("post", at) for at in range(min(slots, len(remote)))] if fetch else []
    order += [Operation("attend", call) for call in early]
    for at, calls in enumerate(remote):
        order += [Operation("wait", at)] if fetch else []
        order += [Operation("attend", call) for call in calls]
        if whole:
            continue
        # As with what is fetched, what goes home is held for so many stages at once.
        order += [Operation("wait_return", at - slots)] if at >= slots else []
        order.append(Operation("post_return", at))
        if fetch and at + slots < len(remote):
            order.append(Operation("post", at + slots))
    order += [Operation("post_return", at) for at in range(len(remote))] if whole else []
    order += [Operation("attend", call) for call in late]
    order += [Operation("wait_return", at) for at in range(max(len(remote) - slots, 0), len(remote))]
    return tuple(order)
