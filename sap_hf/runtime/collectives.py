"""Collectives around a sharded forward: one number summed, or all rows put together. Both differentiable.

Gradients follow the convention of DDP and FSDP, which average them over all ranks: what a rank computes from the
whole pack is computed on every rank of the cp group, so its gradient counts cp_size times less.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from sap_hf.planning import Plan
from sap_hf.runtime.group import CpGroup, all_gather


def sum_over_ranks(value: torch.Tensor, group: CpGroup) -> torch.Tensor:
    """Sum of a scalar over the cp group, on every rank; a gradient arrives times cp_size."""
    if group.size == 1:
        return value
    total: torch.Tensor = _Sum.apply(value, group)  # type: ignore[no-untyped-call]
    return total


def gather_rows(rows: torch.Tensor, plan: Plan, group: CpGroup) -> torch.Tensor:
    """(T, ...) in pack order from every rank's (C, ...); a gradient arrives times cp_size."""
    everyone = rows
    if group.size > 1:
        everyone = _Gather.apply(rows, group)  # type: ignore[no-untyped-call]
    order = np.argsort(np.concatenate([plan.rows(rank) for rank in range(plan.cp_size)]), kind="stable")
    return everyone.index_select(0, torch.from_numpy(order[: plan.documents.rows]).to(rows.device))


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: torch.Tensor, group: CpGroup) -> torch.Tensor:
        ctx.size = group.size
        total = value.clone()
        dist.all_reduce(total, group=group.device)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient * ctx.size, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, group: CpGroup) -> torch.Tensor:
        ctx.group, ctx.count = group, len(rows)
        return all_gather(rows.contiguous(), group.size, group.device)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        start = ctx.group.rank * ctx.count
        return gradient[start : start + ctx.count] * ctx.group.size, None
