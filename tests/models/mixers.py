"""One layer that mixes neighbouring tokens: its rows on ranks, against every document through it alone.

A test module makes the layers. Its tests take a `case` and a `size`; `on_ranks` runs those that the session asks for.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import sap_hf
from sap_hf.models.bypass import Call
from sap_hf.models.interface import Shard
from sap_hf.models.table import MIXERS
from sap_hf.runtime.group import ALONE, world
from tests.dist import run_ranks
from tests.models import families
from tests.models.tiny import COMMON

EXACT = 1e-10
WIDTH = COMMON["hidden_size"]
WORLDS = (1, 2, 3)
WIDEST = max(WORLDS)
# Of the layer. In autocast it runs in bfloat16.
DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "autocast": torch.float32,
}
# A document and a number of ranks: the last has no row of it, yet as many rows as a convolution reaches back.
EMPTY_RANK = ((11,), 5)
# Entries whose mean error says something.
MANY = 500


@dataclasses.dataclass(frozen=True)
class Case:
    """What runs: a layer by the module's name for it, its documents, one of DTYPES, and which function runs it."""

    layer: str
    lengths: tuple[int, ...]
    dtype: str = "float64"
    way: str = "shared"


@dataclasses.dataclass
class Found:
    """(rows, E) of outputs and of gradients of what goes in, and the gradients of the parameters."""

    out: Tensor
    x: Tensor
    parameters: dict[str, Tensor]


# Makes the layer of a name and a dtype; runs a layer on documents, as a rank of so many.
Make = Callable[[str, torch.dtype], Any]
Way = Callable[[Any, Sequence[int], int, int], Found]
# What every rank found, by the number of ranks.
OnRanks = dict[int, list[dict[Case, Any]]]


def inputs(layer: Any, rows: int) -> tuple[Tensor, Tensor]:
    """What goes in and the gradients of what comes out, (rows, E) each."""
    generator = torch.Generator().manual_seed(1)
    # Row by row: padding at the end changes nothing before it.
    both = torch.randn(rows, 2, WIDTH, generator=generator, dtype=torch.float64)
    x, wanted = both.to(next(layer.parameters()).dtype).unbind(1)
    return x, wanted


def through(layer: Any, document: Tensor) -> Tensor:
    """A document (rows, E) through the layer as transformers has it: (rows, E)."""
    options = {
        "position_ids": torch.arange(len(document))[None],
        "position_embeddings": None,
        "attention_mask": None,
        "use_cache": False,
    }
    known = inspect.signature(layer.forward).parameters
    out: Tensor = layer(document[None], **{name: each for name, each in options.items() if name in known})[0]
    return out.reshape(document.shape)


def alone(layer: Any, lengths: Sequence[int]) -> Found:
    """Every document through the layer by itself."""
    x, wanted = inputs(layer, sum(lengths))
    x.requires_grad_()
    out = torch.cat([through(layer, document) for document in x.split(list(lengths))])
    out.backward(wanted)
    return _found(layer, x, out)


def shared(layer: Any, lengths: Sequence[int], rank: int, size: int) -> Found:
    """This rank's rows through the patched layer."""
    run, x, wanted = _on_rank(layer, lengths, rank, size)
    x.requires_grad_()
    out = run(x)
    out.backward(wanted)
    return _found(layer, x, out)


def trained_alone(layer: Any, lengths: Sequence[int], rank: int, size: int) -> Found:
    """As shared, and each gradient while all but what it is of is frozen."""
    run, x, wanted = _on_rank(layer, lengths, rank, size)
    layer.requires_grad_(False)

    def train(leaf: Tensor) -> None:
        leaf.requires_grad_()
        run(x).backward(wanted)
        leaf.requires_grad_(False)

    for leaf in (x, *layer.parameters()):
        train(leaf)
    return _found(layer, x, run(x))


def _on_rank(
    layer: Any, lengths: Sequence[int], rank: int, size: int
) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor]:
    """The patched layer on this rank, its rows of what goes in, and the gradients of what comes out."""
    plan = sap_hf.plan(lengths, cp_size=size, layout="contiguous")
    rows = torch.from_numpy(plan.rows(rank))
    x, wanted = (each[rows] for each in inputs(layer, plan.rows_per_rank * size))
    call = Call(layer, Shard(plan, world() if size > 1 else ALONE, sap_hf.SapConfig()), type(layer).forward)

    def run(x: Tensor) -> Tensor:
        out: Tensor = MIXERS[type(layer).__name__].sharded(call, x[None], cache=None, unknown=1)[0]
        return out.reshape(x.shape)

    return run, x, wanted * (rows < sum(lengths))[:, None]


def _found(layer: Any, x: Tensor, out: Tensor) -> Found:
    assert x.grad is not None
    parameters = {name: each.grad.double() for name, each in layer.named_parameters()}
    return Found(out.detach().double(), x.grad.double(), parameters)


def attempt(make: Make, case: Case, function: Callable[..., Found], *args: int) -> Any:
    """What the function finds of the case, or a traceback."""
    if case.dtype == "float64":
        context: Any = families.only_float64()
    else:
        context = torch.autocast("cpu", torch.bfloat16, enabled=case.dtype == "autocast")
    try:
        with context:
            return function(copy.deepcopy(make(case.layer, DTYPES[case.dtype])), case.lengths, *args)
    except Exception:  # noqa: BLE001 - shown by the test of this case
        return traceback.format_exc()


@functools.cache
def _alone(make: Make, case: Case) -> Found:
    """Every document of the case alone; computed once for all numbers of ranks."""
    found = attempt(make, case, alone)
    assert isinstance(found, Found), found
    return found


def _truth(make: Make, case: Case) -> Found:
    """As _alone, in float64."""
    return _alone(make, Case(case.layer, case.lengths))


def on_ranks(request: pytest.FixtureRequest, make: Make, ways: Mapping[str, Way]) -> OnRanks:
    """The cases of this module's tests that the session runs, each on the ranks that it asks for."""
    here = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    asked: dict[int, dict[Case, None]] = {}
    for params in (item.callspec.params for item in here):
        if "case" in params:
            asked.setdefault(params["size"], {})[params["case"]] = None
    return {
        size: run_ranks(_all, size, make, ways, list(some), poison=True)
        if size > 1
        else [_all(0, 1, make, ways, list(some))]
        for size, some in asked.items()
    }


def _all(rank: int, size: int, make: Make, ways: Mapping[str, Way], some: Iterable[Case]) -> dict[Case, Any]:
    return {case: attempt(make, case, ways[case.way], rank, size) for case in some}


def seen_through_a_rank(layer: Any, rows: int) -> float:
    """How much the last third of a document's rows differs when the first third is another; of its largest entry."""
    x, _ = inputs(layer, rows)
    other = torch.cat([-x[: rows // 3], x[rows // 3 :]])
    with torch.no_grad(), families.only_float64():
        one, two = (through(layer, each)[2 * rows // 3 :] for each in (x, other))
    return float((one - two).abs().max() / one.abs().max())


def assert_exact(found: OnRanks, make: Make, case: Case, size: int) -> None:
    """All that the ranks found is what the documents alone give, in parts of the largest entry of each."""
    for what, (one, other) in _pairs(_together(found, case, size), _truth(make, case)).items():
        assert float((one - other).abs().max() / other.abs().max()) < EXACT, what


def assert_rounds_as_usual(found: OnRanks, make: Make, case: Case, size: int) -> None:
    """Mean errors are at most twice those of the documents alone, of all that has many entries: a few are luck."""
    truth = _truth(make, case)
    usual = _pairs(_alone(make, case), truth)
    for what, (one, other) in _pairs(_together(found, case, size), truth).items():
        if other.numel() >= MANY:
            assert (one - other).abs().mean() < 2 * (usual[what][0] - other).abs().mean(), what


def _together(found: OnRanks, case: Case, size: int) -> Found:
    """The rows of the documents from all ranks, and the sums of their gradients."""
    parts, rows = [each[case] for each in found[size]], sum(case.lengths)
    for part in parts:
        assert isinstance(part, Found), part
    return Found(
        torch.cat([part.out for part in parts])[:rows],
        torch.cat([part.x for part in parts])[:rows],
        {name: sum(part.parameters[name] for part in parts) for name in parts[0].parameters},
    )


def _pairs(found: Found, truth: Found) -> dict[str, tuple[Tensor, Tensor]]:
    parameters = {name: (found.parameters[name], truth.parameters[name]) for name in truth.parameters}
    return {"out": (found.out, truth.out), "x": (found.x, truth.x), **parameters}


def each_case(
    layers: Iterable[str], packs: Mapping[str, tuple[int, ...]], kinds: Sequence[str], way: str = "shared"
) -> list[Any]:
    """Every layer with every pack on every number of ranks, as parameters `case, size`.

    `make test` has of each layer in `kinds` every pack on the most ranks, and the first pack on all numbers of them; of
    other layers the first pack on the most ranks. `make matrix` has the rest.
    """
    found, first = [], next(iter(packs))
    for layer in layers:
        for label, lengths in packs.items():
            for size in WORLDS:
                most, plain = size == WIDEST, label == first
                kept = (most or plain) if layer in kinds else (most and plain)
                found.append(_param(Case(layer, lengths, way=way), size, label, kept))
        lengths, size = EMPTY_RANK
        found.append(_param(Case(layer, lengths, way=way), size, "a rank of padding", False))
    return found


def rounded_cases(
    layers: Iterable[str],
    lengths: tuple[int, ...],
    dtypes: Sequence[str],
    kinds: Sequence[str],
    way: str = "shared",
) -> list[Any]:
    """Every layer in every dtype on the most ranks; `make test` has those of `kinds` where they run in bfloat16."""
    return [
        _param(Case(layer, lengths, dtype, way), WIDEST, dtype, layer in kinds and dtype != "float32")
        for layer in layers
        for dtype in dtypes
    ]


def _param(case: Case, size: int, label: str, kept: bool) -> Any:
    name = f"{case.way}-{case.layer}-{label}-{size}"
    return pytest.param(case, size, id=name, marks=[] if kept else pytest.mark.matrix)
