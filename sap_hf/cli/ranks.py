"""What sap-hf doctor asks of the ranks that a launcher started: do they meet, do messages arrive, and how fast?

Every rank runs the same checks, each in a thread that is given up after a time limit: a hang is what most mistakes
look like here. What a rank found goes to rank 0 through the launcher's store, which works where the groups do not.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import queue
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import Store

from sap_hf.cli.doctor import OK, PROBLEM, START, WARNING, Finding
from sap_hf.cli.machine import compute_device
from sap_hf.planning.hardware import PRESETS
from sap_hf.runtime import transport
from sap_hf.runtime.calibrate import agreed_ranks_per_node, link_bytes_per_s, message_costs
from sap_hf.runtime.group import world as whole_run

Result = TypeVar("Result")
# What torch.distributed raises when others are late, gone or unreachable. SapError's LayoutError is a ValueError.
FAILURES = (RuntimeError, OSError, ValueError)
# Measuring takes some seconds for each kind of link.
LINKS_SECONDS = 120.0
# Plans are made for a preset; half or twice its speed may turn a choice.
FACTOR = 2.0
KEY = "sap-hf/doctor/"


def examine(limit: float) -> tuple[list[Finding], Store | None]:
    """Meet the other ranks and exchange something with them in each way that training does.

    Args:
        limit: seconds until a check that has not come back is a problem; the checks after it are left out.

    Returns:
        What this rank found, and the store to tell the others; None when even that was not reached.
    """
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store = _within(limit, functools.partial(_rendezvous, limit))
    except FAILURES as error:
        change = "start all nodes with the same --rdzv-endpoint (or MASTER_ADDR and MASTER_PORT), open to each other"
        return [Finding(PROBLEM, "rendezvous", f"{place}: {_first_line(error)}", change)], None
    device = compute_device()
    # Its own connection: one that a thread waits on answers nobody else.
    reports = store.clone()
    checks: dict[str, Callable[[], list[Finding]]] = {
        "process groups": functools.partial(_groups, store, device, limit),
        "all-reduce": functools.partial(_all_reduce, device),
        "all-to-all": functools.partial(_all_to_all, device),
        "point-to-point": functools.partial(_point_to_point, device),
        "links": functools.partial(_links, device),
    }
    findings: list[Finding] = []
    for name, check in checks.items():
        findings += _checked(name, max(limit, LINKS_SECONDS) if name == "links" else limit, check, device)
        if findings[-1].level == PROBLEM:
            break
    return findings, reports


def _checked(
    name: str, seconds: float, check: Callable[[], list[Finding]], device: torch.device
) -> list[Finding]:
    try:
        return _within(seconds, check)
    except FAILURES as error:
        return [Finding(PROBLEM, name, _first_line(error), _way_out(device))]


def gather(store: Store, findings: list[Finding], limit: float) -> list[list[Finding]]:
    """On rank 0 what every rank found, a rank that does not say so in `limit` seconds included; elsewhere nothing."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if rank:
        store.set(f"{KEY}{rank}", json.dumps([dataclasses.astuple(finding) for finding in findings]))
        return []
    everyone, deadline = [findings], time.monotonic() + limit
    everyone += [
        _report_of(other, store, max(deadline - time.monotonic(), 0.01)) for other in range(1, world)
    ]
    return everyone


def _report_of(rank: int, store: Store, seconds: float) -> list[Finding]:
    try:
        store.wait([f"{KEY}{rank}"], timedelta(seconds=seconds))
    except FAILURES:
        change = "look at its node and its output: it has ended, or stands in something else"
        return [Finding(PROBLEM, "report", f"none {seconds:.0f} s after rank 0 was done", change)]
    return [Finding(*fields) for fields in json.loads(store.get(f"{KEY}{rank}"))]


def leave(limit: float) -> bool:
    """Destroy the groups once all ranks are here; False when that did not come about."""

    def end() -> None:
        dist.barrier()
        dist.destroy_process_group()

    try:
        _within(limit, end)
    except FAILURES:
        return False
    return True


def _within(seconds: float, function: Callable[[], Result]) -> Result:
    """The function's result or error, or TimeoutError; then it still runs, in a thread of its own."""
    answers: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        if torch.cuda.is_available():
            torch.cuda.set_device(compute_device())
        try:
            answers.put((function(), None))
        except FAILURES as error:
            answers.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        result, error = answers.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(
            f"no answer in {seconds:.0f} s: a rank did not take part, or messages get lost"
        ) from None
    if error is not None:
        raise error
    return result  # type: ignore[no-any-return]


def _rendezvous(limit: float) -> Store:
    store, _, _ = next(dist.rendezvous("env://", timeout=timedelta(seconds=limit)))
    return store


def _groups(store: Store, device: torch.device, limit: float) -> list[Finding]:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    backend = "nccl" if device.type == "cuda" else "gloo"
    # Longer than a check: what hangs is given up by the check, before torch ends the process.
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=2 * limit + LINKS_SECONDS),
    )
    group = whole_run()
    side = "" if group.host is group.device else ", gloo beside it for the host"
    return [Finding(OK, "process groups", f"{backend}{side}: {world} ranks")]


def _all_reduce(device: torch.device) -> list[Finding]:
    world = dist.get_world_size()
    total = torch.full((1024,), dist.get_rank() + 1.0, device=device)
    dist.all_reduce(total)
    _expect(total, torch.full_like(total, world * (world + 1) / 2))
    return [Finding(OK, "all-reduce", "right")]


def _all_to_all(device: torch.device) -> list[Finding]:
    """Some ranks get 0 rows, as from most plans."""
    rank, world = dist.get_rank(), dist.get_world_size()
    leaving, coming = (
        [(source + 2 * target) % 4 for source, target in pairs]
        for pairs in (
            [(rank, other) for other in range(world)],
            [(other, rank) for other in range(world)],
        )
    )
    send = torch.full((sum(leaving), 8), float(rank), device=device)
    receive = torch.full((sum(coming), 8), -1.0, device=device)
    assert dist.group.WORLD is not None
    transport.current().post_all_to_all(send, receive, leaving, coming, dist.group.WORLD).wait()
    sources = torch.arange(world, dtype=receive.dtype).repeat_interleave(torch.tensor(coming))
    _expect(receive, sources.to(device)[:, None].expand(-1, 8))
    return [Finding(OK, "all-to-all", "right, with uneven parts")]


def _point_to_point(device: torch.device) -> list[Finding]:
    """Two messages of different sizes to every other rank, in one group."""
    rank, world = dist.get_rank(), dist.get_world_size()
    others = [other for other in range(world) if other != rank]
    sends = [
        (other, torch.full((size,), float(rank * size), device=device))
        for other in others
        for size in (3, 1000)
    ]
    receives = [(other, torch.full((size,), -1.0, device=device)) for other in others for size in (3, 1000)]
    assert dist.group.WORLD is not None
    transport.current().post(sends, receives, dist.group.WORLD).wait()
    for source, part in receives:
        _expect(part, torch.full_like(part, float(source * len(part))))
    return [Finding(OK, "point-to-point", "right, in groups")]


def _expect(found: torch.Tensor, right: torch.Tensor) -> None:
    if not torch.equal(found, right):
        # The same words on every rank: they are printed once.
        raise ConnectionError("numbers of others arrived wrong")


def _links(device: torch.device) -> list[Finding]:
    """Bytes per second between neighbours, all ranks sending at once, beside what plans are made for."""
    world = dist.get_world_size()
    if world == 1:
        return [Finding(OK, "links", "1 process: nothing is sent")]
    per_node = agreed_ranks_per_node()
    start, _ = message_costs(device)
    preset = PRESETS["h100" if device.type == "cuda" else "cpu"]
    kinds = []
    if per_node > 1:
        kinds.append(("inside the node", (1, per_node), preset.node_bytes_per_s))
    if world > per_node:
        kinds.append(("between nodes", (per_node, world), preset.network_bytes_per_s))
    findings = []
    for name, (distance, span), assumed in kinds:
        measured = link_bytes_per_s(distance, span, device, start)
        text = f"{name} {measured / 1e9:.2f} GB/s per rank and direction"
        text += f"; plans for {preset.name!r} assume {assumed / 1e9:.2f}"
        near = 1 / FACTOR <= measured / assumed <= FACTOR
        change = f"{START} bench --calibrate mine.yaml, then hardware: mine.yaml in the config"
        findings.append(Finding(OK, "links", text) if near else Finding(WARNING, "links", text, change))
    return findings


def _way_out(device: torch.device) -> str:
    if device.type == "cuda":
        return "NCCL_DEBUG=INFO says where it stands; NCCL_SOCKET_IFNAME names the network card"
    return "GLOO_SOCKET_IFNAME names the network card (lo on one machine)"


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
