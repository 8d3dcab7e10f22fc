"""attach: the one line that makes a Trainer or SFTTrainer share every pack over cp_size ranks. detach undoes it.

Nothing in transformers, accelerate or trl is subclassed or edited: the mesh is set on accelerate's state, the model is
patched, and a handful of the trainer's own methods are replaced on the instance.
"""

from __future__ import annotations

import functools
import weakref
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate.state import AcceleratorState

from sap_hf.config import SapConfig
from sap_hf.errors import ConfigError, LayoutError, SapError
from sap_hf.hf import counting
from sap_hf.hf.ahead import Ahead
from sap_hf.hf.plugin import SapPlugin
from sap_hf.hf.profile import Profile
from sap_hf.hf.refuse import refuse_unsupported
from sap_hf.kernels import pick
from sap_hf.models import Patch, patch_model, unpatch_model
from sap_hf.models.families import attention_layers
from sap_hf.runtime.group import ALONE, CpGroup, attach_group

AnyTrainer = TypeVar("AnyTrainer")
_MISSING = object()


class Attachment:
    """What attach changed on one trainer, and how to change it back."""

    def __init__(self, trainer: Any, config: SapConfig, plugin: SapPlugin | None, before: tuple[Any, Any]):
        self.config = config
        self._mesh_before = before
        self.group: CpGroup = plugin.group if plugin else ALONE
        self._before: list[tuple[Any, str, Any]] = []
        self.ahead = Ahead(self.group, config.check_batches)
        self.profile: Profile | None = None
        self.patch = self._patch(trainer.model)
        self._give_losses_whole_batches(trainer)
        if self.group.size > 1:
            self._count_once(trainer)
        self._replace(trainer, "_get_num_items_in_batch", counting.count_targets(trainer))
        self._replace(trainer, "prediction_step", self._prediction_step(trainer))
        self._replace(trainer, "evaluation_loop", self._evaluation_loop(trainer))
        self._replace(trainer, "train", self.ahead.train(trainer.train))
        self._replace(trainer, "get_batch_samples", self.ahead.get_batch_samples(trainer.get_batch_samples))
        self._replace(trainer, "_prepare_input", self.ahead.prepare_input(trainer._prepare_input))
        if config.profile:
            self._replace(trainer, "train", self._profiled_train(trainer))
            self._replace(trainer, "log", self._profiled_log(trainer))
        if trainer.model_init is not None:
            self._replace(trainer, "call_model_init", self._call_model_init(trainer))

    def undo(self, trainer: Any) -> None:
        """Give every attribute back, newest first."""
        for owner, name, value in reversed(self._before):
            if value is _MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, value)
        unpatch_model(trainer.model)
        self.ahead.close()
        state = AcceleratorState()
        state.parallelism_config, state.device_mesh = self._mesh_before
        attach_group(None)

    def _replace(self, owner: Any, name: str, value: Any) -> None:
        self._before.append((owner, name, vars(owner).get(name, _MISSING)))
        setattr(owner, name, value)

    def _patch(self, model: Any) -> Patch:
        patch = patch_model(model, self.config, group=self.group)
        self.ahead.serve(patch.sharding)
        if self.profile is not None:
            self.profile.watch(patch.sharding)
        return patch

    def _count_once(self, trainer: Any) -> None:
        size, accelerator = self.group.size, trainer.accelerator
        gather = counting.gather_once(trainer, size)
        self._replace(accelerator, "gather_for_metrics", gather)
        self._replace(
            trainer,
            "gather_function",
            functools.partial(gather, use_gather_object=trainer.args.eval_use_gather_object),
        )
        self._replace(trainer, "_track_num_input_tokens", counting.track_tokens_once(trainer, size))
        self._replace(trainer, "floating_point_ops", counting.count_flops_once(trainer, size))
        # A dispatcher would cut one process's batch for all the others.
        self._replace(accelerator.dataloader_config, "dispatch_batches", False)
        if hasattr(trainer, "_tp_size"):
            # trl divides the tokens that it counts over processes by this.
            self._replace(trainer, "_tp_size", trainer._tp_size * size)

    def _give_losses_whole_batches(self, trainer: Any) -> None:
        """Losses that are computed outside the model see the outputs of all ranks, and count once."""
        for name in ("compute_loss_func", "label_smoother"):
            function = getattr(trainer, name, None)
            if function is not None:
                self.patch.sharding.full_outputs = True
                self._replace(trainer, name, counting.whole_batch_loss(function, self.group.size))

    def _prediction_step(self, trainer: Any) -> Any:
        """Put the outputs of all ranks together only when somebody will look at them."""
        original = trainer.prediction_step

        @functools.wraps(original)
        def prediction_step(
            model: Any, inputs: Any, prediction_loss_only: bool, *args: Any, **kwargs: Any
        ) -> Any:
            # trl derives its evaluation loss from per-token outputs, which are as small as the ids.
            self.patch.sharding.eval_outputs = not prediction_loss_only or hasattr(trainer, "_metrics")
            try:
                return original(model, inputs, prediction_loss_only, *args, **kwargs)
            finally:
                self.patch.sharding.eval_outputs = True

        return prediction_step

    def _evaluation_loop(self, trainer: Any) -> Any:
        """Evaluation before training must not cost training its DDP wrapper.

        Trainer prepares the bare model for an evaluation; accelerate marks it as prepared, and a later train() would
        then leave it unwrapped: no gradient would be averaged, on any number of processes.
        """
        original = trainer.evaluation_loop

        @functools.wraps(original)
        def evaluation_loop(*args: Any, **kwargs: Any) -> Any:
            model = trainer.model
            prepared = getattr(model, "_is_accelerate_prepared", False)
            result = original(*args, **kwargs)
            if not prepared and not trainer.is_fsdp_enabled:
                model._is_accelerate_prepared = False
            return result

        return evaluation_loop

    def _profiled_train(self, trainer: Any) -> Any:
        original = trainer.train

        @functools.wraps(original)
        def train(*args: Any, **kwargs: Any) -> Any:
            with Profile(self.patch, lambda: trainer.state.global_step) as self.profile:
                try:
                    return original(*args, **kwargs)
                finally:
                    self.profile = None

        return train

    def _profiled_log(self, trainer: Any) -> Any:
        """Evaluations log too, and the end of training: the figures belong to the loss of training steps."""
        original = trainer.log

        @functools.wraps(original)
        def log(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            if self.profile is not None and "loss" in logs:
                logs.update(self.profile.take())
            original(logs, *args, **kwargs)

        return log

    def _call_model_init(self, trainer: Any) -> Any:
        original = trainer.call_model_init

        @functools.wraps(original)
        def call_model_init(*args: Any, **kwargs: Any) -> Any:
            model = original(*args, **kwargs)
            full_outputs = self.patch.sharding.full_outputs
            self.patch = self._patch(model)
            self.patch.sharding.full_outputs = full_outputs
            return model

        return call_model_init


_attachments: weakref.WeakKeyDictionary[Any, Attachment] = weakref.WeakKeyDictionary()


def attach(trainer: AnyTrainer, config: SapConfig | str | Path | None = None, **options: Any) -> AnyTrainer:
    """Make a built trainer share each row of its batches over cp_size ranks.

    Call it once, after the trainer is built and before train() or evaluate(). Losses, gradients, evaluation and
    counters are those of one process that runs every document alone.

    Args:
        trainer: a transformers.Trainer or trl.SFTTrainer, possibly a subclass that leaves compute_loss alone.
        config: a SapConfig, the path of its YAML, or None.
        options: fields of SapConfig that override those of config.

    Returns:
        The same trainer.

    Raises:
        SapError: an unknown option, a cp_size that does not divide the processes, a model or a trainer that cannot be
            exact. Raised on every rank, before any communication; nothing has been changed then.
    """
    resolved = SapConfig.resolve(config, options)
    known = _attachments.get(trainer)
    if known is not None:
        if known.config == resolved:
            return trainer
        detach(trainer)
    any_trainer: Any = trainer
    accelerator = getattr(any_trainer, "accelerator", None)
    processes = 1 if accelerator is None else accelerator.num_processes
    refuse_unsupported(
        any_trainer, 2 if resolved.cp_size is None and processes > 1 else resolved.cp_size or 1
    )
    attention_layers(any_trainer.model)
    state = AcceleratorState()
    before = (state.parallelism_config, state.device_mesh)
    plugin = _plugin(accelerator, resolved)
    if plugin is not None:
        state.parallelism_config = plugin
        state.device_mesh = plugin.get_device_mesh(accelerator.device.type)
    else:
        attach_group(ALONE)
    attachment = _attachments[trainer] = Attachment(any_trainer, resolved, plugin, before)
    try:
        # On every rank: a kernel that cannot do what it is asked for is refused by all of them.
        report = _report(any_trainer, attachment, plugin)
    except SapError:
        detach(trainer)
        raise
    if accelerator.is_main_process:
        print(report, flush=True)
    return trainer


def detach(trainer: AnyTrainer) -> AnyTrainer:
    """Undo attach: model, trainer and accelerate's state are as before. A trainer never attached stays as it is."""
    attachment = _attachments.pop(trainer, None)
    if attachment is not None:
        attachment.undo(trainer)
    return trainer


def _plugin(accelerator: Any, config: SapConfig) -> SapPlugin | None:
    """The plugin of this run: the one the user built, or a new one; None for a single process."""
    existing = accelerator.parallelism_config
    if isinstance(existing, SapPlugin):
        if config.cp_size not in (None, existing.cp_size):
            raise LayoutError(
                f"cp_size={config.cp_size} was asked for, but the SapPlugin of this run has cp_size={existing.cp_size}."
                "\n  Give cp_size in one place only."
            )
        if config.ulysses_size not in ("auto", existing.ulysses_size):
            raise LayoutError(
                f"ulysses_size={config.ulysses_size} was asked for, but the SapPlugin of this run has "
                f"ulysses_size={existing.ulysses_size}.\n  Give ulysses_size in one place only."
            )
        return existing
    if existing is not None and existing.total_size > 1:
        raise ConfigError(
            f"A {type(existing).__name__} of {existing.total_size} ranks is set already. Use sap_hf.SapPlugin in its "
            "place, or leave parallelism_config out."
        )
    if accelerator.num_processes == 1:
        if config.cp_size not in (None, 1):
            raise LayoutError(
                f"cp_size={config.cp_size} does not divide the 1 process of this run.\n"
                f"  Start {config.cp_size} processes with accelerate launch, or use cp_size=1."
            )
        return None
    plugin = SapPlugin(cp_size=config.cp_size, ulysses_size=config.ulysses_size)
    plugin.resolve(accelerator.num_processes, accelerator.distributed_type == "FSDP")
    if config.strategy == "ulysses":
        plugin.ulysses_size = plugin.cp_size
    return plugin


def _report(trainer: Any, attachment: Attachment, plugin: SapPlugin | None) -> str:
    """Four lines: the mesh, tokens per optimizer step before and after, classes patched and how, the kernel and why."""
    processes, size = trainer.accelerator.num_processes, attachment.group.size
    after = counting.tokens_per_step(trainer, processes // size)
    lines = ["sap_hf: 1 process, every row on it" if plugin is None else f"sap_hf: {plugin}"]
    if size > 1:
        before = counting.tokens_per_step(trainer, processes)
        lines.append(
            f"sap_hf: per optimizer step {before} before, {after} now; gradient_accumulation_steps x {size} "
            "(or cp_size=1) would keep the batch"
        )
    else:
        lines.append(f"sap_hf: per optimizer step {after}")
    lines.append(f"sap_hf: patched {attachment.patch}")
    if attention_layers(trainer.model):
        lines.append(f"sap_hf: kernel {_kernel(trainer, attachment)}")
    return "\n".join(lines)


def _kernel(trainer: Any, attachment: Attachment) -> str:
    """The kernel of the first attention layer, and why; a layer that asks for more picks its own."""
    layer = next(iter(attachment.patch.sharding.layers.values()))
    config = trainer.model.config.get_text_config()
    head_dim = attachment.patch.sharding.shape.head_dim
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(trainer.accelerator.mixed_precision)
    _, why = pick(
        attachment.config.kernel,
        device_type=trainer.accelerator.device.type,
        dtype=dtype or next(trainer.model.parameters()).dtype,
        head_dim=getattr(layer, "qk_head_dim", head_dim),
        value_dim=getattr(layer, "v_head_dim", head_dim),
        softcap=getattr(config, "attn_logit_softcapping", None),
        window=None,
    )
    return why
