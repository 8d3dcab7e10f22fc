"""Memory: the bytes that a program's execution holds, before it runs.

(Program, Shape) -> bytes. It follows the executor tensor by tensor: the arena, the accumulators, and for each kernel
call the rows that are gathered for it and what it returns. What a kernel allocates for itself is not in it.
"""

from __future__ import annotations

import dataclasses

from sap_hf.planning.cost import Shape
from sap_hf.planning.program import Call, Program, Rows

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
    width = _Widths.of(shape)
    returns = sum(leave + come for leave, come in program.return_rows)
    return (program.buffer_rows + returns) * width.keys + program.buffer_rows * width.wide_keys


def peak_bytes(program: Program, shape: Shape) -> int:
    """Most bytes that one layer holds beside q, k, v, out and dout, forward or backward.

    Args:
        shape: its bytes_per_element is that of q, k and v, and of what the kernel returns; accumulators have 4 or 8.
    """
    width = _Widths.of(shape)
    own = int(program.own.stop - program.own.start)
    # The out of the forward and the dq of the backward, and lse, which the backward has from the forward.
    accumulators = own * (width.wide_query + width.head)
    # In the end dk and dv leave the arena as copies, and dq its accumulator.
    leaving = own * (width.keys + (width.query if width.query < width.wide_query else 0))
    most = max(_most(program, width, backward=False), _most(program, width, backward=True), leaving)
    # The arena is never smaller than the backward of an earlier layer made it.
    return arena_bytes(program, shape) + accumulators + most


def _most(program: Program, width: _Widths, backward: bool) -> int:
    """Most bytes that come and go while the operations run."""
    held, most, first = 0, 0, True
    for operation in program.backward if backward else program.forward:
        if operation.kind in ("post", "wait", "wait_return"):
            exchange = program.exchanges[operation.at]
            packed = 0 if exchange.packed is None else len(exchange.packed) * width.keys
            if operation.kind == "wait_return" and packed:
                largest = max((message.stop - message.start for message in exchange.sends), default=0)
                most = max(most, held + largest * width.wide_keys)
            # What was packed to be sent lives until the exchange is over.
            if operation.kind != "wait_return":
                held += packed if operation.kind == "post" else -packed
            most = max(most, held)
        elif operation.kind == "attend":
            call = program.calls[operation.at]
            most = max(most, held + (_backward(call, width) if backward else _forward(call, width, first)))
            first = False
    return most


def _gathered(rows: Rows) -> int:
    return 0 if rows.start is not None else len(rows.index)


def _forward(call: Call, width: _Widths, first: bool) -> int:
    keys, results = _gathered(call.k) * width.keys, len(call.q.index) * (width.query + width.head)
    merged = 0
    if not first or len(call.q.rounds) > 1:
        largest = max(len(turn) for turn in call.q.rounds)
        merged = largest * MERGE * width.head
        if call.q.start is None:
            merged += largest * width.wide_query
        if len(call.q.rounds) > 1:
            merged += largest * (width.query + width.head)
    # What was gathered of q is gone when the kernel has returned.
    return keys + results + max(_gathered(call.q) * width.query, merged)


def _backward(call: Call, width: _Widths) -> int:
    keys = _gathered(call.k) * width.keys
    results = len(call.q.index) * width.query + len(call.k.index) * width.keys
    added = 0
    if width.query < width.wide_query:
        # Adding at indices wants both sides in one dtype.
        largest = max(len(turn) for turn in call.q.rounds)
        turn = largest * width.query if len(call.q.rounds) > 1 else 0
        added = max(
            largest * width.wide_query + turn if call.q.start is None else 0,
            len(call.k.index) * width.wide_keys // 2 if call.k.start is None else 0,
        )
    return keys + results + max(_gathered(call.q) * (3 * width.query + width.head), added)
