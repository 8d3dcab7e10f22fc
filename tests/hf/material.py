"""Tiny models, packs and arguments that the tests of this folder share. All seeded, all float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tests.hf.oracle import IGNORED, Document

VOCAB = 64
EXACT = 1e-6

# Packs of unequal length: documents of one token, of the whole pack, lengths that no number of ranks divides.
PACKS: tuple[tuple[int, ...], ...] = (
    (5, 11, 1, 8),
    (23,),
    (2, 2, 17, 9),
    (1, 30),
    (7, 7, 7),
    (4, 19, 3, 1),
)
# The same number of targets in each (one target less than tokens per document): evaluation with several
# data-parallel groups weighs rows equally, whoever shares a round.
EVEN_PACKS: tuple[tuple[int, ...], ...] = ((9, 12, 3), (20, 1, 3), (8, 8, 8), (2, 4, 18), (6, 17, 1))


def tiny_llama(**changes: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    options: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        # Large weights: attention that differs between keys, so a leak is seen.
        "initializer_range": 0.2,
        "attn_implementation": "sdpa",
    }
    torch.manual_seed(20)
    return LlamaForCausalLM(LlamaConfig(**{**options, **changes})).double()


def lora_llama() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(21)
    config = LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    return get_peft_model(tiny_llama(), config).double()


def documents(packs: Sequence[Sequence[int]], seed: int = 0, prompt: float = 0.2) -> list[list[Document]]:
    """Random documents of the given lengths, by pack; a share `prompt` of the labels is ignored."""
    generator = torch.Generator().manual_seed(seed)
    result = []
    for lengths in packs:
        row = []
        for length in lengths:
            ids = torch.randint(3, VOCAB, (length,), generator=generator)
            labels = ids.clone()
            labels[torch.rand(length, generator=generator) < prompt] = IGNORED
            # Outside the document nothing predicts its first token.
            labels[0] = IGNORED
            row.append(Document(ids, labels))
        result.append(row)
    return result


def packed(row: Sequence[Document]) -> dict[str, Tensor]:
    """A pack as a dataset item: (T,) ids, unshifted labels and restarting positions."""
    return {
        "input_ids": torch.cat([document.ids for document in row]),
        "labels": torch.cat([document.labels for document in row]),
        "position_ids": torch.cat([torch.arange(len(document.ids)) for document in row]),
    }


def stack(features: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The plainest collator: rows of equal length, one under the other."""
    return {name: torch.stack([feature[name] for feature in features]) for name in features[0]}


def right_padded(features: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """An ordinary collator: rows filled on the right, with an attention_mask and no position_ids."""
    longest = max(len(feature["input_ids"]) for feature in features)
    batch: dict[str, list[Tensor]] = {"input_ids": [], "labels": [], "attention_mask": []}
    for feature in features:
        fill = (0, longest - len(feature["input_ids"]))
        batch["input_ids"].append(nn.functional.pad(feature["input_ids"], fill))
        batch["labels"].append(nn.functional.pad(feature["labels"], fill, value=IGNORED))
        batch["attention_mask"].append(nn.functional.pad(torch.ones_like(feature["input_ids"]), fill))
    return {name: torch.stack(rows) for name, rows in batch.items()}


class Stream(torch.utils.data.IterableDataset):
    """The items in their order, with no length."""

    def __init__(self, items: Sequence[dict[str, Tensor]]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter(self.items)


def arguments(output_dir: str, **changes: Any) -> Any:
    """TrainingArguments for a deterministic run whose every step is logged."""
    from transformers import TrainingArguments

    options: dict[str, Any] = {
        "output_dir": output_dir,
        "use_cpu": True,
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "num_train_epochs": 1,
        "optim": "sgd",
        "learning_rate": 0.1,
        "adam_epsilon": 1e-3,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": False,
        "seed": 7,
    }
    return TrainingArguments(**{**options, **changes})


def schedule(
    rows: Sequence[Any], accumulation: int = 1, groups: int = 1, batch: int = 1
) -> list[list[list[Any]]]:
    """Rows in the order in which the loader deals them: steps[s][m][g] is the list of rows of group g."""
    batches = [list(rows[at : at + batch]) for at in range(0, len(rows), batch)]
    rounds = [batches[at : at + groups] for at in range(0, len(batches), groups)]
    assert all(len(dealt) == groups for dealt in rounds), (
        "the last round would be filled up with repeated rows"
    )
    return [rounds[at : at + accumulation] for at in range(0, len(rounds), accumulation)]


def flat(steps: list[list[list[list[list[Document]]]]]) -> list[list[list[list[Document]]]]:
    """The rows of each batch joined: what the oracle takes."""
    return [[[[d for row in batch for d in row] for batch in micro] for micro in step] for step in steps]


def fresh_state() -> None:
    """Forget accelerate's process-wide choices: the next trainer of this process starts like a new script."""
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import DistributedType

    AcceleratorState._reset_state(reset_partial_state=False)
    if PartialState._shared_state.get("distributed_type") == DistributedType.FSDP:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_CPU
    GradientState._reset_state()


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters, whole even where FSDP2 sharded them."""
    found = {}
    for name, parameter in model.named_parameters():
        full = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        found[name] = full.detach().clone()
    return found


def logged(trainer: Any, key: str) -> list[float]:
    """The values of one key in the order in which they were logged."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def clone(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)
