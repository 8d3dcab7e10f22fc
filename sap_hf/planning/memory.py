"""Memory: the bytes that a program's execution holds, before it runs.

(Program, Shape) -> bytes. It follows the executor tensor by tensor: the arena, what the parts of all calls are put
together in, and for each kernel call the rows that are gathered for it and what it returns. What a kernel allocates for
itself is not in it.
"""

from __future__ import annotations

import dataclasses

from sap_hf.planning.cost import Shape
from sap_hf.planning.program import Call, Operation, Program, Rows

# Elements per row and head that merging keeps beside the outputs: lse of both parts and their weights.
MERGE = 6


@dataclasses.dataclass(frozen=True)
class _Widths:
    """Bytes of one row: of q and out, of K and V, of one number per head; in the wire's dtype or the accumulators'."""

    query: int
    keys: int
    wide_query: int
    wide_keys: int
    head: int

    @classmethod
    def of(cls, shape: Shape) -> _Widths:
        wire, wide = shape.bytes_per_element, max(4, shape.bytes_per_element)
        query, keys = shape.num_heads * shape.head_dim, 2 * shape.num_kv_heads * shape.head_dim
        return cls(query * wire, keys * wire, query * wide, keys * wide, shape.num_heads * wide)


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


def peak_bytes(program: Program, shape: Shape) -> int:
    """Most bytes that one layer holds beside q, k, v, out and dout, forward or backward.

    Args:
        shape: its bytes_per_element is that of q, k and v, and of what the kernel returns; accumulators have 4 or 8.
    """
    width = _Widths.of(shape)
    # The arena is never smaller than the backward of an earlier layer made it.
    return arena_bytes(program, shape) + max(_forward(program, width), _backward(program, width))


def _forward(program: Program, width: _Widths) -> int:
    own = _own(program)
    # Where no row has two parts, they are put together in out itself.
    room = own * (width.head + (width.wide_query if program.merges else width.query))
    # In the end out leaves its accumulator.
    most = room + (own * width.query if program.merges else 0)
    held = 0
    for call in _attended(program, program.forward):
        keys, results = _gathered(call.k) * width.keys, len(call.q.index) * (width.query + width.head)
        # What was gathered of q is gone when the kernel has returned.
        most = max(most, held + keys + results + _gathered(call.q) * width.query)
        if held == 0 and call.q.start == 0 and len(call.q.index) == own:
            # The part is the whole, or is widened to it.
            most = max(most, keys + results + (own * width.wide_query if _widens(program, width) else 0))
        else:
            added = 0
            if program.merges and (held or len(call.q.rounds) > 1):
                added = _merging(call, width)
            elif _widens(program, width) and call.q.start is None:
                added = len(call.q.index) * width.wide_query
            most = max(most, room + keys + results + added)
        held = room
    return most - own * width.query


def _merging(call: Call, width: _Widths) -> int:
    """Bytes while a part is merged into the rows that it belongs to."""
    largest = max(len(turn) for turn in call.q.rounds)
    merged = largest * MERGE * width.head
    if call.q.start is None:
        merged += largest * width.wide_query
    if len(call.q.rounds) > 1:
        merged += largest * (width.query + width.head)
    return merged


def _backward(program: Program, width: _Widths) -> int:
    """With lse, which the forward leaves."""
    own = _own(program)
    room = own * (width.wide_query if program.merges else width.query)
    # In the end dk and dv leave the arena as copies, and dq its accumulator.
    most = room + own * (width.keys + (width.query if _widens(program, width) else 0))
    held = room if program.merges else 0
    for call in _attended(program, program.backward):
        keys = _gathered(call.k) * width.keys
        results = len(call.q.index) * width.query + len(call.k.index) * width.keys
        most = max(most, held + keys + results + _gathered(call.q) * (3 * width.query + width.head))
        if not program.merges:
            # The part of all rows is dq.
            held = room - (room if call.q.start == 0 and len(call.q.index) == own else 0)
        most = max(most, held + keys + results + max(_adding(call, program, width), 0))
        held = room
    for exchange in program.exchanges:
        if exchange.packed is not None:
            largest = max((message.stop - message.start for message in exchange.sends), default=0)
            most = max(most, held + largest * width.wide_keys)
    return own * width.head + most


def _adding(call: Call, program: Program, width: _Widths) -> int:
    """Bytes while the gradients of a call are added to those of its rows: adding at indices wants one dtype."""
    most = 0
    for rows, wire, wide in (
        (call.q if program.merges else None, width.query, width.wide_query),
        (call.k, width.keys // 2, width.wide_keys // 2),
    ):
        if rows is not None and rows.start is None:
            largest = max(len(turn) for turn in rows.rounds)
            most = max(most, largest * ((wire if len(rows.rounds) > 1 else 0) + (wide if wire < wide else 0)))
    return most


def _own(program: Program) -> int:
    return int(program.own.stop - program.own.start)


def _attended(program: Program, operations: tuple[Operation, ...]) -> list[Call]:
    return [program.calls[operation.at] for operation in operations if operation.kind == "attend"]


def _widens(program: Program, width: _Widths) -> bool:
    return program.merges and width.query < width.wide_query


def _gathered(rows: Rows) -> int:
    return 0 if rows.start is not None else len(rows.index)
