"""Query heads in groups of different sizes, for kernels that expect H to be a multiple of K.

Nine query heads on three kv heads, shared by two ranks, are five on two and four on two: readers (3, 2) and (1, 3).
"""

from __future__ import annotations

import dataclasses

import torch

from sap_hf.kernels.interface import NOWHERE, Kernel, Places, Scoring, Segments


@dataclasses.dataclass(frozen=True, eq=False)
class Uneven:
    """A kernel that gives every query head a kv head of its own; gradients of one kv head are summed.

    Attributes:
        kernel: computes with as many kv heads as query heads.
        readers: for each kv head, the query heads that read it; they follow each other.
    """

    kernel: Kernel
    readers: tuple[int, ...]

    @property
    def name(self) -> str:
        """Of the kernel that computes."""
        return self.kernel.name

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        segments: Segments,
        scoring: Scoring,
        place: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As in Kernel, with k and v (n_k, len(readers), ...)."""
        return self.kernel.forward(q, self._repeat(k), self._repeat(v), segments, scoring, place)

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        segments: Segments,
        scoring: Scoring,
        places: Places = NOWHERE,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As in Kernel; dk and dv are at least float32, in new memory."""
        of_q, _, _ = places
        dq, dk, dv = self.kernel.backward(
            dout, q, self._repeat(k), self._repeat(v), out, lse, segments, scoring, (of_q, None, None)
        )
        return dq, self._sum(dk), self._sum(dv)

    def _repeat(self, x_nKD: torch.Tensor) -> torch.Tensor:
        heads = [x_nKD[:, i : i + 1].expand(-1, count, -1) for i, count in enumerate(self.readers)]
        return torch.cat(heads, dim=1)

    def _sum(self, x_nHD: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(x_nHD.dtype, torch.float32)
        return torch.stack([part.sum(1, dtype=wide) for part in x_nHD.split(self.readers, dim=1)], dim=1)
