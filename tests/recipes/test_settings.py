"""Every shipped YAML is read by what reads it in a run; a wrong key is an error that names the nearest one."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from settings import load
from transformers import TrainingArguments
from trl import SFTConfig

from sap_hf import SapConfig
from sap_hf.errors import ConfigError
from tests.recipes.launch import ROOT

CONFIGS = ROOT / "configs"
RUNS = sorted(path for path in CONFIGS.glob("*.yaml") if path.name != "sap.yaml")
LAUNCHERS = sorted((CONFIGS / "accelerate").glob("*.yaml"))
ARGUMENTS = {"recipes/sft.py": SFTConfig, "recipes/pretrain.py": TrainingArguments}


def command_of(path: Path) -> list[str]:
    """Return the command in a YAML's first line."""
    first = path.read_text().splitlines()[0]
    assert first.startswith("# accelerate launch "), (
        f"{path.name} does not begin with the command that runs it"
    )
    return shlex.split(first[2:])


def recipe_and_config(path: Path) -> tuple[str, str]:
    """Return the recipe and the YAML that a first line names, after accelerate's own parser took its options."""
    parsed = launch_command_parser().parse_args(command_of(path)[2:])
    assert (ROOT / parsed.config_file).is_file()
    assert (ROOT / parsed.training_script).is_file()
    return parsed.training_script, parsed.training_script_args[0]


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_first_line_runs_this_yaml(path):
    recipe, config = recipe_and_config(path)
    assert recipe in ARGUMENTS
    assert ROOT / config == path


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_recipe_reads_its_yaml(path, tmp_path):
    recipe, config = recipe_and_config(path)
    # The GPU runs too: on the CPU they differ in these two fields only.
    settings = load([str(ROOT / config), "training.use_cpu=true", f"training.output_dir={tmp_path}"])
    args = settings.arguments(ARGUMENTS[recipe])
    written = yaml.safe_load(path.read_text())["training"]
    for key in set(written) - {"use_cpu", "output_dir", "report_to"}:
        # Enums compare equal to their values, and 200 to "200" does not.
        assert getattr(args, key) == written[key], key


@pytest.mark.parametrize("path", LAUNCHERS, ids=lambda path: path.stem)
def test_accelerate_reads_its_yaml(path):
    config = load_config_from_file(str(path))
    run = recipe_and_config(path)[1]
    assert load([str(ROOT / run)]).sap.cp_size in (None, 1, 2, 4, 8)
    # use_cpu in a launcher's YAML would start one process, whatever num_processes says.
    assert not config.use_cpu


def test_fsdp2_config_saves_a_whole_model():
    fsdp = load_config_from_file(str(CONFIGS / "accelerate" / "gpu8_fsdp2.yaml")).fsdp_config
    assert fsdp["fsdp_version"] == 2
    assert fsdp["fsdp_reshard_after_forward"] is True
    assert fsdp["fsdp_state_dict_type"] == "FULL_STATE_DICT"


def test_sap_yaml_holds_every_field_with_its_default():
    written = yaml.safe_load((CONFIGS / "sap.yaml").read_text())
    assert written == dataclasses.asdict(SapConfig())
    assert SapConfig.from_yaml(CONFIGS / "sap.yaml") == SapConfig()


@pytest.mark.parametrize(
    "override, found",
    [
        ("sap.cp_sise=2", "Did you mean 'cp_size'"),
        ("model.nam=x", "Did you mean 'name'"),
        ("data.packlength=4", "Did you mean 'pack_length'"),
        ("modle.name=x", "Did you mean 'model'"),
        ("sap.strategy=sapp", "Did you mean 'sap'"),
        ("data.too_long=cut", "must be drop or split"),
        ("max_steps=4", "Write section.key=value"),
        ("training.max_steps", "Write section.key=value"),
    ],
)
def test_wrong_override_names_the_nearest(override, found):
    with pytest.raises(ConfigError, match=found):
        load([str(CONFIGS / "sft_quickstart.yaml"), override])


def test_unknown_training_field_names_the_nearest():
    settings = load([str(CONFIGS / "sft_quickstart.yaml"), "training.max_step=4"])
    with pytest.raises(ConfigError, match="Did you mean 'max_steps'"):
        settings.arguments(SFTConfig)


def test_field_that_the_recipe_sets_is_refused():
    settings = load([str(CONFIGS / "sft_quickstart.yaml"), "training.packing=false"])
    with pytest.raises(ConfigError, match=r"training\.packing is set by the recipe"):
        settings.arguments(SFTConfig, packing=True)


def test_override_wins_over_the_yaml():
    settings = load([str(CONFIGS / "sft_quickstart.yaml"), "sap.cp_size=null", "training.max_steps=3"])
    assert settings.sap.cp_size is None
    assert settings.training["max_steps"] == 3
    assert settings.data.pack_length == 2048


def test_missing_yaml_is_an_error_with_its_path():
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such file"):
        load(["nowhere.yaml"])
    with pytest.raises(ConfigError, match="Name the YAML"):
        load(["training.max_steps=3"])
