"""Ahead: the plan of the next batch is made, and agreed upon, while this one trains.

accelerate's loader holds one batch more than it has yielded, so batch n + 1 lies on the host before n trains. It is
looked at there, as it comes from the workers and before it goes to the device: one daemon thread finds its documents
and plans it. When the forward of n begins, that thread makes the only collective per batch, an all-gather over all
ranks on a gloo group of its own: "n came as agreed", and the hashes of n + 1. The forward of n + 1 takes its plan from
there; it has long been done. All ranks see the same table, so all decide alike: where not every rank has the next
batch ready, or hashes differ, or nothing was asked yet (an epoch's first batch, or one that was refused), they take
the way of any forward, which agrees there and then and raises on all ranks. A batch that was changed between loader
and model takes that way too when it was changed on all ranks. A rank that alone was given other tensors learns that,
and raises alone: the others are inside an exchange by then, and end with it.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any

import torch
import torch.distributed as dist
from accelerate.data_loader import DataLoaderShard

from sap_hf.errors import BatchMismatch
from sap_hf.models.batch import PER_TOKEN
from sap_hf.models.sharding import Prepared, Sharding
from sap_hf.runtime.group import CpGroup, agree_ahead

# The thread's jobs, the most urgent first. A forward waits for a report, the end of training for no plan.
REPORT, STOP, PLAN = range(3)
FOR_THE_LOSS = ("labels", "shift_labels")


@dataclasses.dataclass(eq=False)
class _Fetched:
    """A batch between the loader and the model.

    Attributes:
        plan: its documents and plan, made in the first call; the thread's alone.
        given: its tensors by name, as the loader yields them and as the trainer moves them, at the versions they had.
    """

    plan: Callable[[], Prepared | None]
    given: list[tuple[str, torch.Tensor, int]] = dataclasses.field(default_factory=list)

    def is_batch_of(self, inputs: Mapping[str, Any]) -> bool:
        """Whether a forward is given this batch, untouched; what only the loss reads may be missing."""
        for name, value in inputs.items():
            if isinstance(value, torch.Tensor) and (name in PER_TOKEN or value.dim() > 1):
                known = [version for at, tensor, version in self.given if at == name and tensor is value]
                if value._version not in known:
                    return False
        needed = {name for name, *_ in self.given if name in PER_TOKEN and name not in FOR_THE_LOSS}
        return all(inputs.get(name) is not None for name in needed)


class Ahead:
    """The thread that plans ahead of one trainer, and the batches that it looks at.

    Args:
        group: the ranks that share a batch.
        check_batches: compare batches over all ranks.
    """

    def __init__(self, group: CpGroup, check_batches: bool):
        self._cp_size = group.size
        # Nobody else's: two threads would issue one group's collectives in another order on every rank.
        self._group = dist.new_group(backend="gloo") if check_batches and group.job is not None else None
        self._sharding: Sharding
        self._thread: threading.Thread | None = None
        self._jobs: queue.PriorityQueue[tuple[int, int, Callable[[], Any] | None, Future[Any]]]
        self._order = itertools.count()
        self._watch(None)

    def serve(self, sharding: Sharding) -> None:
        """Plan for this model from now on."""
        self._sharding = sharding
        sharding.ahead = self._next

    def close(self) -> None:
        """Give the group back."""
        if self._group is not None:
            dist.destroy_process_group(self._group)

    def __enter__(self) -> None:
        if self._thread is not None:
            # After an exception the last thread may have a report to finish.
            self._thread.join()
        self._jobs = queue.PriorityQueue()
        self._thread = threading.Thread(
            target=self._run, args=(self._jobs,), name="sap_hf-ahead", daemon=True
        )
        self._thread.start()

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        self._watch(None)
        self._submit(STOP, None)
        # After an exception the peers may never make the report that this rank waits for.
        if kind is None and self._thread is not None:
            self._thread.join()

    def train(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Trainer.train, with the thread running."""

        @functools.wraps(original)
        def train(*args: Any, **kwargs: Any) -> Any:
            with self:
                return original(*args, **kwargs)

        return train

    def get_batch_samples(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Trainer.get_batch_samples, looking at the batches that the loader fetches and those that it yields."""

        @functools.wraps(original)
        def get_batch_samples(epoch_iterator: Any, *args: Any, **kwargs: Any) -> Any:
            loader = None
            if epoch_iterator is not self._watched:
                loader = _loader_of(epoch_iterator)
                self._watch(None if loader is None else epoch_iterator)
            if self._watched is None:
                return original(epoch_iterator, *args, **kwargs)
            self._given.clear()
            seen = map(self._yielded, epoch_iterator)
            if loader is None:
                return original(seen, *args, **kwargs)
            base = loader.base_dataloader
            # accelerate calls base.__iter__ by name, in the first next(): an attribute of the instance is found.
            base.__iter__ = lambda: self._fetch(type(base).__iter__(base), loader.skip_batches)
            try:
                return original(seen, *args, **kwargs)
            finally:
                del base.__iter__

        return get_batch_samples

    def prepare_input(self, original: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Trainer._prepare_input, which moves a tensor to the device: what it returns is the same batch still."""

        @functools.wraps(original)
        def prepare_input(data: Any) -> Any:
            moved = original(data)
            if isinstance(data, torch.Tensor) and moved is not data:
                for batch in self._known():
                    batch.given += [
                        (name, moved, moved._version)
                        for name, tensor, version in batch.given
                        if tensor is data and version == data._version
                    ]
            return moved

        return prepare_input

    def _watch(self, iterator: Iterator[Any] | None) -> None:
        """Forget all batches; those of `iterator` come next."""
        self._watched = iterator
        self._fetched: deque[_Fetched] = deque()
        self._given: list[_Fetched] = []
        self._used: _Fetched | None = None
        self._last: tuple[_Fetched | None, Future[tuple[bool, bool, Prepared | None]] | None] = (None, None)

    def _fetch(self, batches: Iterator[Any], skipped: int) -> Iterator[Any]:
        for at, batch in enumerate(batches):
            if at >= skipped:
                inputs = dict(batch) if isinstance(batch, Mapping) else {}
                fetched = _Fetched(functools.cache(functools.partial(self._sharding.look_ahead, inputs)))
                self._fetched.append(fetched)
                self._submit(PLAN, fetched.plan)
            yield batch

    def _yielded(self, batch: Any) -> Any:
        # Only accelerate's own code lies between the fetch and here: the order is the same.
        fetched = self._fetched.popleft()
        if isinstance(batch, Mapping):
            tensors = [(name, value) for name, value in batch.items() if isinstance(value, torch.Tensor)]
            fetched.given = [(name, tensor, tensor._version) for name, tensor in tensors]
        self._given.append(fetched)
        return batch

    def _known(self) -> list[_Fetched]:
        """The batches that a forward may be given: the one that it was given last, or a later one."""
        return [*self._given] if self._used is None else [self._used, *self._given]

    def _next(self, inputs: dict[str, Any]) -> tuple[Prepared | None, bool]:
        """What was prepared for a training forward, and whether all ranks have agreed upon it.

        Raises:
            BatchMismatch: this rank was given another batch than the one agreed upon, others were given that one.
        """
        if self._watched is None:
            return None, False
        batch = next((batch for batch in self._known() if batch.is_batch_of(inputs)), None)
        if batch in self._given:
            del self._given[: self._given.index(batch) + 1]
        expected, report = self._last
        agreed, prepared = False, None
        if report is not None:
            _, agreed, prepared = report.result()
        # Some losses call the model twice.
        came = not agreed or (batch is not None and batch in (expected, self._used))
        if batch is not None and (batch is not expected or not agreed):
            prepared = self._submit(REPORT, batch.plan).result()
        following = next(iter((*self._given, *self._fetched)), None)
        report = self._submit(REPORT, functools.partial(self._report, came, following))
        self._last, self._used = (following, report), batch or self._used
        if not came and not report.result()[0]:
            raise BatchMismatch(
                "This rank's model was given another batch than its data loader gave, and not every rank's was.\n"
                "  Change batches in the collator, or alike on every rank."
            )
        return (prepared, agreed and came) if batch is not None else (None, False)

    # ---- the thread ----------------------------------------------------------------------------------------

    def _submit(self, priority: int, work: Callable[[], Any] | None) -> Future[Any]:
        done: Future[Any] = Future()
        self._jobs.put((priority, next(self._order), work, done))
        return done

    @staticmethod
    def _run(jobs: queue.PriorityQueue[tuple[int, int, Callable[[], Any] | None, Future[Any]]]) -> None:
        while True:
            _, _, work, done = jobs.get()
            if work is None:
                return
            try:
                done.set_result(work())
            except BaseException as error:  # noqa: BLE001  whatever it is, the forward that waits must raise it
                done.set_exception(error)

    def _report(self, came: bool, following: _Fetched | None) -> tuple[bool, bool, Prepared | None]:
        """Whether all ranks say `came` alike, whether all agree upon the following batch, and what it is."""
        prepared = None if following is None else following.plan()
        fingerprint = None if prepared is None else prepared.fingerprint
        return *agree_ahead(self._group, self._cp_size, came, fingerprint), prepared


def _loader_of(iterator: Any) -> Any:
    """The loader of a generator that has not begun; None for loaders whose lookahead is not known."""
    if not inspect.isgenerator(iterator) or inspect.getgeneratorstate(iterator) != inspect.GEN_CREATED:
        return None
    loader = inspect.getgeneratorlocals(iterator).get("self")
    return loader if type(loader) is DataLoaderShard else None
