"""Profile: what a training step moves, waits for and weighs, as numbers for a log.

The model's forwards and the transport's exchanges -> {"sap/...": number} per optimizer step. `SapConfig(profile=True)`
puts them beside every loss that Trainer logs, and with it into TensorBoard and W&B. A loop of one's own asks for them:

    with Profile(sap_hf.patch_model(model)) as profile:
        for batch in loader:
            ...
            optimizer.step()
            print(profile.take())
"""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from sap_hf.models import Patch
from sap_hf.models.interface import state
from sap_hf.models.sharding import Sharding
from sap_hf.planning import Plan
from sap_hf.runtime import transport
from sap_hf.runtime.profile import Meter


class Profile:
    """Measures the training of one patched model inside a `with` block; evaluation in between is left out.

    Args:
        patch: what patch_model returned.
        steps_done: optimizer steps so far; without it, what was taken is the sum over all since the last take.
    """

    def __init__(self, patch: Patch, steps_done: Callable[[], int] = lambda: 0):
        self._patch, self._steps_done = patch, steps_done
        self._group = patch.sharding.group
        self._plan_seconds: weakref.WeakKeyDictionary[Plan, float] = weakref.WeakKeyDictionary()
        # Imbalance and seconds to plan of each forward; the plans themselves hold memory of the device.
        self._forwards: list[tuple[float, float]] = []
        self._first_step = 0
        self._meter: Meter
        self._undo: contextlib.ExitStack

    def __enter__(self) -> Profile:
        self._meter = Meter(transport.current(), on=False)
        self._undo = contextlib.ExitStack()
        self._undo.enter_context(transport.using(self._meter))
        self.watch(self._patch.sharding)
        return self

    def __exit__(self, *raised: Any) -> None:
        self._undo.close()

    def watch(self, sharding: Sharding) -> None:
        """Measure this model too, inside the block: the one that takes the first one's place."""
        hook = sharding.model.register_forward_pre_hook(self._before)
        self._undo.callback(hook.remove)
        plans = sharding._plans
        self._undo.callback(setattr, sharding, "_plans", plans)

        def timed(cu_seqlens: bytes, recomputed: bool) -> Plan:
            started = time.perf_counter()
            plan = plans(cu_seqlens, recomputed)
            # Documents seen before have their plan already.
            self._plan_seconds.setdefault(plan, time.perf_counter() - started)
            return plan

        sharding._plans = timed  # type: ignore[assignment]

    def _before(self, module: torch.nn.Module, args: Any) -> None:
        """Sharding's own hook has run: this forward's plan is known."""
        shard = state.shard
        self._meter.on = module.training and shard is not None
        if shard is None or not module.training:
            return
        if not self._forwards:
            self._first_step = self._steps_done()
        self._forwards.append((shard.plan.imbalance, self._plan_seconds.get(shard.plan, 0.0)))
        self._meter.ranks_per_node = shard.plan.hardware.ranks_per_node

    def take(self) -> dict[str, float]:
        """Numbers per optimizer step since the last take; one small all-reduce, so every rank of the cp group calls it.

        Returns:
            sap/bytes_inside_node, sap/bytes_between_nodes: what all ranks of the cp group sent in attention, forward
                and backward of all layers, as posted.
            sap/wait_seconds: how long this rank waited for it; see sap_hf.runtime.profile.Reading.
            sap/imbalance: busiest rank's work over the mean; the mean of these steps' plans.
            sap/plan_ms: host milliseconds that making a plan took; the mean of the same. A Trainer's plans are made
                by a thread, ahead of their step.
            Nothing where no batch was trained on.
        """
        if not self._forwards:
            return {}
        reading, steps = self._meter.take(), max(1, self._steps_done() - self._first_step)
        sent = torch.tensor([reading.bytes_inside_node, reading.bytes_between_nodes])
        if self._group.host is not None:
            dist.all_reduce(sent, group=self._group.host)
        imbalance, plan_seconds = (
            sum(figures) / len(figures) for figures in zip(*self._forwards, strict=True)
        )
        self._forwards.clear()
        return {
            "sap/bytes_inside_node": round(int(sent[0]) / steps),
            "sap/bytes_between_nodes": round(int(sent[1]) / steps),
            "sap/wait_seconds": reading.wait_seconds / steps,
            "sap/imbalance": imbalance,
            "sap/plan_ms": 1e3 * plan_seconds,
        }
