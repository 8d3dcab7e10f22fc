"""One exchange of a layer: K/V of other ranks' rows comes in, or dK/dV goes home to the owners.

DeviceProgram, buffers -> a Pending to wait on. What is sent and where it lands, the program says.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from sap_hf.planning.program import Message, rows_in
from sap_hf.runtime import transport
from sap_hf.runtime.device_program import DeviceProgram


def fetch(
    buffer: torch.Tensor,
    loaded: DeviceProgram,
    at: int,
    group: dist.ProcessGroup | None,
    room: torch.Tensor,
) -> transport.Pending:
    """Start receiving the rows of exchange `at` into the buffer (rows, K, D + Dv).

    Args:
        room: where rows are packed that do not leave as they lie, in use until the exchange is over.
    """
    exchange, index = loaded.program.exchanges[at], loaded.packed[at]
    assert group is not None, "an exchange needs a process group"
    if exchange.delivery == "all_gather":
        return transport.current().post_all_gather(buffer[loaded.program.own], buffer, group)
    if index is None:
        return transport.current().post(
            [(m.peer, buffer[m.start : m.stop]) for m in exchange.sends],
            [(m.peer, buffer[m.start : m.stop]) for m in exchange.receives],
            group,
        )
    return transport.current().post_all_to_all(
        torch.index_select(buffer, 0, index, out=room[: len(index)]),
        buffer[_span(exchange.receives)],
        _rows_per_peer(exchange.sends, loaded),
        _rows_per_peer(exchange.receives, loaded),
        group,
    )


def send_home(
    dkv: torch.Tensor,
    loaded: DeviceProgram,
    at: int,
    group: dist.ProcessGroup | None,
    room: tuple[torch.Tensor, torch.Tensor],
) -> tuple[transport.Pending, torch.Tensor]:
    """Start sending dK/dV of the rows that exchange `at` brought to their owners.

    Args:
        room: two buffers in the wire's dtype, for what leaves and for what comes home, in use until it has.

    Returns:
        The pending exchange, and (rows, K, D + Dv) that will hold what other ranks send for this rank's own rows, in
        the order of `exchange.sends`.
    """
    exchange = loaded.program.exchanges[at]
    assert group is not None, "an exchange needs a process group"
    leaving = room[0][: rows_in(exchange.receives)]
    home = room[1][: rows_in(exchange.sends)]
    # The rank's own rows may lie in the midst of those received: they stay.
    offset, parts = 0, [_span(exchange.receives)]
    if exchange.delivery == "all_gather":
        own = loaded.program.own
        parts = [slice(0, own.start), slice(own.stop, loaded.program.buffer_rows)]
    for part in parts:
        leaving[offset : offset + part.stop - part.start] = dkv[part]
        offset += part.stop - part.start
        if loaded.program.slots < len(loaded.program.exchanges):
            # The next stage in this slot adds its own gradients.
            dkv[part] = 0
    if exchange.delivery != "p2p":
        pending = transport.current().post_all_to_all(
            leaving,
            home,
            _rows_per_peer(exchange.receives, loaded),
            _rows_per_peer(exchange.sends, loaded),
            group,
        )
        return pending, home
    receives, offset = [], 0
    for m in exchange.sends:
        receives.append((m.peer, home[offset : offset + m.stop - m.start]))
        offset += m.stop - m.start
    span = parts[0]
    sends = [(m.peer, leaving[m.start - span.start : m.stop - span.start]) for m in exchange.receives]
    return transport.current().post(sends, receives, group), home


def collect(dkv: torch.Tensor, home: torch.Tensor, loaded: DeviceProgram, at: int) -> None:
    """Add what came home to the gradients of own rows: one reader after the other, in rank order."""
    exchange, index = loaded.program.exchanges[at], loaded.packed[at]
    offset = 0
    for m in exchange.sends:
        part = home[offset : offset + m.stop - m.start]
        offset += m.stop - m.start
        if index is None:
            dkv[m.start : m.stop].add_(part)
        else:
            dkv.index_add_(0, index[m.start : m.stop], part.to(dkv.dtype))


def _span(messages: Sequence[Message]) -> slice:
    """The buffer rows that received messages fill together."""
    return slice(messages[0].start, messages[-1].stop) if messages else slice(0, 0)


def _rows_per_peer(messages: Sequence[Message], loaded: DeviceProgram) -> list[int]:
    rows = [0] * loaded.program.cp_size
    for m in messages:
        rows[m.peer] += m.stop - m.start
    return rows
