"""Positions: where counting starts, and rotary frequencies that depend on the length of documents."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import sap_hf
from sap_hf.models.positions import check_lengths, first_position
from tests.models import families
from tests.models.tiny import VARIANTS, config_of

DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}


def longrope(reach: int) -> Any:
    _, fields = VARIANTS["phi3-longrope"]
    rope = {**fields["rope_parameters"], "original_max_position_embeddings": reach}
    return config_of("phi3", **{**fields, "rope_parameters": rope, "original_max_position_embeddings": reach})


@pytest.mark.parametrize("lengths", [(4, 30), (31, 40), (30,), (31,)])
def test_documents_on_one_side_of_longrope_s_reach_are_taken(lengths: tuple[int, ...]) -> None:
    check_lengths(longrope(30), np.array(lengths))


def test_documents_on_both_sides_of_longrope_s_reach_are_refused() -> None:
    with pytest.raises(sap_hf.errors.DocumentError, match=r"4 and of 31 tokens.*longrope.*beyond 30"):
        check_lengths(longrope(30), np.array([4, 31]))


def test_documents_beyond_dynamic_frequencies_are_refused() -> None:
    config = config_of("llama", rope_parameters=DYNAMIC)
    check_lengths(config, np.array([64, 3]))
    with pytest.raises(sap_hf.errors.DocumentError, match=r"65 tokens.*max_position_embeddings=64"):
        check_lengths(config, np.array([65, 3]))


def test_frequencies_of_single_layer_types_are_looked_at_too() -> None:
    rope = {
        "full_attention": DYNAMIC,
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "other": None,
    }
    config = SimpleNamespace(model_type="some", rope_parameters=rope, max_position_embeddings=8)
    with pytest.raises(sap_hf.errors.DocumentError, match="9 tokens"):
        check_lengths(config, np.array([9]))


def test_a_model_refuses_such_a_pack_in_its_forward() -> None:
    model_type, fields = VARIANTS["phi3-longrope"]
    model: Any = families.build(model_type, **fields)
    sap_hf.patch_model(model)
    row = families.pack((31, 5))
    with pytest.raises(sap_hf.errors.DocumentError, match="longrope"):
        model(**row)
    sap_hf.unpatch_model(model)
    # Plain again: nothing is added to its positions.
    assert model(**row, use_cache=False).logits.shape == (1, 36, families.VOCAB)


@pytest.mark.parametrize("name, first", [("roberta", 1), ("xmod", 1), ("bert", 0), ("llama", 0)])
def test_the_first_token_has_the_position_that_transformers_gives_it(name: str, first: int) -> None:
    config = config_of(name)
    assert first_position(config) == first
    model: Any = families.build(name)
    ids = families.pack()["input_ids"][:, :9]
    with torch.no_grad():
        given = model(input_ids=ids, position_ids=torch.arange(9)[None] + first, use_cache=False).logits
        assert torch.equal(given, model(input_ids=ids, use_cache=False).logits)
