"""bf16=True on shared packs: no further from float32 than twice what bf16 costs one process.

One process means the documents alone under the same autocast; float32 truth comes from the oracle.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.hf import material, oracle
from tests.hf.scenarios import Case, build
from tests.hf.together import Together


def half(folder: str, cp_size: int) -> dict[str, Any]:
    """Logits and loss of every pack, and the gradients of the first; the learning rate is 0."""
    from transformers import TrainerCallback

    import sap_hf

    gradients: dict[str, torch.Tensor] = {}

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for name, parameter in kwargs["model"].named_parameters():
                gradients.setdefault(name, parameter.grad.clone())

    case = Case(evaluates=True, args={"bf16": True, "learning_rate": 0.0, "max_grad_norm": 0.0})
    trainer = build(case, folder, model=material.tiny_llama().float(), callbacks=[Keep()])
    sap_hf.attach(trainer, cp_size=cp_size)
    logits = trainer.predict(trainer.eval_dataset).predictions
    trainer.train()
    return {"logits": logits, "losses": material.logged(trainer, "loss"), "gradients": gradients}


@pytest.fixture(scope="module", params=[2, 4])
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    world = request.param
    together = Together(tmp_path_factory.mktemp(f"bf16-{world}"), world, {"bf16": (half, {"cp_size": world})})
    return together["bf16"]


def alone(autocast: bool) -> dict[str, Any]:
    """Every document alone in float32, with or without bf16 autocast."""
    model, rows = material.tiny_llama().float(), Case().rows()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = oracle.predictions(model, rows)
        losses = []
        for row in rows:
            total = sum(document.targets for document in row)
            parts = [
                oracle.loss_sum(oracle.document_logits(model, document), document.labels, 0.0) / total
                for document in row
            ]
            losses.append(torch.stack(parts).sum())
    losses[0].backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {"logits": logits, "losses": [loss.item() for loss in losses], "gradients": gradients}


def distance(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    """Relative error in the 2-norm over all entries."""
    squares = sum(((a.double() - b.double()) ** 2).sum() for a, b in zip(left, right, strict=True))
    return float((squares / sum((b.double() ** 2).sum() for b in right)).sqrt())


def text(rows: Any, truth: list[torch.Tensor]) -> list[torch.Tensor]:
    return [torch.as_tensor(row)[: len(logits)] for row, logits in zip(rows, truth, strict=True)]


def test_output_is_within_twice_the_error_of_one_process(results: list[dict[str, Any]]) -> None:
    truth, plain = alone(False)["logits"], alone(True)["logits"]
    bound = 2 * distance(plain, truth)
    assert 0 < bound < 0.1
    for result in results:
        assert distance(text(result["logits"], truth), truth) <= bound


def test_gradients_are_within_twice_the_error_of_one_process(results: list[dict[str, Any]]) -> None:
    truth, plain = alone(False)["gradients"], alone(True)["gradients"]
    bound = 2 * distance(list(plain.values()), list(truth.values()))
    assert 0 < bound < 0.2
    for result in results:
        assert result["gradients"].keys() == truth.keys()
        assert distance([result["gradients"][name] for name in truth], list(truth.values())) <= bound


def test_loss_is_within_twice_the_error_of_one_process(results: list[dict[str, Any]]) -> None:
    # Over all packs: on a single one, bf16 can hit the right loss by chance.
    truth, plain = (torch.tensor(alone(half)["losses"]) for half in (False, True))
    bound = 2 * distance([plain], [truth])
    assert 0 < bound < 0.1
    for result in results:
        assert distance([torch.tensor(result["losses"])], [truth]) <= bound
