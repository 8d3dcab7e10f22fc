"""attach adds, detach takes away, twice is once: what a trainer is made of before, between and after."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import pytest
import torch

from sap_hf.errors import UnsupportedAttention
from tests.hf import material, oracle, vocabulary
from tests.hf.scenarios import Case, build
from tests.hf.together import Together

CASE = Case(evaluates=True, packs=material.PACKS[:4])
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks", "_backward_pre_hooks")


def own(holder: Any) -> dict[str, Any]:
    """Attributes of an object itself, values by identity."""
    return {name: id(value) for name, value in vars(holder).items()}


def anatomy(trainer: Any) -> dict[str, Any]:
    """Everything of a trainer and its model that attach could replace."""
    from accelerate.state import AcceleratorState
    from transformers import Trainer

    model = trainer.model
    attention = {
        f"{type(m).__module__}.{type(m).__name__}": id(type(m).forward)
        for m in model.modules()
        if "Attention" in type(m).__name__
    }
    skip = {"_memory_tracker", "state", "control", "train_dataset", "eval_dataset", "_signature_columns"}
    return {
        "class": type(trainer),
        "trainer": {name: value for name, value in own(trainer).items() if name not in skip},
        "methods": {name: id(value) for name, value in vars(Trainer).items() if callable(value)},
        "accelerator": set(vars(trainer.accelerator)),
        "gather": "gather_for_metrics" in vars(trainer.accelerator),
        "parallelism": trainer.accelerator.parallelism_config,
        "mesh": trainer.accelerator.torch_device_mesh,
        "state": set(AcceleratorState._shared_state),
        "arguments": {name: repr(value) for name, value in vars(trainer.args).items()},
        "model class": type(model),
        "model": set(vars(model)),
        "implementation": model.config._attn_implementation,
        "use_cache": model.config.use_cache,
        "hooks": {
            (name, kind): tuple(id(hook) for hook in getattr(module, kind).values())
            for name, module in model.named_modules()
            for kind in HOOKS
        },
        "forwards": {name: vars(module).get("forward") for name, module in model.named_modules()},
        "attention": attention,
        "callbacks": [type(callback) for callback in trainer.callback_handler.callbacks],
    }


def differences(left: dict[str, Any], right: dict[str, Any]) -> list[str]:
    found = []
    for key, before in left.items():
        after = right[key]
        if before != after:
            if isinstance(before, dict):
                names = [n for n in before.keys() | after.keys() if before.get(n, "-") != after.get(n, "-")]
                found.append(f"{key}: {names}")
            elif isinstance(before, set):
                found.append(f"{key}: {sorted(before ^ after)}")
            else:
                found.append(f"{key}: {before} -> {after}")
    return found


def there_and_back(folder: str) -> dict[str, Any]:
    import sap_hf

    trainer = build(CASE, folder)
    before = anatomy(trainer)
    returned = sap_hf.attach(trainer, cp_size=2)
    while_attached = differences(before, anatomy(trainer))
    sap_hf.detach(trainer)
    unused = differences(before, anatomy(trainer))
    sap_hf.attach(trainer, cp_size=2)
    attached_loss = trainer.evaluate()["eval_loss"]
    sap_hf.detach(trainer)
    after = differences(before, anatomy(trainer))
    again = sap_hf.attach(trainer, cp_size=2) is trainer
    trainer.train()
    return {
        "same": returned is trainer,
        "while": while_attached,
        "unused": unused,
        "after": after,
        "attached_loss": attached_loss,
        "again": again,
        "losses": material.logged(trainer, "loss"),
    }


def twice(folder: str) -> dict[str, Any]:
    import sap_hf

    trainer = build(CASE, folder)
    before = anatomy(trainer)
    sap_hf.attach(trainer, cp_size=2)
    once = anatomy(trainer)
    sap_hf.attach(trainer, cp_size=2)
    changed = differences(once, anatomy(trainer))
    trainer.train()
    losses = material.logged(trainer, "loss")
    sap_hf.detach(trainer)
    after = [name for name in differences(before, anatomy(trainer)) if name.startswith(("hooks", "impl"))]
    return {"changed": changed, "losses": losses, "after": after}


def two_trainers(folder: str) -> dict[str, Any]:
    """A second trainer with another model, built and attached in the process of the first, which lives on."""
    import sap_hf

    first = build(CASE, folder)
    sap_hf.attach(first, cp_size=2)
    first.train()
    second = build(CASE, folder + "-second")
    sap_hf.attach(second, cp_size=2)
    second.train()
    return {"first": material.logged(first, "loss"), "second": material.logged(second, "loss")}


def printed(folder: str) -> str:
    import sap_hf

    case = Case(packs=material.PACKS[:4], args={"gradient_accumulation_steps": 2})
    trainer = build(case, folder)
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        sap_hf.attach(trainer, cp_size=2)
    return out.getvalue()


def generation(folder: str) -> dict[str, Any]:
    """generate() of an attached model on every rank, left padding included, after training."""
    import sap_hf

    trainer = build(CASE, folder)
    sap_hf.attach(trainer, cp_size=2)
    trainer.train()
    torch.manual_seed(5)
    ids = torch.randint(3, material.VOCAB, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    ids[0, :4] = 0
    model = trainer.model.eval()
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "output_logits": True}
    attached = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **options)
    plain = material.tiny_llama()
    plain.load_state_dict(model.state_dict())
    expected = plain.eval().generate(ids, attention_mask=mask, return_dict_in_generate=True, **options)
    return {
        "same": torch.equal(attached.sequences, expected.sequences),
        "error": oracle.worst(torch.stack(attached.logits), torch.stack(expected.logits)),
    }


def through_plugin(folder: str) -> dict[str, Any]:
    """The mesh asked for through TrainingArguments instead of attach's cp_size."""
    import sap_hf

    case = Case(packs=material.PACKS[:4], args={"parallelism_config": sap_hf.SapPlugin(cp_size=2)})
    trainer = build(case, folder)
    sap_hf.attach(trainer)
    mesh = trainer.accelerator.torch_device_mesh
    trainer.train()
    return {"mesh": tuple(mesh.mesh_dim_names), "losses": material.logged(trainer, "loss")}


def sft_there_and_back(folder: str) -> list[str]:
    import sap_hf
    from tests.hf.test_sft import Chat
    from tests.hf.test_sft import build as build_sft

    trainer = build_sft(Chat(args={"packing": True}), folder)
    before = anatomy(trainer)
    sap_hf.attach(trainer, cp_size=2)
    trainer.evaluate()
    sap_hf.detach(trainer)
    assert trainer.model.config.vocab_size == vocabulary.SIZE
    return differences(before, anatomy(trainer))


@pytest.fixture(scope="module")
def on_2(tmp_path_factory: pytest.TempPathFactory) -> Together:
    scenarios: dict[str, Any] = {
        "there-and-back": there_and_back,
        "twice": twice,
        "two-trainers": two_trainers,
        "printed": printed,
        "generation": generation,
        "plugin": through_plugin,
        "sft-there-and-back": sft_there_and_back,
    }
    return Together(tmp_path_factory.mktemp("attach"), 2, {name: (fn, {}) for name, fn in scenarios.items()})


def in_use(left: list[str]) -> list[str]:
    """What is left without the traces of the evaluation itself: Trainer and accelerate prepare the model for it."""
    return [
        line
        for line in left
        if not line.startswith(("accelerator:", "trainer:")) and line != "model: ['_is_accelerate_prepared']"
    ]


def expected_losses() -> list[float]:
    return CASE.truth()[0].losses


def test_detach_leaves_the_trainer_as_it_was(on_2: Together) -> None:
    for result in on_2["there-and-back"]:
        assert result["same"]
        assert result["while"], "attach changed nothing that this test can see"
        assert result["unused"] == []
        assert in_use(result["after"]) == []


def test_an_attached_trainer_can_be_attached_again_after_detach(on_2: Together) -> None:
    for result in on_2["there-and-back"]:
        assert result["again"]
        assert oracle.worst(result["losses"], expected_losses()) < material.EXACT
        assert oracle.worst(result["attached_loss"], CASE.truth()[1]) < material.EXACT


def test_attach_twice_is_attach_once(on_2: Together) -> None:
    for result in on_2["twice"]:
        assert result["changed"] == []
        assert result["after"] == []
        assert oracle.worst(result["losses"], expected_losses()) < material.EXACT


def test_two_trainers_live_in_one_process(on_2: Together) -> None:
    for result in on_2["two-trainers"]:
        assert oracle.worst(result["first"], expected_losses()) < material.EXACT
        assert oracle.worst(result["second"], expected_losses()) < material.EXACT


def test_attach_prints_what_it_did_once(on_2: Together) -> None:
    main, other = on_2["printed"]
    assert "LlamaAttention x2: via interface" in main
    assert "dp_replicate 1 x dp_shard 1 x cp 2" in main and "2 processes" in main
    assert "per optimizer step" in main and "62 tokens" in main and "124 tokens" in main
    assert "LlamaAttention" not in other, "the second rank repeats it"


def test_generation_of_an_attached_model_equals_plain_generation(on_2: Together) -> None:
    for result in on_2["generation"]:
        assert result["same"]
        assert result["error"] < 1e-6


def test_plugin_in_the_training_arguments_needs_no_cp_size(on_2: Together) -> None:
    for result in on_2["plugin"]:
        assert "cp" in result["mesh"]
        assert oracle.worst(result["losses"], expected_losses()) < material.EXACT


def test_detach_leaves_an_sft_trainer_as_it_was(on_2: Together) -> None:
    for left in on_2["sft-there-and-back"]:
        assert in_use(left) == []


def test_a_kernel_that_cannot_run_is_refused_with_nothing_changed(tmp_path: Any) -> None:
    import sap_hf

    trainer = build(CASE, str(tmp_path))
    before = dict(vars(trainer))
    with pytest.raises(UnsupportedAttention, match="on CUDA only"):
        sap_hf.attach(trainer, kernel="varlen")
    assert vars(trainer) == before
    assert trainer.model.config._attn_implementation == "sdpa"
