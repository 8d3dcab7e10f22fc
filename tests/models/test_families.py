"""Every supported family on a pack shared by 2 and 4 ranks: logits, loss, gradients of documents alone."""

from __future__ import annotations

import traceback
from typing import Any

import pytest
import torch

from tests.dist import run_ranks
from tests.float64 import whole_float64
from tests.models import families

NAMES = [*families.FAMILIES, *families.WINDOWED]
EXACT = 1e-11


def shared(rank: int, world: int, layouts: tuple[str, ...]) -> dict[str, Any]:
    """What one rank gets for every family and layout: {(family, layout): answer or traceback}."""
    results = {}
    for name in NAMES:
        for layout in layouts:
            results[name, layout] = attempt(name, layout)
    return results


def attempt(name: str, layout: str) -> Any:
    try:
        with whole_float64():
            return one(name, layout)
    except Exception:  # noqa: BLE001 - shown by the test of this family
        return traceback.format_exc()


def one(name: str, layout: str) -> dict[str, Any]:
    import torch.distributed as dist

    import sap_hf

    model = families.build(name)
    patch = sap_hf.patch_model(model, layout=layout)
    row = families.pack()
    out = model(**row)
    out.loss.backward()
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()
    # The same pack with another first document: what the others see of it is what leaks.
    ids = row["input_ids"].clone()
    first = families.LENGTHS[0]
    ids[0, :first] = families.VOCAB - ids[0, :first] + 2
    with torch.no_grad():
        changed = model(input_ids=ids, position_ids=row["position_ids"]).logits
    return {
        "report": str(patch),
        "logits": out.logits.detach()[0],
        "loss": out.loss.item(),
        "gradients": families.gradients(model),
        "leak": float((changed - out.logits.detach())[0, first:].abs().max()),
        "changed": float((changed - out.logits.detach())[0, :first].abs().max()),
    }


@pytest.fixture(scope="module")
def on_ranks() -> dict[int, list[dict[str, Any]]]:
    return {
        2: run_ranks(shared, 2, ("contiguous", "zigzag"), timeout=120),
        4: run_ranks(shared, 4, ("auto",), timeout=120),
    }


@pytest.mark.parametrize("world, layout", [(2, "contiguous"), (2, "zigzag"), (4, "auto")])
@pytest.mark.parametrize("name", NAMES)
def test_model_equals_documents_run_alone(
    on_ranks: dict[int, list[dict[str, Any]]], name: str, world: int, layout: str
) -> None:
    with whole_float64():
        truth = families.documents_alone(families.build_dense(name), families.pack(), families.LENGTHS)
    for rank, results in enumerate(on_ranks[world]):
        result = results[name, layout]
        assert isinstance(result, dict), result
        assert float((result["logits"] - truth.logits).abs().max()) < EXACT, f"rank {rank}"
        assert abs(result["loss"] - truth.loss) < EXACT, f"rank {rank}"
        error, where = families.worst(result["gradients"], truth.gradients)
        assert error < EXACT, f"rank {rank}: {where}"


@pytest.mark.parametrize("name", NAMES)
def test_a_document_does_not_see_the_one_before(on_ranks: dict[int, list[dict[str, Any]]], name: str) -> None:
    for results in on_ranks.values():
        for result in results[0].items():
            if result[0][0] == name:
                assert isinstance(result[1], dict), result[1]
                assert result[1]["leak"] == 0.0
                assert result[1]["changed"] > 0.1


@pytest.mark.parametrize("name", NAMES)
def test_report_names_the_patched_classes(on_ranks: dict[int, list[dict[str, Any]]], name: str) -> None:
    family = families.WINDOWED.get(name, (name, {}))[0]
    for results in on_ranks[2]:
        result = results[name, "contiguous"]
        assert isinstance(result, dict), result
        assert result["report"] == f"{families.FAMILIES[family].attention} x2: via interface"


def test_the_oracle_sees_a_window_and_a_softcap() -> None:
    """The families whose attention is special really differ from their plain form on this pack."""
    for name, plain in (
        ("mistral", {"sliding_window": None}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"sliding_window": 64}),
        ("gemma3_text", {"sliding_window": 64}),
        ("smollm3", {"no_rope_layers": [1, 1]}),
        ("granite", {"attention_multiplier": 0.35}),
    ):
        row = families.pack()
        special = families.documents_alone(families.build_dense(name), row, families.LENGTHS)
        other = families.documents_alone(families.build_dense(name, **plain), row, families.LENGTHS)
        assert float((special.logits - other.logits).abs().max()) > 1e-3, name
