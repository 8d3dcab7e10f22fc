"""What Trainer counts and gathers over processes, with the ranks of a cp group counted once.

Each function here stands in for one method or attribute of a trainer. `Attachment` puts them in place and takes them
out again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from accelerate.utils import gather_object, recursively_apply

from sap_hf.errors import DocumentError


def gather_once(trainer: Any, cp_size: int) -> Callable[..., Any]:
    """accelerator.gather_for_metrics that keeps one copy per cp group in evaluation.

    In training the ranks hold different rows, and every rank counts.
    """
    accelerator = trainer.accelerator
    original = accelerator.gather_for_metrics
    processes = accelerator.num_processes

    def gather_for_metrics(input_data: Any, use_gather_object: bool = False) -> Any:
        if trainer.model.training:
            return original(input_data, use_gather_object=use_gather_object)
        if use_gather_object:
            per_rank = gather_object([input_data])
            gathered: Any = [item for data in per_rank[::cp_size] for item in data]
        else:
            gathered = recursively_apply(_first_of_each_group, accelerator.gather(_at_least_1d(input_data)))
        state = accelerator.gradient_state
        if not state.end_of_dataloader or state.remainder <= 0:
            return gathered
        if use_gather_object:
            return gathered[: state.remainder]
        return recursively_apply(lambda tensor: tensor[: state.remainder], gathered)

    def _first_of_each_group(tensor: torch.Tensor) -> torch.Tensor:
        # cp is the fastest-varying mesh axis: the ranks of a group follow each other.
        return tensor.unflatten(0, (processes, -1))[::cp_size].flatten(0, 1)

    return gather_for_metrics


def _at_least_1d(data: Any) -> Any:
    return recursively_apply(lambda tensor: tensor[None] if tensor.ndim == 0 else tensor, data)


def track_tokens_once(trainer: Any, cp_size: int) -> Callable[[Any], None]:
    """Trainer._track_num_input_tokens: all ranks of a cp group hold the same batch."""
    original = trainer._track_num_input_tokens

    def track(inputs: Any) -> None:
        before = trainer.state.num_input_tokens_seen
        original(inputs)
        trainer.state.num_input_tokens_seen = (
            before + (trainer.state.num_input_tokens_seen - before) // cp_size
        )

    return track


def count_flops_once(trainer: Any, cp_size: int) -> Callable[[Any], float]:
    """Trainer.floating_point_ops: a rank computes its share of the batch."""
    original = trainer.floating_point_ops
    return lambda inputs: original(inputs) / cp_size


def count_targets(trainer: Any) -> Callable[..., Any]:
    """Trainer._get_num_items_in_batch: the first token of a document is nobody's target, whatever its label."""
    original = trainer._get_num_items_in_batch

    def count(batch_samples: list[Any], device: torch.device) -> Any:
        return original([_without_first_tokens(batch) for batch in batch_samples], device)

    return count


def _without_first_tokens(batch: Any) -> Any:
    labels, positions, borders = (batch.get(name) for name in ("labels", "position_ids", "cu_seq_lens_q"))
    if labels is None or "shift_labels" in batch:
        return batch
    if positions is not None and positions.dim() == 2:
        return {**batch, "labels": labels.masked_fill(positions == 0, -100)}
    if borders is not None and labels.shape[0] == 1:
        first = borders[:-1].long()
        if len(first) and int(first.max()) >= labels.shape[1]:
            raise DocumentError(
                f"cu_seq_lens_q ends at {int(borders[-1])} but the row has {labels.shape[1]} tokens."
            )
        return {**batch, "labels": labels.index_fill(1, first.to(labels.device), -100)}
    return batch


def whole_batch_loss(function: Callable[..., torch.Tensor], cp_size: int) -> Callable[..., torch.Tensor]:
    """A loss function that every rank of a cp group computes over the whole batch.

    Trainer multiplies a loss that was divided by num_items_in_batch by the number of processes, cp ranks included.
    """

    def loss(*args: Any, **kwargs: Any) -> torch.Tensor:
        value = function(*args, **kwargs)
        return value / cp_size if kwargs.get("num_items_in_batch") is not None else value

    return loss


def tokens_per_step(trainer: Any, data_parallel: int) -> str:
    """What one optimizer step holds, in tokens where the first examples tell."""
    args = trainer.args
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * data_parallel
    longest = _longest_row(trainer.train_dataset)
    return f"{rows:,} row{'' if rows == 1 else 's'}" + (
        f" (at most {rows * longest:,} tokens)" if longest else ""
    )


def _longest_row(dataset: Any) -> int:
    """The longest of the first rows of an indexable dataset; 0 when it cannot tell."""
    if dataset is None or not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        return 0
    rows = [dataset[i] for i in range(min(len(dataset), 64))]
    return max(
        (len(row["input_ids"]) for row in rows if isinstance(row, dict) and "input_ids" in row), default=0
    )
