"""patch_model / unpatch_model: route a transformers model's attention through sap_hf, and give everything back."""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from sap_hf.config import SapConfig
from sap_hf.errors import UnsupportedAttention
from sap_hf.models import router
from sap_hf.models.families import attention_layers, mixer_layers
from sap_hf.models.interface import NAME, originals, register, unregister
from sap_hf.models.sharding import Sharding
from sap_hf.models.table import TABLE, entry_of, install, mixes, uninstall
from sap_hf.runtime.group import CpGroup, attached, world


@dataclasses.dataclass(eq=False)
class Patch:
    """What `patch_model` did to a model.

    Attributes:
        classes: {class: number of layers}, of those that attend and those that mix neighbouring tokens.
        table: those of them that are patched at class level; the others go through the interface.
        sharding: the hooks that cut batches and put outputs together.
        original: the attention implementation before.
    """

    classes: dict[type, int]
    table: list[type]
    sharding: Sharding
    original: str
    configs: list[Any] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        return ", ".join(
            f"{cls.__name__} x{count}: via {self._way(cls)}" for cls, count in self.classes.items()
        )

    @property
    def through_interface(self) -> bool:
        """Whether some class attends, and all that do ask transformers' attention interface."""
        return len(self.classes) > len(self.table) and all(mixes(cls) for cls in self.table)

    def _way(self, cls: type) -> str:
        return f"{TABLE[cls.__name__].method} patched" if cls in self.table else "interface"


_patches: weakref.WeakKeyDictionary[torch.nn.Module, Patch] = weakref.WeakKeyDictionary()


def patch_model(
    model: torch.nn.Module,
    config: SapConfig | str | Path | None = None,
    *,
    group: CpGroup | None = None,
    **options: Any,
) -> Patch:
    """Make a transformers model share every batch that it is given with the ranks of its cp group.

    Every rank passes the same whole batch; the model computes this rank's rows. In training, gradients averaged over
    all ranks (as DDP and FSDP do) are those of the whole batch; `loss` is the whole batch's mean on every rank, unless
    num_items_in_batch is passed: then it is this rank's part of the sum, divided by it, as Trainer expects.

    Args:
        model: a causal language model, or a PEFT model around one.
        config: a SapConfig, the path of its YAML, or None; options override its fields.
        group: the ranks that share a batch; None is the group that SapPlugin made, else all ranks, which make process
            groups of their own the first time: all of them must come here.

    A deep copy of a patched model is a plain one.

    Returns:
        The Patch; `print` it to see the classes patched and how.

    Raises:
        UnsupportedAttention: a model that is not exact, or not with this layout; nothing has been changed then.
    """
    resolved = SapConfig.resolve(config, options)
    if model in _patches:
        unpatch_model(model)
    attention, mixers = attention_layers(model), mixer_layers(model)
    base = _base(model)
    # It refuses what no batch could change, before anything is changed.
    sharding = Sharding(model, attention, mixers, resolved, group or attached() or world())
    register()
    original = base.config._attn_implementation
    classes = Counter(type(layer) for layer in (attention | mixers).values())
    patch = Patch(
        classes=dict(classes),
        table=[cls for cls in classes if entry_of(cls) is not None],
        sharding=sharding,
        original=original,
    )
    _set_implementation(base, patch, NAME)
    if base.config._attn_implementation != NAME:
        sharding.remove(model)
        raise UnsupportedAttention(
            f"{base.config.model_type}: {type(base).__name__} refused the attention implementation {NAME!r}."
        )
    install(patch.table)
    router.install(base)
    patch.configs = list(
        {id(module.config): module.config for module in base.modules() if hasattr(module, "config")}.values()
    )
    for each in patch.configs:
        originals[id(each)] = original
    sharding.on_copy = functools.partial(_restore, patch)
    _patches[model] = patch
    return patch


def unpatch_model(model: torch.nn.Module) -> None:
    """Undo `patch_model`; a model that was never patched stays as it is."""
    patch = _patches.pop(model, None)
    if patch is None:
        for hook in list(model._forward_pre_hooks.values()):
            sharding = getattr(hook, "__self__", None)
            if isinstance(sharding, Sharding) and sharding.on_copy is not None:
                sharding.on_copy(model)
        return
    _restore(patch, model)
    uninstall(patch.table)
    router.uninstall(_base(model))
    for config in patch.configs:
        originals.pop(id(config), None)
    unregister()


def find_patch(model: torch.nn.Module) -> Patch | None:
    """The patch of a model, or None."""
    return _patches.get(model)


def _base(model: Any) -> Any:
    """The transformers model in a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _restore(patch: Patch, model: torch.nn.Module) -> None:
    """Give the patched model, or a copy of it, back what it had; what others use too stays."""
    patch.sharding.remove(model)
    _set_implementation(_base(model), patch, patch.original)


def _set_implementation(base: Any, patch: Patch, name: str) -> None:
    if patch.through_interface:
        base.set_attn_implementation(name)
    else:
        # These classes chose their attention when they were built; the name is for the mask alone.
        base.config._attn_implementation_internal = name
