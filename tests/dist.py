"""Start real processes for a test, one per rank, and bring back what they return or how they failed.

    results = run_ranks(fn, 4, *args)       fn(rank, world, *args), a module-level function
    script = run_script("recipe.py", 2)     a script under torch.distributed.run

Ranks come from a fork server that has torch loaded (spawn would import it once per rank) and meet through a
file (gloo). The first rank that fails is the one whose traceback pytest shows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import faulthandler
import gc
import multiprocessing
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

# Loaded once in the fork server; a test module's own imports come on top, in every rank. A folder whose ranks
# all need more (transformers: 4 s each) appends to this list in its conftest.py: that runs before any start.
# torch loads _dynamo in its first backward.
PRELOAD = ["torch", "torch.distributed", "torch._dynamo", "numpy", "pytest"]
GROUP_TIMEOUT_SECONDS = 60
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


class RankError(AssertionError):
    """A rank failed, died or never came back; the message holds its traceback or its stack."""


def run_ranks(
    fn: Callable[..., Any],
    world: int,
    *args: Any,
    timeout: float = 120,
    init: bool = True,
    poison: bool = False,
    env: Mapping[str, str] | None = None,
) -> list[Any]:
    """Run fn(rank, world, *args) in `world` processes and return their results, by rank.

    Args:
        fn: module-level, so that the processes can import it; results and args must pickle.
        timeout: seconds until ranks still running are shown with their stacks and ended.
        init: start the gloo group here; False leaves it to fn, which finds the address in the environment.
        poison: `torch.empty` gives NaN inside the ranks.
        env: more environment variables for the ranks.

    Raises:
        RankError: with the traceback of the rank that failed first.
    """
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        job = _Job(world, Path(folder), _free_port(), init, poison, dict(env or {}), pickle.dumps((fn, args)))
        with _started(job) as ranks:
            return _collect(ranks, job, timeout)


@dataclasses.dataclass(frozen=True)
class Script:
    """What a script left behind: its exit code, and stdout and stderr in the order of arrival."""

    code: int
    output: str


def run_script(
    path: str | os.PathLike[str],
    world: int,
    *args: str,
    timeout: float = 300,
    env: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
) -> Script:
    """Run `python -m torch.distributed.run --nproc_per_node world path args` on the CPU.

    Raises:
        RankError: after `timeout` seconds, with the output so far; the whole process tree is ended.
    """
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(world)]
    command += ["--master_addr", "127.0.0.1", "--master_port", str(_free_port()), os.fspath(path), *args]
    environment = {**os.environ, **ONE_THREAD, **_loopback(), "ACCELERATE_USE_CPU": "true", **(env or {})}
    with tempfile.TemporaryFile("w+") as out:
        # Its own session: a timeout must end the launcher's children too, and nothing else.
        process = subprocess.Popen(
            command, stdout=out, stderr=subprocess.STDOUT, env=environment, cwd=cwd, start_new_session=True
        )
        try:
            code: int | None = process.wait(timeout)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        out.seek(0)
        output = out.read()
    if code is None:
        raise RankError(
            f"{path} was still running after {timeout} s on {world} processes. Its output:\n{output}"
        )
    return Script(code, output)


# ---- the parent's side ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Job:
    world: int
    folder: Path
    port: int
    init: bool
    poison: bool
    env: dict[str, str]
    call: bytes

    def stack_file(self, rank: int) -> Path:
        return self.folder / f"stack-{rank}.txt"


@dataclasses.dataclass
class _Rank:
    number: int
    process: Any
    pipe: Connection


# When, which rank, what it said.
_Failure = tuple[float, int, str]


@contextlib.contextmanager
def _started(job: _Job) -> Iterator[list[_Rank]]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    ranks = []
    kept = {name: os.environ.get(name) for name in ONE_THREAD}
    # The fork server reads these while it loads torch: inside the ranks it is too late.
    os.environ.update(ONE_THREAD)
    try:
        for number in range(job.world):
            mine, theirs = context.Pipe()
            process = context.Process(target=_rank_main, args=(number, job, theirs), daemon=True)
            process.start()
            theirs.close()
            ranks.append(_Rank(number, process, mine))
        yield ranks
    finally:
        for name, value in kept.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        for rank in ranks:
            rank.process.kill()
            rank.process.join()
            rank.pipe.close()


def _collect(ranks: Sequence[_Rank], job: _Job, timeout: float) -> list[Any]:
    deadline = time.monotonic() + timeout
    running = {rank.pipe: rank for rank in ranks}
    results: dict[int, Any] = {}
    while running:
        ready = wait(list(running), max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankError(_stuck(list(running.values()), job, timeout))
        failures = _read(ready, running, results)
        if failures:
            # A rank that vanished closed its sockets before its pipe: others may have complained already.
            time.sleep(0.3)
            failures += _read(wait(list(running), 0), running, results)
            raise RankError(_first(failures, job))
    for rank in ranks:
        rank.process.join(max(0.0, deadline - time.monotonic()))
        if rank.process.exitcode != 0:
            code = rank.process.exitcode
            raise RankError(f"rank {rank.number} of {job.world} returned, then left with exit code {code}")
    return [results[number] for number in range(job.world)]


def _read(ready: Sequence[Any], running: dict[Connection, _Rank], results: dict[int, Any]) -> list[_Failure]:
    """Take what these ranks have said: results into `results`, failures back."""
    failures = []
    for pipe in ready:
        rank = running.pop(pipe)
        try:
            kind, at, content = pickle.loads(pipe.recv_bytes())
        except EOFError:
            rank.process.join()
            # Time 0: a death without a traceback may have caused the errors of others, never the reverse:
            # a rank that raised stays until this process ends it.
            text = f"died with exit code {rank.process.exitcode}, without a traceback"
            failures.append((0.0, rank.number, text))
            continue
        if kind == "result":
            results[rank.number] = content
        else:
            failures.append((at, rank.number, f"failed:\n\n{content}"))
    return failures


def _first(failures: Sequence[_Failure], job: _Job) -> str:
    (_, number, text), *later = sorted(failures)
    lines = [f"rank {number} of {job.world} {text}"]
    lines += [f"later, rank {number}: {text.strip().splitlines()[-1]}" for _, number, text in later]
    return "\n".join(lines)


def _stuck(running: Sequence[_Rank], job: _Job, timeout: float) -> str:
    for rank in running:
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank.process.pid, signal.SIGUSR1)
    time.sleep(0.5)
    lines = [f"after {timeout} s, {len(running)} of {job.world} ranks were still running:"]
    for rank in running:
        file = job.stack_file(rank.number)
        stack = file.read_text() if file.exists() else "(not started)"
        lines.append(f"\nrank {rank.number} stood here:\n{stack}")
    return "\n".join(lines)


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def _loopback() -> dict[str, str]:
    # gloo looks the host name up otherwise, and in a container that may resolve to nothing.
    return {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}


# ---- the rank's side --------------------------------------------------------------------------------


def _rank_main(rank: int, job: _Job, pipe: Connection) -> None:
    # What the fork server loaded stays: every gc.collect, one of Trainer's for each run, would look through it.
    gc.freeze()
    stack_file = job.stack_file(rank).open("w")
    faulthandler.register(signal.SIGUSR1, file=stack_file, all_threads=True)
    environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job.world, "LOCAL_WORLD_SIZE": job.world}
    os.environ.update({name: str(value) for name, value in environment.items()})
    os.environ.update(
        {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(job.port), "ACCELERATE_USE_CPU": "true"}
    )
    os.environ.update({**_loopback(), **job.env})
    try:
        message = ("result", time.monotonic(), _run_rank(rank, job))
        content = pickle.dumps(message)
    except BaseException:  # noqa: BLE001  whatever it is, the parent must see it
        content = pickle.dumps(("error", time.monotonic(), traceback.format_exc()))
        pipe.send_bytes(content)
        # Stay: leaving closes the connections, and the others would fail over that. The parent ends this one.
        time.sleep(30)
        os._exit(1)
    pipe.send_bytes(content)


def _run_rank(rank: int, job: _Job) -> Any:
    import torch
    import torch.distributed as dist

    from tests.runtime.poison import poisoned_empty

    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=GROUP_TIMEOUT_SECONDS)
    if job.init:
        rendezvous = f"file://{job.folder / 'rendezvous'}"
        dist.init_process_group("gloo", rendezvous, rank=rank, world_size=job.world, timeout=limit)
    fn, args = pickle.loads(job.call)
    with poisoned_empty() if job.poison else contextlib.nullcontext():
        result = fn(rank, job.world, *args)
    if dist.is_initialized():
        # Both, else a rank that is a little late finds its peers gone and aborts.
        dist.barrier()
        dist.destroy_process_group()
    return result
