"""FSDP2 through attach alone: sharded parameters, shared packs, one process's gradients.

accelerate never switches FSDP on for a CPU; `force_fsdp2` sets the two fields it would set on a GPU, and
accelerate's own fully_shard runs from there, on gloo.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.hf import material, oracle
from tests.hf.scenarios import Case, build, force_fsdp2, parity
from tests.hf.together import Together

CASES = {
    2: {
        "cp-2": Case(fsdp2=True, evaluates=True),
        "cp-2-accumulation-checkpointing": Case(
            fsdp2=True,
            args={
                "gradient_accumulation_steps": 2,
                "gradient_checkpointing": True,
                "gradient_checkpointing_kwargs": {"use_reentrant": False},
            },
        ),
        "cp-2-adam": Case(fsdp2=True, args={"optim": "adamw_torch", "learning_rate": 0.01}),
    },
    4: {
        "dp_shard-2-cp-2": Case(fsdp2=True, groups=2),
        "dp_replicate-2-cp-2": Case(fsdp2=True, groups=2, replicate=2),
        "dp_shard-2-cp-2-accumulation": Case(fsdp2=True, groups=2, args={"gradient_accumulation_steps": 2}),
    },
}


def sharding(folder: str, case: Case) -> dict[str, Any]:
    """Over how many ranks each parameter is spread, and the whole gradients of the first step."""
    from transformers import TrainerCallback

    import sap_hf

    first: dict[str, Any] = {}

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for name, parameter in kwargs["model"].named_parameters():
                first.setdefault(name, parameter.grad.full_tensor().clone())

    trainer = build(case, folder, callbacks=[Keep()])
    force_fsdp2(trainer)
    sap_hf.attach(trainer, cp_size=case.cp_size)
    trainer.train()
    spread = {
        name: parameter.device_mesh.size() if hasattr(parameter, "device_mesh") else 1
        for name, parameter in trainer.model.named_parameters()
    }
    shares = {
        name: parameter.to_local().numel() / parameter.numel()
        for name, parameter in trainer.model.named_parameters()
    }
    return {"spread": spread, "shares": shares, "gradients": first}


ONE_STEP = {"max_steps": 1, "max_grad_norm": 0.0}


@pytest.fixture(scope="module", params=[2, 4])
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Together]:
    world = request.param
    scenarios: dict[str, Any] = {name: (parity, {"case": case}) for name, case in CASES[world].items()}
    case = Case(fsdp2=True, groups=world // 2, args=ONE_STEP)
    scenarios["sharding"] = (sharding, {"case": case})
    return world, Together(tmp_path_factory.mktemp(f"fsdp2-{world}"), world, scenarios)


def test_training_equals_documents_run_alone(runs: tuple[int, Together]) -> None:
    world, together = runs
    for name, case in CASES[world].items():
        run, _, after = case.truth()
        for result in together[name]:
            assert oracle.worst(result["losses"], run.losses) < material.EXACT, name
            assert oracle.worst(result["grad_norms"], run.grad_norms) < material.EXACT, name
            assert oracle.worst(result["parameters"], run.parameters) < material.EXACT, name
            if case.evaluates:
                assert oracle.worst(result["after"], after) < material.EXACT, name


def test_every_parameter_is_sharded_over_all_ranks(runs: tuple[int, Together]) -> None:
    world, together = runs
    for result in together["sharding"]:
        assert set(result["spread"].values()) == {world}
        assert max(result["shares"].values()) <= 1 / world


def test_gradients_equal_documents_run_alone(runs: tuple[int, Together]) -> None:
    world, together = runs
    case = Case(groups=world // 2)
    model = case.model()
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    steps = material.flat(material.schedule(case.rows(), groups=case.groups))[:1]
    # One SGD step of rate 1 without clipping subtracts exactly the gradient.
    after = oracle.train(model, steps, oracle.Recipe(learning_rate=1.0, max_grad_norm=0.0)).parameters
    truth = {name: start[name] - after[name] for name in start}
    for result in together["sharding"]:
        assert oracle.worst(result["gradients"], truth) < material.EXACT
