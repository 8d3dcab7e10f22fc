"""One case of attention over ranks: drawn from a seed, run on every rank, judged against documents run alone.

Case -> inputs (the same on every rank) -> run_cases, inside run_ranks -> one Answer per rank -> join -> judge
"""

from __future__ import annotations

import dataclasses
import functools
import traceback
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

import sap_hf
from tests.oracles import documents_alone

TENSORS = ("out", "dq", "dk", "dv", "dsinks")
# What the right answer depends on. All else in a case is a way to compute it.
ASKED = (
    "lengths",
    "heads",
    "kv_heads",
    "head_dim",
    "value_dim",
    "dtype",
    "sinks",
    "options",
    "seed",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """What is computed. `options` go to sap_hf.attention as they are."""

    lengths: tuple[int, ...]
    strategy: str = "sap"
    layout: str = "contiguous"
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    value_dim: int = 8
    dtype: str = "float64"
    sinks: bool = False
    options: tuple[tuple[str, float], ...] = ()
    remote_kv: str = "refetch"
    delivery: str = "auto"
    stages: int = 1
    whole: bool = True
    max_remote_rows: int | None = None
    ulysses_size: int = 1
    turns: int = 1
    heads_first: bool = False
    seed: int = 0

    def plan(self, world: int) -> Any:
        """The plan of this case on `world` ranks, made for the window that it uses."""
        made = _plan(
            lengths=self.lengths,
            cp_size=world,
            strategy=self.strategy,
            layout=self.layout,
            delivery=self.delivery,
            max_remote_rows=self.max_remote_rows,
            ulysses_size=self.ulysses_size,
            window=dict(self.options).get("window"),
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_dim=self.head_dim,
        )
        return _formed(made, self.stages, self.whole, self.turns)


# Cases of one process share a plan, as the layers of a model do: most of them differ in what it does not know.
_plan = functools.cache(sap_hf.plan)


@functools.cache
def _formed(made: Any, stages: int, whole: bool, turns: int) -> Any:
    # How many stages and turns there are, and whether keys are read in parts, plan() decides by the model.
    return dataclasses.replace(made, stages=stages, whole=whole, turns=turns)


@dataclasses.dataclass
class Inputs:
    """q, k, v and the gradient of out, for all rows of the padded pack; padding holds garbage too."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    sinks: torch.Tensor | None


def inputs(case: Case, world: int) -> Inputs:
    """Draw the tensors of a case: rounded to its dtype, the same for everybody who asks."""
    draw = torch.Generator().manual_seed(1000 + case.seed)
    dtype = getattr(torch, case.dtype)
    padded = -(-sum(case.lengths) // world) * world

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    return Inputs(
        normal(padded, case.heads, case.head_dim),
        normal(padded, case.kv_heads, case.head_dim),
        normal(padded, case.kv_heads, case.value_dim),
        normal(padded, case.heads, case.value_dim),
        normal(case.heads) if case.sinks else None,
    )


def as_views(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, stored heads first: what a model's transpose leaves behind."""
    return tensor.transpose(0, 1).contiguous().transpose(0, 1)


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: Any, case: Case, sinks: Any, group: Any = None
) -> torch.Tensor:
    """sap_hf.attention with all that the case asks for."""
    options = dict(case.options)
    if sinks is not None:
        options["sinks"] = sinks
    return sap_hf.attention(q, k, v, plan, group=group, remote_kv=case.remote_kv, **options)


def run_case(rank: int, world: int, case: Case, group: Any = None) -> dict[str, Any]:
    """Forward and backward of one case on this rank: its rows, out and gradients."""
    given = inputs(case, world)
    plan = case.plan(world)
    rows = torch.from_numpy(plan.rows(rank))
    q, k, v = (tensor[rows].clone().requires_grad_() for tensor in (given.q, given.k, given.v))
    sinks = None if given.sinks is None else given.sinks.clone().requires_grad_()
    arranged = [as_views(tensor) for tensor in (q, k, v)] if case.heads_first else (q, k, v)
    out = attend(*arranged, plan, case, sinks, group)
    (out * given.dout[rows]).sum().backward()
    answer = {"rows": rows.numpy(), "out": out.detach(), "dq": q.grad, "dk": k.grad, "dv": v.grad}
    if sinks is not None:
        answer["dsinks"] = sinks.grad
    return answer


def run_cases(rank: int, world: int, cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Run every case; one that raises is remembered with its traceback: the others are still judged."""
    return [_run_or_explain(rank, world, case) for case in cases]


def _run_or_explain(rank: int, world: int, case: Case) -> dict[str, Any]:
    try:
        return run_case(rank, world, case)
    except Exception:  # noqa: BLE001  shown by judge(), for this case alone
        return {"error": traceback.format_exc()}


def join(case: Case, answers: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """One tensor over all rows of the padded pack per result; dsinks summed over the ranks."""
    for rank, answer in enumerate(answers):
        if "error" in answer:
            raise AssertionError(f"rank {rank} raised in {case}:\n{answer['error']}")
    rows = torch.from_numpy(np.concatenate([answer["rows"] for answer in answers]))
    joined = {}
    for name in answers[0]:
        if name == "dsinks":
            joined[name] = sum(answer[name].double() for answer in answers)
        elif name != "rows":
            parts = torch.cat([answer[name] for answer in answers])
            joined[name] = torch.full_like(parts, torch.nan)
            joined[name][rows] = parts
    return joined


def right_answer(case: Case, world: int) -> dict[str, torch.Tensor]:
    """Each document alone in float64, from the same (rounded) inputs, without padding; the same tensors each time."""
    asked = {name: getattr(case, name) for name in ASKED}
    return _right_answer(Case(**asked), world)


@functools.cache
def _right_answer(case: Case, world: int) -> dict[str, torch.Tensor]:
    given = inputs(case, world)
    total = sum(case.lengths)
    q, k, v = (tensor[:total].double().requires_grad_() for tensor in (given.q, given.k, given.v))
    sinks = None if given.sinks is None else given.sinks.double().requires_grad_()
    options = dict(case.options)
    out = documents_alone(
        q,
        k,
        v,
        case.lengths,
        scale=options.get("softmax_scale"),
        window=options.get("window"),
        softcap=options.get("softcap"),
        sinks=sinks,
    )
    (out * given.dout[:total].double()).sum().backward()
    answer = {"out": out.detach(), "dq": q.grad, "dk": k.grad, "dv": v.grad}
    if sinks is not None:
        answer["dsinks"] = sinks.grad
    return answer


def judge(case: Case, world: int, answers: Sequence[dict[str, Any]], tolerance: float) -> None:
    """Hold out and every gradient to the right answer, and padding rows to exactly 0.

    tolerance: largest absolute difference, on inputs drawn from a standard normal distribution.
    """
    got = join(case, answers)
    right = right_answer(case, world)
    total = sum(case.lengths)
    assert set(got) == set(right)
    for name, expected in right.items():
        found = got[name]
        if name != "dsinks":
            assert found.dtype == getattr(torch, case.dtype), f"{name} is {found.dtype} in {case}"
            assert not found[total:].any(), f"{name} of padding rows is not 0 in {case} on {world} ranks"
            found = found[:total]
        error = (found.double() - expected).abs().max().item()
        # Not `error > tolerance`: NaN must fail.
        assert error <= tolerance, f"{name} is off by {error:.3g} in {case} on {world} ranks"
