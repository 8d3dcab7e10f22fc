"""Bad input: one clear error on every rank, before the first collective, and no hang.

A hang shows itself: the launcher ends the ranks and prints where each of them stood.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.hf import material, oracle, vocabulary
from tests.hf.scenarios import Case, build, refused
from tests.hf.together import Together

GOOD = Case(packs=(material.PACKS[0], material.PACKS[2], material.PACKS[4]))
PADDED = Case(
    packs=[(9, 5), (12, 7), (8, 8)],
    collator="right padded",
    args={"per_device_train_batch_size": 2},
)
Batch = dict[str, Any]

# ---- batches that cannot be split, each made from a good one ----------------------------------------------


def left_padded(batch: Batch) -> Batch:
    return {name: values.flip(1) for name, values in batch.items()}


def mask_with_holes(batch: Batch) -> Batch:
    mask = batch["attention_mask"].clone()
    mask[0, 2] = 0
    return {**batch, "attention_mask": mask}


def positions_from_5(batch: Batch) -> Batch:
    return {**batch, "position_ids": batch["position_ids"] + 5}


def positions_that_jump(batch: Batch) -> Batch:
    positions = batch["position_ids"].clone()
    positions[0, 3] += 40
    return {**batch, "position_ids": positions}


def boundaries_that_end_early(batch: Batch) -> Batch:
    length = batch["input_ids"].shape[1]
    ends = torch.tensor([0, 4, length - 3], dtype=torch.int32)
    extra = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": length, "max_length_k": length}
    return {**batch, **extra}


def boundaries_beyond_the_row(batch: Batch) -> Batch:
    ends = torch.tensor([0, 4, batch["input_ids"].shape[1] + 2], dtype=torch.int32)
    return {**batch, "cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 99, "max_length_k": 99}


def other_tokens(batch: Batch) -> Batch:
    ids = batch["input_ids"].clone()
    ids[0, -1] = (ids[0, -1] + 1) % material.VOCAB
    return {**batch, "input_ids": ids}


def other_labels(batch: Batch) -> Batch:
    return {**batch, "labels": batch["labels"].roll(1, dims=1)}


def other_documents(batch: Batch) -> Batch:
    return {**batch, "position_ids": torch.arange(batch["input_ids"].shape[1])[None]}


def other_length(batch: Batch) -> Batch:
    return {name: values[:, :-2] for name, values in batch.items()}


@dataclasses.dataclass(frozen=True)
class Bad:
    case: Case
    spoil: Callable[[Batch], Batch]
    error: str
    words: tuple[str, ...]
    """One of these must be in the message."""
    only: tuple[int, ...] | None = None


BAD = {
    "left-padding": Bad(PADDED, left_padded, "DocumentError", ("left", "padding")),
    "mask-with-holes": Bad(PADDED, mask_with_holes, "DocumentError", ("attention_mask",)),
    "positions-from-5": Bad(GOOD, positions_from_5, "DocumentError", ("position_ids",)),
    "positions-that-jump": Bad(GOOD, positions_that_jump, "DocumentError", ("position_ids",)),
    "boundaries-that-end-early": Bad(GOOD, boundaries_that_end_early, "DocumentError", ("cu_seq",)),
    "boundaries-beyond-the-row": Bad(GOOD, boundaries_beyond_the_row, "DocumentError", ("cu_seq",)),
    "other-tokens": Bad(GOOD, other_tokens, "BatchMismatch", ("batch",), (1,)),
    "other-labels": Bad(GOOD, other_labels, "BatchMismatch", ("batch",), (1,)),
    "other-documents": Bad(GOOD, other_documents, "BatchMismatch", ("batch",), (0,)),
    "other-length": Bad(GOOD, other_length, "BatchMismatch", ("batch",), (1,)),
    "left-padding-on-one-rank": Bad(PADDED, left_padded, "", ("left", "padding"), (1,)),
    "mask-with-holes-on-one-rank": Bad(PADDED, mask_with_holes, "", ("attention_mask",), (0,)),
    "positions-that-jump-on-one-rank": Bad(GOOD, positions_that_jump, "", ("position_ids",), (1,)),
    "boundaries-that-end-early-on-one-rank": Bad(GOOD, boundaries_that_end_early, "", ("cu_seq",), (1,)),
}


def bad_batch(folder: str, bad: Bad) -> Any:
    """Train on one good batch, then on a spoiled one."""
    import torch.distributed as dist

    import sap_hf

    trainer = build(bad.case, folder)
    collate, calls = trainer.data_collator, []

    def spoiled(features: list[Any]) -> Batch:
        calls.append(1)
        batch = collate(features)
        mine = bad.only is None or dist.get_rank() in bad.only
        return bad.spoil(batch) if mine and len(calls) > 1 else batch

    trainer.data_collator = spoiled
    sap_hf.attach(trainer, cp_size=2)
    return {"error": refused(trainer.train), "steps": trainer.state.global_step}


# ---- trainers and options that are refused when attach is called ------------------------------------------


def too_many_ranks(folder: str) -> Any:
    import sap_hf

    trainer = build(GOOD, folder)
    error = refused(lambda: sap_hf.attach(trainer, cp_size=3))
    # A refused trainer is an untouched trainer.
    return error, trainer.model.config._attn_implementation, len(trainer.model._forward_pre_hooks)


def unknown_key(folder: str) -> Any:
    import sap_hf

    file = Path(folder + ".yaml")
    file.write_text("cp_sise: 2\n")
    trainer = build(GOOD, folder)
    return refused(lambda: sap_hf.attach(trainer, file)), refused(lambda: sap_hf.attach(trainer, cp_sizes=2))


def bypassing_model(folder: str, family: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    import sap_hf

    tiny = {
        "vocab_size": 64,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "n_layer": 2,
        "d_model": 32,
        "n_head": 4,
    }
    # Each family takes what it knows.
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **tiny))
    trainer = build(GOOD, folder, model=model)
    return refused(lambda: sap_hf.attach(trainer, cp_size=2))


def data_order(folder: str, option: str) -> Any:
    """Options that give every process other rows of the batch than its peers."""
    import sap_hf

    args: dict[str, Any] = {"accelerator_config": {option: True}}
    if option == "batch_rebalance":
        args = {"train_sampling_strategy": option}
    trainer = build(dataclasses.replace(GOOD, args=args), folder)
    return refused(lambda: sap_hf.attach(trainer, cp_size=2))


def own_compute_loss(folder: str) -> Any:
    from transformers import Trainer

    import sap_hf

    class Mine(Trainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return model(**inputs).logits.mean()

    trainer = Mine(
        material.tiny_llama(),
        material.arguments(folder),
        train_dataset=GOOD.items(),
        data_collator=material.stack,
    )
    return refused(lambda: sap_hf.attach(trainer, cp_size=2))


def summed(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """A user's own loss: squared distance of the target's probability from 1."""
    chosen = outputs["logits"][:, :-1].softmax(-1)
    target = labels[:, 1:]
    p = chosen.gather(-1, target.clamp(min=0)[..., None])[..., 0]
    return (((1 - p) ** 2) * (target != -100)).sum() / num_items_in_batch


def own_loss_function(folder: str) -> Any:
    import sap_hf

    trainer = build(GOOD, folder, compute_loss_func=summed)
    error = refused(lambda: sap_hf.attach(trainer, cp_size=2))
    if error is not None:
        return {"error": error}
    trainer.train()
    return {"error": None, "losses": material.logged(trainer, "loss")}


def dpo(folder: str) -> Any:
    import datasets
    from trl import DPOConfig, DPOTrainer

    import sap_hf

    rows = [{"prompt": "ba be", "chosen": " bi bo", "rejected": " bu da"}] * 4
    trainer = DPOTrainer(
        material.tiny_llama(vocab_size=vocabulary.SIZE),
        ref_model=material.tiny_llama(vocab_size=vocabulary.SIZE),
        args=DPOConfig(output_dir=folder, use_cpu=True, report_to=[], bf16=False, max_length=16),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=vocabulary.tokenizer(),
    )
    return refused(lambda: sap_hf.attach(trainer, cp_size=2))


DATA_ORDER = ("dispatch_batches", "split_batches", "batch_rebalance")
SCENARIOS: dict[str, Any] = {
    "too-many-ranks": (too_many_ranks, {}),
    "unknown-key": (unknown_key, {}),
    "rembert": (bypassing_model, {"family": "rembert"}),
    "xlnet": (bypassing_model, {"family": "xlnet"}),
    **{option: (data_order, {"option": option}) for option in DATA_ORDER},
    "own-compute-loss": (own_compute_loss, {}),
    "own-loss-function": (own_loss_function, {}),
    "dpo": (dpo, {}),
    **{name: (bad_batch, {"bad": bad}) for name, bad in BAD.items()},
}


@pytest.fixture(scope="module")
def on_2(tmp_path_factory: pytest.TempPathFactory) -> Together:
    return Together(tmp_path_factory.mktemp("refusals"), 2, SCENARIOS)


@pytest.fixture(scope="module")
def on_4(tmp_path_factory: pytest.TempPathFactory) -> Together:
    """Two groups of two ranks; only the second group's batch is bad."""
    bad = Bad(dataclasses.replace(GOOD, packs=material.PACKS, groups=2), positions_that_jump, "", (), (2, 3))
    return Together(tmp_path_factory.mktemp("two-groups"), 4, {"one-group": (bad_batch, {"bad": bad})}, 60)


def test_bad_batch_of_one_group_is_an_error_in_every_group(on_4: Together) -> None:
    for result in on_4["one-group"]:
        assert result["error"] is not None
        assert result["error"][0] in ("DocumentError", "BatchMismatch")
        assert "position_ids" in result["error"][1]


@pytest.mark.parametrize("name", BAD)
def test_bad_batch_is_an_error_on_every_rank(on_2: Together, name: str) -> None:
    bad = BAD[name]
    results = on_2[name]
    for result in results:
        assert result["error"] is not None, "trained on a batch that cannot be split exactly"
        assert result["steps"] == 1, "the good batch before it was trained"
        kind, message = result["error"]
        assert kind in ("DocumentError", "BatchMismatch")
        if bad.error:
            assert kind == bad.error, message
        assert "unexpected" not in message.lower()
    # The rank with the bad batch says what is bad; the others learn that a peer refused.
    said = [result["error"] for result in results]
    guilty = said if bad.only is None else [said[rank] for rank in bad.only]
    for _, message in guilty:
        assert any(word in message for word in bad.words), message
    if bad.only is not None:
        assert said[1 - bad.only[0]][0] == "BatchMismatch"


def test_cp_size_that_does_not_divide_shows_the_arithmetic(on_2: Together) -> None:
    for error, attention, hooks in on_2["too-many-ranks"]:
        assert error is not None
        assert error[0] == "LayoutError"
        assert "cp_size=3" in error[1] and "2 processes" in error[1]
        assert (attention, hooks) == ("sdpa", 0)


def test_unknown_key_names_the_nearest(on_2: Together) -> None:
    for from_yaml, from_option in on_2["unknown-key"]:
        assert from_yaml[0] == from_option[0] == "ConfigError"
        assert "'cp_sise'" in from_yaml[1] and "'cp_size'" in from_yaml[1] and ".yaml" in from_yaml[1]
        assert "'cp_sizes'" in from_option[1] and "'cp_size'" in from_option[1]


@pytest.mark.parametrize(
    "family, attention", [("rembert", "RemBertAttention"), ("xlnet", "XLNetRelativeAttention")]
)
def test_model_that_bypasses_the_interface_is_refused_by_name(
    on_2: Together, family: str, attention: str
) -> None:
    for error in on_2[family]:
        assert error is not None
        assert error[0] == "UnsupportedAttention"
        assert family in error[1] and attention in error[1]


@pytest.mark.parametrize("option", DATA_ORDER)
def test_option_that_splits_batches_by_process_is_refused_by_name(on_2: Together, option: str) -> None:
    for error in on_2[option]:
        assert error is not None
        assert error[0] == "UnsupportedTrainer"
        assert option in error[1]


def test_overridden_compute_loss_is_refused_by_name(on_2: Together) -> None:
    for error in on_2["own-compute-loss"]:
        assert error is not None
        assert error[0] == "UnsupportedTrainer"
        assert "compute_loss" in error[1] and "Mine" in error[1]


def test_compute_loss_func_is_exact_or_refused_by_name(on_2: Together) -> None:
    for result in on_2["own-loss-function"]:
        if result["error"] is not None:
            assert result["error"][0] == "UnsupportedTrainer"
            assert "compute_loss_func" in result["error"][1]
            continue
        # The first step is before any update: every document alone, over the targets of the pack.
        row = GOOD.rows()[0]
        model, total = material.tiny_llama(), sum(document.targets for document in row)
        expected = 0.0
        for document in row:
            logits = oracle.document_logits(model, document)[None]
            expected += summed({"logits": logits}, document.labels[None], total).item()
        assert oracle.worst(result["losses"][0], expected) < material.EXACT


def test_other_trl_trainers_are_refused_by_name(on_2: Together) -> None:
    for error in on_2["dpo"]:
        assert error is not None
        assert error[0] == "UnsupportedTrainer"
        assert "DPOTrainer" in error[1]
