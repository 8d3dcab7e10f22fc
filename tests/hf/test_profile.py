"""SapConfig(profile=True): beside every loss stands what the plans say and what was waited for; without it, nothing."""

from __future__ import annotations

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from sap_hf.errors import ConfigError
from sap_hf.planning.cost import Shape
from sap_hf.planning.documents import Documents
from sap_hf.planning.hardware import PRESETS
from sap_hf.runtime import transport
from sap_hf.runtime.profile import Meter
from sap_hf.strategies import Request, make_plan
from tests.hf import material
from tests.hf.scenarios import Case, build
from tests.hf.together import Together
from tests.runtime.test_bytes import planned_bytes, planned_heads

# Four ranks on two nodes.
HARDWARE = dataclasses.replace(PRESETS["cpu"], name="nodes", ranks_per_node=2)
LAYERS = 2
KEYS = {"bytes_inside_node", "bytes_between_nodes", "wait_seconds", "imbalance", "plan_ms"}
CHECKPOINTING = {
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
}
# Between two logs.
EVALUATING = {"eval_strategy": "steps", "eval_steps": 3, "logging_steps": 2}

CASES = {
    "evaluating": Case(cp_size=4, evaluates=True, args=EVALUATING),
    "accumulation": Case(cp_size=4, args={"gradient_accumulation_steps": 2, "logging_steps": 3}),
    "checkpointing": Case(cp_size=4, args=CHECKPOINTING),
    "kept-unchecked": Case(
        cp_size=4, options={"strategy": "sap", "remote_kv": "keep", "check_batches": False}
    ),
    "ulysses-inside": Case(cp_size=4, options={"ulysses_size": 2, "strategy": "sap"}),
    "ulysses-checkpointing": Case(
        cp_size=4, args=CHECKPOINTING, options={"ulysses_size": 2, "strategy": "sap"}
    ),
    "ulysses-kept": Case(
        cp_size=4,
        args=CHECKPOINTING,
        options={"ulysses_size": 2, "strategy": "sap", "remote_kv": "keep"},
    ),
    "model-init": Case(cp_size=4, model_init=True),
    "two-groups": Case(cp_size=2, groups=2),
}


def train(folder: str, case: Case, hardware: str) -> list[dict[str, float]]:
    """What Trainer logged in a profiled training."""
    import sap_hf

    trainer = build(case, folder)
    sap_hf.attach(trainer, cp_size=case.cp_size, profile=True, hardware=hardware, **case.options)
    trainer.train()
    return trainer.state.log_history


def resume(folder: str, hardware: str) -> list[dict[str, float]]:
    """A run of 6 steps that logs after the fourth, continued after the second."""
    import sap_hf

    case = Case(cp_size=4, args={"logging_steps": 4, "save_strategy": "steps", "save_steps": 2})
    sap_hf.attach(build(case, folder), cp_size=4, hardware=hardware).train()
    trainer = sap_hf.attach(build(case, folder), cp_size=4, hardware=hardware, profile=True)
    trainer.train(resume_from_checkpoint=str(Path(folder) / "checkpoint-2"))
    return trainer.state.log_history


class Slow(transport.Transport):
    """What was posted is waited for 20 ms longer."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def _slowed(self, pending: transport.Pending) -> transport.Pending:
        wait = pending.wait

        def slowed() -> None:
            started = time.perf_counter()
            wait()
            time.sleep(0.02)
            self.seconds += time.perf_counter() - started

        pending.wait = slowed  # type: ignore[method-assign]
        return pending

    def post(self, *args: Any) -> transport.Pending:
        return self._slowed(super().post(*args))

    def post_all_to_all(self, *args: Any) -> transport.Pending:
        return self._slowed(super().post_all_to_all(*args))


def slow(folder: str, hardware: str) -> dict[str, Any]:
    """Exchanges and plans that take long, and how long they took by another clock."""
    from sap_hf.models import sharding

    fast = sharding.make_plan

    def slow_plan(*args: Any) -> Any:
        time.sleep(0.05)
        return fast(*args)

    sharding.make_plan = slow_plan  # type: ignore[assignment]
    case = Case(cp_size=4, options={"strategy": "sap", "ulysses_size": 2})
    try:
        with transport.using(Slow()) as wire:
            started = time.perf_counter()
            log = train(folder, case, hardware)
            return {"log": log, "waited": wire.seconds, "trained": time.perf_counter() - started}
    finally:
        sharding.make_plan = fast  # type: ignore[assignment]


def installed(folder: str, profile: bool) -> dict[str, Any]:
    """What a training has around it, and what is left afterwards."""
    from transformers import TrainerCallback

    import sap_hf

    seen: dict[str, Any] = {}

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen["transport"] = type(transport.current()).__name__
            seen["hooks"] = len(kwargs["model"]._forward_pre_hooks)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            seen.setdefault("logged", set()).update(name for name in logs if name.startswith("sap/"))

    trainer = build(Case(cp_size=4), folder)
    trainer.add_callback(Look())
    sap_hf.attach(trainer, cp_size=4, profile=profile)
    seen["log"] = "log" in vars(trainer)
    trainer.train()
    seen["after"] = type(transport.current()).__name__, len(trainer.model._forward_pre_hooks)
    sap_hf.detach(trainer)
    seen["detached"] = [name for name in ("log", "train") if name in vars(trainer)]
    return seen


def own_loop(folder: str) -> list[dict[str, float]]:
    """A loop without Trainer that takes the figures of every step, and looks at an evaluation in between."""
    import sap_hf
    from sap_hf.hf.profile import Profile

    model: Any = material.tiny_llama().train()
    patch = sap_hf.patch_model(model, strategy="sap")
    taken = []
    with Profile(patch) as profile:
        for row in material.documents(material.PACKS):
            batch = material.stack([material.packed(row)])
            model(**batch).loss.backward()
            model.eval()(**batch)
            model.train()
            taken.append(profile.take())
        assert profile.take() == {}
    sap_hf.unpatch_model(model)
    return taken


def sft(folder: str) -> list[dict[str, float]]:
    import sap_hf
    from tests.hf.test_sft import Chat
    from tests.hf.test_sft import build as build_sft

    trainer = sap_hf.attach(build_sft(Chat(args={"packing": True}), folder), cp_size=4, profile=True)
    trainer.train()
    return trainer.state.log_history


@pytest.fixture(scope="module")
def on_4(tmp_path_factory: pytest.TempPathFactory) -> Together:
    folder = tmp_path_factory.mktemp("profile")
    hardware = str(folder / "nodes.yaml")
    Path(hardware).write_text(yaml.safe_dump(dataclasses.asdict(HARDWARE)))
    scenarios: dict[str, Any] = {
        name: (train, {"case": case, "hardware": hardware}) for name, case in CASES.items()
    }
    scenarios |= {
        "resume": (resume, {"hardware": hardware}),
        "slow": (slow, {"hardware": hardware}),
        "on": (installed, {"profile": True}),
        "off": (installed, {"profile": False}),
        "own-loop": (own_loop, {}),
        "sft": (sft, {}),
    }
    return Together(folder, 4, scenarios)


@functools.cache
def plan_of(
    lengths: tuple[int, ...],
    cp_size: int,
    options: tuple[tuple[str, Any], ...],
    hardware: Any,
    recomputed: bool = False,
) -> Any:
    """The plan that attach makes for a pack in float64."""
    asked = dict(options)
    return make_plan(
        Request(
            Documents.from_lengths(lengths),
            cp_size,
            strategy=asked.get("strategy", "auto"),
            windows={None: LAYERS},
            shape=Shape(4, 2, 8, 8),
            hardware=hardware,
            ulysses_size=asked.get("ulysses_size", "auto"),
            recomputed=recomputed,
        )
    )


def expected(packs: Any, case: Case, steps: int = 1, hardware: Any = HARDWARE) -> dict[str, float]:
    """Figures of one log over `steps` optimizer steps that train on `packs`."""
    kept, recomputed = case.options.get("remote_kv") == "keep", "gradient_checkpointing" in case.args
    asked = case.cp_size, tuple(case.options.items()), hardware, recomputed and not kept
    plans = [plan_of(lengths, *asked) for lengths in packs]
    node = np.arange(case.cp_size) // hardware.ranks_per_node
    # A recompute has no rows of the forward, but its out: it fetches once, as any backward, and exchanges heads again.
    sent = sum(sum(planned_bytes(plan, kept and not recomputed)) for plan in plans) * LAYERS
    if recomputed and not kept:
        sent = sent + sum(planned_heads(plan) for plan in plans) * LAYERS
    near = node[:, None] == node
    return {
        "sap/bytes_inside_node": round((sent * near).sum() / steps),
        "sap/bytes_between_nodes": round((sent * ~near).sum() / steps),
        "sap/imbalance": sum(plan.imbalance for plan in plans) / len(plans),
    }


def assert_figures(entry: dict[str, float], figures: dict[str, float]) -> None:
    assert {key: entry[key] for key in figures} == pytest.approx(figures, rel=1e-12)


def profiled(log: list[dict[str, float]]) -> list[dict[str, float]]:
    return [entry for entry in log if "loss" in entry]


@pytest.mark.parametrize("name", CASES)
def test_what_is_logged_is_what_the_plans_say(on_4: Together, name: str) -> None:
    case = CASES[name]
    accumulated = case.args.get("gradient_accumulation_steps", 1)
    steps = case.args.get("logging_steps", 1)
    between = 0.0
    for rank, log in enumerate(on_4[name]):
        packs = case.packs[rank // case.cp_size :: case.groups]
        per_log = steps * accumulated
        entries = profiled(log)
        assert len(entries) == len(packs) // per_log
        for at, entry in enumerate(entries):
            figures = expected(packs[at * per_log : (at + 1) * per_log], case, steps)
            assert_figures(entry, figures)
            assert entry["sap/plan_ms"] > 0
            between += entry["sap/bytes_between_nodes"]
    assert (between > 0) == (case.groups == 1), "a case that sends nothing between nodes shows nothing of it"


def test_only_the_losses_of_training_steps_carry_figures(on_4: Together) -> None:
    for log in on_4["evaluating"]:
        carrying = [entry for entry in log if any(key.startswith("sap/") for key in entry)]
        assert carrying == profiled(log)
        assert any("eval_loss" in entry for entry in log)


def test_a_resumed_training_counts_its_own_steps(on_4: Together) -> None:
    case = Case(cp_size=4)
    for log in on_4["resume"]:
        (entry,) = profiled(log)
        assert_figures(entry, expected(case.packs[2:4], case, 2))


def test_waiting_and_planning_are_timed(on_4: Together) -> None:
    for result in on_4["slow"]:
        entries = profiled(result["log"])
        # Timed around what the slow wire timed itself.
        assert result["waited"] <= sum(entry["sap/wait_seconds"] for entry in entries) < result["trained"]
        assert all(entry["sap/wait_seconds"] > 0.02 for entry in entries)
        assert all(50 <= entry["sap/plan_ms"] < 1e3 * result["trained"] for entry in entries)


def test_nothing_is_installed_where_nothing_was_asked_for(on_4: Together) -> None:
    for on, off in zip(on_4["on"], on_4["off"], strict=True):
        assert on["transport"] == "Meter" and on["log"]
        assert on["logged"] == {f"sap/{key}" for key in KEYS}
        assert off["transport"] == "Transport" and not off["log"] and not off["logged"]
        assert on["hooks"] == off["hooks"] + 1
        assert on["after"] == off["after"] == ("Transport", off["hooks"])
        assert on["detached"] == off["detached"] == []


def test_a_loop_of_ones_own_gets_the_same(on_4: Together) -> None:
    case = Case(cp_size=4, options={"strategy": "sap"})
    # The launcher of the tests puts all ranks on one node.
    hardware = dataclasses.replace(PRESETS["cpu"], ranks_per_node=4)
    for taken in on_4["own-loop"]:
        assert len(taken) == len(case.packs)
        for lengths, entry in zip(case.packs, taken, strict=True):
            assert_figures(entry, expected([lengths], case, hardware=hardware))
            assert entry.keys() == {f"sap/{key}" for key in KEYS}


def test_sft_trainer_logs_them_too(on_4: Together) -> None:
    for log in on_4["sft"]:
        assert profiled(log)
        for entry in profiled(log):
            assert {key for key in entry if key.startswith("sap/")} == {f"sap/{key}" for key in KEYS}
            assert entry["sap/bytes_inside_node"] > 0


class Clock:
    """A device's time, and events on it as torch.cuda's: done once the device has passed them."""

    def __init__(self) -> None:
        self.now, self.done, self.synchronized = 0.0, 0.0, 0

    def event(self, enable_timing: bool) -> Event:
        assert enable_timing
        return Event(self)


class Event:
    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def record(self) -> None:
        self.at = self.clock.now

    def query(self) -> bool:
        return self.at <= self.clock.done

    def synchronize(self) -> None:
        self.clock.synchronized += 1
        self.clock.done = max(self.clock.done, self.at)

    def elapsed_time(self, end: Event) -> float:
        assert self.query() and end.query(), "a device that is not that far yet"
        return (end.at - self.at) * 1e3


def test_on_cuda_the_stream_is_timed_and_synchronised_only_when_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock()
    monkeypatch.setattr(torch.cuda, "Event", clock.event)
    meter = Meter(transport.Transport())

    class Wait(transport.Pending):
        def wait(self) -> None:
            clock.now += 0.25

    for done in (0.0, 0.0, 0.75, 0.75):
        # The host does not wait: the device is behind, and catches up now and then.
        clock.done = done
        meter.waited(Wait(()), cuda=True)
        clock.now += 1
    assert clock.synchronized == 0
    assert meter.take().wait_seconds == 4 * 0.25
    assert clock.synchronized == 1
    assert meter.take().wait_seconds == 0


@pytest.mark.parametrize("value", ["yes", 1, None])
def test_profile_is_true_or_false(value: Any) -> None:
    from sap_hf import SapConfig

    with pytest.raises(ConfigError, match=r"profile=.* must be true or false"):
        SapConfig(profile=value)
