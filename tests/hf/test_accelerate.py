"""A training loop of one's own with Accelerator and SapPlugin, no Trainer: patch_model is all that it needs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import sap_hf
from tests.dist import run_ranks
from tests.hf import material
from tests.hf.oracle import Recipe, train, worst

ENV = {"ACCELERATE_USE_CPU": "true"}
LEARNING_RATE = 0.1


def loop(rank: int, world: int, cp_size: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and parameters after one pass over the packs, dealt to the data-parallel groups in turn."""
    from accelerate import Accelerator

    accelerator = Accelerator(parallelism_config=sap_hf.SapPlugin(cp_size=cp_size))
    model: Any = material.tiny_llama()
    sap_hf.patch_model(model)
    rows = [material.packed(row) for row in material.documents(material.PACKS)]
    loader = torch.utils.data.DataLoader(rows, batch_size=1, collate_fn=material.stack)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    losses = []
    for batch in loader:
        loss = model(**batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    parameters = {name: p.detach().clone() for name, p in accelerator.unwrap_model(model).named_parameters()}
    return losses, parameters


@pytest.mark.parametrize("world, cp_size", [(2, 2), (3, 3)])
def test_a_loop_of_ones_own_equals_documents_run_alone(world, cp_size):
    steps = [[[row]] for row in material.documents(material.PACKS)]
    expected = train(material.tiny_llama(), steps, Recipe(learning_rate=LEARNING_RATE, max_grad_norm=0.0))
    for losses, parameters in run_ranks(loop, world, cp_size, init=False, env=ENV):
        assert worst(losses, expected.losses) < material.EXACT
        assert worst(parameters, expected.parameters) < material.EXACT
