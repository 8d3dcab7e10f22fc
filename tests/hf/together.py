"""Many scenarios in one start of the ranks: importing transformers once per rank is what these tests cost.

Each scenario leaves its result, or its traceback, in a file per rank. A scenario that hangs is shown by the
launcher with the stacks of all ranks, and fails alone with the ones that came after it.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import pickle
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

from tests.dist import RankError, run_ranks

PEERS_SECONDS = 30

Scenario = tuple[Callable[..., Any], dict[str, Any]]
"""A module-level fn(folder, **options) that every rank calls, and its options."""


class Together:
    """The results of several scenarios on the same number of ranks.

    results[name] is the list of what each rank returned; a scenario that failed raises RankError there.
    """

    def __init__(
        self, folder: Path, world: int, scenarios: Mapping[str, Scenario], timeout: float = 150
    ) -> None:
        self.folder, self.world, self.names = folder, world, list(scenarios)
        self.failure: RankError | None = None
        try:
            run_ranks(_rank, world, str(folder), dict(scenarios), init=False, timeout=timeout)
        except RankError as error:
            self.failure = error

    def __getitem__(self, name: str) -> list[Any]:
        results = []
        missing = []
        for rank in range(self.world):
            file = _file(self.folder, name, rank)
            if not file.exists():
                missing.append(rank)
                continue
            kind, content = pickle.loads(file.read_bytes())
            if kind == "error":
                raise RankError(f"scenario {name}, rank {rank} of {self.world}:\n\n{content}")
            results.append(content)
        if missing:
            raise RankError(f"scenario {name}: nothing from ranks {missing} of {self.world}.\n{self.failure}")
        return results


def _file(folder: str | Path, name: str, rank: int) -> Path:
    return Path(folder) / f"{name}-{rank}.result"


@contextlib.contextmanager
def planned_once() -> Iterator[None]:
    """Plan each pack once: trainings on the same packs would spend half their time on the same plans."""
    from sap_hf.models import sharding

    make = sharding.make_plan
    made: dict[bytes, Any] = {}

    def remembered(request: Any) -> Any:
        # By value: a Request is equal to no other one.
        key = pickle.dumps(request)
        if key not in made:
            made[key] = make(request)
        return made[key]

    with mock.patch.object(sharding, "make_plan", remembered):
        yield


@planned_once()
def _rank(rank: int, world: int, folder: str, scenarios: dict[str, Scenario]) -> None:
    import torch.distributed as dist
    from accelerate import PartialState

    from tests.hf.material import fresh_state

    PartialState(cpu=True)
    assert dist.get_world_size() == world
    store = dist.distributed_c10d._get_default_store()
    for name, (fn, options) in scenarios.items():
        fresh_state()
        try:
            outcome: tuple[str, Any] = ("result", fn(str(Path(folder) / name), **options))
        except Exception:  # noqa: BLE001 - shown by the test that asks for this scenario
            outcome = ("error", traceback.format_exc())
        _file(folder, name, rank).write_bytes(pickle.dumps(outcome))
        # The store, not a collective: a rank that failed alone must not meet its peers' pending all-reduce.
        store.set(f"together/{name}/{rank}", outcome[0])
        peers = [f"together/{name}/{other}" for other in range(world)]
        try:
            store.wait(peers, datetime.timedelta(seconds=PEERS_SECONDS))
        except Exception as error:
            shown = outcome[1] if outcome[0] == "error" else "came back"
            raise AssertionError(
                f"after scenario {name} the ranks are apart; rank {rank}: {shown}"
            ) from error
        gc.collect()
