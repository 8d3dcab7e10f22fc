"""What a recipe runs with: one YAML, and key=value pairs of the command line on top of it.

    python recipes/sft.py configs/sft_quickstart.yaml training.max_steps=4 sap.cp_size=2

Sections: model, data, training (fields of TrainingArguments or SFTConfig), sap (fields of SapConfig). An unknown
key is an error that names the nearest known one.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import yaml

from sap_hf import SapConfig
from sap_hf.config import nearest
from sap_hf.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Which model is trained."""

    name: str
    """A hub id, a folder, or material:smollm2-135m-instruct (from the quickstart extra, no hub)."""
    dtype: str = "float32"
    """The parameters' dtype. Mixed precision keeps float32 here and sets training.bf16."""
    chat_template: str | None = None
    """A Jinja file used in training instead of the tokenizer's own; relative to this YAML."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Which documents are trained, and how they are packed."""

    name: str
    """A hub id, a JSON-lines file, material:chitchat or material:transformers-source."""
    subset: str | None = None
    """The hub data set's configuration."""
    split: str = "train"
    """The hub data set's split."""
    documents: int | None = None
    """Documents to train on, the first ones after a shuffle. None: all."""
    held_out: int = 16
    """Documents that are never trained on; the loss on them is measured before and after."""
    pack_length: int = 2048
    """Tokens in a packed row, at most; shared by the cp_size ranks of a group."""
    too_long: str = "drop"
    """drop | split: documents longer than a pack. Chats cannot be split."""
    seed: int = 0
    """Of the shuffle."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """One run."""

    model: ModelSettings
    data: DataSettings
    training: dict[str, Any]
    """Fields of the recipe's arguments class, checked against it."""
    sap: SapConfig
    """What `sap_hf.attach` is given."""

    def arguments(self, kind: type, **fixed: Any) -> Any:
        """Build the trainer's arguments; `fixed` are the fields that the recipe itself sets."""
        for key in fixed:
            if key in self.training:
                raise ConfigError(f"training.{key} is set by the recipe to {fixed[key]!r}. Leave it out.")
        known = [field.name for field in dataclasses.fields(kind) if field.init]
        check_keys("training", self.training, known)
        return kind(**self.training, **fixed)


def load(arguments: list[str]) -> Settings:
    """Read `[YAML, key=value, ...]`.

    Raises:
        ConfigError: no file, an unknown section or key, or a value without its key.
    """
    if not arguments or "=" in arguments[0]:
        raise ConfigError(
            "Name the YAML to run, e.g. configs/sft_quickstart.yaml; key=value pairs may follow."
        )
    path = Path(arguments[0])
    if not path.is_file():
        raise ConfigError(f"{path}: no such file.")
    values = yaml.safe_load(path.read_text())
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: holds no sections. Needed: model, data, training; optional: sap.")
    sections = [field.name for field in dataclasses.fields(Settings)]
    for pair in arguments[1:]:
        key, found, text = pair.partition("=")
        section, dot, name = key.partition(".")
        if not found or not dot:
            raise ConfigError(f"{pair!r} is no override. Write section.key=value, e.g. training.max_steps=4.")
        check_keys("override", [section], sections)
        values[section] = {**(values.get(section) or {}), name: yaml.safe_load(text)}
    check_keys(str(path), values, sections)
    model = build(ModelSettings, "model", values.get("model") or {})
    if model.chat_template:
        model = dataclasses.replace(model, chat_template=str((path.parent / model.chat_template).resolve()))
    data = build(DataSettings, "data", values.get("data") or {})
    if data.too_long not in ("drop", "split"):
        raise ConfigError(f"data.too_long={data.too_long!r} must be drop or split.")
    sap = SapConfig.from_dict(values.get("sap") or {}, origin=f"{path}: sap")
    return Settings(model=model, data=data, training=values.get("training") or {}, sap=sap)


def build(kind: type, section: str, values: dict[str, Any]) -> Any:
    """Build one section's dataclass from its mapping."""
    fields = {field.name: field for field in dataclasses.fields(kind)}
    check_keys(section, values, list(fields))
    for name, field in fields.items():
        if field.default is dataclasses.MISSING and name not in values:
            raise ConfigError(f"{section}.{name} is missing.")
    return kind(**values)


def check_keys(where: str, keys: Any, known: list[str]) -> None:
    """Refuse a key that is not known, naming the nearest one."""
    for key in keys:
        if key not in known:
            hint = nearest(str(key), known) if len(known) < 12 else nearest_only(str(key), known)
            raise ConfigError(f"{where}: unknown key {key!r}.{hint}")


def nearest_only(word: str, known: list[str]) -> str:
    """`nearest` for TrainingArguments: a list of all its fields would hide the message."""
    hint = nearest(word, known)
    return hint if hint.startswith(" Did you mean") else " See transformers.TrainingArguments for the fields."
