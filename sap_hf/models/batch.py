"""A batch as Hugging Face passes it -> the documents in it, and where each rank's rows come from.

Everything here runs once per batch, on the host. Packed rows, several rows per batch and right-padded rows all become
one pack: the real tokens of the batch, one after the other.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

import numpy as np
import torch

from sap_hf.errors import DocumentError, UnsupportedAttention
from sap_hf.planning import Documents, Plan
from sap_hf.planning.documents import Int64

# Arguments that only describe documents, in the terms of other attention kernels.
BOUNDARIES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
# Arguments with one entry per token, which are cut to this rank's rows.
PER_TOKEN = (
    "input_ids",
    "inputs_embeds",
    "labels",
    "shift_labels",
    "position_ids",
    "attention_mask",
    *BOUNDARIES,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """The pack that a batch of shape (B, S) holds.

    Attributes:
        shape: (B, S).
        tokens: (T,) index of each pack row in the flattened batch; padding is left out.
        documents: the documents of the pack; none crosses a row of the batch.
        fingerprint: 64-bit hash of what the ranks of a cp group must have in common.
    """

    shape: tuple[int, int]
    tokens: Int64
    documents: Documents
    fingerprint: int

    def positions(self) -> Int64:
        """(T,) position of each pack row inside its document."""
        rows = np.arange(self.documents.rows)
        return rows - self.documents.cu_seqlens[self.documents.index_of(rows)]

    def targets(self, labels: torch.Tensor) -> torch.Tensor:
        """(T,) the label that each pack row predicts: its successor's; -100 at a document's last row."""
        flat = labels.reshape(-1).index_select(0, self._on(labels.device, self.tokens))
        shifted = torch.full_like(flat, -100)
        shifted[:-1] = flat[1:]
        shifted[self._on(labels.device, self.documents.cu_seqlens[1:] - 1)] = -100
        return shifted

    @staticmethod
    def _on(device: torch.device, index: Int64) -> torch.Tensor:
        return torch.from_numpy(index).to(device)


@dataclasses.dataclass(frozen=True, eq=False)
class Cut:
    """This rank's rows of a batch, as indices on the device.

    Attributes:
        rows: (C,) pack row of each of this rank's rows; 0 where it is padding.
        tokens: (C,) the same as indices into the flattened batch.
        padding: (C,) bool.
    """

    rows: torch.Tensor
    tokens: torch.Tensor
    padding: torch.Tensor

    @classmethod
    def of(cls, batch: Batch, plan: Plan, rank: int, device: torch.device) -> Cut:
        """The rows that the plan gives to `rank`."""
        rows = plan.rows(rank)
        padding = rows >= plan.documents.rows
        rows = np.where(padding, 0, rows)
        return cls(*(torch.from_numpy(index).to(device) for index in (rows, batch.tokens[rows], padding)))

    def of_batch(self, tensor: torch.Tensor) -> torch.Tensor:
        """(1, C, ...) of a (B, S, ...) tensor. Padding repeats the first token: it is computed and never read."""
        return tensor.flatten(0, 1).index_select(0, self.tokens).unsqueeze(0)

    def of_pack(self, tensor: torch.Tensor, padding: int) -> torch.Tensor:
        """(1, C) of a (T,) tensor, with `padding` where this rank's row is none of the pack's."""
        return tensor.index_select(0, self.rows).masked_fill(self.padding, padding).unsqueeze(0)


def read(inputs: dict[str, Any]) -> Batch:
    """Find the documents in the arguments of a forward.

    Args:
        inputs: input_ids (B, S) or inputs_embeds (B, S, E), and any of attention_mask (B, S), position_ids (B, S) or
            (1, S), labels (B, S), shift_labels (B, S), cu_seq_lens_q.

    Raises:
        DocumentError: padding that is not on the right, masks with holes, positions that do not restart at 0,
            cu_seq_lens that do not cover the row, two descriptions that disagree.
        UnsupportedAttention: an argument with one entry per token that nobody here knows how to cut.
    """
    main = inputs.get("input_ids")
    main = inputs["inputs_embeds"] if main is None else main
    if main.dim() < 2:
        raise DocumentError(f"input_ids has shape {tuple(main.shape)}: (rows, tokens) is needed.")
    shape = (main.shape[0], main.shape[1])
    for name, value in inputs.items():
        if (
            name not in PER_TOKEN
            and isinstance(value, torch.Tensor)
            and value.dim() >= 2
            and value.shape[:2] == shape
        ):
            raise UnsupportedAttention(
                f"The input {name!r} {tuple(value.shape)} has one entry per token; it cannot be split with the pack.\n"
                "  Leave it out of the batch."
            )
    host = _to_host(inputs, shape)
    lengths = _row_lengths(host.get("attention_mask"), shape)
    positions = host.get("position_ids")
    borders = inputs.get("cu_seq_lens_q")
    found = None
    if positions is not None:
        found = _from_positions(positions, lengths)
    if borders is not None:
        given = Documents.from_cu_seqlens(borders.cpu().numpy(), rows=shape[0] * shape[1])
        if found is not None and not np.array_equal(found.cu_seqlens, given.cu_seqlens):
            raise DocumentError(
                f"cu_seq_lens_q names {len(given)} documents and position_ids {len(found)}: they disagree about where "
                "documents start. Pass only one of them, or build both from the same lengths."
            )
        found = given
    if found is None:
        found = Documents.from_lengths(lengths[lengths > 0])
    real = np.arange(shape[1]) < lengths[:, None]
    state = hashlib.blake2b(repr((shape, sorted(host))).encode(), digest_size=8)
    for name in sorted(host):
        state.update(host[name].tobytes())
    state.update(found.cu_seqlens.tobytes())
    return Batch(shape, np.flatnonzero(real), found, int.from_bytes(state.digest(), "little"))


def _to_host(inputs: dict[str, Any], shape: tuple[int, int]) -> dict[str, Int64]:
    """The whole-number (B, S) inputs in one copy from the device: one synchronisation per batch, not one each."""
    names, tensors = [], []
    for name in ("input_ids", "labels", "shift_labels", "position_ids", "attention_mask"):
        value = inputs.get(name)
        if value is None:
            continue
        if name == "position_ids" and value.dim() == 2 and value.shape[0] == 1:
            value = value.expand(shape[0], -1)
        if tuple(value.shape) != shape:
            raise DocumentError(
                f"{name} has shape {tuple(value.shape)}, the batch is {shape}: one entry per token is needed."
                + (" Leave out 4-D masks; documents are told by position_ids." if value.dim() == 4 else "")
            )
        names.append(name)
        tensors.append(value.to(torch.int64))
    if not tensors:
        return {}
    return dict(zip(names, torch.stack(tensors).cpu().numpy(), strict=True))


def _row_lengths(mask: Int64 | None, shape: tuple[int, int]) -> Int64:
    """(B,) real tokens of each row."""
    if mask is None:
        return np.full(shape[0], shape[1], np.int64)
    if not np.isin(mask, (0, 1)).all():
        raise DocumentError(
            f"attention_mask holds the value {int(mask.max())}: only 0 and 1 are understood. "
            "Number documents by position_ids that restart at 0."
        )
    lengths = mask.sum(axis=1)
    expected = np.arange(shape[1]) < lengths[:, None]
    wrong = np.flatnonzero((mask.astype(bool) != expected).any(axis=1))
    if wrong.size:
        row = int(wrong[0])
        side = "is padded on the left" if not mask[row, 0] else "has holes"
        raise DocumentError(
            f"attention_mask of row {row} {side}; padding must be on the right.\n"
            "  Set tokenizer.padding_side = 'right', or pack the examples."
        )
    if not lengths.any():
        raise DocumentError("attention_mask is 0 everywhere: the batch has no token.")
    return lengths


def _from_positions(positions: Int64, lengths: Int64) -> Documents:
    """Documents of all rows; each row of the batch starts one."""
    found = []
    for row, length in enumerate(lengths.tolist()):
        if length == 0:
            continue
        try:
            found.append(Documents.from_position_ids(positions[row, :length]).lengths)
        except DocumentError as error:
            raise DocumentError(f"row {row} of the batch: {error}") from None
    return Documents.from_lengths(np.concatenate(found))
