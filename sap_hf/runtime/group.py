"""The cp group: which ranks share a pack, and the one thing they must agree on.

`attach` names the group once; `sap_hf.attention` finds it here.
"""

from __future__ import annotations

import atexit
import dataclasses
import datetime
import functools
import os
import sys
import weakref
from typing import Any

import torch
import torch.distributed as dist

from sap_hf.errors import BatchMismatch, ConfigError, LayoutError, SapError


@dataclasses.dataclass(frozen=True)
class CpGroup:
    """The ranks that share one pack.

    Attributes:
        device: carries K and V (NCCL on CUDA, gloo on CPU), and nothing else. None for a single process without
            torch.distributed.
        host: a gloo group over the same ranks, for a few bytes per batch that never touch the device.
        job: a gloo group over all ranks of the run: those of other cp groups wait for this one's gradients.
        ulysses_size: neighbours that exchange heads, or auto; what a SapConfig says goes first.
    """

    device: dist.ProcessGroup | None
    host: dist.ProcessGroup | None
    job: dist.ProcessGroup | None
    size: int
    rank: int
    ulysses_size: int | str = "auto"


ALONE = CpGroup(None, None, None, 1, 0)
_attached: CpGroup | None = None
_warm: weakref.WeakSet[dist.ProcessGroup] = weakref.WeakSet()
# By the run's default process group, then by cp_size.
_made: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[int, CpGroup]] = weakref.WeakKeyDictionary()


def attach_group(group: CpGroup | None) -> None:
    """Make `group` what `sap_hf.attention(group=None)` means; None goes back to WORLD."""
    global _attached
    _attached = group


@functools.cache
def leave_at_exit() -> None:
    """Destroy the process groups when the interpreter ends: gloo's threads, still running then, abort the process."""
    atexit.register(_leave)


def _leave() -> None:
    # After an exception the others may be inside a collective; waiting for them here would hide the traceback.
    if getattr(sys, "last_value", None) is None and dist.is_initialized():
        attach_group(None)
        _made.clear()
        dist.destroy_process_group()


def resolve(group: dist.ProcessGroup | None, cp_size: int) -> tuple[dist.ProcessGroup | None, int]:
    """The group to use and this process's rank in it.

    Raises:
        LayoutError: the group does not have `cp_size` ranks.
    """
    if group is None and cp_size == 1:
        return None, 0
    if group is None and _attached is not None:
        group, size = _attached.device, _attached.size
    else:
        if group is None and dist.is_available() and dist.is_initialized():
            group = dist.group.WORLD
        size = 1 if group is None else dist.get_world_size(group)
    if size != cp_size:
        raise LayoutError(
            f"The plan is for cp_size={cp_size} ranks, but the group has {size}.\n"
            f"  Plan with cp_size={size}, or pass the group of the {cp_size} ranks that share this pack."
        )
    return group, 0 if group is None else dist.get_rank(group)


def warm(group: dist.ProcessGroup, device: torch.device) -> None:
    """One all-reduce over all ranks on a group's first use, so that no later point-to-point call is its first."""
    if group not in _warm:
        dist.all_reduce(torch.zeros(1, device=device), group=group)
        _warm.add(group)


def all_gather(tensor: torch.Tensor, size: int, group: dist.ProcessGroup | None) -> torch.Tensor:
    """(size * n, ...) of every rank's (n, ...), in rank order."""
    everyone = torch.empty(size * len(tensor), *tensor.shape[1:], dtype=tensor.dtype, device=tensor.device)
    if hasattr(dist, "all_gather_single"):
        dist.all_gather_single(everyone, tensor, group=group)
    else:  # TODO(torch>=2.13): the only name then.
        dist.all_gather_into_tensor(everyone, tensor, group=group)
    return everyone


def attached() -> CpGroup | None:
    """The cp group that `attach_group` named, or None."""
    return _attached


def consecutive(cp_size: int) -> CpGroup:
    """This process among each `cp_size` consecutive ranks, on process groups of its own.

    The default group and those of a DeviceMesh carry what DDP and FSDP reduce while the backward runs (a mesh axis that
    spans the run has the default group itself), and what one communicator carries goes one after the other: on NCCL in
    one stream, on gloo through two threads and one connection to each peer. Rows would wait behind buckets of 25 MB.
    So would agreements about batches; they share the rows' group where that is gloo: all come from the thread that
    runs the model.

    Made once per cp_size, by all ranks of the run alike, each of which makes the groups of all.
    """
    world = dist.group.WORLD
    assert world is not None, "cp groups are made of the ranks of a process group"
    made = _made.setdefault(world, {})
    if cp_size not in made:
        device = _among(cp_size)
        host = device if dist.get_backend(device) == "gloo" else _among(cp_size, "gloo")
        job = host if cp_size == dist.get_world_size() else _among(dist.get_world_size(), "gloo")
        made[cp_size] = CpGroup(device, host, job, cp_size, dist.get_rank(device))
    return made[cp_size]


def world() -> CpGroup:
    """All ranks of the run as one cp group."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return ALONE
    return consecutive(dist.get_world_size())


def ranks_per_node() -> int | None:
    """Processes of this run on this machine, as torchrun and accelerate say; None where no launcher did."""
    given = os.environ.get("LOCAL_WORLD_SIZE")
    return None if given is None else int(given)


def from_first(group: CpGroup, value: object, problem: SapError | None) -> object:
    """The value of the cp group's first rank, on all of them; every rank raises when one has a problem.

    Raises:
        SapError: this rank's own problem.
        ConfigError: another rank's.
    """
    if group.host is None:
        everyone: list[Any] = [(value, None if problem is None else str(problem))]
    else:
        everyone = [None] * group.size
        dist.all_gather_object(everyone, (value, None if problem is None else str(problem)), group=group.host)
    if problem is not None:
        raise problem
    for rank, (_, message) in enumerate(everyone):
        if message is not None:
            raise ConfigError(f"Rank {rank} of the cp group: {message}")
    return everyone[0][0]


def agree(group: CpGroup, fingerprint: tuple[int, int], problem: SapError | None, training: bool) -> None:
    """Raise on every rank alike when one rank refused its batch, or when the batches of a cp group differ.

    Args:
        training: ask the whole run, whose ranks all wait for each other's gradients; else the cp group alone.
        fingerprint: 64-bit hash of the inputs and digest of the plan; ignored where there is a problem.
        problem: why this rank refuses its batch, or None.

    Raises:
        SapError: this rank's own problem.
        BatchMismatch: another rank's problem, or other inputs on another rank.
    """
    if group.host is None:
        if problem is not None:
            raise problem
        return
    asked, count = group.host, group.size
    if training and group.job is not None:
        asked, count = group.job, dist.get_world_size(group.job)
    mine = torch.tensor(
        [int(problem is not None), *(_signed(word) for word in fingerprint)], dtype=torch.int64
    )
    table = all_gather(mine, count, asked).view(count, 3)
    if table[:, 0].any():
        messages: list[str | None] = [None] * count
        dist.all_gather_object(messages, str(problem) if problem else None, group=asked)
        if problem is not None:
            raise problem
        rank = int(table[:, 0].nonzero()[0])
        raise BatchMismatch(f"Rank {rank} refused its batch: {messages[rank]}")
    # cp is the fastest-varying mesh axis: the ranks of a group follow each other.
    _check_same(table.view(-1, group.size, 3), group.size)


def agree_ahead(
    group: dist.ProcessGroup | None, cp_size: int, came: bool, fingerprint: tuple[int, int] | None
) -> tuple[bool, bool]:
    """Say how the last batch came and which one is next; no rank raises, all are told the same.

    Args:
        group: gloo, over all ranks of the run; None for a rank that asks nobody.
        came: the last batch was the one that was agreed upon.
        fingerprint: of the next batch, as for `agree`; None when there is none, or none that could be planned.

    Returns:
        Whether all ranks said the same about the last batch, and whether besides all ranks have a next one, the same
        throughout every cp group.
    """
    if group is None:
        return True, fingerprint is not None
    words = [int(came), int(fingerprint is not None), *(_signed(word) for word in fingerprint or (0, 0))]
    mine = torch.tensor(words, dtype=torch.int64)
    groups = all_gather(mine, dist.get_world_size(group), group).view(-1, cp_size, len(words))
    same = bool((groups[:, :, 0] == int(came)).all())
    return same, same and bool(groups[:, :, 1].all() and (groups == groups[:, :1]).all())


def _check_same(groups: torch.Tensor, size: int) -> None:
    """Compare fingerprints (groups, size, 3) within every cp group; all that were asked raise alike."""
    for column, what in ((1, "inputs"), (2, "plan")):
        odd = (groups[:, :, column] != groups[:, :1, column]).nonzero()
        if len(odd):
            group, ranks = int(odd[0, 0]), sorted({int(r) for g, r in odd.tolist() if g == odd[0, 0]})
            which = f" (cp group {group})" if len(groups) > 1 else ""
            raise BatchMismatch(
                f"The {size} ranks of a cp group share every batch, but the {what} of rank "
                f"{', '.join(map(str, ranks))} differ from rank 0's{which}.\n"
                "  Give all of them the same data in the same order: the same seed, dispatch_batches=False for an "
                "iterable dataset, and the same config."
            )


def _signed(word: int) -> int:
    return word - (1 << 64) if word >= 1 << 63 else word


def _among(size: int, backend: str | None = None) -> dist.ProcessGroup:
    """This rank's one of the groups of `size` consecutive ranks; the default group's backend unless one is given."""
    mine = None
    for first in range(0, dist.get_world_size(), size):
        ranks = list(range(first, first + size))
        group = dist.new_group(ranks, _patience(), backend)
        if dist.get_rank() in ranks:
            mine = group
    assert mine is not None
    return mine


def _patience() -> datetime.timedelta | None:
    """The timeout that the script gave the default group; torch gives a new one its own default. None: it has none."""
    world: Any = dist.group.WORLD
    options = getattr(world._get_backend(world._device_types[0]), "options", None)
    return None if options is None else options._timeout
