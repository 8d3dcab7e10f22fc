"""Memory: the bytes that a program's execution holds, before it runs.

(Program, Shape) -> bytes. It follows the executor tensor by tensor: the arena, what the parts of all calls are put
together in, for each kernel call the rows that are gathered for it and what it returns, and around all of it the
exchange of heads. What a kernel allocates for itself is not in it; kv heads that are repeated for it are.
"""

from __future__ import annotations

import dataclasses

from sap_hf.planning.cost import Shape
from sap_hf.planning.heads import split_turns
from sap_hf.planning.program import Call, Operation, Program, Rows

# Elements per row and head that merging keeps: while the weights of both parts are computed, and once they are.
WEIGHING, WEIGHED = 5, 3


@dataclasses.dataclass(frozen=True)
class _Widths:
    """Bytes of one row: of q and out, of K and V, of one number per head; in the wire's dtype or the accumulators'.

    Attributes:
        uneven: kv heads have different numbers of readers; K and V are repeated for each query head.
    """

    query: int
    keys: int
    wide_query: int
    wide_keys: int
    head: int
    uneven: bool

    @classmethod
    def of(cls, shape: Shape, uneven: bool = False) -> _Widths:
        wire, wide = shape.bytes_per_element, max(4, shape.bytes_per_element)
        query, keys = shape.num_heads * shape.head_dim, 2 * shape.num_kv_heads * shape.head_dim
        return cls(query * wire, keys * wire, query * wide, keys * wide, shape.num_heads * wide, uneven)

    @property
    def repeated(self) -> int:
        """K and V with a head for each query head."""
        return 2 * self.query if self.uneven else 0


def arena_bytes(program: Program, shape: Shape) -> int:
    """What the layers of a batch receive in and send from: in the backward, where K/V and its gradient live at once."""
    if program.alone:
        return 0
    width = _Widths.of(shape)
    sent = sum(leave + come for leave, come in program.return_rows)
    # With room for all stages, rows are packed where their gradients come home.
    if program.slots < len(program.exchanges):
        sent += sum(program.packed_rows)
    return (program.buffer_rows + sent) * width.keys + program.buffer_rows * width.wide_keys


def peak_bytes(program: Program, shape: Shape, ulysses_size: int = 1, turns: int = 1) -> tuple[int, int]:
    """Most bytes that one layer's forward, and its backward, hold beside q, k, v, out and dout of the rank's rows.

    Args:
        shape: of the layer, all heads; its bytes_per_element is that of q, k and v, and of what the kernel returns;
            accumulators have 4 or 8.
        ulysses_size: ranks that exchange heads, of which `program` is for one.
        turns: as in Plan.
    """
    if ulysses_size == 1:
        width = _Widths.of(shape)
        forward, backward = _forward(program, width), _backward(program, width)
        of_arena = arena_bytes(program, shape)
    else:
        forward, backward, of_arena = _in_turns(program, shape, ulysses_size, turns)
    # The arena is never smaller than the backward of an earlier layer made it.
    return of_arena + forward, of_arena + backward


@dataclasses.dataclass(frozen=True)
class _Turn:
    """Bytes of one turn of exchanged heads.

    Attributes:
        sent: q, k and v of this rank's rows as they travel, and arrived: of all rows and this rank's heads. dq, dk and
            dv have the same way back.
        attended, lse: out and lse of all rows and this rank's heads; home: out of this rank's rows as it comes home.
            dout has the same way back.
        forward, backward: as of a layer of these heads. begun: what its backward holds when it has begun.
        arena: what it receives in.
    """

    sent: int
    arrived: int
    attended: int
    lse: int
    home: int
    forward: int
    backward: int
    begun: int
    arena: int

    @property
    def saved(self) -> int:
        """What waits for the backward."""
        return self.arrived + self.attended + self.lse

    @property
    def leaving(self) -> int:
        """dq, dk and dv while they are put together, then beside the room for those that come."""
        return self.arrived + max(self.arrived, self.sent)


def _in_turns(program: Program, shape: Shape, ulysses_size: int, number: int) -> tuple[int, int, int]:
    """Most bytes of a forward and a backward with exchanged heads, and of the arena of each."""
    rows, own, one = program.rows, program.rows // ulysses_size, shape.head_dim * shape.bytes_per_element
    turns = []
    for split in split_turns(shape.num_heads, shape.num_kv_heads, ulysses_size, number):
        its = split[program.rank % ulysses_size]
        mine = dataclasses.replace(shape, num_heads=its.q_count, num_kv_heads=its.kv_count)
        width = _Widths.of(mine, uneven=not its.even)
        turns.append(
            _Turn(
                own * one * sum(each.q_count + 2 * each.kv_count for each in split),
                rows * (width.query + width.keys),
                rows * width.query,
                rows * width.head,
                own * one * sum(each.q_count for each in split),
                _forward(program, width),
                _backward(program, width),
                rows * width.wide_query if program.merges else 0,
                arena_bytes(program, mine),
            )
        )
    gradients = own * one * (shape.num_heads + 2 * shape.num_kv_heads)
    whole = _Widths.of(shape)
    # Gradients of kv heads that went to several ranks are summed in wide accumulators.
    if sum(turn.sent for turn in turns) > gradients and whole.keys < whole.wide_keys:
        gradients += own * whole.wide_keys
    return _forward_in(turns), _backward_in(turns, gradients), max(turn.arena for turn in turns)


def _forward_in(turns: list[_Turn]) -> int:
    """Beside out, in which the parts that have come home are put together."""
    out, saved, coming = 0, 0, turns[0].sent + turns[0].arrived
    most = coming
    for turn, after in zip(turns, [*turns[1:], None], strict=True):
        # Beside a turn the heads of the next one come, and out of the one before is on the way.
        coming = 0 if after is None else after.sent + after.arrived
        most = max(most, saved + out + turn.arrived + turn.attended + turn.forward + coming)
        saved, out = saved + turn.saved, out + turn.home
    return max(most, saved + 2 * out) - out


def _backward_in(turns: list[_Turn], gradients: int) -> int:
    """Beside dout of the rank's own rows.

    Args:
        gradients: dq, dk and dv of the rank's own rows, where those that have come home are summed.
    """
    saved, home, before = sum(turn.saved for turn in turns), 0, None
    most = saved + turns[0].home + turns[0].attended
    for turn, after in zip(turns, [*turns[1:], None], strict=True):
        held = saved + home + turn.attended
        if before is not None:
            # What the one before has computed leaves when this one has begun.
            most = max(most, held + turn.begun + before.leaving)
            home += before.arrived + before.sent
            held += before.arrived + before.sent
        coming = 0 if after is None else after.home + after.attended
        most = max(most, held + coming + turn.backward - turn.lse)
        saved, before = saved - turn.saved, turn
    assert before is not None, "there is at least one turn"
    return max(most, home + before.leaving, sum(turn.sent for turn in turns) + gradients)


def _forward(program: Program, width: _Widths) -> int:
    own = program.rows
    # Where no row has two parts, they are put together in out itself.
    room = own * (width.head + (width.wide_query if program.merges else width.query))
    # In the end out leaves its accumulator.
    most = room + (own * width.query if _widens(program, width) else 0)
    held = 0
    for call in _attended(program, program.forward):
        whole = held == 0 and _are_all(call.q, own)
        results = len(call.q.index) * (width.query + width.head)
        if not program.merges and call.q.start is not None and not whole:
            # The kernel writes its part in out, which is there before it runs.
            results = len(call.q.index) * width.head
            held = max(held, own * width.query)
        # What was gathered, and repeated of K and V, is gone when the kernel has returned.
        given = _gathered(call.q) * width.query + _gathered(call.k) * width.keys
        most = max(most, held + given + len(call.k.index) * width.repeated + results)
        if whole:
            # The part is the whole, or is widened to it.
            most = max(most, results + (own * width.wide_query if _widens(program, width) else 0))
        else:
            added = 0
            if program.merges and (held or len(call.q.rounds) > 1):
                added = _merging(call, width)
            elif _widens(program, width) and call.q.start is None:
                added = len(call.q.index) * width.wide_query
            most = max(most, room + results + added)
        held = room
    return most - own * width.query


def _merging(call: Call, width: _Widths) -> int:
    """Bytes while a part is merged into the rows that it belongs to."""
    row = WEIGHING * width.head
    if call.q.start is None:
        # Rows of out are gathered when the weights are known.
        row = WEIGHED * width.head + width.wide_query
    if len(call.q.rounds) > 1:
        row += width.query + width.head
    return max(len(turn) for turn in call.q.rounds) * row


def _backward(program: Program, width: _Widths) -> int:
    """With lse, which the forward leaves."""
    # Where no row has two parts, and for keys whose gradient has one, parts are put together in the gradient itself.
    of_query = program.rows * (width.wide_query if program.merges else width.query)
    of_keys = program.rows * width.keys
    most = 0
    dq, dkv = of_query if program.merges else 0, 0
    for call in _attended(program, program.backward):
        part_q, part_keys = len(call.q.index) * width.query, len(call.k.index) * width.keys
        # The part of all rows is the whole.
        whole_q = dq == 0 and _are_all(call.q, program.rows)
        whole_keys = dkv == 0 and _are_all(call.k, program.rows)
        # Other parts of rows that lie together are written in the whole, which is there before the kernel runs.
        if not program.merges and call.q.start is not None and not whole_q:
            dq, part_q = of_query, 0
        if call.local and call.k.start is not None and not whole_keys and not width.uneven:
            dkv, part_keys = of_keys, 0
        given = _gathered(call.q) * (3 * width.query + width.head) + _gathered(call.k) * width.keys
        most = max(most, dq + dkv + given + part_q + max(part_keys, _repeating(call, width)))
        if whole_q:
            part_q = 0
        dq = of_query
        most = max(most, dq + dkv + part_q + part_keys + _adding(call, program, width))
        if call.local:
            dkv, part_keys = of_keys, 0 if whole_keys else part_keys
            most = max(most, dq + dkv + part_q + part_keys)
    for exchange in program.exchanges:
        if exchange.packed is not None:
            largest = max((message.stop - message.start for message in exchange.sends), default=0)
            most = max(most, dq + dkv + largest * width.wide_keys)
    # In the end dq leaves its accumulator, and the sums of kept rows are written to dk and dv.
    leaving = program.rows * width.query if _widens(program, width) else 0
    written = _gathered(program.kept) * width.keys // 2 if width.keys < width.wide_keys else 0
    return program.rows * width.head + max(most, of_query + leaving + of_keys + written)


def _repeating(call: Call, width: _Widths) -> int:
    """Bytes of K, V, dK and dV with a head for each query head; the readers' dK and dV are summed."""
    if not width.uneven:
        return 0
    # When dV is summed there is dK; the sums are put together beside themselves. Later they are wide, but this is more.
    summing = 3 * width.wide_keys // 2
    return len(call.k.index) * (width.repeated + max(width.repeated, summing))


def _adding(call: Call, program: Program, width: _Widths) -> int:
    """Bytes while the gradients of a call are added to those of its rows: adding at indices wants one dtype."""
    picked, sums = call.added
    taken = _gathered(picked) * width.keys // 2
    return max(
        _at_indices(call.q, width.query, width.wide_query) if program.merges else 0,
        taken + _at_indices(sums, width.keys // 2, width.wide_keys // 2),
    )


def _at_indices(rows: Rows, wire: int, wide: int) -> int:
    if rows.start is not None:
        return 0
    picked, widened = wire if len(rows.rounds) > 1 else 0, wide if wire < wide else 0
    return max(len(turn) * (picked + widened) for turn in rows.rounds)


def _attended(program: Program, operations: tuple[Operation, ...]) -> list[Call]:
    return [program.calls[operation.at] for operation in operations if operation.kind == "attend"]


def _widens(program: Program, width: _Widths) -> bool:
    return program.merges and width.query < width.wide_query


def _are_all(rows: Rows, count: int) -> bool:
    """Whether these are the rank's `count` rows, in order."""
    return rows.start == 0 and len(rows.index) == count


def _gathered(rows: Rows) -> int:
    return 0 if rows.start is not None else len(rows.index)
