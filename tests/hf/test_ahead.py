"""Plans made ahead of their step: the same training, by another thread, and nothing left hanging."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.dist import RankError, run_ranks
from tests.hf import material
from tests.hf.scenarios import Case, build, refused
from tests.hf.together import Together

THREAD = "sap_hf-ahead"
# A rank that waits for its peers in vain would wait for gloo's half hour.
SOON_SECONDS = 10

ON_2_RANKS = {
    "plain": Case(),
    "two-epochs": Case(args={"num_train_epochs": 2}),
    "accumulation": Case(args={"gradient_accumulation_steps": 4}),
    "max-steps-inside-an-epoch": Case(args={"max_steps": 4}),
    "workers": Case(args={"dataloader_num_workers": 2, "num_train_epochs": 2}),
    "evaluation-between-steps": Case(evaluates=True, args={"eval_strategy": "steps", "eval_steps": 2}),
    "stream": Case(stream=True, args={"max_steps": 6}),
    "stream-in-a-worker": Case(stream=True, args={"max_steps": 5, "dataloader_num_workers": 1}),
    "right-padded": Case(collator="right padded", args={"per_device_train_batch_size": 2}),
    "flattening": Case(collator="flattening", args={"per_device_train_batch_size": 3}),
    "labels-kept-from-the-model": Case(args={"label_smoothing_factor": 0.1}),
    "model-init": Case(model_init=True),
    "unchecked": Case(options={"check_batches": False}),
}
ON_4_RANKS = {
    "two-groups": Case(groups=2, args={"gradient_accumulation_steps": 2}),
    "cp-4": Case(cp_size=4),
}
ALL = [
    pytest.param(world, name, case, id=f"{name}-W{world}")
    for world, cases in ((2, ON_2_RANKS), (4, ON_4_RANKS))
    for name, case in cases.items()
]


@dataclasses.dataclass
class Seen:
    """One rank's training forwards: the thread that prepared each, and whether it made the ranks agree first."""

    threads: list[str] = dataclasses.field(default_factory=list)
    asked: list[bool] = dataclasses.field(default_factory=list)


@contextlib.contextmanager
def watched() -> Iterator[Seen]:
    from sap_hf.models import sharding

    seen, names, asked = Seen(), {}, []
    prepare, agree, agree_on = sharding.Sharding._prepare, sharding.agree, sharding.Sharding._agree_on

    def noted_prepare(self: Any, inputs: Any) -> Any:
        prepared = prepare(self, inputs)
        names[prepared] = threading.current_thread().name
        return prepared

    def noted_agree(*args: Any) -> None:
        asked.append(1)
        agree(*args)

    def noted(self: Any, inputs: Any) -> Any:
        asked.clear()
        prepared = agree_on(self, inputs)
        if self.model.training:
            seen.threads.append(names[prepared])
            seen.asked.append(bool(asked))
        return prepared

    with (
        mock.patch.object(sharding.Sharding, "_prepare", noted_prepare),
        mock.patch.object(sharding, "agree", noted_agree),
        mock.patch.object(sharding.Sharding, "_agree_on", noted),
    ):
        yield seen


def attached(folder: str, case: Case, **changes: Any) -> Any:
    import sap_hf

    trainer = build(case, folder, **changes)
    sap_hf.attach(trainer, cp_size=case.cp_size, **case.options)
    return trainer


def train(trainer: Any, **options: Any) -> dict[str, Any]:
    # The ranks of these tests are daemons from a fork server; their workers are to be those of an ordinary process.
    multiprocessing.set_start_method("fork", force=True)
    process: Any = multiprocessing.current_process()
    with watched() as seen, mock.patch.dict(process._config, daemon=False):
        trainer.train(**options)
    return {
        "losses": material.logged(trainer, "loss"),
        "eval_losses": material.logged(trainer, "eval_loss"),
        "parameters": material.parameters(trainer.model),
        "seen": seen,
        "left": threads(),
    }


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == THREAD]


def in_the_hook() -> Any:
    """Every forward plans and agrees by itself, as one without a trainer does."""
    from sap_hf.hf.ahead import Ahead

    return mock.patch.object(Ahead, "_next", return_value=(None, False))


# ---- trainings that look ahead and that do not -----------------------------------------------------------


def both(folder: str, case: Case) -> tuple[dict[str, Any], dict[str, Any]]:
    ahead = train(attached(folder, case))
    material.fresh_state()
    with in_the_hook():
        return ahead, train(attached(folder, case))


def resumed(folder: str, stream: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """Four steps of an epoch, of which the last two are trained again from a checkpoint."""
    case = Case(stream=stream, args={"max_steps": 4, "save_strategy": "steps", "save_steps": 2})
    whole = train(attached(folder, case))
    material.fresh_state()
    checkpoint = str(Path(folder) / "checkpoint-2")
    return train(attached(folder + "-again", case), resume_from_checkpoint=checkpoint), whole


def stopped(folder: str) -> dict[str, Any]:
    """A callback that ends each epoch after its second step."""
    from transformers import TrainerCallback

    class Two(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            control.should_epoch_stop = state.global_step % 2 == 0

    return train(attached(folder, Case(args={"num_train_epochs": 3}), callbacks=[Two()]))


def called_twice(folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A trainer whose step calls the model twice with the same batch."""

    def run() -> dict[str, Any]:
        trainer = attached(folder, Case())
        step = trainer.training_step

        def twice(model: Any, inputs: Any, count: Any) -> Any:
            with torch.no_grad():
                model.train()(**inputs)
            return step(model, inputs, count)

        trainer.training_step = twice
        return train(trainer)

    ahead = run()
    material.fresh_state()
    with in_the_hook():
        return ahead, run()


def shortened(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value[:, :-3] for name, value in inputs.items()}


def spoiled_in_place(inputs: dict[str, Any]) -> dict[str, Any]:
    inputs["position_ids"].copy_(torch.arange(inputs["input_ids"].shape[1]))
    return inputs


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "shortened": (shortened, "training_step"),
    "in-place": (spoiled_in_place, "training_step"),
    "in-place-on-the-device": (spoiled_in_place, "_prepare_inputs"),
}


def changing(trainer: Any, name: str, calls: tuple[int, ...], ranks: tuple[int, ...]) -> None:
    """Change the batches of these steps after the loader, on these ranks: before or after they go to the device."""
    change, method = CHANGES[name]
    original, count = getattr(trainer, method), []

    def changed(*args: Any) -> Any:
        count.append(1)
        mine = int(os.environ["RANK"]) in ranks and len(count) in calls
        if method == "_prepare_inputs":
            return change(original(*args)) if mine else original(*args)
        model, inputs, *rest = args
        return original(model, change(inputs) if mine else inputs, *rest)

    setattr(trainer, method, changed)


def changed_everywhere(folder: str, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    def run() -> dict[str, Any]:
        trainer = attached(folder, Case())
        changing(trainer, name, calls=(3, 4), ranks=(0, 1))
        return train(trainer)

    ahead = run()
    material.fresh_state()
    with in_the_hook():
        return ahead, run()


# ---- batches that differ, or that one rank refuses --------------------------------------------------------


def one_differs(batch: dict[str, Any]) -> dict[str, Any]:
    return {**batch, "input_ids": batch["input_ids"].flip(1)}


def one_is_refused(batch: dict[str, Any]) -> dict[str, Any]:
    return {**batch, "position_ids": batch["position_ids"] + 5}


def failing(folder: str, spoil: Callable[[Any], Any], workers: int = 0) -> dict[str, Any]:
    """Rank 1's fourth batch is bad; then the same trainer trains on good ones."""
    rank = int(os.environ["RANK"])
    bad = material.stack([Case().items()[3]])["input_ids"]

    def collate(features: list[Any]) -> dict[str, Any]:
        batch = material.stack(features)
        spoils = (
            rank == 1 and batch["input_ids"].shape == bad.shape and bool((batch["input_ids"] == bad).all())
        )
        return spoil(batch) if spoils else batch

    trainer = attached(folder, Case(args={"dataloader_num_workers": workers}), data_collator=collate)
    began = time.monotonic()
    error = refused(lambda: train(trainer))
    seconds, steps = time.monotonic() - began, trainer.state.global_step
    trainer.data_collator = material.stack
    again = train(trainer)
    return {"error": error, "seconds": seconds, "steps": steps, "again": again}


def changed_alone(rank: int, world: int, folder: str, name: str) -> None:
    from accelerate import PartialState

    PartialState(cpu=True)
    trainer = attached(folder, Case())
    changing(trainer, name, calls=(3,), ranks=(1,))
    trainer.train()


FAILING: dict[str, Any] = {
    "one-differs": {"spoil": one_differs},
    "one-differs-in-a-worker": {"spoil": one_differs, "workers": 1},
    "one-is-refused": {"spoil": one_is_refused},
}


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Together]:
    scenarios: dict[int, dict[str, Any]] = {
        2: {name: (both, {"case": case}) for name, case in ON_2_RANKS.items()},
        4: {name: (both, {"case": case}) for name, case in ON_4_RANKS.items()},
    }
    scenarios[2] |= {
        "resumed": (resumed, {"stream": False}),
        "resumed-stream": (resumed, {"stream": True}),
        "stopped": (stopped, {}),
        "called-twice": (called_twice, {}),
        **{name: (changed_everywhere, {"name": name}) for name in CHANGES},
        **{name: (failing, options) for name, options in FAILING.items()},
    }
    return {
        world: Together(tmp_path_factory.mktemp(f"ahead-{world}"), world, every)
        for world, every in scenarios.items()
    }


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    """The same training to the bit."""
    assert one["losses"] and one["losses"] == other["losses"]
    assert one["eval_losses"] == other["eval_losses"]
    assert all((one["parameters"][key] == other["parameters"][key]).all() for key in one["parameters"])


@pytest.mark.parametrize("world, name, case", ALL)
def test_training_is_the_same_to_the_bit(
    on_ranks: dict[int, Together], world: int, name: str, case: Case
) -> None:
    for ahead, hook in on_ranks[world][name]:
        assert_same(ahead, hook)


@pytest.mark.parametrize("world, name, case", ALL)
def test_every_plan_is_made_by_the_thread_and_agreed_upon_ahead(
    on_ranks: dict[int, Together], world: int, name: str, case: Case
) -> None:
    epochs = case.args.get("num_train_epochs", 1)
    for ahead, hook in on_ranks[world][name]:
        seen = ahead["seen"]
        forwards = len(hook["seen"].threads)
        assert forwards > 2 and set(hook["seen"].threads) == {"MainThread"}
        assert seen.threads == [THREAD] * forwards
        # Before an epoch's first batch there was none to agree upon it meanwhile.
        first = [at % (forwards // epochs) == 0 for at in range(forwards)]
        checks = case.options.get("check_batches", True)
        assert seen.asked == [checks and is_first for is_first in first]
        assert ahead["left"] == []


@pytest.mark.parametrize("name", ["resumed", "resumed-stream"])
def test_a_resumed_epoch_is_planned_ahead_too(on_ranks: dict[int, Together], name: str) -> None:
    for again, whole in on_ranks[2][name]:
        assert_same({**again, "losses": again["losses"][-2:]}, {**whole, "losses": whole["losses"][-2:]})
        assert again["seen"] == Seen([THREAD] * 2, [True, False])


def test_an_epoch_that_is_broken_off_leaves_the_next_one_in_order(on_ranks: dict[int, Together]) -> None:
    for result in on_ranks[2]["stopped"]:
        assert result["seen"] == Seen([THREAD] * 6, [True, False] * 3)
        assert result["left"] == []


def test_a_batch_that_the_model_is_given_twice_is_agreed_upon_once(on_ranks: dict[int, Together]) -> None:
    for ahead, hook in on_ranks[2]["called-twice"]:
        assert_same(ahead, hook)
        # The last batch has no next one, so there is nothing that its second forward could look up.
        assert ahead["seen"] == Seen([THREAD] * 12, [True, *[False] * 10, True])


@pytest.mark.parametrize("name", CHANGES)
def test_batches_changed_on_every_rank_are_planned_as_the_model_gets_them(
    on_ranks: dict[int, Together], name: str
) -> None:
    for ahead, hook in on_ranks[2][name]:
        assert_same(ahead, hook)
        # The first batch after them is agreed upon again, then the thread is ahead again.
        assert ahead["seen"].asked == [True, False, True, True, True, False]
        assert ahead["seen"].threads == [THREAD] * 2 + ["MainThread"] * 2 + [THREAD] * 2


@pytest.mark.parametrize("name", FAILING)
def test_a_bad_batch_is_an_error_on_every_rank_at_its_step_and_soon(
    on_ranks: dict[int, Together], name: str
) -> None:
    results = on_ranks[2][name]
    kinds = [result["error"][0] for result in results]
    refuses = name == "one-is-refused"
    assert kinds == ["BatchMismatch", "DocumentError" if refuses else "BatchMismatch"], results[0]["error"]
    for result in results:
        assert ("position_ids" if refuses else "rank 1") in result["error"][1]
        assert result["steps"] == 3
        assert result["seconds"] < SOON_SECONDS


@pytest.mark.parametrize("name", FAILING)
def test_a_trainer_trains_again_after_a_bad_batch(on_ranks: dict[int, Together], name: str) -> None:
    for result in on_ranks[2][name]:
        assert result["again"]["seen"] == Seen([THREAD] * 6, [True] + [False] * 5)
        assert result["again"]["left"] == []


@pytest.mark.parametrize("name", CHANGES)
def test_a_batch_changed_on_one_rank_alone_is_an_error_there_and_soon(tmp_path: Path, name: str) -> None:
    began = time.monotonic()
    with pytest.raises(RankError, match="another batch than its data loader gave") as error:
        run_ranks(changed_alone, 2, str(tmp_path), name, init=False)
    assert str(error.value).startswith("rank 1 of 2 failed")
    assert time.monotonic() - began < 2 * SOON_SECONDS
