"""SFTTrainer on rows shared by 2 and 4 ranks against documents alone: packing, padding-free, streaming."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from tests.hf import material, oracle, vocabulary
from tests.hf.oracle import Document
from tests.hf.together import Together

PACK = 40
# SFTConfig has other defaults than TrainingArguments; these are taken from the tests' own.
TAKEN = (
    "output_dir",
    "use_cpu",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "num_train_epochs",
    "learning_rate",
    "adam_epsilon",
    "max_grad_norm",
    "logging_steps",
    "report_to",
    "disable_tqdm",
    "dataloader_pin_memory",
    "seed",
    "train_sampling_strategy",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chat:
    """One SFTTrainer run."""

    args: dict[str, Any]
    cp_size: int = 2
    groups: int = 1
    streaming: bool = False
    lora: bool = False
    prompt_completion: bool = False
    count: int = 14

    @property
    def batch(self) -> int:
        return int(self.args.get("per_device_train_batch_size", 1))


ON_2_RANKS = {
    "bfd": Chat(args={"packing": True}),
    "bfd-completions-only": Chat(args={"packing": True}, prompt_completion=True),
    "bfd-accumulation-checkpointing": Chat(
        args={"packing": True, "gradient_accumulation_steps": 2, "gradient_checkpointing": True}
    ),
    "bfd-split": Chat(args={"packing": True, "packing_strategy": "bfd_split"}),
    "bfd-lora": Chat(args={"packing": True}, lora=True),
    "wrapped": Chat(args={"packing": True, "packing_strategy": "wrapped"}),
    "padding-free": Chat(
        args={"padding_free": True, "max_length": None, "per_device_train_batch_size": 3}, count=12
    ),
    "padded": Chat(args={"per_device_train_batch_size": 3}, count=12),
    "label-smoothing": Chat(args={"packing": True, "label_smoothing_factor": 0.1}),
    "streaming": Chat(
        args={"packing": True, "max_steps": 4, "accelerator_config": {"dispatch_batches": False}},
        streaming=True,
    ),
}
ON_4_RANKS = {
    "two-groups-bfd": Chat(args={"packing": True, "max_steps": 3}, groups=2, count=40),
    "two-groups-accumulation": Chat(
        args={"packing": True, "max_steps": 2, "gradient_accumulation_steps": 2}, groups=2, count=50
    ),
    "cp-4": Chat(args={"packing": True}, cp_size=4),
}
ALL = [
    pytest.param(world, name, chat, id=f"{name}-W{world}")
    for world, chats in ((2, ON_2_RANKS), (4, ON_4_RANKS))
    for name, chat in chats.items()
]


def model() -> torch.nn.Module:
    return material.tiny_llama(vocab_size=vocabulary.SIZE)


def lora_config() -> Any:
    from peft import LoraConfig

    return LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )


def build(chat: Chat, folder: str) -> Any:
    import datasets
    from trl import SFTConfig, SFTTrainer

    written = vocabulary.texts(chat.count, PACK - 2)
    if chat.prompt_completion:
        halves = [text.split(" ", 1) for text in written]
        rows = [{"prompt": first + " ", "completion": rest} for first, rest in halves]
    else:
        rows = [{"text": text} for text in written]
    train: Any = datasets.Dataset.from_list(rows)
    plain = material.arguments(folder)
    args = {name: getattr(plain, name) for name in TAKEN}
    args |= {"optim": "sgd", "lr_scheduler_type": "constant", "save_strategy": "no", "bf16": False}
    args |= {"max_length": PACK, "gradient_checkpointing": False}
    torch.manual_seed(22)
    trainer = SFTTrainer(
        model(),
        args=SFTConfig(**{**args, **chat.args}),
        train_dataset=train.to_iterable_dataset() if chat.streaming else train,
        eval_dataset=train.select(range(6)),
        processing_class=vocabulary.tokenizer(),
        peft_config=lora_config() if chat.lora else None,
    )
    trainer.model.double()
    return trainer


def sft(folder: str, chat: Chat) -> dict[str, Any]:
    import sap_hf

    trainer = build(chat, folder)
    start = material.parameters(trainer.model)
    rows = list(trainer.train_dataset)
    held_out = list(trainer.eval_dataset)
    sap_hf.attach(trainer, cp_size=chat.cp_size)
    before = trainer.evaluate()
    trainer.train()
    keys = ("loss", "grad_norm", "mean_token_accuracy", "entropy", "num_tokens")
    return {
        "start": start,
        "rows": rows,
        "held_out": held_out,
        "before": before,
        "log": {key: material.logged(trainer, key) for key in keys},
        "parameters": material.parameters(trainer.model),
    }


def documents(rows: list[dict[str, Any]]) -> list[list[Document]]:
    """The documents of trl's prepared rows; a `wrapped` row has no lengths and is one document."""
    result = []
    for row in rows:
        ids = torch.tensor(row["input_ids"])
        labels = torch.tensor(row["labels"]) if "labels" in row else ids.clone()
        if "labels" not in row and "completion_mask" in row:
            labels[torch.tensor(row["completion_mask"]) == 0] = oracle.IGNORED
        lengths = list(row.get("seq_lengths") or [len(ids)])
        result.append(
            [Document(a, b) for a, b in zip(ids.split(lengths), labels.split(lengths), strict=True)]
        )
    return result


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Together]:
    return {
        world: Together(
            tmp_path_factory.mktemp(f"sft-{world}"),
            world,
            {name: (sft, {"chat": chat}) for name, chat in chats.items()},
        )
        for world, chats in ((2, ON_2_RANKS), (4, ON_4_RANKS))
    }


known: dict[tuple[int, str], tuple[oracle.Run, list[Any]]] = {}


def truth(world: int, name: str, result: dict[str, Any]) -> tuple[oracle.Run, list[Any]]:
    """The oracle's run over the rows that trl prepared, from the parameters that the trainer started with."""
    if (world, name) not in known:
        known[world, name] = compute_truth((ON_2_RANKS if world == 2 else ON_4_RANKS)[name], result)
    return known[world, name]


def compute_truth(chat: Chat, result: dict[str, Any]) -> tuple[oracle.Run, list[Any]]:
    rows = documents(result["rows"])
    accumulation = chat.args.get("gradient_accumulation_steps", 1)
    size = chat.batch * chat.groups * accumulation
    limit = chat.args.get("max_steps", 0) * size or len(rows)
    steps = material.flat(material.schedule(rows[:limit], accumulation, chat.groups, chat.batch))
    alone = model()
    if chat.lora:
        from peft import get_peft_model

        alone = get_peft_model(alone, lora_config()).double()
    alone.load_state_dict(result["start"], strict=False)
    smoothing = chat.args.get("label_smoothing_factor", 0.0)
    return oracle.train(alone, steps, oracle.Recipe(label_smoothing=smoothing)), steps


@pytest.mark.parametrize("world, name, chat", ALL)
def test_training_equals_documents_run_alone(
    on_ranks: dict[int, Together], world: int, name: str, chat: Chat
) -> None:
    results = on_ranks[world][name]
    run, _ = truth(world, name, results[0])
    assert len(run.losses) > 1
    if chat.args.get("packing_strategy") != "wrapped" and chat.args.get("packing"):
        assert any(len(row) > 1 for row in documents(results[0]["rows"]))
    for rank, result in enumerate(results):
        log = result["log"]
        assert oracle.worst(log["loss"], run.losses) < material.EXACT, f"rank {rank}"
        assert oracle.worst([float(norm) for norm in log["grad_norm"]], run.grad_norms) < material.EXACT
        assert oracle.worst(result["parameters"], run.parameters) < material.EXACT, f"rank {rank}"


@pytest.mark.parametrize("world, name, chat", ALL)
def test_trl_counters_equal_one_process(
    on_ranks: dict[int, Together], world: int, name: str, chat: Chat
) -> None:
    results = on_ranks[world][name]
    run, steps = truth(world, name, results[0])
    tokens, total = [], 0
    for step in steps:
        total += sum(len(d.ids) for micro in step for batch in micro for d in batch)
        tokens.append(total)
    for rank, result in enumerate(results):
        log = result["log"]
        assert log["num_tokens"] == tokens, rank
        assert oracle.worst(log["mean_token_accuracy"], run.accuracies) < material.EXACT
        assert oracle.worst(log["entropy"], run.entropies) < material.EXACT


@pytest.mark.parametrize("world, name, chat", [row for row in ALL if row.values[2].groups == 1])
def test_evaluation_equals_documents_run_alone(
    on_ranks: dict[int, Together], world: int, name: str, chat: Chat
) -> None:
    for result in on_ranks[world][name]:
        rows = documents(result["held_out"])
        alone = model()
        if chat.lora:
            from peft import get_peft_model

            alone = get_peft_model(alone, lora_config()).double()
        alone.load_state_dict(result["start"], strict=False)
        smoothing = chat.args.get("label_smoothing_factor", 0.0)
        expected = oracle.evaluate(alone, [(row, 1) for row in rows], smoothing)
        assert oracle.worst(result["before"]["eval_loss"], expected) < material.EXACT
        # A run whose steps change nothing sees one row after the other with the same parameters.
        still = oracle.train(alone, [[[row]] for row in rows], oracle.Recipe(learning_rate=0.0))
        for key, values in (("mean_token_accuracy", still.accuracies), ("entropy", still.entropies)):
            assert oracle.worst(result["before"][f"eval_{key}"], sum(values) / len(values)) < material.EXACT
