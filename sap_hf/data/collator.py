"""One row from many documents: features -> {input_ids, labels, position_ids}, all (1, T).

Takes single documents, packs from `sap_hf.pack` or trl (`seq_lengths`), and rows that were flattened already
(`position_ids`, `cu_seq_lens_q`). Labels leave unshifted: the shift happens once, over the whole row, before
the row is split over ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sap_hf.data.packing import IGNORED, LOSS_MASKS
from sap_hf.errors import DataError

TOKEN_WISE = ("labels", "position_ids", "attention_mask", *LOSS_MASKS)
BOUNDARIES = ("seq_lengths", "cu_seq_lens_q")


class DataCollatorForPacking:
    """Concatenate features into one row whose documents stay apart.

    A feature is one document, or several with their boundaries: `seq_lengths` (their lengths), `position_ids`
    (restarting at 0 with each) or `cu_seq_lens_q`. Where it gives them in several ways, they must agree.
    Without labels, every token is one, except where `completion_mask` or `assistant_masks` is 0. Other fields
    are left out.

    Called with a list of features whose fields are (t,) or (1, t); t may differ.

    Returns:
        input_ids, labels, position_ids: (1, T), int64. labels are unshifted and -100 at each document's first
        token; position_ids restart at 0 with each document. There is no attention_mask: models isolate packed
        documents only when there is none.

    Raises:
        DataError: a feature that is empty, padded, or whose fields do not describe the same tokens.
    """

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Tensor]:
        if not features:
            raise DataError("the batch has no features.")
        labelled = ["labels" in feature for feature in features]
        if any(labelled) and not all(labelled):
            raise DataError(
                f"feature {labelled.index(True)} has labels and feature {labelled.index(False)} has none: "
                "give labels to all or to none."
            )
        rows = [collate_one(feature, at) for at, feature in enumerate(features)]
        input_ids, labels, position_ids = (torch.cat(parts)[None] for parts in zip(*rows))
        return {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}


def collate_one(feature: dict[str, Any], at: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return input_ids, labels and position_ids, each (t,), of the feature at this place of the batch."""
    if "input_ids" not in feature:
        raise DataError(f"feature {at} has no input_ids, only {', '.join(feature) or 'nothing'}.")
    fields = {
        name: as_row(feature[name], name, at)
        for name in ("input_ids", *TOKEN_WISE, *BOUNDARIES)
        if name in feature
    }
    input_ids = fields["input_ids"]
    if not len(input_ids):
        raise DataError(f"feature {at} is empty: leave documents without tokens out of the dataset.")
    for name in TOKEN_WISE:
        if name in fields and len(fields[name]) != len(input_ids):
            raise DataError(
                f"feature {at} has {len(input_ids)} tokens in input_ids but {len(fields[name])} in {name}."
            )
    if "attention_mask" in fields and not fields["attention_mask"].all():
        raise DataError(
            f"feature {at} is padded (attention_mask has zeros): the padding would be trained as text.\n"
            "  Tokenise with padding=False."
        )
    position_ids = positions(fields, at)
    if "labels" in fields:
        labels = fields["labels"].clone()
    else:
        labels = input_ids.clone()
        for name in LOSS_MASKS:
            if name in fields:
                labels[fields[name] == 0] = IGNORED
    labels[position_ids == 0] = IGNORED
    return input_ids, labels, position_ids


def positions(fields: dict[str, Tensor], at: int) -> Tensor:
    """Return the (t,) positions of the tokens in their documents, from whichever fields give boundaries."""
    length = len(fields["input_ids"])
    given = fields.get("position_ids")
    found: dict[str, Tensor] = {}
    if "seq_lengths" in fields:
        found["seq_lengths"] = fields["seq_lengths"]
    if "cu_seq_lens_q" in fields:
        cu_seqlens = fields["cu_seq_lens_q"]
        if not len(cu_seqlens) or cu_seqlens[0] != 0:
            raise DataError(f"feature {at}: cu_seq_lens_q must begin at 0, found {cu_seqlens.tolist()[:8]}.")
        found["cu_seq_lens_q"] = torch.diff(cu_seqlens)
    if given is not None:
        if given[0] != 0:
            raise DataError(
                f"feature {at}: position_ids begin at {int(given[0])}; each document must restart at 0."
            )
        found["position_ids"] = torch.diff((given == 0).nonzero().flatten(), append=torch.tensor([length]))
    for name, lengths in found.items():
        if (lengths < 1).any() or lengths.sum() != length:
            raise DataError(
                f"feature {at}: {name} gives documents of {brief(lengths)} tokens, "
                f"{int(lengths.sum())} in all, but input_ids has {length}."
            )
    (name, lengths), *others = found.items() or {"input_ids": torch.tensor([length])}.items()
    for other, same in others:
        if not torch.equal(lengths, same):
            raise DataError(
                f"feature {at}: {name} gives documents of {brief(lengths)} tokens, {other} of {brief(same)}."
            )
    position_ids = torch.arange(length) - torch.repeat_interleave(torch.cumsum(lengths, 0) - lengths, lengths)
    if given is not None and not torch.equal(given, position_ids):
        wrong = int((given != position_ids).nonzero()[0])
        raise DataError(
            f"feature {at}: position_ids[{wrong}] is {int(given[wrong])}, expected "
            f"{int(position_ids[wrong])}: they must count 0, 1, 2, ... in each document."
        )
    return position_ids


def as_row(value: Any, name: str, at: int) -> Tensor:
    """Return a field as a 1-D int64 tensor: a list, an array, a tensor, or any of them as (1, t)."""
    try:
        row = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"feature {at}: {name} is not a list of integers ({error}).") from error
    if row.ndim == 2 and row.shape[0] == 1:
        row = row[0]
    if row.ndim != 1 or (row.numel() and (row.is_floating_point() or row.is_complex())):
        raise DataError(
            f"feature {at}: {name} has shape {tuple(row.shape)} and dtype {row.dtype}; "
            "expected one row of integers: (t,) or (1, t)."
        )
    return row.to(torch.int64)


def brief(lengths: Tensor) -> str:
    """Return the first few lengths for a message."""
    shown = ", ".join(str(x) for x in lengths[:8].tolist())
    return shown if len(lengths) <= 8 else f"{shown}, ... ({len(lengths)} documents)"
