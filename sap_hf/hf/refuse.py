"""What attach refuses, by name: options that would be fed one shard, or that were never shown to be exact."""

from __future__ import annotations

from typing import Any

from transformers import Trainer

from sap_hf.errors import UnsupportedTrainer


def refuse_unsupported(trainer: Any, cp_size: int) -> None:
    """Look at the trainer's class and arguments before anything is changed.

    Raises:
        UnsupportedTrainer: something that cannot be exact; the message says what to do instead.
    """
    if not isinstance(trainer, Trainer):
        raise UnsupportedTrainer(f"{type(trainer).__name__} is not a transformers.Trainer; attach needs one.")
    _refuse_class(trainer)
    _refuse_model(trainer.model)
    _refuse_arguments(trainer)
    _refuse_lost_boundaries(trainer)
    if cp_size > 1:
        _refuse_data_order(trainer)


def _refuse_class(trainer: Any) -> None:
    name = type(trainer).__name__
    for base in type(trainer).__mro__:
        from_trl = base.__module__.startswith("trl.") and base.__name__.endswith("Trainer")
        if from_trl and base.__name__ not in ("SFTTrainer", "_BaseTrainer", "BaseTrainer"):
            raise UnsupportedTrainer(
                f"{name}: trl's {base.__name__} computes its loss from whole sequences, and would be given one shard "
                "of each.\n  Exact here: transformers.Trainer and trl.SFTTrainer."
            )
        if base.__name__ == "Seq2SeqTrainer":
            raise UnsupportedTrainer(
                f"{name}: encoder-decoder models are not causal; Seq2SeqTrainer is not supported."
            )
    owner = next(base for base in type(trainer).__mro__ if "compute_loss" in vars(base))
    if owner is not Trainer and not owner.__module__.startswith("trl."):
        raise UnsupportedTrainer(
            f"{owner.__name__}.compute_loss is overridden: it would see this rank's rows of the batch, not the batch.\n"
            "  Pass the loss as compute_loss_func, which is given the whole batch's outputs and labels."
        )


def _refuse_model(model: Any) -> None:
    config = getattr(model, "active_peft_config", None)
    if config is not None and getattr(config, "is_prompt_learning", False):
        raise UnsupportedTrainer(
            f"{type(config).__name__} puts virtual tokens before every row, which a pack has no place for.\n"
            "  Use LoRA, or another adapter that leaves the rows alone."
        )


def _refuse_arguments(trainer: Any) -> None:
    args = trainer.args
    if trainer.is_deepspeed_enabled:
        raise UnsupportedTrainer("DeepSpeed is not supported. Use DDP, or FSDP2 with fsdp_version: 2.")
    if trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2:
        raise UnsupportedTrainer(
            "FSDP version 1 is not supported. Set fsdp_version: 2 in the accelerate config."
        )
    if args.n_gpu > 1:
        raise UnsupportedTrainer(
            f"{args.n_gpu} GPUs are visible to one process. Start one process per GPU with accelerate launch."
        )
    if getattr(args, "torch_compile", False):
        raise UnsupportedTrainer(
            "torch_compile=True is not supported: plans change from batch to batch. Set it to False."
        )
    if getattr(args, "use_liger_kernel", False) and not _is_sft(trainer):
        raise UnsupportedTrainer(
            "use_liger_kernel=True replaces the model's forward and its loss. Set it to False."
        )
    if getattr(args, "activation_offloading", False):
        raise UnsupportedTrainer("activation_offloading=True was never shown to be exact. Set it to False.")


def _refuse_lost_boundaries(trainer: Any) -> None:
    """trl's collator forgets where documents end unless it flattens the batch or adds positions."""
    collator = trainer.data_collator
    keeps = getattr(collator, "padding_free", True) or getattr(collator, "return_position_ids", True)
    for name in ("train_dataset", "eval_dataset"):
        columns = getattr(getattr(trainer, name), "column_names", None) or ()
        if "seq_lengths" in columns and not keeps:
            raise UnsupportedTrainer(
                f"{name} holds packs (it has the column seq_lengths), but {type(collator).__name__} drops their "
                "boundaries: every pack would train as one document.\n"
                "  Set padding_free=True (or packing=True) in SFTConfig, or use sap_hf.DataCollatorForPacking."
            )


def _refuse_data_order(trainer: Any) -> None:
    args = trainer.args
    if args.accelerator_config.dispatch_batches:
        raise UnsupportedTrainer(
            "dispatch_batches=True cuts one process's batch for all others; the ranks of a cp group need the same "
            "batch.\n  Leave accelerator_config.dispatch_batches unset."
        )
    if args.accelerator_config.split_batches:
        raise UnsupportedTrainer("split_batches=True cuts batches by process. Leave it unset.")
    if getattr(args, "train_sampling_strategy", "") == "batch_rebalance":
        raise UnsupportedTrainer(
            "train_sampling_strategy='batch_rebalance' gives every process other rows; the ranks of a cp group need "
            "the same.\n  Use 'random', or pack the dataset with sap_hf.pack."
        )


def _is_sft(trainer: Any) -> bool:
    return any(
        base.__name__ == "SFTTrainer" and base.__module__.startswith("trl.") for base in type(trainer).__mro__
    )
