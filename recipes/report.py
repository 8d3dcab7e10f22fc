"""What a recipe tells its user: what the plan saves, before the first step, and what came of the run, at its end."""

from __future__ import annotations

import logging
import time
import warnings
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

import sap_hf

PACKS_PLANNED = 8
CHECKED_TOKENS = 2048
# Between packed rows over several ranks and documents run alone, both in the dtype of the run.
TOLERANCE = {"no": 1e-4, "fp16": 2e-2, "bf16": 2e-2}


def hush(args: TrainingArguments) -> None:
    """Leave progress bars and notes to the main process: the others would say the same once more."""
    logging.basicConfig(format="%(message)s", level=logging.ERROR if args.process_index else logging.WARNING)
    if args.process_index:
        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        warnings.simplefilter("ignore", FutureWarning)


def print_savings(trainer: Trainer, config: sap_hf.SapConfig) -> None:
    """Print what the plans of some packs move, against an all-gather, and how even the work is."""
    cp_size = config.cp_size or trainer.accelerator.num_processes
    model = trainer.model.config.get_text_config()
    heads = model.num_attention_heads
    packs = trainer.train_dataset["seq_lengths"]
    # Evenly spread: packs come with the longest documents first.
    chosen = packs[:: -(-len(packs) // PACKS_PLANNED)]
    plans = [
        sap_hf.plan(
            lengths=lengths,
            cp_size=cp_size,
            ulysses_size=config.ulysses_size,
            strategy=config.strategy,
            layout=config.layout,
            num_heads=heads,
            num_kv_heads=getattr(model, "num_key_value_heads", None) or heads,
            head_dim=getattr(model, "head_dim", None) or model.hidden_size // heads,
        )
        for lengths in chosen
    ]
    tokens = sum(sum(lengths) for lengths in packs)
    moved = sum(int(plan.rows_moved.sum()) for plan in plans)
    gathered = sum(plan.all_gather_rows for plan in plans)
    share = 100 * moved / gathered if gathered else 0.0
    layouts = " and ".join(sorted({plan.layout for plan in plans}))
    documents = sum(len(lengths) for lengths in packs)
    tell(trainer, f"\n{len(packs)} packs, {documents} documents, {tokens} tokens.")
    tell(trainer, str(plans[len(plans) // 2]))
    tell(
        trainer,
        f"\n{len(plans)} packs, evenly spread, over {cp_size} ranks ({plans[0].strategy}, {layouts}):",
    )
    tell(
        trainer,
        f"  rows moved      {moved} of {gathered} that an all-gather moves ({share:.1f} %), per layer",
    )
    worst = max(plan.imbalance for plan in plans)
    mean = sum(plan.imbalance for plan in plans) / len(plans)
    tell(
        trainer,
        f"  work balance    busiest rank {mean:.2f} x the mean of its pack (worst pack {worst:.2f})\n",
    )


def check_documents(pack: dict[str, Any]) -> list[dict[str, list[int]]]:
    """Split one held-out pack into its documents, each cut to CHECKED_TOKENS (a causal prefix is a document too)."""
    labels = pack.get("labels") or pack["input_ids"]
    documents, start = [], 0
    for length in pack["seq_lengths"]:
        stop = start + min(length, CHECKED_TOKENS)
        documents.append({"input_ids": pack["input_ids"][start:stop], "labels": labels[start:stop]})
        start += length
    return [document for document in documents if any(label != -100 for label in document["labels"][1:])]


def check_saved(
    trainer: Trainer, documents: list[dict[str, list[int]]], packed: Dataset
) -> tuple[float, float]:
    """Load the saved model again in plain transformers, and compare its loss with the trainer's.

    The trainer sees `packed`: one row, shared by the ranks. The saved model sees each document alone, on one
    process, without sap_hf: the loss must be the same.

    Raises:
        RuntimeError: on every rank, where the two differ by more than rounding.
    """
    here = trainer.evaluate(eval_dataset=packed, metric_key_prefix="check")["check_loss"]
    alone = [0.0]
    if trainer.accelerator.is_main_process:
        model = AutoModelForCausalLM.from_pretrained(trainer.args.output_dir, dtype=torch.float32)
        alone = [loss_alone(model.to(trainer.args.device), documents)]
    broadcast_object_list(alone)
    tolerance = TOLERANCE[str(trainer.accelerator.mixed_precision)]
    if not abs(here - alone[0]) <= tolerance * max(1.0, abs(here)):
        raise RuntimeError(
            f"The model saved in {trainer.args.output_dir} has loss {alone[0]:.6f} on documents run alone, "
            f"but the trainer measured {here:.6f} on the same documents in one pack."
        )
    return here, alone[0]


@torch.no_grad()
def loss_alone(model: PreTrainedModel, documents: list[dict[str, list[int]]]) -> float:
    """Mean loss over the labelled tokens of documents that the model sees one by one."""
    model.eval()
    total, count = 0.0, 0
    for document in documents:
        ids = torch.tensor([document["input_ids"]], device=model.device)
        labels = torch.tensor(document["labels"], device=model.device)[1:]
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        total += float(torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum"))
        count += int((labels != -100).sum())
    return total / count


def print_summary(
    trainer: Trainer, losses: tuple[float, float], saved: tuple[float, float], started: float
) -> None:
    """Print the closing lines: what was trained, the held-out loss, and where the model is."""
    state = trainer.state
    folder = Path(trainer.args.output_dir)
    tell(trainer, f"\n{state.global_step} steps, {time.time() - started:.0f} s in all.")
    tell(trainer, f"  held-out loss   {losses[0]:.4f} before, {losses[1]:.4f} after")
    tell(trainer, f"  model           {folder} (history: {folder / 'trainer_state.json'})")
    tell(trainer, "  loads again     in plain transformers; one held-out pack, each document alone:")
    tell(trainer, f"                  loss {saved[1]:.5f}, in this run {saved[0]:.5f}")


def tell(trainer: Trainer, text: str) -> None:
    """Print once per run."""
    trainer.accelerator.print(text, flush=True)
