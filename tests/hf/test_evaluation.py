"""Evaluation, predictions and metric functions on shared packs: each row once, functions fed whole rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.hf import material, oracle
from tests.hf.scenarios import Case, build
from tests.hf.together import Together

FIVE = Case(evaluates=True, packs=material.PACKS[:5])
FIVE_EVEN = Case(evaluates=True, prompt=0.0, packs=material.EVEN_PACKS)
PADDED_FIVE = Case(
    evaluates=True, packs=[(5, 9, 12, 3, 16)], collator="right padded", args={"per_device_eval_batch_size": 2}
)


def evaluation(folder: str, case: Case, cp_size: int) -> dict[str, Any]:
    """evaluate() with compute_metrics and preprocess_logits_for_metrics, and predict()."""
    import sap_hf

    seen: dict[str, Any] = {"calls": 0, "shapes": []}

    def metrics(prediction: Any) -> dict[str, float]:
        seen["calls"] += 1
        seen["predictions"], seen["labels"] = prediction.predictions, prediction.label_ids
        return {"sum_of_predictions": float(prediction.predictions.sum())}

    def best(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        seen["shapes"].append((tuple(logits.shape), tuple(labels.shape)))
        return logits.argmax(-1)

    logits_trainer = build(case, folder)
    sap_hf.attach(logits_trainer, cp_size=cp_size)
    output = logits_trainer.predict(logits_trainer.eval_dataset)
    material.fresh_state()
    trainer = build(case, folder, compute_metrics=metrics, preprocess_logits_for_metrics=best)
    sap_hf.attach(trainer, cp_size=cp_size)
    report = trainer.evaluate()
    return {"report": report, "seen": seen, "logits": output.predictions, "labels": output.label_ids}


def metrics_while_training(folder: str) -> dict[str, Any]:
    """compute_metrics of an evaluation in the middle of training, and the training it interrupts."""
    import sap_hf

    def metrics(prediction: Any) -> dict[str, float]:
        return {"labels": float((prediction.label_ids != -100).sum())}

    case = Case(evaluates=True, args={"eval_strategy": "steps", "eval_steps": 3})
    trainer = build(case, folder, compute_metrics=metrics)
    sap_hf.attach(trainer, cp_size=2)
    trainer.train()
    return {
        "losses": material.logged(trainer, "loss"),
        "labels": material.logged(trainer, "eval_labels"),
        "eval_losses": material.logged(trainer, "eval_loss"),
        "parameters": material.parameters(trainer.model),
    }


def generation_while_training(folder: str) -> dict[str, Any]:
    """An evaluation that generates on every rank, and once more on the first rank alone, between steps of training."""
    import sap_hf

    prompt = torch.arange(3, 9).unsqueeze(0)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    texts: list[torch.Tensor] = []
    plain: list[torch.Tensor] = []

    def metrics(prediction: Any) -> dict[str, float]:
        model = trainer.accelerator.unwrap_model(trainer.model).eval()
        texts.append(model.generate(prompt, **options))
        if trainer.accelerator.is_main_process:
            texts.append(model.generate(prompt, **options))
        copy = material.tiny_llama()
        copy.load_state_dict(model.state_dict())
        plain.append(copy.eval().generate(prompt, **options))
        return {}

    case = Case(evaluates=True, args={"eval_strategy": "steps", "eval_steps": 3})
    trainer = build(case, folder, compute_metrics=metrics)
    sap_hf.attach(trainer, cp_size=2)
    trainer.train()
    return {
        "losses": material.logged(trainer, "loss"),
        "main": trainer.accelerator.is_main_process,
        "texts": texts,
        "plain": plain,
    }


@pytest.fixture(scope="module")
def on_2(tmp_path_factory: pytest.TempPathFactory) -> Together:
    return Together(
        tmp_path_factory.mktemp("evaluation-2"),
        2,
        {
            "packs": (evaluation, {"case": FIVE, "cp_size": 2}),
            "padded": (evaluation, {"case": PADDED_FIVE, "cp_size": 2}),
            "while-training": (metrics_while_training, {}),
            "generating": (generation_while_training, {}),
        },
    )


@pytest.fixture(scope="module")
def on_4(tmp_path_factory: pytest.TempPathFactory) -> Together:
    return Together(
        tmp_path_factory.mktemp("evaluation-4"),
        4,
        {"groups": (evaluation, {"case": FIVE_EVEN, "cp_size": 2})},
    )


def side_by_side(rows: list[torch.Tensor]) -> np.ndarray:
    """Rows of different lengths as Trainer stacks them: filled on the right with -100."""
    longest = max(len(row) for row in rows)
    full = torch.full((len(rows), longest, *rows[0].shape[1:]), -100, dtype=rows[0].dtype)
    for at, row in enumerate(rows):
        full[at, : len(row)] = row
    return full.numpy()


def expected_loss(case: Case) -> float:
    rows, size = case.rows(), int(case.args.get("per_device_eval_batch_size", 1))
    batches = [rows[at : at + size] for at in range(0, len(rows), size)]
    return oracle.evaluate(
        case.model(), [([d for row in batch for d in row], len(batch)) for batch in batches]
    )


@pytest.mark.parametrize("name, case", [("packs", FIVE), ("padded", PADDED_FIVE)])
def test_evaluation_loss_equals_documents_alone_with_an_incomplete_last_batch(
    on_2: Together, name: str, case: Case
) -> None:
    for result in on_2[name]:
        assert oracle.worst(result["report"]["eval_loss"], expected_loss(case)) < material.EXACT


def test_two_groups_evaluate_an_odd_number_of_packs_once_each(on_4: Together) -> None:
    for result in on_4["groups"]:
        assert oracle.worst(result["report"]["eval_loss"], expected_loss(FIVE_EVEN)) < material.EXACT
        assert len(result["logits"]) == len(FIVE_EVEN.packs)


@pytest.mark.parametrize("name, case", [("packs", FIVE), ("groups", FIVE_EVEN)])
def test_predictions_are_whole_rows_in_their_order(
    request: pytest.FixtureRequest, name: str, case: Case
) -> None:
    together = request.getfixturevalue("on_4" if name == "groups" else "on_2")
    rows = case.rows()
    logits = side_by_side(oracle.predictions(case.model(), rows))
    labels = side_by_side([torch.cat([document.labels for document in row]) for row in rows])
    for result in together[name]:
        assert result["logits"].shape == logits.shape
        assert np.abs(result["logits"] - logits).max() < material.EXACT
        assert (result["labels"] == labels).all()


def test_padded_rows_predict_like_documents_alone_where_there_is_text(on_2: Together) -> None:
    rows = PADDED_FIVE.rows()
    logits = oracle.predictions(PADDED_FIVE.model(), rows)
    for result in on_2["padded"]:
        assert len(result["logits"]) == len(rows)
        for row, truth in zip(result["logits"], logits, strict=True):
            assert np.abs(row[: len(truth)] - truth.numpy()).max() < material.EXACT


@pytest.mark.parametrize("name, case", [("packs", FIVE), ("padded", PADDED_FIVE), ("groups", FIVE_EVEN)])
def test_metric_functions_are_fed_what_one_process_feeds_them(
    request: pytest.FixtureRequest, name: str, case: Case
) -> None:
    together = request.getfixturevalue("on_4" if name == "groups" else "on_2")
    rows = case.rows()
    best = [logits.argmax(-1) for logits in oracle.predictions(case.model(), rows)]
    labels = [torch.cat([document.labels for document in row]) for row in rows]
    for result in together[name]:
        seen = result["seen"]
        assert seen["calls"] == 1
        assert "eval_sum_of_predictions" in result["report"]
        assert len(seen["predictions"]) == len(seen["labels"]) == len(rows)
        for row, truth in zip(seen["predictions"], best, strict=True):
            assert (row[: len(truth)] == truth.numpy()).all()
        for row, truth in zip(seen["labels"], labels, strict=True):
            assert (row[: len(truth)] == truth.numpy()).all()
            assert (row[len(truth) :] == -100).all()
        # preprocess_logits_for_metrics sees the whole row, never a shard of it.
        for logits, label in seen["shapes"]:
            assert logits[:2] == label and logits[2] == material.VOCAB


def test_evaluating_in_the_middle_does_not_disturb_training(on_2: Together) -> None:
    case = Case(evaluates=True)
    run, before, _ = case.truth()
    targets = sum(int((d.labels != -100).sum()) for row in case.rows() for d in row)
    for result in on_2["while-training"]:
        assert oracle.worst(result["losses"], run.losses) < material.EXACT
        assert oracle.worst(result["parameters"], run.parameters) < material.EXACT
        assert result["labels"] == [targets] * 2
        assert len(result["eval_losses"]) == 2 and result["eval_losses"][0] != before


def test_an_evaluation_that_generates_neither_hangs_nor_disturbs_training(on_2: Together) -> None:
    run, _, _ = Case(evaluates=True).truth()
    results = on_2["generating"]
    assert [result["main"] for result in results] == [True, False]
    for result in results:
        assert oracle.worst(result["losses"], run.losses) < material.EXACT
        # The first rank generates twice in each of the evaluations, the other once.
        twice = 2 if result["main"] else 1
        assert len(result["plain"]) == 2 and len(result["texts"]) == 2 * twice
        for at, text in enumerate(result["texts"]):
            assert torch.equal(text, result["plain"][at // twice])


def test_trainer_in_one_process_feeds_the_same(tmp_path: Path) -> None:
    """The expectation itself: plain Trainer on rows of one document."""
    from transformers import Trainer

    rows = material.documents([(12,), (7,), (23,)])
    items = [material.packed(row) for row in rows]
    material.fresh_state()
    trainer = Trainer(
        material.tiny_llama(),
        material.arguments(str(tmp_path)),
        eval_dataset=items,
        data_collator=material.stack,
    )
    output = trainer.predict(items)
    expected = side_by_side(oracle.predictions(material.tiny_llama(), rows))
    assert np.abs(output.predictions - expected).max() < 1e-10
    assert (output.label_ids == side_by_side([d.labels for row in rows for d in row])).all()
