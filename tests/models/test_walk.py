"""Every causal-LM type of the installed transformers is exact in the matrix, or refused by a message that names it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import sap_hf
from tests.models.matrix import anatomy, cases, model_type_of
from tests.models.walk import every_type, model_of, refusal_of

CASES = cases()


@pytest.mark.parametrize("name", every_type())
def test_a_type_is_in_the_matrix_or_refused_by_name(name: str) -> None:
    message = refusal_of(name)
    if name in CASES:
        assert message is None
        return
    assert message is not None, "patched, but nothing shows that it is exact"
    assert message.startswith(f"{model_type_of(name)}: ")
    reason = message.splitlines()[0].removeprefix(f"{model_type_of(name)}: ")
    assert re.match(r"\S+ \(\w+\) |it is made of several models", reason), "no layer is named"


def test_the_page_names_every_type_and_variant() -> None:
    """Written by `make matrix`: a type that comes or goes makes it stale."""
    text = (Path(__file__).parents[2] / "docs" / "models.md").read_text(encoding="utf-8")
    exact, refused = (
        re.findall(r"^\| ([\w-]+) \| ", part, re.MULTILINE)[1:] for part in text.split("## Refused")
    )
    assert exact == list(CASES)
    assert refused == [name for name in every_type() if name not in CASES]
    assert "fails" not in text


@pytest.mark.parametrize("name", ["rwkv", "deepseek_v32", "bart", "gemma3"])
def test_a_refused_model_is_left_as_it_was(name: str) -> None:
    model = model_of(name)
    before = anatomy(model)
    with pytest.raises(sap_hf.errors.UnsupportedAttention):
        sap_hf.patch_model(model)
    assert anatomy(model) == before


def test_something_that_is_no_transformers_model_is_refused() -> None:
    with pytest.raises(sap_hf.errors.UnsupportedAttention, match="Linear"):
        sap_hf.patch_model(nn.Linear(2, 2))


def test_a_type_that_nobody_knows_is_refused() -> None:
    model = model_of("llama")
    model.config.model_type = "llama_of_tomorrow"
    with pytest.raises(sap_hf.errors.UnsupportedAttention, match=r"llama_of_tomorrow: .* has not been shown"):
        sap_hf.patch_model(model)
    assert next(model.parameters()).device == torch.device("meta")
