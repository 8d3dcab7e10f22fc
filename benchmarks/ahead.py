"""Time training steps whose plans are made ahead, in the forward's hook, or not at all, in one run.

    torchrun --nproc-per-node 2 benchmarks/ahead.py --rows 16384 --workload short

A small Llama and transformers.Trainer on the same packs, three ways in turn: `ahead` (as sap_hf.attach does), `hook`
(each forward reads its batch, plans it and agrees with its peers) and `fixed` (plans are there before the run, programs
compiled and batches neither read nor compared: the lower limit). Per pack and turn, the seconds from one step's end to
the next's; printed are medians, the median of the ratios to `fixed` on the same pack in the same turn, the processor
seconds of the thread that trains, which other work on the machine disturbs least, and how long the forward's hook takes
to come by its plan. The first turn and each training's first step are left out.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

import sap_hf
from sap_hf.models.patch import find_patch
from sap_hf.planning.workloads import pack

MODES = ("ahead", "hook", "fixed")
VOCAB = 256


class Clock(TrainerCallback):
    """When each step of a training ended, what its thread had computed, and how long its hook waited for a plan."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.busy: list[float] = []
        self.waits: list[float] = []

    def on_train_begin(self, *args: object, **kwargs: object) -> None:
        """Forget the training before."""
        self.ends, self.busy, self.waits = [], [], []

    def on_step_end(self, *args: object, **kwargs: object) -> None:
        """Note the time: the gradients have been averaged, so the ranks are together."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        self.busy.append(time.thread_time())


def main() -> None:
    """Train in all modes in turn; rank 0 prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=16384)
    parser.add_argument("--workload", default="short")
    parser.add_argument("--packs", type=int, default=5, help="steps of one training; the modes take turns")
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--hidden", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    items = [
        packed(pack(options.workload, options.rows, np.random.default_rng(i))) for i in range(options.packs)
    ]
    clock = Clock()
    trainer = build(items, options.hidden, clock)
    sap_hf.attach(trainer, hardware="cpu")
    sharding = find_patch(trainer.model).sharding
    ways = ways_to_plan(trainer, items, clock)
    steps: dict[str, list[float]] = {mode: [] for mode in MODES}
    busy: dict[str, list[float]] = {mode: [] for mode in MODES}
    waits: dict[str, list[float]] = {mode: [] for mode in MODES}
    for turn in range(options.turns + 1):
        # Who is first in a turn changes, so that no mode always follows the same one.
        for mode in (*MODES[turn % 3 :], *MODES[: turn % 3]):
            (sharding.ahead, trainer.get_batch_samples), sharding._agree_on = ways[mode]
            # Of few packs, so that a machine's other work disturbs all modes alike; none knows its plans yet.
            sharding._plans.cache_clear()
            trainer.train()
            if turn:
                steps[mode] += np.diff(clock.ends).tolist()
                busy[mode] += np.diff(clock.busy).tolist()
                waits[mode] += clock.waits[1:]
    if trainer.accelerator.is_main_process:
        print(
            f"{options.workload}: {options.packs} packs of {options.rows} rows, "
            f"{trainer.accelerator.num_processes} ranks, {len(steps['fixed'])} steps of each"
        )
        for mode in MODES:
            ratio, busy_ratio = (
                statistics.median(a / b for a, b in zip(spent[mode], spent["fixed"]))
                for spent in (steps, busy)
            )
            print(
                f"  {mode:<6} {statistics.median(steps[mode]) * 1e3:8.1f} ms per step  {ratio:6.3f} x fixed  "
                f"its thread busy {statistics.median(busy[mode]) * 1e3:8.1f} ms  {busy_ratio:6.3f} x fixed  "
                f"plan in the hook after {statistics.median(waits[mode]) * 1e3:6.2f} ms"
            )


def ways_to_plan(trainer: Trainer, items: list[dict[str, torch.Tensor]], clock: Clock) -> dict[str, tuple]:
    """For each mode: what looks ahead and which method fetches batches, and how the hook comes by its plan."""
    sharding = find_patch(trainer.model).sharding
    prepared = itertools.cycle(
        [sharding.look_ahead({name: value[None] for name, value in item.items()}) for item in items]
    )
    in_the_hook = (None, Trainer.get_batch_samples.__get__(trainer))

    def timed(function: object) -> object:
        def call(inputs: dict) -> object:
            began = time.perf_counter()
            result = function(inputs)
            clock.waits.append(time.perf_counter() - began)
            return result

        return call

    return {
        "ahead": ((sharding.ahead, trainer.get_batch_samples), timed(sharding._agree_on)),
        "hook": (in_the_hook, timed(sharding._agree_on)),
        "fixed": (in_the_hook, timed(lambda inputs: next(prepared))),
    }


def packed(lengths: np.ndarray) -> dict[str, torch.Tensor]:
    """A pack of random tokens as an item of a dataset."""
    ids = torch.randint(0, VOCAB, (int(lengths.sum()),))
    positions = torch.cat([torch.arange(length) for length in lengths.tolist()])
    return {"input_ids": ids, "labels": ids, "position_ids": positions}


def build(items: list[dict[str, torch.Tensor]], hidden: int, clock: Clock) -> Trainer:
    """A Trainer that does nothing but train: one epoch of the packs, in their order."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=len(items[0]["input_ids"]),
    )
    arguments = TrainingArguments(
        tempfile.mkdtemp(),
        per_device_train_batch_size=1,
        num_train_epochs=1,
        train_sampling_strategy="sequential",
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        optim="sgd",
        ddp_find_unused_parameters=False,
    )
    return Trainer(
        LlamaForCausalLM(config),
        arguments,
        train_dataset=items,
        data_collator=lambda features: {name: value[None] for name, value in features[0].items()},
        callbacks=[clock],
    )


if __name__ == "__main__":
    main()
