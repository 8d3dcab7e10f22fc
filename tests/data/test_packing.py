"""pack: nothing lost, nothing cut, nothing crossed; and few packs, found fast."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset, load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st

from sap_hf.data import pack
from sap_hf.data.packing import best_fit_decreasing
from sap_hf.errors import DataError

CAPACITY = 12
# A call of pack writes a file-like table through datasets: some 10 ms each.
fewer = settings(max_examples=30)
LENGTHS = st.lists(st.integers(1, CAPACITY), min_size=1, max_size=40)


def documents_of(lengths: list[int]) -> list[dict[str, Any]]:
    """Documents whose tokens name their document and place; labels are other numbers, some of them -100."""
    made = []
    for index, length in enumerate(lengths):
        ids = [1000 * (index + 1) + place for place in range(length)]
        made.append({"input_ids": ids, "labels": [-100 if i % 3 == 2 else i + 500_000 for i in ids]})
    return made


def cut_at_boundaries(row: dict[str, Any], column: str) -> list[tuple[int, ...]]:
    """The documents of a pack, as its seq_lengths say."""
    ends = np.cumsum(row["seq_lengths"])
    return [tuple(part) for part in np.split(np.array(row[column]), ends[:-1])]


@given(LENGTHS)
@fewer
def test_every_document_comes_out_whole_exactly_once(lengths: list[int]) -> None:
    documents = documents_of(lengths)
    packs = pack(documents, CAPACITY)
    found = [part for row in packs for part in cut_at_boundaries(row, "input_ids")]
    assert Counter(found) == Counter(tuple(document["input_ids"]) for document in documents)


@given(LENGTHS)
@fewer
def test_no_pack_exceeds_its_capacity_and_all_columns_have_its_length(lengths: list[int]) -> None:
    for row in pack(documents_of(lengths), CAPACITY):
        assert sum(row["seq_lengths"]) <= CAPACITY
        assert {len(row[name]) for name in ("input_ids", "labels", "position_ids")} == {
            sum(row["seq_lengths"])
        }


@given(LENGTHS)
@fewer
def test_labels_stay_with_their_tokens_and_never_cross_documents(lengths: list[int]) -> None:
    given_labels = {tuple(d["input_ids"]): tuple(d["labels"][1:]) for d in documents_of(lengths)}
    for row in pack(documents_of(lengths), CAPACITY):
        for ids, labels in zip(cut_at_boundaries(row, "input_ids"), cut_at_boundaries(row, "labels")):
            # After a causal shift the last token before this document would have to predict labels[0].
            assert labels[0] == -100
            assert labels[1:] == given_labels[ids]


@given(LENGTHS)
@fewer
def test_position_ids_restart_with_each_document(lengths: list[int]) -> None:
    for row in pack(documents_of(lengths), CAPACITY):
        assert row["position_ids"] == [i for length in row["seq_lengths"] for i in range(length)]


@given(LENGTHS)
@fewer
def test_packs_come_in_the_order_of_their_first_document(lengths: list[int]) -> None:
    first = []
    for row in pack(documents_of(lengths), CAPACITY):
        inside = [ids[0] // 1000 for ids in cut_at_boundaries(row, "input_ids")]
        assert inside == sorted(inside)
        first.append(inside[0])
    assert first == sorted(first)


def slow_best_fit_decreasing(lengths: list[int], capacity: int) -> list[int]:
    """The rooms left by best-fit-decreasing, by looking at every pack for every document."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
            rooms.append(min(fitting) - length)
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


@given(
    st.integers(1, 5000).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), max_size=60)))
)
def test_packs_are_those_of_the_textbook_algorithm(case: tuple[int, list[int]]) -> None:
    capacity, lengths = case
    pack_of = best_fit_decreasing(np.array(lengths, dtype=np.int64), capacity)
    filled = np.bincount(pack_of, weights=lengths).astype(int)
    assert sorted(capacity - filled) == slow_best_fit_decreasing(lengths, capacity)


def first_fit(lengths: np.ndarray, capacity: int) -> int:
    """The number of packs when each document, in order, goes into the first pack that has room."""
    rooms = np.zeros(0, dtype=np.int64)
    for length in lengths:
        fitting = np.flatnonzero(rooms >= length)
        if len(fitting):
            rooms[fitting[0]] -= length
        else:
            rooms = np.append(rooms, capacity - length)
    return len(rooms)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("kind", ["uniform", "chats", "many short"])
def test_packs_are_not_more_than_first_fit_needs(kind: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    lengths = {
        "uniform": random.integers(1, 1025, 800),
        "chats": np.clip(random.lognormal(5, 1.0, 800).astype(np.int64), 1, 1024),
        "many short": random.integers(1, 100, 800),
    }[kind]
    count = best_fit_decreasing(lengths, 1024).max() + 1
    assert -(-lengths.sum() // 1024) <= count <= first_fit(lengths, 1024)


def test_100000_documents_are_packed_in_seconds() -> None:
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(4, 1.2, 100_000).astype(np.int64), 1, 4096)
    tokens = pa.ListArray.from_arrays(
        np.append(0, np.cumsum(lengths)).astype(np.int32), np.arange(lengths.sum(), dtype=np.int32)
    )
    dataset = Dataset(pa.table({"input_ids": tokens}))
    begun = time.process_time()
    packs = pack(dataset, 4096)
    seconds = time.process_time() - begun
    assert sum(map(sum, packs["seq_lengths"])) == lengths.sum()
    assert len(packs) <= 1.01 * lengths.sum() / 4096
    # About 2 s of one core when it was written; a search over all packs per document takes minutes.
    assert seconds < 15


def test_documents_that_are_too_long_are_refused_with_the_options() -> None:
    with pytest.raises(DataError) as error:
        pack(documents_of([3, 20, 5, 13]), 12)
    assert str(error.value).startswith(
        "2 of 4 documents are longer than max_length=12; the longest has 20 tokens."
    )
    for option in ("max_length=20", '"drop"', '"split"', '"keep"'):
        assert option in str(error.value)


def test_dropped_documents_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    packs = pack(documents_of([3, 20, 5, 13]), 12, too_long="drop")
    assert sorted(length for row in packs for length in row["seq_lengths"]) == [3, 5]
    assert "2 of 4 documents are longer than max_length=12" in caplog.text
    assert "dropped them with 33 tokens" in caplog.text


@given(st.lists(st.integers(1, 4 * CAPACITY), min_size=1, max_size=20))
@fewer
def test_split_documents_lose_no_token(lengths: list[int]) -> None:
    documents = documents_of(lengths)
    packs = pack(documents, CAPACITY, too_long="split")
    assert max(sum(row["seq_lengths"]) for row in packs) <= CAPACITY
    assert Counter(i for row in packs for i in row["input_ids"]) == Counter(
        i for document in documents for i in document["input_ids"]
    )
    for row in packs:
        for ids in cut_at_boundaries(row, "input_ids"):
            assert ids == tuple(range(ids[0], ids[0] + len(ids)))
            assert ids[0] % 1000 % CAPACITY == 0
        assert all(part[0] == -100 for part in cut_at_boundaries(row, "labels"))


@given(st.lists(st.integers(1, 3 * CAPACITY), min_size=1, max_size=20))
@fewer
def test_kept_documents_have_a_pack_of_their_own(lengths: list[int]) -> None:
    packs = pack(documents_of(lengths), CAPACITY, too_long="keep")
    alone = [row["seq_lengths"] for row in packs if sum(row["seq_lengths"]) > CAPACITY]
    assert sorted(alone) == sorted([length] for length in lengths if length > CAPACITY)
    assert sum(sum(row["seq_lengths"]) for row in packs) == sum(lengths)


def test_documents_without_tokens_are_left_out() -> None:
    packs = pack([{"input_ids": []}, {"input_ids": [7, 8]}, {"input_ids": []}], 4)
    assert packs[:] == {"input_ids": [[7, 8]], "position_ids": [[0, 1]], "seq_lengths": [[2]]}


def test_loss_masks_become_labels() -> None:
    packs = pack(
        [
            {"input_ids": [1, 2, 3, 4], "completion_mask": [0, 0, 1, 1], "assistant_masks": [0, 1, 1, 0]},
            {"input_ids": [5, 6], "completion_mask": [1, 1], "assistant_masks": [1, 1]},
        ],
        8,
    )
    assert packs["labels"][:] == [[-100, -100, 3, -100, -100, 6]]


def test_other_columns_are_left_behind_and_another_column_can_be_packed() -> None:
    packs = pack([{"text": "a b", "tokens": [1, 2], "attention_mask": [1, 1]}], 4, column="tokens")
    assert packs.column_names == ["tokens", "position_ids", "seq_lengths"]


def test_a_dataset_on_disk_is_packed_once_and_after_a_shuffle_anew(tmp_path: Any) -> None:
    Dataset.from_list(documents_of([5, 3, 8, 12, 1, 7])).save_to_disk(tmp_path / "chats")
    dataset = load_from_disk(tmp_path / "chats")
    first, again, shuffled = pack(dataset, 12), pack(dataset, 12), pack(dataset.shuffle(seed=3), 12)
    assert first.cache_files == again.cache_files
    assert first.cache_files[0]["filename"].startswith(str(tmp_path / "chats"))
    assert first[:] == again[:] == pack(documents_of([5, 3, 8, 12, 1, 7]), 12)[:]
    assert shuffled.cache_files != first.cache_files
    assert Counter(i for row in shuffled for i in row["input_ids"]) == Counter(
        i for row in first for i in row["input_ids"]
    )


def test_selected_and_shuffled_documents_are_read_in_their_order() -> None:
    dataset = Dataset.from_list(documents_of([9, 9, 9, 9])).select([3, 1])
    assert [row["input_ids"][0] for row in pack(dataset, 12)] == [4000, 2000]


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ([{"input_ids": [1]}], {"max_length": 0}, "max_length=0 must be a positive number"),
        ([{"input_ids": [1]}], {"too_long": "cut"}, "too_long='cut' must be one of error, drop, split, keep"),
        ([{"text": "hello"}], {}, "no column 'input_ids' among text: tokenise the dataset first"),
        ([{"input_ids": "hello"}], {}, "column 'input_ids' holds string, not lists of integers"),
        ([{"input_ids": [0.5]}], {}, "column 'input_ids' holds lists of double, not of integers"),
        ([{"input_ids": [1, None]}], {}, "column 'input_ids' has missing values"),
        (
            [{"input_ids": [1], "labels": [1]}, {"input_ids": [1, 2], "labels": [1]}],
            {},
            "document 1 has 2 tokens in 'input_ids' but 1 in 'labels'",
        ),
        ([{"input_ids": [1, 0], "attention_mask": [1, 0]}], {}, "attention_mask has zeros"),
        ([{"input_ids": [1], "labels": [1]}, {"input_ids": [1]}], {}, "do not all have the same fields"),
        ([{"input_ids": []}], {}, "nothing to pack: none of the 1 documents is left"),
        ({"train": []}, {}, "pack takes a datasets.Dataset or a list of dicts, found dict"),
    ],
)
def test_bad_input_is_refused_by_name(dataset: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as error:
        pack(dataset, **{"max_length": 4, **options})
    assert message in str(error.value)
