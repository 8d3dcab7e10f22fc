"""What the ranks do: build a trainer, attach, train, evaluate, bring back every number that a user reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from tests.hf import material, oracle
from tests.hf.oracle import IGNORED, Document, Recipe, Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One training run: on cp_size ranks per pack, and by the oracle."""

    cp_size: int = 2
    groups: int = 1
    packs: Sequence[Sequence[int]] = material.PACKS
    prompt: float = 0.2
    """Share of the labels that are ignored."""
    args: dict[str, Any] = dataclasses.field(default_factory=dict)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    model: Callable[[], torch.nn.Module] = material.tiny_llama
    collator: str = "packed"
    stream: bool = False
    ignored: tuple[int, int] | None = None
    """Rows of every pack whose labels are all -100."""
    ignored_pack: int | None = None
    """A pack without any target."""
    model_init: bool = False
    fsdp2: bool = False
    replicate: int | None = None
    """dp_replicate_size of a SapPlugin in the training arguments, which then also carries cp_size."""
    evaluates: bool = False

    @property
    def batch(self) -> int:
        return int(self.args.get("per_device_train_batch_size", 1))

    def rows(self) -> list[list[Document]]:
        """The rows as the oracle takes them."""
        rows = material.documents(self.packs, prompt=self.prompt)
        if self.collator in ("right padded", "flattening", "sap"):
            # One document per item.
            rows = [[document] for row in rows for document in row]
        if self.ignored is not None:
            first, last = self.ignored
            for row in rows:
                labels = torch.cat([document.labels for document in row])
                labels[first:last] = IGNORED
                parts = labels.split([len(document.ids) for document in row])
                row[:] = [Document(document.ids, part) for document, part in zip(row, parts)]
        if self.ignored_pack is not None:
            empty = [Document(d.ids, torch.full_like(d.labels, IGNORED)) for d in rows[self.ignored_pack]]
            rows[self.ignored_pack] = empty
        return rows

    def items(self) -> list[dict[str, Any]]:
        items = [material.packed(row) for row in self.rows()]
        if self.collator in ("right padded", "flattening", "sap"):
            for item in items:
                del item["position_ids"]
        return items

    def collate(self) -> Callable[[list[Any]], dict[str, Any]]:
        if self.collator == "right padded":
            return material.right_padded
        if self.collator == "flattening":
            from transformers import DataCollatorWithFlattening

            lists = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)
            return lambda items: lists(
                [{name: value.tolist() for name, value in item.items()} for item in items]
            )
        if self.collator == "sap":
            import sap_hf

            return sap_hf.DataCollatorForPacking()
        return material.stack

    def recipe(self) -> Recipe:
        names = {field.name for field in dataclasses.fields(Recipe)}
        options = {name: value for name, value in self.args.items() if name in names}
        return Recipe(**options, label_smoothing=self.args.get("label_smoothing_factor", 0.0))

    def truth(self) -> tuple[Run, float | None, float | None]:
        """The oracle's run, and its evaluation loss before and after."""
        model, rows = self.model(), self.rows()
        size = int(self.args.get("per_device_eval_batch_size", 1))
        batches = [rows[at : at + size] for at in range(0, len(rows), size)]
        joined = [([document for row in batch for document in row], len(batch)) for batch in batches]
        smoothing = self.recipe().label_smoothing
        before = oracle.evaluate(model, joined, smoothing) if self.evaluates else None
        steps = material.schedule(
            rows, self.args.get("gradient_accumulation_steps", 1), self.groups, self.batch
        )
        run = oracle.train(model, material.flat(steps), self.recipe())
        after = oracle.evaluate(model, joined, smoothing) if self.evaluates else None
        return run, before, after


def build(case: Case, folder: str, **changes: Any) -> Any:
    """The trainer of a case, as a user's script would build it, not attached."""
    from transformers import Trainer

    items: Any = case.items()
    args = dict(case.args)
    if case.replicate is not None:
        import sap_hf

        args["parallelism_config"] = sap_hf.SapPlugin(cp_size=case.cp_size, dp_replicate_size=case.replicate)
    options: dict[str, Any] = {
        "args": material.arguments(folder, **args),
        "train_dataset": material.Stream(items) if case.stream else items,
        "eval_dataset": items if case.evaluates else None,
        "data_collator": case.collate(),
    }
    if case.model_init:
        options["model_init"] = lambda: case.model()
    else:
        options["model"] = case.model()
    return Trainer(**{**options, **changes})


def parity(folder: str, case: Case) -> dict[str, Any]:
    """Attach, evaluate, train, evaluate."""
    import sap_hf

    trainer = build(case, folder)
    if case.fsdp2:
        force_fsdp2(trainer)
    sap_hf.attach(trainer, cp_size=case.cp_size, **case.options)
    result: dict[str, Any] = {}
    # Plain Trainer cannot evaluate before training under FSDP2 either: accelerate wants an optimizer there.
    if case.evaluates and not case.fsdp2:
        result["before"] = trainer.evaluate()["eval_loss"]
    output = trainer.train()
    result["losses"] = material.logged(trainer, "loss")
    result["grad_norms"] = [float(norm) for norm in material.logged(trainer, "grad_norm")]
    result["train_loss"] = output.training_loss
    if case.evaluates:
        result["after"] = trainer.evaluate()["eval_loss"]
    result["parameters"] = material.parameters(trainer.accelerator.unwrap_model(trainer.model))
    result["steps"] = trainer.state.global_step
    result["tokens_seen"] = trainer.state.num_input_tokens_seen
    return result


def shuffled(folder: str, case: Case) -> dict[str, Any]:
    """Train in the order that Trainer shuffles the packs into; bring back which packs this rank was given."""
    import sap_hf

    places = {tuple(item["input_ids"].tolist()): at for at, item in enumerate(case.items())}
    order: list[int] = []

    def collate(features: list[Any]) -> dict[str, Any]:
        order.extend(places[tuple(feature["input_ids"].tolist())] for feature in features)
        return material.stack(features)

    random_order = dataclasses.replace(case, args={**case.args, "train_sampling_strategy": "random"})
    trainer = build(random_order, folder, data_collator=collate)
    sap_hf.attach(trainer, cp_size=case.cp_size)
    trainer.train()
    return {
        "order": order,
        "losses": material.logged(trainer, "loss"),
        "parameters": material.parameters(trainer.model),
    }


def force_fsdp2(trainer: Any) -> None:
    """What accelerate does by itself on a GPU where FSDP is configured, and never on a CPU."""
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    state = trainer.accelerator.state
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        reshard_after_forward=True,
        state_dict_type="FULL_STATE_DICT",
    )
    state.distributed_type = DistributedType.FSDP
    state.fsdp_plugin = plugin
    # accelerate does the same: every AcceleratorState() copies PartialState's fields over its own.
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    trainer.is_fsdp_enabled = True
    assert trainer.accelerator.is_fsdp2


def refused(act: Callable[[], Any]) -> tuple[str, str] | None:
    """The name of the exception's class and its message; None when nothing was raised."""
    try:
        act()
    except Exception as error:  # noqa: BLE001 - the test asserts on the class
        return type(error).__name__, str(error)
    return None
