"""Hybrid models, with the cheapest of them: what is planned and refused, and that no layer is passed by.

That they are exact is in the matrix, and with recomputed layers in test_patch.
"""

from __future__ import annotations

from typing import Any

import pytest

import sap_hf
from sap_hf.errors import UnsupportedAttention
from sap_hf.models import table
from tests.dist import run_ranks
from tests.models import families
from tests.models.matrix import anatomy
from tests.models.tiny import WINDOW
from tests.models.walk import model_of


@pytest.mark.parametrize("layout", ["zigzag", "balanced"])
def test_a_layout_that_parts_neighbours_is_refused_and_changes_nothing(layout: str) -> None:
    model = model_of("lfm2")
    before = anatomy(model)
    with pytest.raises(UnsupportedAttention, match=rf"\.0\.conv \(Lfm2ShortConv\) .* layout='{layout}'"):
        sap_hf.patch_model(model, layout=layout)
    assert anatomy(model) == before


@pytest.mark.parametrize("options", [{}, {"layout": "contiguous"}, {"strategy": "ring"}])
def test_a_hybrid_is_planned_with_neighbours_together(options: dict[str, Any]) -> None:
    model: Any = families.build("lfm2")
    patch = sap_hf.patch_model(model, **options)
    model(**families.pack())
    plan = patch.sharding.last_plan
    assert plan is not None
    assert plan.layout == "contiguous"
    sap_hf.unpatch_model(model)


def test_the_report_names_both_kinds_of_layers() -> None:
    model = model_of("lfm2")
    report = str(sap_hf.patch_model(model))
    sap_hf.unpatch_model(model)
    assert report == "Lfm2Attention x1: via interface, Lfm2ShortConv x2: via forward patched"


@pytest.mark.parametrize(
    ("name", "windows"),
    [
        ("bamba", {None: 1}),
        ("gpt_neo", {None: 2, WINDOW: 1}),
        ("lfm3", {None: 1, WINDOW: 1}),
        ("llama4_text", {None: 1, 3: 2}),
        ("mamba2", {None: 0}),
        ("zamba2", {None: 1}),
    ],
)
def test_plans_weigh_the_layers_that_attend_with_what_they_see(
    name: str, windows: dict[int | None, int]
) -> None:
    model = model_of(name)
    found = sap_hf.patch_model(model).sharding.windows
    sap_hf.unpatch_model(model)
    assert found == windows


def test_a_mixer_that_nobody_patches_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(table.MIXERS, "Lfm2ShortConv")
    monkeypatch.delitem(table.TABLE, "Lfm2ShortConv")
    with pytest.raises(UnsupportedAttention, match=r"lfm2: model\.layers\.0\.conv \(Lfm2ShortConv\) mixes"):
        sap_hf.patch_model(model_of("lfm2"))


def test_a_mixer_that_is_passed_by_is_noticed() -> None:
    model: Any = families.build("lfm2")
    sap_hf.patch_model(model)
    model.model.layers[2].conv.forward = lambda hidden_states, **kwargs: hidden_states
    with pytest.raises(UnsupportedAttention, match=r"1 of 3 .* the first is model\.layers\.2\.conv"):
        model(**families.pack())
    sap_hf.unpatch_model(model)


def too_short(rank: int, world: int) -> str:
    model = families.build("lfm3")
    sap_hf.patch_model(model)
    with pytest.raises(UnsupportedAttention) as caught:
        model(**families.pack((7,)))
    return str(caught.value)


def test_a_shard_shorter_than_the_convolution_is_refused_on_every_rank() -> None:
    for message in run_ranks(too_short, 2):
        assert "holds 4 rows" in message
        assert "reaches 6 rows back" in message


def test_one_process_keeps_documents_apart() -> None:
    with families.only_float64():
        model: Any = families.build("lfm2")
        truth = families.documents_alone(families.build_plain("lfm2"), families.pack(), families.LENGTHS)
        sap_hf.patch_model(model)
        out = model(**families.pack())
        out.loss.backward()
        sap_hf.unpatch_model(model)
    assert float((out.logits[0].detach() - truth.logits).abs().max()) < 1e-10
    assert families.worst(families.gradients(model), truth.gradients)[0] < 1e-10
