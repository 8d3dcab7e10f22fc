"""Sharding: hooks on the outermost module that give every rank its rows, and give evaluation its batch back.

Before the forward: batch -> documents -> plan -> this rank's ids, positions and already shifted labels. After it: in
evaluation the per-token outputs of all ranks are put together again, so that metrics never see a shard.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from accelerate.state import is_initialized as accelerate_runs
from transformers.modeling_layers import GradientCheckpointingLayer

from sap_hf.config import SapConfig
from sap_hf.errors import SapError, UnsupportedAttention
from sap_hf.models.batch import BOUNDARIES, Batch, Cut, read
from sap_hf.models.families import windows
from sap_hf.models.interface import KEYWORD, Shard, state
from sap_hf.models.positions import check_lengths, first_position, hook_lengths
from sap_hf.models.table import bind_recompute, entry_of
from sap_hf.planning import Documents, Plan
from sap_hf.planning.cost import Shape
from sap_hf.planning.hardware import PRESETS, Hardware, find_hardware
from sap_hf.runtime.collectives import gather_rows, sum_over_ranks
from sap_hf.runtime.device_program import compiled
from sap_hf.runtime.group import CpGroup, agree, from_first, ranks_per_node
from sap_hf.strategies import Request, make_plan
from sap_hf.strategies.auto import degrees

PLANS_KEPT = 8


@dataclasses.dataclass(frozen=True, eq=False)
class Prepared:
    """The documents of a batch and the plan for them."""

    batch: Batch
    plan: Plan

    @property
    def fingerprint(self) -> tuple[int, int]:
        """64-bit hash of the inputs and digest of the plan: what the ranks of a cp group must have in common."""
        return self.batch.fingerprint, self.plan.digest


class Sharding:
    """The forward hooks of one patched model.

    Attributes:
        full_outputs: also in training, give per-token outputs of the whole batch, differentiably, to whoever computes
            the loss from them.
        eval_outputs: in evaluation, put per-token outputs together; off when only the loss is wanted.
        shape: the model's first attention layer, for modelled seconds and the heads that may be exchanged.
        last_plan: the plan of the newest sharded forward.
        ahead: called with the inputs of every training forward: what was prepared for them, or None, and whether all
            ranks have agreed upon it already.
        on_copy: called with a deep copy of the model, whose hooks are these ones too, before its first forward.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        attention: dict[str, torch.nn.Module],
        mixers: dict[str, torch.nn.Module],
        config: SapConfig,
        group: CpGroup,
    ):
        self.model, self.config, self.group = model, config, group
        self.layers = attention | mixers
        self.windows = windows(model, attention)
        self._layout = _layout(config.layout, mixers)
        self.shape = _shape(model, attention)
        self._text_config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
        self._ulysses_size = group.ulysses_size if config.ulysses_size == "auto" else config.ulysses_size
        if group.size > 1:
            # What no batch could change is refused here, before the first one.
            degrees(group.size, self._ulysses_size, config.strategy, config.delivery, self.shape.num_heads)
        self._hardware = _hardware(config.hardware, group)
        self.full_outputs = False
        self.eval_outputs = True
        self.last_plan: Plan | None = None
        self.ahead: Callable[[dict[str, Any]], tuple[Prepared | None, bool]] | None = None
        self.on_copy: Callable[[torch.nn.Module], None] | None = None
        self._batch: Batch | None = None
        self._counts_given = False
        self._all_layers_seen = False
        self._layer_ids = frozenset(id(layer) for layer in self.layers.values())
        self._drops_keywords = any(entry_of(type(layer)) is not None for layer in self.layers.values())
        self._blocks: list[Any] = [
            block for block in model.modules() if isinstance(block, GradientCheckpointingLayer)
        ]
        self._plans = functools.lru_cache(maxsize=PLANS_KEPT)(self._plan)
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True),
            model.register_forward_hook(self._after, with_kwargs=True, always_call=True),
            *hook_lengths(model),
        ]

    def remove(self, model: torch.nn.Module) -> None:
        """Take the hooks off the model, or off a copy of it, which has them under the same numbers."""
        for module in model.modules():
            for name, hooks in vars(module).items():
                if name.startswith(("_forward_hooks", "_forward_pre_hooks")):
                    for handle in self._handles:
                        hooks.pop(handle.id, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Sharding:
        """Itself: the hooks of a copied model still say whose they were."""
        return self

    def _before(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # Not whether it is the model itself: what torch replicates shares these hooks.
        if module._forward_pre_hooks is not self.model._forward_pre_hooks:
            if self.on_copy is not None:
                self.on_copy(module)
            return None
        state.shard, self._batch = None, None
        inputs = self._by_name(args, kwargs)
        if not _shardable(module, inputs):
            return None
        prepared = self._agree_on(inputs)
        batch, plan = prepared.batch, prepared.plan
        main = inputs.get("input_ids")
        main = inputs["inputs_embeds"] if main is None else main
        cut = Cut.of(batch, plan, self.group.rank, main.device)
        for name in ("attention_mask", *BOUNDARIES):
            inputs.pop(name, None)
        for name in ("input_ids", "inputs_embeds"):
            if inputs.get(name) is not None:
                inputs[name] = cut.of_batch(inputs[name])
        positions = batch.positions() + first_position(self._text_config)
        inputs["position_ids"] = cut.of_pack(torch.from_numpy(positions).to(main.device), 0)
        self._shard_labels(inputs, batch, cut)
        inputs["use_cache"] = False
        recomputed = module.training and self._checkpointed
        state.shard = inputs[KEYWORD] = Shard(
            plan, self.group, self.config, self._layer_ids, {} if recomputed else None
        )
        if recomputed and self._drops_keywords:
            bind_recompute(self._blocks)
        self._batch, self.last_plan = batch, plan
        return (), inputs

    def look_ahead(self, inputs: dict[str, Any]) -> Prepared | None:
        """Documents and plan of a batch that a forward will be given; None for one that the forward has to judge."""
        if not _shardable(self.model, inputs):
            return None
        try:
            return self._prepare(inputs)
        except SapError:
            # It meets the error again, when all ranks are there to hear of it.
            return None

    def _prepare(self, inputs: dict[str, Any]) -> Prepared:
        batch = read(inputs)
        check_lengths(self._text_config, batch.documents.lengths)
        return Prepared(batch, self._plans(batch.documents.cu_seqlens.tobytes(), self._recomputed))

    def _agree_on(self, inputs: dict[str, Any]) -> Prepared:
        """Documents and plan of this batch; every rank raises when any of them refuses its own."""
        problem, prepared, agreed = None, None, False
        if self.ahead is not None and self.model.training:
            prepared, agreed = self.ahead(inputs)
        try:
            prepared = prepared or self._prepare(inputs)
        except SapError as error:
            problem = error
        if self.config.check_batches and not agreed:
            agree(self.group, prepared.fingerprint if prepared else (0, 0), problem, self.model.training)
        elif problem is not None:
            raise problem
        assert prepared is not None
        return prepared

    @property
    def _checkpointed(self) -> bool:
        return any(block.gradient_checkpointing for block in self._blocks)

    @property
    def _recomputed(self) -> bool:
        """Whether layers exchange heads again in their recompute."""
        return self._checkpointed and self.config.remote_kv == "refetch"

    def _plan(self, cu_seqlens: bytes, recomputed: bool) -> Plan:
        made = make_plan(
            Request(
                Documents(np.frombuffer(cu_seqlens, np.int64).copy()),
                self.group.size,
                strategy=self.config.strategy,
                layout=self._layout,
                windows=self.windows,
                delivery=self.config.delivery,
                shape=self.shape,
                hardware=self._hardware,
                max_remote_rows=self.config.max_remote_rows,
                ulysses_size=self._ulysses_size,
                recomputed=recomputed,
            )
        )
        # Here it may be ahead of the step; the first layer would wait for it.
        for window in self.windows:
            compiled(made, self.group.rank, window)
        return made

    def _shard_labels(self, inputs: dict[str, Any], batch: Batch, cut: Cut) -> None:
        """Shift labels once over the whole pack, then cut: a shard's last row keeps its target."""
        labels, shifted = inputs.get("labels"), inputs.get("shift_labels")
        self._counts_given = inputs.get("num_items_in_batch") is not None
        if labels is None and shifted is None:
            return
        if shifted is None:
            targets = batch.targets(labels)
        else:
            targets = shifted.reshape(-1)[torch.from_numpy(batch.tokens).to(shifted.device)]
        inputs["labels"] = inputs["shift_labels"] = cut.of_pack(targets, -100)
        if not self._counts_given:
            # A shard's own mean would weigh shards, not tokens: divide by the targets of the whole pack instead.
            inputs["num_items_in_batch"] = (targets != -100).sum()

    def _after(
        self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        shard, batch = state.shard, self._batch
        state.shard, self._batch = None, None
        if shard is not None:
            shard.running = False
        if shard is None or batch is None or output is None:
            return None
        self._check_all_seen(shard)
        loss = output.get("loss") if isinstance(output, dict) else None
        if loss is not None and not module.training and self._counts_given:
            # Trainer multiplies by the number of processes; the cp group's sum counts once in that.
            output["loss"] = sum_over_ranks(loss.detach(), self.group) / self.group.size
        elif loss is not None and not self._counts_given:
            output["loss"] = sum_over_ranks(loss, self.group)
        if isinstance(output, dict) and output.get("aux_loss") is not None:
            # Every rank has added its part of what they all computed alike.
            output["aux_loss"] = output["aux_loss"] * self.group.size
        if self.full_outputs or (not module.training and self.eval_outputs):
            whole = functools.partial(self._whole, plan=shard.plan, batch=batch)
            for name in list(output.keys()):
                if name != "loss":
                    output[name] = _map_tensors(output[name], whole)
        return output

    def _whole(self, tensor: torch.Tensor, plan: Plan, batch: Batch) -> torch.Tensor:
        """(B, S, ...) of all ranks' (1, C, ...), 0 at padding; other tensors as they are."""
        if tensor.dim() < 2 or tensor.shape[:2] != (1, plan.rows_per_rank):
            return tensor
        rows = gather_rows(tensor[0], plan, self.group)
        whole = rows.new_zeros(batch.shape[0] * batch.shape[1], *rows.shape[1:])
        tokens = torch.from_numpy(batch.tokens).to(rows.device)
        return whole.index_copy(0, tokens, rows).unflatten(0, batch.shape)

    def _check_all_seen(self, shard: Shard) -> None:
        """In the first forward, make sure that every layer that looks at other tokens came through us."""
        if self._all_layers_seen:
            return
        missing = [name for name, layer in self.layers.items() if id(layer) not in shard.seen]
        if missing:
            raise UnsupportedAttention(
                f"{type(self.model).__name__}: {len(missing)} of {len(self.layers)} layers that look at other "
                f"tokens did not go through sap_hf, the first is {missing[0]}. Its result would have been wrong."
            )
        self._all_layers_seen = True

    def _by_name(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        if not args:
            return dict(kwargs)
        model = self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model
        names = [name for name in inspect.signature(type(model).forward).parameters if name != "self"]
        return {**dict(zip(names, args, strict=False)), **kwargs}


def _layout(asked: str, mixers: dict[str, torch.nn.Module]) -> str:
    """The layout to plan with: what was asked for, or the only one where layers mix neighbouring tokens.

    Raises:
        UnsupportedAttention: another one was asked for.
    """
    if not mixers:
        return asked
    if asked not in ("auto", "contiguous"):
        name, layer = next(iter(mixers.items()))
        raise UnsupportedAttention(
            f"{name} ({type(layer).__name__}) mixes neighbouring tokens, which layout={asked!r} puts on several "
            "ranks.\n  Set layout='contiguous' or 'auto'."
        )
    return "contiguous"


def _shape(model: torch.nn.Module, layers: dict[str, torch.nn.Module]) -> Shape:
    """The model's first attention layer, for modelled seconds and the heads that may be exchanged."""
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    if not layers:
        # Any will do where none attends.
        return Shape(num_heads=1, num_kv_heads=1, head_dim=1, bytes_per_element=_bytes_per_element(model))
    # Where layers differ (gemma4), the config has no head_dim and raises when it is asked for one.
    layer: Any = next(iter(layers.values()))
    # As many as each layer has (laguna's layers have numbers of their own).
    each = getattr(config, "num_attention_heads_per_layer", None) or [config.num_attention_heads]
    heads, kv_heads = min(each), each[0] // getattr(layer, "num_key_value_groups", 1)
    if not getattr(config, "alibi", False):
        # Falcon's layer says it so; its bias needs a key of each head.
        kv_heads = getattr(layer, "num_kv_heads", kv_heads)
    return Shape(
        num_heads=heads,
        num_kv_heads=min(heads, kv_heads),
        head_dim=getattr(layer, "head_dim", None) or config.hidden_size // heads,
        bytes_per_element=_bytes_per_element(model),
    )


def _bytes_per_element(model: torch.nn.Module) -> int:
    """Of q, k and v: of accelerate's mixed precision, else of the model's parameters."""
    if accelerate_runs() and AcceleratorState().mixed_precision in ("bf16", "fp16", "fp8"):
        return 2
    dtypes = (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    return max(2, next(dtypes, torch.bfloat16).itemsize)


def _hardware(name: str, group: CpGroup) -> Hardware:
    """What plans are made for: the first rank's numbers, so that all ranks make the same ones."""
    found, problem = None, None
    if name == "auto":
        name = "h100" if torch.cuda.is_available() else "cpu"
    try:
        found = find_hardware(name)
        if name in PRESETS and (node := ranks_per_node()) is not None:
            found = dataclasses.replace(found, ranks_per_node=node)
    except SapError as error:
        problem = error
    first = from_first(group, found, problem)
    assert isinstance(first, Hardware)
    return first


def _shardable(module: torch.nn.Module, inputs: dict[str, Any]) -> bool:
    """Whether this forward is over a whole batch; a step of generation is not, and runs unsharded."""
    if inputs.get("input_ids") is None and inputs.get("inputs_embeds") is None:
        return False
    # Its name from transformers 5.24 on is "cache".
    if inputs.get("past_key_values") is not None or inputs.get("cache") is not None:
        return False
    if not module.training and inputs.get("use_cache"):
        return False
    logits_to_keep = inputs.get("logits_to_keep")
    return isinstance(logits_to_keep, int | None) and not logits_to_keep


def _map_tensors(value: Any, function: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, tuple | list):
        return type(value)(_map_tensors(item, function) for item in value)
    return value
