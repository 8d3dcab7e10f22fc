"""Whole documents grouped into packs: tokenised examples -> rows of at most max_length tokens.

Best-fit-decreasing: the longest document first, each into the pack whose room it fills best. A document is
never cut unless the caller asks for it by name, and every pack carries where its documents begin, so that
attention, positions and labels can stay inside them. Leaves in the form that trl's packing leaves in
(`seq_lengths`), so its collator and DataCollatorForPacking both take it.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sap_hf.errors import DataError

if TYPE_CHECKING:
    import datasets
    import pyarrow as pa

logger = logging.getLogger(__name__)

Ints = npt.NDArray[np.int64]

TOO_LONG = ("error", "drop", "split", "keep")
IGNORED = -100
LOSS_MASKS = ("completion_mask", "assistant_masks")
"""Columns of 0 and 1 that say which tokens are trained; folded into labels, as trl does."""

DOCUMENTS_PER_READ = 10_000
TOKENS_PER_WRITE = 4_000_000


def pack(
    dataset: datasets.Dataset | list[dict[str, Any]],
    max_length: int,
    *,
    column: str = "input_ids",
    too_long: str = "error",
) -> datasets.Dataset:
    """Group whole documents into packs of at most max_length tokens.

    Deterministic. Inside a pack, documents keep the order of the dataset; packs come in the order of their
    first document, so a dataset shuffled before stays shuffled. Documents without tokens are left out.

    Args:
        dataset: one document per row; `column` holds its token ids. `labels` of the same length (unshifted)
            may stand beside it; without them, `completion_mask` and `assistant_masks` are turned into labels.
            All other columns are left behind: a pack holds many documents.
        max_length: tokens in a pack, at most.
        too_long: what happens to documents longer than max_length. "error" refuses them; "drop" leaves them
            out; "split" cuts each into documents of at most max_length that do not see each other; "keep"
            gives each a pack of its own, longer than max_length. All but the first log how many there were.

    Returns:
        One row per pack: `column` and, where the dataset has labels, `labels` (-100 at the first token of
        each document, so that no document predicts the next one's), concatenated; `seq_lengths`, the
        documents' lengths; `position_ids`, which restart at 0 with each document. The boundaries are there
        twice because each trainer drops one: Trainer removes columns that the model does not take (a pack
        would become one document), SFTTrainer removes position_ids. Give either trainer a
        DataCollatorForPacking, and SFTTrainer max_length=None too, or it cuts the packs.

    Raises:
        DataError: documents that are too long, padded, or not lists of token ids.
    """
    if isinstance(max_length, bool) or not isinstance(max_length, int | np.integer) or max_length < 1:
        raise DataError(f"max_length={max_length!r} must be a positive number of tokens.")
    if too_long not in TOO_LONG:
        raise DataError(f"too_long={too_long!r} must be one of {', '.join(TOO_LONG)}.")
    source = read_columns(dataset, column)
    lengths = document_lengths(source, column)
    document, start, stop = pieces(lengths, int(max_length), too_long)
    pack_of = best_fit_decreasing(stop - start, int(max_length))
    order = np.argsort(pack_of, kind="stable")
    packs = np.split(order, np.cumsum(np.bincount(pack_of))[:-1])
    tokens = int((stop - start).sum())
    logger.info(
        "pack: %d documents, %d tokens -> %d packs of at most %d, %.1f %% full",
        len(np.unique(document)), tokens, len(packs), max_length, 100 * tokens / (len(packs) * max_length),
    )  # fmt: skip

    from datasets import Dataset
    from datasets.fingerprint import Hasher

    def build(rows: pa.Table) -> pa.Table:
        chosen = [packs[i] for i in rows["pack"].to_pylist()]
        at = np.concatenate(chosen)
        return concatenate(source, column, document[at], start[at], stop[at], [len(ids) for ids in chosen])

    fingerprint = Hasher.hash(["sap_hf.pack", source._fingerprint, column, int(max_length), too_long])
    packs_per_write = max(1, TOKENS_PER_WRITE // int(max_length))
    return (
        Dataset.from_dict({"pack": np.arange(len(packs))})
        .with_format("arrow")
        .map(
            build,
            batched=True,
            batch_size=packs_per_write,
            writer_batch_size=packs_per_write,
            remove_columns=["pack"],
            # A dataset on disk gets its packs on disk, beside it: the next process maps the same file.
            cache_file_name=cache_file(source, fingerprint),
            new_fingerprint=fingerprint,
            desc="Packing",
        )
        .with_format(None)
    )


def best_fit_decreasing(lengths: Ints, capacity: int) -> Ints:
    """Choose a pack for every document: longest first, into the pack that it leaves with the least room.

    O(N log N). Packs are numbered by their first document; of equal documents the earlier comes first. A
    document longer than the capacity gets a pack of its own.

    Args:
        lengths: (N,), tokens of each document, at least 1.

    Returns:
        (N,), the pack of each document.
    """
    pack_of = np.empty(len(lengths), dtype=np.int64)
    rooms = RoomSet(capacity)
    with_room: dict[int, list[int]] = defaultdict(list)
    count = 0
    by_length = np.argsort(-lengths, kind="stable")
    for document, length in zip(by_length.tolist(), lengths[by_length].tolist()):
        room = rooms.smallest_from(length)
        if room is None:
            chosen, room = count, max(capacity, length)
            count += 1
        else:
            chosen = with_room[room].pop()
            if not with_room[room]:
                rooms.remove(room)
        pack_of[document] = chosen
        if room > length:
            with_room[room - length].append(chosen)
            rooms.add(room - length)
    _, first, numbered = np.unique(pack_of, return_index=True, return_inverse=True)
    rank = np.empty(len(first), dtype=np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[numbered]


class RoomSet:
    """A set of integers in [0, limit] that finds its smallest member >= x in a few operations.

    Bits in words of 1024, and one integer that says which words are not empty.
    """

    def __init__(self, limit: int) -> None:
        self.words: dict[int, int] = defaultdict(int)
        self.filled = 0
        self.limit = limit

    def add(self, x: int) -> None:
        """Put x in; it may be there already."""
        self.words[x >> 10] |= 1 << (x & 1023)
        self.filled |= 1 << (x >> 10)

    def remove(self, x: int) -> None:
        """Take x out; it must be there."""
        self.words[x >> 10] ^= 1 << (x & 1023)
        if not self.words[x >> 10]:
            self.filled ^= 1 << (x >> 10)

    def smallest_from(self, x: int) -> int | None:
        """Return the smallest member >= x, or None."""
        if x > self.limit:
            return None
        word = x >> 10
        bits = self.words[word] >> (x & 1023)
        if bits:
            return x + lowest(bits)
        rest = self.filled >> (word + 1)
        if not rest:
            return None
        word += 1 + lowest(rest)
        return (word << 10) + lowest(self.words[word])


def lowest(bits: int) -> int:
    """Return the position of the lowest set bit; bits is not 0."""
    return (bits & -bits).bit_length() - 1


def read_columns(dataset: datasets.Dataset | list[dict[str, Any]], column: str) -> datasets.Dataset:
    """Return the token-wise columns of the dataset, in arrow format."""
    from datasets import Dataset

    if isinstance(dataset, list):
        if len({frozenset(row) for row in dataset}) > 1:
            raise DataError(
                "the documents do not all have the same fields: give labels to all of them or to none."
            )
        dataset = Dataset.from_list(dataset)
    if not isinstance(dataset, Dataset):
        raise DataError(
            f"pack takes a datasets.Dataset or a list of dicts, found {type(dataset).__name__}.\n"
            "  It needs all lengths at once: pack each split of a DatasetDict; for a stream, use "
            "SFTConfig(packing=True), or pack shard by shard."
        )
    if column not in dataset.column_names:
        raise DataError(
            f"no column {column!r} among {', '.join(dataset.column_names) or 'no columns at all'}: "
            "tokenise the dataset first, or name the column of token ids with column=."
        )
    wanted = [column, "labels", "attention_mask"]
    if "labels" not in dataset.column_names:
        wanted.extend(LOSS_MASKS)
    return dataset.select_columns([name for name in wanted if name in dataset.column_names]).with_format(
        "arrow"
    )


def document_lengths(source: datasets.Dataset, column: str) -> Ints:
    """Return the number of tokens of each document, after checking every token-wise column against it."""
    parts = [np.zeros(0, dtype=np.int64)]
    for table in source.iter(DOCUMENTS_PER_READ):
        done = sum(map(len, parts))
        lengths = list_lengths(table, column)
        parts.append(lengths)
        for name in table.column_names:
            found = list_lengths(table, name)
            wrong = np.flatnonzero(found != lengths)
            if len(wrong):
                raise DataError(
                    f"document {done + wrong[0]} has {lengths[wrong[0]]} tokens in {column!r} but "
                    f"{found[wrong[0]]} in {name!r}."
                )
        if "attention_mask" in table.column_names and not flatten(table["attention_mask"]).all():
            raise DataError(
                "attention_mask has zeros: documents are padded, and the padding would be trained as text.\n"
                "  Tokenise with padding=False."
            )
    return np.concatenate(parts)


def list_lengths(table: pa.Table, name: str) -> Ints:
    """Return the length of each list of a column, which must hold lists of integers and nothing missing."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = table[name].type
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
        raise DataError(f"column {name!r} holds {kind}, not lists of integers: tokenise the dataset first.")
    # A column of nothing but empty lists has values of type null.
    of = kind.value_type
    if not (pa.types.is_integer(of) or pa.types.is_boolean(of) or pa.types.is_null(of)):
        raise DataError(f"column {name!r} holds lists of {of}, not of integers: tokenise the dataset first.")
    if table[name].null_count or pc.list_flatten(table[name]).null_count:
        raise DataError(f"column {name!r} has missing values: every document needs all of its tokens.")
    return np.asarray(pc.list_value_length(table[name]), dtype=np.int64)


def pieces(lengths: Ints, max_length: int, too_long: str) -> tuple[Ints, Ints, Ints]:
    """Return (document, start, stop) of every piece to pack: whole documents unless too_long is "split"."""
    over = np.flatnonzero(lengths > max_length)
    counts = np.minimum(lengths, 1)
    if len(over):
        found = (
            f"{len(over)} of {len(lengths)} documents {'is' if len(over) == 1 else 'are'} longer than "
            f"max_length={max_length}; the longest has {lengths.max()} tokens"
        )
        if too_long == "error":
            raise DataError(
                f"{found}.\n"
                f'  Use max_length={lengths.max()}, or too_long="drop" (leave them out), "split" (cut them '
                f'into documents of at most {max_length} tokens) or "keep" (each alone in a longer pack).'
            )
        if too_long == "drop":
            counts[over] = 0
            logger.warning("pack: %s; dropped them with %d tokens.", found, lengths[over].sum())
        if too_long == "split":
            counts[over] = -(-lengths[over] // max_length)
            logger.warning("pack: %s; split them into %d documents.", found, counts[over].sum())
        if too_long == "keep":
            logger.warning("pack: %s; kept each in a pack of its own.", found)
    if not counts.any():
        raise DataError(f"nothing to pack: none of the {len(lengths)} documents is left.")
    document = np.repeat(np.arange(len(lengths)), counts)
    nth = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = nth * max_length
    whole = counts[document] == 1
    stop = np.where(whole, lengths[document], np.minimum(start + max_length, lengths[document]))
    return document, start, stop


def concatenate(
    source: datasets.Dataset, column: str, document: Ints, start: Ints, stop: Ints, pieces_per_pack: list[int]
) -> pa.Table:
    """Build the rows of some packs from the pieces that they hold, in order."""
    import pyarrow as pa

    # Read every document once, however many pieces of it are wanted, and in the order of the file.
    unique, which = np.unique(document, return_inverse=True)
    table = source[unique.tolist()]
    values = {name: flatten(table[name]) for name in table.column_names}
    sizes = np.array([len(ids) for ids in table[column]], dtype=np.int64)
    length = stop - start
    total = int(length.sum())
    begin = np.cumsum(length) - length
    position = np.arange(total) - np.repeat(begin, length)
    token = np.repeat((np.cumsum(sizes) - sizes)[which] + start, length) + position

    columns = {column: values[column][token]}
    if "labels" in values or any(mask in values for mask in LOSS_MASKS):
        labels = values.get("labels", values[column])[token].astype(np.int64)
        for mask in LOSS_MASKS:
            if mask in values:
                labels[values[mask][token] == 0] = IGNORED
        labels[begin] = IGNORED
        columns["labels"] = labels
    columns["position_ids"] = position.astype(np.int32)

    first_piece = np.concatenate([[0], np.cumsum(pieces_per_pack)])
    first_token = np.append(begin, total)[first_piece]
    arrays = {name: list_array(first_token, array) for name, array in columns.items()}
    return pa.table({**arrays, "seq_lengths": list_array(first_piece, length.astype(np.int32))})


def flatten(column: pa.ChunkedArray) -> npt.NDArray[Any]:
    """Return the values of a column of lists, one after the other."""
    return np.concatenate([chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks])


def list_array(offsets: Ints, values: npt.NDArray[Any]) -> pa.LargeListArray:
    """Return lists over values: the i-th holds values[offsets[i]:offsets[i + 1]]."""
    import pyarrow as pa

    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values))


def cache_file(source: datasets.Dataset, fingerprint: str) -> str | None:
    """Return where the packs of a dataset on disk are stored, or None for a dataset in memory."""
    from pathlib import Path

    from datasets import is_caching_enabled

    if not source.cache_files or not is_caching_enabled():
        return None
    return str(Path(source.cache_files[0]["filename"]).with_name(f"cache-{fingerprint}.arrow"))
