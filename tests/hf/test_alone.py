"""What attach costs where nothing is shared: at cp_size=1 a training step dispatches the tensor operations that plain
transformers with sdpa dispatches on the same pack, plus a constant for each layer and one for the model.

Counted on the CPU, with its own kernel and with the CUDA kernel, which is one operation for all documents.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sap_hf
from sap_hf.kernels.varlen import Varlen
from tests.hf import material, oracle
from tests.kernels.stand_ins import aten_flash_on_cpu

LAYERS = (2, 4)
# Documents of more rows than the CPU kernel puts into one call together.
PACKS = {2: (70, 90), 3: (66, 100, 80), 10: tuple(range(66, 76))}
CPU_CALL = "aten._scaled_dot_product_flash_attention_for_cpu"
CALL = {"varlen": "torch_attn._varlen_attn", "sdpa": CPU_CALL}


@dataclasses.dataclass(frozen=True)
class More:
    """Operations of a step beyond those of plain transformers; below 0 where plain transformers has more.

    per_layer: plain attention fits the mask to its dtype and copies its out in every layer; ours has views from
        (1, H, T, D) to the kernel's (T, H, D) and back, and what the kernel allocates.
    per_call: the CPU kernel has one call for each longer document, with slices of all that goes in and comes out.
    per_model: documents, labels and positions are read and cut once; plain transformers makes the mask once.
    """

    per_layer: int
    per_call: int
    per_model: int


# By kernel, direction, and whether an operation computes or moves numbers or is a mere view.
MORE = {
    ("varlen", "forward", "work"): More(per_layer=-4, per_call=0, per_model=-3),
    ("varlen", "forward", "view"): More(per_layer=0, per_call=0, per_model=2),
    ("varlen", "backward", "work"): More(per_layer=-2, per_call=0, per_model=1),
    ("varlen", "backward", "view"): More(per_layer=2, per_call=0, per_model=0),
    ("sdpa", "forward", "work"): More(per_layer=-4, per_call=3, per_model=-3),
    ("sdpa", "forward", "view"): More(per_layer=13, per_call=6, per_model=2),
    ("sdpa", "backward", "work"): More(per_layer=-1, per_call=6, per_model=1),
    ("sdpa", "backward", "view"): More(per_layer=20, per_call=10, per_model=0),
}


class Dispatched(TorchDispatchMode):
    """Counts every operation inside the block; asking for a device is none."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace != "prim":
            self.counts[str(func)] += 1
            # _unsafe_view is a view that does not say so.
            view = func.is_view or func is torch.ops.aten._unsafe_view.default
            self.kinds["view" if view else "work"] += 1
        return func(*args, **(kwargs or {}))


@dataclasses.dataclass(frozen=True)
class Step:
    """One training step: what it dispatched, and its loss and gradients."""

    forward: Dispatched
    backward: Dispatched
    loss: torch.Tensor
    gradients: dict[str, torch.Tensor]


def step(folder: Path, layers: int, lengths: tuple[int, ...], attached: bool) -> Step:
    """The second of two steps on one pack: the first loads what is made once."""
    from transformers import Trainer

    material.fresh_state()
    model: Any = material.tiny_llama(num_hidden_layers=layers)
    trainer = Trainer(model=model, args=material.arguments(str(folder)))
    (row,) = material.documents([lengths])
    batch = {name: values.unsqueeze(0) for name, values in material.packed(row).items()}
    if attached:
        sap_hf.attach(trainer, cp_size=1)
    model.train()
    try:
        for _ in range(2):
            model.zero_grad()
            with Dispatched() as forward:
                loss = model(**batch, use_cache=False).loss
            with Dispatched() as backward:
                loss.backward()
    finally:
        sap_hf.detach(trainer)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    return Step(forward, backward, loss.detach(), gradients)


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Step by kernel ("plain" is transformers'), layers and documents; each is run once."""

    @functools.cache
    def run(kernel: str, layers: int, documents: int) -> Step:
        folder, lengths = tmp_path_factory.mktemp("alone"), PACKS[documents]
        if kernel != "varlen":
            return step(folder, layers, lengths, kernel == "sdpa")
        attention = importlib.import_module("sap_hf.runtime.attention")
        # pick would take the CPU's kernel.
        with aten_flash_on_cpu(), mock.patch.object(attention, "_pick", return_value=(Varlen(), "asked for")):
            return step(folder, layers, lengths, True)

    return run


ALL = [(kernel, layers, documents) for kernel in CALL for layers in LAYERS for documents in PACKS]


@pytest.mark.parametrize(("kernel", "layers", "documents"), ALL)
def test_a_step_is_plain_transformers_plus_a_constant(
    steps: Any, kernel: str, layers: int, documents: int
) -> None:
    ours, plain = steps(kernel, layers, documents), steps("plain", layers, documents)
    calls = 1 if kernel == "varlen" else documents
    for direction, suffix in (("forward", ""), ("backward", "_backward")):
        mine, theirs = getattr(ours, direction), getattr(plain, direction)
        assert mine.counts[f"{CALL[kernel]}{suffix}.default"] == layers * calls
        for kind in ("work", "view"):
            more = MORE[kernel, direction, kind]
            expected = more.per_model + layers * (more.per_layer + more.per_call * calls)
            extra = mine.kinds[kind] - theirs.kinds[kind]
            assert extra == expected, (direction, kind, mine.counts - theirs.counts)


@pytest.mark.parametrize(("kernel", "layers", "documents"), ALL)
def test_every_matrix_product_norm_and_rotation_is_there_as_often(
    steps: Any, kernel: str, layers: int, documents: int
) -> None:
    ours, plain = steps(kernel, layers, documents), steps("plain", layers, documents)
    for name in (
        "mm.default",
        "mul.Tensor",
        "rsqrt.default",
        "silu.default",
        "silu_backward.default",
        "neg.default",
    ):
        found = [[run.counts[f"aten.{name}"] for run in (of.forward, of.backward)] for of in (ours, plain)]
        assert found[0] == found[1] != [0, 0], name


@pytest.mark.parametrize(("kernel", "layers", "documents"), ALL)
def test_loss_and_gradients_are_those_of_plain_transformers(
    steps: Any, kernel: str, layers: int, documents: int
) -> None:
    ours, plain = steps(kernel, layers, documents), steps("plain", layers, documents)
    assert oracle.worst(ours.loss, plain.loss) < material.EXACT
    assert oracle.worst(ours.gradients, plain.gradients) < material.EXACT
