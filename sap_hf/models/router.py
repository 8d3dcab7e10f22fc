"""Router: the load-balancing loss of a mixture of experts, over the whole pack instead of one rank's rows.

The loss multiplies two means over tokens, so that the mean of shards' losses is another number. transformers computes
it in a function of the model's own module; while a model is patched, that function is given every rank's router logits.
"""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

from sap_hf.errors import TensorError
from sap_hf.models.interface import state
from sap_hf.runtime.collectives import gather_rows

NAME = "load_balancing_loss_func"
# Module name -> the function that was there, and for how many patched models it is replaced.
_originals: dict[str, Callable[..., Any]] = {}
_users: Counter[str] = Counter()


def install(model: torch.nn.Module) -> None:
    """Replace the loss in every module that a class of the model comes from."""
    for name in _modules(model):
        if not _users[name]:
            _originals[name] = getattr(sys.modules[name], NAME)
            setattr(sys.modules[name], NAME, _over_ranks(_originals[name]))
        _users[name] += 1


def uninstall(model: torch.nn.Module) -> None:
    """Undo `install` for this model; the last one brings the function back."""
    for name in _modules(model):
        _users[name] -= 1
        if not _users[name]:
            setattr(sys.modules[name], NAME, _originals.pop(name))


def _modules(model: torch.nn.Module) -> list[str]:
    names = {cls.__module__ for module in model.modules() for cls in type(module).__mro__}
    return sorted(name for name in names if hasattr(sys.modules.get(name), NAME))


def _over_ranks(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def balanced(gate_logits: Any, *args: Any, **kwargs: Any) -> Any:
        shard = state.shard
        if shard is None or shard.group.size == 1 or not isinstance(gate_logits, tuple | list):
            return original(gate_logits, *args, **kwargs)
        rows = shard.plan.rows_per_rank
        shapes = [tuple(logits.shape) for logits in gate_logits]
        if any(len(shape) != 2 or shape[0] != rows for shape in shapes):
            raise TensorError(
                f"Router logits of shapes {', '.join(map(str, shapes))}: ({rows}, experts) is needed for each layer.\n"
                "  Train this model with output_router_logits=False."
            )
        # One exchange for all layers. What is computed on every rank counts once in the sum over ranks.
        everyone = gather_rows(torch.cat(list(gate_logits), dim=1), shard.plan, shard.group)
        layers = everyone.split([experts for _, experts in shapes], dim=1)
        return original(tuple(layers), *args, **kwargs) / shard.group.size

    return balanced
