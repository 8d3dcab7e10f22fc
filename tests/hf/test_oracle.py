"""The oracle against plain Trainer in one process, on one-document rows, where Trainer is right by itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.hf import material, oracle

ONE_DOCUMENT_ROWS = [(length,) for length in (12, 7, 23, 9, 5, 18, 30, 4)]


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="sgd"),
        pytest.param({"optim": "adamw_torch", "learning_rate": 0.01}, id="adam"),
        pytest.param({"gradient_accumulation_steps": 2}, id="accumulation"),
        pytest.param({"max_grad_norm": 0.05}, id="clipped"),
        pytest.param({"label_smoothing_factor": 0.1}, id="smoothing"),
        pytest.param({"per_device_train_batch_size": 2, "per_device_eval_batch_size": 3}, id="batch-of-2"),
    ],
)
def test_trainer_on_one_document_rows_equals_the_oracle(tmp_path: Path, options: dict[str, Any]) -> None:
    from transformers import Trainer

    rows = material.documents(ONE_DOCUMENT_ROWS)
    items = [material.packed(row) for row in rows]
    material.fresh_state()
    model = material.tiny_llama()
    trainer = Trainer(
        model,
        material.arguments(str(tmp_path), **options),
        train_dataset=items,
        eval_dataset=items,
        data_collator=material.right_padded,
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()

    recipe = oracle.Recipe(
        optim=options.get("optim", "sgd"),
        learning_rate=options.get("learning_rate", 0.1),
        max_grad_norm=options.get("max_grad_norm", 1.0),
        label_smoothing=options.get("label_smoothing_factor", 0.0),
    )
    steps = material.flat(
        material.schedule(
            rows,
            accumulation=options.get("gradient_accumulation_steps", 1),
            batch=options.get("per_device_train_batch_size", 1),
        )
    )
    truth = material.tiny_llama()
    size = options.get("per_device_eval_batch_size", 1)
    batches = [rows[at : at + size] for at in range(0, len(rows), size)]
    eval_loss = oracle.evaluate(
        truth, [([d for row in batch for d in row], len(batch)) for batch in batches], recipe.label_smoothing
    )
    run = oracle.train(truth, steps, recipe)

    assert oracle.worst(before, eval_loss) < 2e-7
    # Trainer sums losses in float32, and the model's loss and norms are float32 inside.
    assert oracle.worst(material.logged(trainer, "loss"), run.losses) < 5e-7
    assert oracle.worst(material.logged(trainer, "grad_norm"), run.grad_norms) < 5e-7
    assert oracle.worst(material.parameters(model), run.parameters) < 5e-7
