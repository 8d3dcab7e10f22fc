"""What a model makes of positions beyond their order: where counting starts, and frequencies that depend on length.

Every rank is given the positions of its own rows. A model that looks at the largest of them decides from one shard what
it should decide from whole documents; that decision is taken here for all ranks alike.
"""

from __future__ import annotations

from typing import Any

import torch

from sap_hf.errors import DocumentError
from sap_hf.models.interface import state
from sap_hf.planning.documents import Int64

# These keep the position of padding for padding: a document's first token has the next one.
_AFTER_PADDING = (
    "camembert",
    "data2vec-text",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
)


def first_position(config: Any) -> int:
    """The position that the model gives to a document's first token."""
    return int(config.pad_token_id) + 1 if config.model_type in _AFTER_PADDING else 0


def check_lengths(config: Any, lengths: Int64) -> None:
    """Refuse documents that rotary embeddings of this model would treat alike in a pack, but not when run alone.

    Raises:
        DocumentError: "dynamic" frequencies and a document beyond their reach; "longrope" and documents on both sides
            of the length where it changes frequencies.
    """
    longest, shortest = int(lengths.max()), int(lengths.min())
    for kind, reach in _reaches(config):
        if kind == "dynamic" and longest > reach:
            raise DocumentError(
                f"{config.model_type}: a document of {longest} tokens is beyond max_position_embeddings={reach}, where "
                "its rotary frequencies depend on the longest document of the batch.\n"
                "  Cut documents to that length, or set a rope_type that does not depend on the batch."
            )
        if kind == "longrope" and shortest <= reach < longest:
            raise DocumentError(
                f"{config.model_type}: one pack holds documents of {shortest} and of {longest} tokens; its rotary "
                f"frequencies (longrope) change beyond {reach} tokens, for the whole batch.\n"
                "  Pack shorter and longer documents apart."
            )


def hook_lengths(model: torch.nn.Module) -> list[Any]:
    """Handles of hooks that show the length of the longest document to the embeddings that ask for it."""
    handles = []
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if "longrope" in (kinds.values() if isinstance(kinds, dict) else (kinds,)):
            handles.append(module.register_forward_pre_hook(_add_last, with_kwargs=True))
            handles.append(module.register_forward_hook(_drop_last))
    return handles


def _reaches(config: Any) -> list[tuple[str, int]]:
    """Kind and reach of every rotary embedding whose frequencies depend on the length."""
    parameters = getattr(config, "rope_parameters", None) or {}
    each = [parameters] if "rope_type" in parameters else [value for value in parameters.values() if value]
    found = []
    for rope in each:
        if "dynamic" in rope["rope_type"]:
            found.append(("dynamic", int(config.max_position_embeddings)))
        elif rope["rope_type"] == "longrope":
            found.append(("longrope", int(rope["original_max_position_embeddings"])))
    return found


def _add_last(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """One more position behind this rank's rows: the last one of the longest document."""
    if state.shard is None:
        return None
    last = int(state.shard.plan.documents.lengths.max()) - 1
    if "position_ids" in kwargs:
        return args, {**kwargs, "position_ids": _with(kwargs["position_ids"], last)}
    return (args[0], _with(args[1], last), *args[2:]), kwargs


def _with(position_ids: torch.Tensor, last: int) -> torch.Tensor:
    return torch.nn.functional.pad(position_ids, (0, 1), value=last)


def _drop_last(module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    if state.shard is None:
        return None
    return tuple(each[:, :-1] for each in output) if isinstance(output, tuple) else output[:, :-1]
