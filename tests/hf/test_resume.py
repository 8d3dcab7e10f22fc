"""A checkpoint written on shared packs resumes in one process, and the other way round."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.hf import material, oracle
from tests.hf.scenarios import Case, build
from tests.hf.together import Together

# 6 steps over two epochs; the checkpoint falls into the second one.
ARGS: dict[str, Any] = {
    "optim": "adamw_torch",
    "learning_rate": 0.01,
    "num_train_epochs": 2,
    "save_strategy": "steps",
    "save_steps": 4,
    "gradient_accumulation_steps": 2,
}
CASE = Case(packs=material.PACKS, args=ARGS)
KEPT = "checkpoint-4"


def truth() -> oracle.Run:
    steps = material.flat(material.schedule(CASE.rows(), accumulation=2))
    return oracle.train(CASE.model(), steps * 2, CASE.recipe())


def trainer_of(folder: str) -> Any:
    trainer = build(CASE, folder)
    # Plain transformers keeps packed documents apart only without a cache.
    trainer.model.config.use_cache = False
    return trainer


def saving(folder: str, output: str) -> dict[str, Any]:
    import sap_hf

    trainer = trainer_of(output)
    sap_hf.attach(trainer, cp_size=2)
    trainer.train()
    trainer.save_model(str(Path(output) / "final"))
    return {"losses": material.logged(trainer, "loss"), "parameters": material.parameters(trainer.model)}


def resuming(folder: str, checkpoint: str) -> dict[str, Any]:
    import sap_hf

    trainer = trainer_of(folder)
    sap_hf.attach(trainer, cp_size=2)
    trainer.train(resume_from_checkpoint=checkpoint)
    return {"losses": material.logged(trainer, "loss"), "parameters": material.parameters(trainer.model)}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of one plain process."""
    folder = tmp_path_factory.mktemp("alone")
    material.fresh_state()
    trainer_of(str(folder)).train()
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, alone: Path) -> tuple[Path, Together]:
    output = tmp_path_factory.mktemp("shared")
    together = Together(
        tmp_path_factory.mktemp("resume"),
        2,
        {
            "save": (saving, {"output": str(output)}),
            "resume-alone": (resuming, {"checkpoint": str(alone / KEPT)}),
            "resume-shared": (resuming, {"checkpoint": str(output / KEPT)}),
        },
    )
    return output, together


@pytest.mark.parametrize("name", ["save", "resume-alone", "resume-shared"])
def test_ranks_stay_on_the_uninterrupted_trajectory(runs: tuple[Path, Together], name: str) -> None:
    run = truth()
    for result in runs[1][name]:
        assert oracle.worst(result["losses"], run.losses) < material.EXACT
        assert oracle.worst(result["parameters"], run.parameters) < material.EXACT


def test_one_process_resumes_what_two_ranks_saved(runs: tuple[Path, Together], tmp_path: Path) -> None:
    output, together = runs
    together["save"]
    material.fresh_state()
    trainer = trainer_of(str(tmp_path))
    trainer.train(resume_from_checkpoint=str(output / KEPT))
    run = truth()
    assert oracle.worst(material.logged(trainer, "loss"), run.losses) < material.EXACT
    assert oracle.worst(material.parameters(trainer.model), run.parameters) < material.EXACT


def test_the_saved_model_loads_in_plain_transformers(runs: tuple[Path, Together]) -> None:
    from transformers import AutoModelForCausalLM

    output, together = runs
    saved = together["save"][0]["parameters"]
    model = AutoModelForCausalLM.from_pretrained(output / "final", dtype=torch.float64)
    assert model.config._attn_implementation == "sdpa"
    assert all(torch.equal(parameter, saved[name]) for name, parameter in model.named_parameters())
