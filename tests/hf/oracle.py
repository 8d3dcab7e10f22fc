"""The right answer for a training run: every document of every pack alone, in one process, in float64.

A document is its own forward of shape (1, L) on an unpatched model: nothing to leak into, no padding, no
sharding. The optimizers, the clipping and the averaging are written out here, after the papers and torch's
documentation; nothing of sap_hf, Trainer or torch.optim is used.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100


@dataclasses.dataclass(frozen=True)
class Document:
    """One document: ids and unshifted labels, both (L,). The first label is never a target."""

    ids: Tensor
    labels: Tensor

    @property
    def targets(self) -> int:
        return int((self.labels[1:] != IGNORED).sum())


Batch = Sequence[Document]
"""What one data-parallel group sees in one forward: the documents of all its rows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """The options of a run that change the numbers, named as TrainingArguments names them."""

    optim: str = "sgd"
    learning_rate: float = 0.1
    adam_epsilon: float = 1e-3
    max_grad_norm: float = 1.0
    label_smoothing: float = 0.0
    average_tokens_across_devices: bool = True


@dataclasses.dataclass
class Run:
    """What a training run left behind."""

    losses: list[float]
    grad_norms: list[float]
    parameters: dict[str, Tensor]
    accuracies: list[float] = dataclasses.field(default_factory=list)
    entropies: list[float] = dataclasses.field(default_factory=list)
    eval_loss: float | None = None


def document_logits(model: nn.Module, document: Document) -> Tensor:
    """(L, V) logits of a document alone, in float64."""
    return model(input_ids=document.ids[None], use_cache=False).logits[0].double()


def loss_sum(logits: Tensor, labels: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy summed over the targets of one document. logits (L, V), labels (L,) unshifted."""
    log_p = F.log_softmax(logits[:-1], dim=-1)
    target = labels[1:]
    seen = target != IGNORED
    nll = -log_p.gather(1, target.clamp(min=0)[:, None])[:, 0]
    uniform = -log_p.mean(dim=-1)
    return ((1 - smoothing) * nll + smoothing * uniform)[seen].sum()


def train(model: nn.Module, steps: Sequence[Sequence[Sequence[Batch]]], recipe: Recipe) -> Run:
    """Train `model` in place.

    Args:
        steps: steps[s][m][g] is the batch of data-parallel group g in micro-batch m of optimizer step s.

    Returns:
        The loss of each step (the mean over all its targets), the norm of its gradient before clipping, token
        accuracy and entropy (the mean over micro-batches, as trl logs them), and the parameters at the end.
    """
    run = Run([], [], {})
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    state: dict[str, dict[str, Tensor]] = {name: {} for name in named}
    model.train()
    for number, step in enumerate(steps, start=1):
        groups = len(step[0])
        total = sum(document.targets for micro in step for batch in micro for document in batch)
        grads = {name: torch.zeros_like(p) for name, p in named.items()}
        loss = 0.0
        accuracies, entropies = [], []
        for micro in step:
            correct, entropy, targets = 0, 0.0, 0
            for group, batch in enumerate(micro):
                if recipe.average_tokens_across_devices:
                    weight = 1 / total
                else:
                    own = sum(document.targets for other in step for document in other[group])
                    weight = 1 / (own * groups)
                for document in batch:
                    logits = document_logits(model, document)
                    part = loss_sum(logits, document.labels, recipe.label_smoothing) * weight
                    used = torch.autograd.grad(part, list(named.values()), allow_unused=True)
                    for name, grad in zip(named, used, strict=True):
                        if grad is not None:
                            grads[name] += grad
                    loss += part.item()
                    seen = document.labels[1:] != IGNORED
                    scores = logits[:-1][seen].detach()
                    correct += int((scores.argmax(-1) == document.labels[1:][seen]).sum())
                    entropy += float(-(scores.softmax(-1) * scores.log_softmax(-1)).sum())
                    targets += int(seen.sum())
            accuracies.append(correct / max(targets, 1))
            entropies.append(entropy / max(targets, 1))
        norm = float(torch.sqrt(sum((grad**2).sum() for grad in grads.values())))
        scale = min(1.0, recipe.max_grad_norm / (norm + 1e-6)) if recipe.max_grad_norm > 0 else 1.0
        with torch.no_grad():
            for name, parameter in named.items():
                parameter -= update(grads[name] * scale, state[name], number, recipe)
        run.losses.append(loss)
        run.grad_norms.append(norm)
        run.accuracies.append(sum(accuracies) / len(accuracies))
        run.entropies.append(sum(entropies) / len(entropies))
    run.parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    return run


def update(grad: Tensor, state: dict[str, Tensor], number: int, recipe: Recipe) -> Tensor:
    """What one optimizer step subtracts from a parameter: plain SGD, or Adam without weight decay."""
    if recipe.optim == "sgd":
        return recipe.learning_rate * grad
    assert recipe.optim == "adamw_torch", recipe.optim
    first = state["first"] = 0.9 * state.get("first", torch.zeros_like(grad)) + 0.1 * grad
    second = state["second"] = 0.999 * state.get("second", torch.zeros_like(grad)) + 0.001 * grad**2
    mean, square = first / (1 - 0.9**number), second / (1 - 0.999**number)
    return recipe.learning_rate * mean / (square.sqrt() + recipe.adam_epsilon)


@torch.no_grad()
def evaluate(model: nn.Module, batches: Sequence[tuple[Batch, int]], smoothing: float = 0.0) -> float:
    """Evaluation loss as Trainer reports it: the mean over rows of the loss of the batch that the row was in.

    Args:
        batches: the documents of each batch and the number of rows they came from.
    """
    model.eval()
    total, rows_seen = 0.0, 0
    for documents, rows in batches:
        targets = sum(document.targets for document in documents)
        summed = sum(
            loss_sum(document_logits(model, document), document.labels, smoothing).item()
            for document in documents
        )
        total += rows * summed / targets
        rows_seen += rows
    return total / rows_seen


@torch.no_grad()
def predictions(model: nn.Module, rows: Sequence[Batch]) -> list[Tensor]:
    """(T, V) logits of each row, its documents run alone and put side by side."""
    model.eval()
    return [torch.cat([document_logits(model, document) for document in row]) for row in rows]


def worst(left: Any, right: Any) -> float:
    """Largest difference of tensors, lists or dicts of tensors, relative to the larger of 1 and |right|."""
    if isinstance(right, dict):
        assert left.keys() == right.keys(), sorted(left.keys() ^ right.keys())
        return max(worst(left[key], right[key]) for key in right)
    a, b = torch.as_tensor(left, dtype=torch.float64), torch.as_tensor(right, dtype=torch.float64)
    assert a.shape == b.shape, f"{tuple(a.shape)} against {tuple(b.shape)}"
    # A NaN compares false with every bound; it must count as a difference.
    return (
        torch.nan_to_num((a - b).abs() / b.abs().clamp(min=1), nan=torch.inf).max().item()
        if a.numel()
        else 0.0
    )
