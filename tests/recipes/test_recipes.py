"""The recipes run as a user runs them, on two processes, with a tiny model; two processes log what one logs."""

from __future__ import annotations

import math
import re

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.recipes.launch import (
    accelerate_launch,
    history,
    run_alone,
    write_chats,
    write_texts,
    write_tiny_model,
)

# float32 sums in another order; the loss is about 6.
TOLERANCE = 2e-5
STEPS = 3


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    folder = tmp_path_factory.mktemp("material")
    write_tiny_model(folder / "model")
    write_chats(folder / "chats.jsonl")
    write_texts(folder / "texts.jsonl")
    return folder


def overrides(material, data, output, **more):
    """Return the overrides that make a shipped YAML small."""
    values = {
        "model.name": material / "model",
        "data.name": material / data,
        "data.documents": "null",
        "data.held_out": 4,
        "data.pack_length": 256,
        "training.output_dir": output,
        "training.use_cpu": "true",
        "training.max_steps": STEPS,
        "training.logging_steps": 1,
        **more,
    }
    return [f"{key}={value}" for key, value in values.items()]


@pytest.fixture(scope="module")
def sft(material):
    output = material / "sft"
    printed = accelerate_launch(
        "configs/accelerate/cpu2.yaml",
        "recipes/sft.py",
        "configs/sft_quickstart.yaml",
        *overrides(material, "chats.jsonl", output),
    )
    return output, printed


@pytest.fixture(scope="module")
def pretrain(material):
    output = material / "pretrain"
    printed = accelerate_launch(
        "configs/accelerate/cpu2.yaml",
        "recipes/pretrain.py",
        "configs/pretrain_quickstart.yaml",
        *overrides(material, "texts.jsonl", output),
    )
    return output, printed


def test_sft_prints_what_the_plan_saves_before_the_first_step(sft):
    _, printed = sft
    saved = re.search(r"rows moved +(\d+) of (\d+) that an all-gather moves", printed)
    assert saved
    assert 0 < int(saved[1]) < int(saved[2])
    assert re.search(r"work balance +busiest rank [\d.]+ x the mean", printed)
    assert saved.start() < printed.index(f"/{STEPS} ["), "the plan is printed after the progress bar began"


def test_sft_loss_falls_and_is_in_the_summary(sft):
    output, printed = sft
    measured = [entry["eval_loss"] for entry in history(output) if "eval_loss" in entry]
    summary = re.search(r"held-out loss +([\d.]+) before, ([\d.]+) after", printed)
    assert [float(summary[1]), float(summary[2])] == pytest.approx([measured[0], measured[-1]], abs=1e-4)
    assert measured[-1] < measured[0]


def test_sft_model_loads_in_plain_transformers_with_a_template_without_marks(sft, material):
    output, printed = sft
    assert "in plain transformers" in printed
    AutoModelForCausalLM.from_pretrained(output)
    # The tokenizer's own template went back in; here it is the training one, which the tiny tokenizer came with.
    own = AutoTokenizer.from_pretrained(material / "model").chat_template
    assert AutoTokenizer.from_pretrained(output).chat_template == own


def test_sft_on_two_processes_logs_what_one_process_logs(sft, material):
    alone = material / "sft_alone"
    run_alone(
        "recipes/sft.py",
        "configs/sft_quickstart.yaml",
        *overrides(material, "chats.jsonl", alone, **{"sap.cp_size": 1}),
    )
    assert_same_log(history(sft[0]), history(alone))


def test_pretrain_on_two_processes_logs_what_one_process_logs(pretrain, material):
    alone = material / "pretrain_alone"
    run_alone(
        "recipes/pretrain.py",
        "configs/pretrain_quickstart.yaml",
        *overrides(material, "texts.jsonl", alone, **{"sap.cp_size": 1}),
    )
    assert_same_log(history(pretrain[0]), history(alone))


def test_pretrain_loss_falls(pretrain):
    measured = [entry["eval_loss"] for entry in history(pretrain[0]) if "eval_loss" in entry]
    assert measured[-1] < measured[0]


@pytest.mark.parametrize("launcher", ["gpu8_fsdp2", "gpu8_ddp"])
def test_gpu_configs_run_with_a_tiny_model_on_the_cpu(launcher, material):
    run = {"gpu8_fsdp2": "sft_8b_64k", "gpu8_ddp": "sft_quickstart_gpu"}[launcher]
    output = material / launcher
    accelerate_launch(
        f"configs/accelerate/{launcher}.yaml",
        "--num_processes=2",
        "--mixed_precision=no",
        "recipes/sft.py",
        f"configs/{run}.yaml",
        *overrides(
            material,
            "chats.jsonl",
            output,
            **{"training.bf16": "false", "training.dataset_num_proc": "null", "sap.cp_size": 2},
        ),
    )
    losses = [entry["loss"] for entry in history(output) if "loss" in entry]
    assert len(losses) == STEPS
    assert all(math.isfinite(loss) for loss in losses)


def assert_same_log(two, one):
    """Losses, gradient norms, evaluation losses and token counters, step by step."""
    keys = ("loss", "grad_norm", "eval_loss", "num_tokens", "check_loss")
    wanted = [{key: entry[key] for key in keys if key in entry} for entry in one]
    found = [{key: entry[key] for key in keys if key in entry} for entry in two]
    assert sum("loss" in entry for entry in wanted) == STEPS
    assert sum("eval_loss" in entry for entry in wanted) == 2
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted):
        assert ours == pytest.approx(theirs, rel=TOLERANCE)
