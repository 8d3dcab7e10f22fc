"""Layers that mix neighbouring tokens outside attention: what they need of the ranks before and after.

A Shard whose ranks hold consecutive rows -> Line: this rank's stretches of documents, the last rows of the rank before
for a convolution, and the state that a recurrence goes on from. Both end at the borders of documents.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import cast

import numpy as np
import torch

from sap_hf.errors import UnsupportedAttention
from sap_hf.models.bypass import once
from sap_hf.models.interface import Shard
from sap_hf.planning import Plan
from sap_hf.runtime.chain import Chain
from sap_hf.runtime.group import CpGroup, warm


@dataclasses.dataclass(frozen=True, eq=False)
class Line:
    """This rank's rows as stretches of documents, and how to pass things along the line of ranks.

    Attributes:
        cu_seqlens: borders of the stretches among this rank's C rows; padding rows are a stretch too.
        earlier: rows of the first stretch's document that earlier ranks hold.
        continues: the last stretch goes on on the next rank.
        chain: to the neighbours; only those that the first and the last stretch share.
    """

    cu_seqlens: tuple[int, ...]
    earlier: int
    continues: bool
    chain: Chain
    _derived: dict[tuple[int, torch.device], torch.Tensor] = dataclasses.field(default_factory=dict)

    @property
    def continued(self) -> bool:
        """Whether the first stretch began on an earlier rank."""
        return self.earlier > 0

    def halo(self, x: torch.Tensor, rows: int) -> torch.Tensor:
        """(1, rows, F) of x (1, C, F): what the ranks before hold in front of this rank's first row.

        Zeros before the start of the document. All ranks call it together, and none waits for another's result.

        Raises:
            UnsupportedAttention: a rank holds fewer rows than that, on all ranks alike.
        """
        held = self.cu_seqlens[-1]
        if held < rows:
            raise UnsupportedAttention(
                f"A rank holds {held} rows, and the layer's convolution reaches {rows} rows back.\n"
                "  Pack longer rows, or use fewer ranks."
            )
        came = self.chain.shift(x[:, held - rows :])
        if 0 < self.earlier < rows:
            # The document began inside the last rows of the rank before.
            came = torch.cat([torch.zeros_like(came[:, self.earlier :]), came[:, rows - self.earlier :]], 1)
        return came

    def spaced(self, x: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """x (1, C, F) with `rows` rows in front of every stretch: the halo of the first, zeros before the others.

        A causal convolution over rows + 1 rows of it sees nothing of another document.

        Returns:
            (1, C + stretches * rows, F), and (C,) int64 where the rows of x are in it.

        Raises:
            UnsupportedAttention: as halo.
        """
        places = self._places(rows, x.device)
        stretches = len(self.cu_seqlens) - 1
        spaced = x.new_zeros(1, x.shape[1] + stretches * rows, x.shape[2])
        return spaced.index_copy(1, places, torch.cat([self.halo(x, rows), x], 1)), places[rows:]

    def convolved(
        self, x: torch.Tensor, reach: int, convolve: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """(1, C, F) of x (1, C, F): a causal convolution of the row and `reach` rows before it, in its document alone.

        Args:
            convolve: what it does to (1, F, L); gives (1, F, L), or (1, F, L - reach) without the first rows.

        Raises:
            UnsupportedAttention: as halo.
        """
        spaced, kept = self.spaced(x, reach)
        out = convolve(spaced.transpose(1, 2)).transpose(1, 2)
        return out.index_select(1, kept - (spaced.shape[1] - out.shape[1]))

    def _places(self, rows: int, device: torch.device) -> torch.Tensor:
        """(rows + C,) where the halo and the rows of this rank are when every stretch has `rows` rows in front."""
        if (rows, device) not in self._derived:
            lengths = np.diff(self.cu_seqlens)
            lengths[0] += rows
            places = np.arange(lengths.sum()) + rows * np.repeat(np.arange(len(lengths)), lengths)
            self._derived[rows, device] = torch.from_numpy(places).to(device)
        return self._derived[rows, device]

    def receive(self, anchor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """State of the first stretch as the rank before left it; zeros where it is not continued.

        Args:
            anchor: a tensor that requires grad exactly where the state that is sent does.
        """
        return self.chain.receive(anchor, shape, dtype)

    def send(self, out: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """Pass on the last stretch's final state; returns out, through which the state's gradient comes back."""
        return self.chain.send(out, state) if self.continues else out


def line_of(shard: Shard, device: torch.device) -> Line:
    """The line of this rank's rows; derived once per batch.

    Raises:
        UnsupportedAttention: ranks do not hold consecutive rows.
    """
    return cast(
        Line, once(shard.plan, ("line", shard.group.rank), lambda: _line(shard.plan, shard.group, device))
    )


def _line(plan: Plan, group: CpGroup, device: torch.device) -> Line:
    documents, rank = plan.documents, group.rank
    rows = plan.rows(rank)
    if plan.layout != "contiguous" or (rows != rank * len(rows) + np.arange(len(rows))).any():
        raise UnsupportedAttention(
            f"Layers that mix neighbouring tokens need consecutive rows on every rank, not layout={plan.layout!r}.\n"
            "  Set layout='contiguous'."
        )
    first, stop = int(rows[0]), int(rows[-1]) + 1
    borders = documents.cu_seqlens
    inside = borders[(borders > first) & (borders < stop)]
    earlier = 0
    if first < documents.rows:
        earlier = first - int(borders[documents.index_of(rows[:1])[0]])
    continues = stop < documents.rows and stop not in borders
    if group.device is not None:
        warm(group.device, device)
    return Line(
        tuple(int(border) - first for border in (first, *inside, stop)),
        earlier,
        continues,
        Chain(group.device, rank - 1 if earlier else None, rank + 1 if continues else None),
    )
