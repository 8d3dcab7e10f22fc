"""DataCollatorForPacking: the same row as transformers' and trl's collators, and no silent mistake."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer, pack_dataset
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from sap_hf.data import DataCollatorForPacking, pack
from sap_hf.errors import DataError

collate = DataCollatorForPacking()
NAMES = ["input_ids", "labels", "position_ids"]


def document(length: int, first: int, labelled: bool) -> dict[str, Any]:
    ids = list(range(first, first + length))
    return {"input_ids": ids, **({"labels": [i + 1 if i % 4 else -100 for i in ids]} if labelled else {})}


DOCUMENTS = st.tuples(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.booleans()).map(
    lambda case: [document(length, 10 * i + 1, case[1]) for i, length in enumerate(case[0])]
)


def assert_same(ours: dict[str, torch.Tensor], theirs: dict[str, Any]) -> None:
    assert list(ours) == NAMES
    for name in NAMES:
        assert ours[name].dtype == torch.int64
        assert ours[name].shape == (1, theirs["input_ids"].shape[1])
        assert torch.equal(ours[name], theirs[name]), name


@given(DOCUMENTS)
def test_documents_become_the_row_that_transformers_makes(documents: list[dict[str, Any]]) -> None:
    assert_same(collate(documents), DataCollatorWithFlattening()(documents))


@given(DOCUMENTS)
def test_documents_become_the_row_that_trl_makes(documents: list[dict[str, Any]]) -> None:
    trl_collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    assert_same(collate(documents), trl_collate(documents))


@given(DOCUMENTS)
@settings(max_examples=30)
def test_packs_from_either_packing_become_the_same_row_in_either_collator(
    documents: list[dict[str, Any]],
) -> None:
    trl_collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    for packs in (pack(documents, 9), pack_dataset(Dataset.from_list(documents), 9, strategy="bfd")):
        features = list(packs)
        assert_same(collate(features), trl_collate(features))


@given(DOCUMENTS)
def test_a_row_that_was_collated_before_comes_back_unchanged(documents: list[dict[str, Any]]) -> None:
    with_boundaries = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
    without_positions = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_position_ids=False)
    once = collate(documents)
    assert_same(collate([once]), once)
    assert_same(collate([with_boundaries(documents)]), once)
    assert_same(collate([without_positions(documents)]), once)


@given(DOCUMENTS)
def test_no_label_is_predicted_from_another_document(documents: list[dict[str, Any]]) -> None:
    row = collate(documents)
    owner = torch.cumsum(row["position_ids"][0] == 0, 0)
    predicted = row["labels"][0, 1:] != -100
    assert (owner[1:] == owner[:-1])[predicted].all()
    alone = [collate([one])["labels"][0] for one in documents]
    assert torch.equal(row["labels"][0], torch.cat(alone))


@pytest.mark.parametrize("as_type", [list, np.array, torch.tensor, lambda ids: np.array(ids, dtype=np.uint8)])
def test_lists_arrays_and_tensors_give_the_same_row(as_type: Any) -> None:
    documents = [document(3, 1, False), document(2, 9, False)]
    converted = [{"input_ids": as_type(one["input_ids"])} for one in documents]
    assert_same(collate(converted), collate(documents))


def test_features_are_not_changed() -> None:
    feature = {"input_ids": torch.tensor([1, 2]), "labels": torch.tensor([1, 2])}
    collate([feature])
    assert feature["labels"].tolist() == [1, 2]


def test_loss_masks_become_labels_unless_there_are_labels() -> None:
    masks = {"completion_mask": [0, 0, 1, 1], "assistant_masks": [1, 1, 1, 0]}
    assert collate([{"input_ids": [1, 2, 3, 4], **masks}])["labels"].tolist() == [[-100, -100, 3, -100]]
    labelled = {"input_ids": [1, 2, 3, 4], "labels": [1, 2, 3, 4], **masks}
    assert collate([labelled])["labels"].tolist() == [[-100, 2, 3, 4]]


def tiny_model() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=64
        )
    )


def packs_of_one_row() -> Dataset:
    return pack([document(length, 10 * length, True) for length in (3, 5, 4)], 12)


def test_packs_keep_their_boundaries_through_trainer(tmp_path: Any) -> None:
    # Trainer removes the columns that forward() does not name, and seq_lengths is one of them.
    packs = packs_of_one_row()
    arguments = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    trainer = Trainer(tiny_model(), arguments, data_collator=collate, train_dataset=packs)
    assert_same(next(iter(trainer.get_train_dataloader())), collate(list(packs)))


@pytest.mark.parametrize("collator", [collate, None], ids=["our collator", "trl's padding-free collator"])
def test_packs_keep_their_boundaries_through_sft_trainer(tmp_path: Any, collator: Any) -> None:
    packs = packs_of_one_row()
    # max_length would cut the packs; padding_free is what trl's own collator takes the boundaries for.
    arguments = SFTConfig(
        output_dir=str(tmp_path), report_to=[], use_cpu=True, max_length=None, padding_free=collator is None
    )
    words = Tokenizer(WordLevel({"<unk>": 0, "<eos>": 1}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")
    trainer = SFTTrainer(
        tiny_model(), arguments, data_collator=collator, train_dataset=packs, processing_class=tokenizer
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert_same({name: batch[name] for name in NAMES}, collate(list(packs)))


ROW = {"input_ids": [1, 2, 3, 4]}


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ([], "the batch has no features"),
        ([{"labels": [1]}], "feature 0 has no input_ids, only labels"),
        ([ROW, {"input_ids": []}], "feature 1 is empty"),
        ([{**ROW, "labels": [1, 2]}], "feature 0 has 4 tokens in input_ids but 2 in labels"),
        ([{**ROW, "completion_mask": [1]}], "feature 0 has 4 tokens in input_ids but 1 in completion_mask"),
        ([{**ROW, "labels": [1, 2, 3, 4]}, ROW], "feature 0 has labels and feature 1 has none"),
        ([{**ROW, "attention_mask": [1, 1, 1, 0]}], "feature 0 is padded"),
        ([{**ROW, "seq_lengths": [2, 3]}], "seq_lengths gives documents of 2, 3 tokens, 5 in all, but"),
        ([{**ROW, "seq_lengths": [4, 0]}], "seq_lengths gives documents of 4, 0 tokens"),
        ([{**ROW, "cu_seq_lens_q": [0, 3]}], "cu_seq_lens_q gives documents of 3 tokens, 3 in all"),
        ([{**ROW, "cu_seq_lens_q": [1, 4]}], "cu_seq_lens_q must begin at 0, found [1, 4]"),
        ([{**ROW, "position_ids": [5, 6, 7, 8]}], "position_ids begin at 5"),
        ([{**ROW, "position_ids": [0, 1, 3, 4]}], "position_ids[2] is 3, expected 2"),
        (
            [{**ROW, "position_ids": [0, 1, 0, 1], "seq_lengths": [1, 3]}],
            "seq_lengths gives documents of 1, 3",
        ),
        ([{"input_ids": [[1, 2], [3, 4]]}], "input_ids has shape (2, 2)"),
        ([{"input_ids": [0.5]}], "dtype torch.float32; expected one row of integers"),
        ([{"input_ids": None}], "input_ids is not a list of integers"),
    ],
)
def test_bad_features_are_refused_by_name(features: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DataError) as error:
        collate(features)
    assert message in str(error.value)
