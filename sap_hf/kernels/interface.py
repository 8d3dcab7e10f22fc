"""One interface for every attention kernel, and the choice of the kernel.

q, k, v of this rank and Segments (which rows read which) -> out, lse; with the final out, lse -> dq, dk, dv.
`runtime` calls a kernel several times with disjoint keys and combines the answers with `merge`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch

from sap_hf.errors import UnsupportedAttention

__all__ = ["NOWHERE", "Kernel", "Places", "Scoring", "Segments", "cut", "fitting", "pick", "space"]

HALF_DTYPES = (torch.float16, torch.bfloat16)
FLASH_MAX_HEAD_DIM = 256
NAMES = ("reference", "sdpa", "varlen", "flash", "flex")
# Besides the reference, by device; the fastest first.
FASTEST = {"cpu": ("sdpa",), "cuda": ("flash", "varlen", "flex")}


@dataclass(frozen=True, eq=False)
class Segments:
    """Which rows attend to which in one kernel call.

    Query rows [cu_q[i], cu_q[i+1]) read key rows [cu_k[i], cu_k[i+1]).
    Compared and hashed by identity: a kernel keeps what it derived from one batch's Segments for all layers.
    """

    cu_q: tuple[int, ...]
    """S + 1 bounds of query rows; starts at 0, ends at the number of query rows."""
    cu_k: tuple[int, ...]
    """S + 1 bounds of key rows; starts at 0, ends at the number of key rows."""
    max_q: int
    """Query rows of the largest segment."""
    max_k: int
    """Key rows of the largest segment."""
    causal: bool
    """True: bottom-right aligned, query i of n_q reads key j iff j <= i + n_k - n_q. False: every key."""
    cu_q_device: torch.Tensor
    """cu_q as int32 on the compute device, so that no layer copies it again."""
    cu_k_device: torch.Tensor
    """cu_k as int32 on the compute device."""

    @classmethod
    def build(
        cls, cu_q: Sequence[int], cu_k: Sequence[int], causal: bool, device: torch.device | str
    ) -> Segments:
        """Check the bounds and put them on the compute device, once per batch.

        Args:
            cu_q, cu_k: S + 1 bounds each, strictly growing: no segment is empty on either side. S may be 0.
            causal: bottom-right aligned; needs n_k >= n_q in every segment, so that every query reads a key.
        """
        cu_q, cu_k = tuple(map(int, cu_q)), tuple(map(int, cu_k))
        assert len(cu_q) == len(cu_k) >= 1, f"{len(cu_q)} bounds of queries, {len(cu_k)} of keys"
        assert cu_q[0] == cu_k[0] == 0, f"bounds start at {cu_q[0]} and {cu_k[0]}, not at 0"
        sizes_q = [hi - lo for lo, hi in pairwise(cu_q)]
        sizes_k = [hi - lo for lo, hi in pairwise(cu_k)]
        assert all(n > 0 for n in sizes_q + sizes_k), f"empty segment in {cu_q} x {cu_k}"
        if causal:
            assert all(m >= n for n, m in zip(sizes_q, sizes_k)), (
                f"fewer keys than queries in {cu_q} x {cu_k}"
            )

        return cls(
            cu_q=cu_q,
            cu_k=cu_k,
            max_q=max(sizes_q, default=0),
            max_k=max(sizes_k, default=0),
            causal=causal,
            cu_q_device=torch.tensor(cu_q, dtype=torch.int32).to(device),
            cu_k_device=torch.tensor(cu_k, dtype=torch.int32).to(device),
        )

    def bounds(self) -> list[tuple[int, int, int, int]]:
        """(first query row, end, first key row, end) of every segment."""
        return [(*q, *k) for q, k in zip(pairwise(self.cu_q), pairwise(self.cu_k))]


@dataclass(frozen=True)
class Scoring:
    """How the queries of a layer score their keys: the same in all of its calls.

    Attributes:
        scale: factor on q . k.
        window: a query reads the last `window` keys, its own included (j > i + n_k - n_q - window);
            only with causal segments. None: no limit.
        softcap: logits become softcap * tanh(logits / softcap). None: off.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None


# Where dq, dk and dv may be written: each contiguous, with the shape and dtype of q, k or v; None is nowhere.
Places = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
NOWHERE: Places = (None, None, None)


class Kernel(Protocol):
    """What `runtime` asks of an attention kernel.

    A result that the caller has a place for may be written there, instead of being copied there. A kernel that does so
    returns that very tensor; one that cannot (its results are wider, its heads padded) returns another.
    """

    name: str

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        segments: Segments,
        scoring: Scoring,
        place: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attend inside every segment.

        Args:
            q: (n_q, H, D); any strides, last dim contiguous.
            k, v: (n_k, K, D) and (n_k, K, Dv), H a multiple of K: query head h reads kv head h // (H / K).
                Both may be slices of one [n_k, K, D + Dv] buffer.
            place: where out may be written: (n_q, H, Dv), q's dtype, contiguous.

        Returns:
            out (n_q, H, Dv): q's dtype or a wider one. lse (n_q, H): natural log of the sum of exp of the
            scaled, capped logits; float32, float64 when q is float64.
        """
        ...

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
        """Gradients of this call's share of an attention.

        Args:
            dout: (n_q, H, Dv), gradient of the final out.
            out, lse: the FINAL ones of these query rows, merged over all calls; P = exp(logits - lse) then
                sums to less than 1 over this call's keys, which makes the sum of all gradients exact.
            places: where dq, dk and dv may be written.

        Returns:
            dq, dk, dv shaped like q, k, v; their dtype or a wider one.
        """
        ...


def fitting(place: torch.Tensor | None, like: torch.Tensor, width: int | None = None) -> torch.Tensor | None:
    """The place, if a result (n, heads, width) in the dtype of `like` can be written to it.

    Args:
        width: None is that of `like`.
    """
    shape = (*like.shape[:2], like.shape[2] if width is None else width)
    fits = place is not None and place.shape == shape and place.dtype == like.dtype
    return place if fits else None


def space(
    place: torch.Tensor | None, like: torch.Tensor, width: int | None = None, zeros: bool = False
) -> torch.Tensor:
    """The place if it is `fitting`, else new memory; with zeros, or with whatever it holds."""
    found = fitting(place, like, width)
    if found is not None:
        return found.zero_() if zeros else found
    shape = (*like.shape[:2], like.shape[2] if width is None else width)
    return like.new_zeros(shape) if zeros else like.new_empty(shape)


def cut(result: torch.Tensor, width: int) -> torch.Tensor:
    """Without the columns that a kernel has added; itself where there are none."""
    return result if result.shape[2] == width else result[..., :width]


def pick(
    name: str,
    *,
    device_type: str,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    softcap: float | None,
    window: int | None,
) -> tuple[Kernel, str]:
    """Choose the kernel: by name, or the fastest that is exact for what is asked.

    Args:
        name: auto | reference | sdpa | varlen | flash | flex.
        dtype: of q, k and v inside the kernel (under autocast: the autocast dtype).
        head_dim, value_dim: of the heads; they may differ.

    Returns:
        The kernel and one sentence saying why. A named kernel that cannot do it raises UnsupportedAttention.
    """
    if name != "auto" and name not in NAMES:
        raise UnsupportedAttention(
            f"kernel={name!r} does not exist.\n  Use one of: auto, {', '.join(NAMES)}."
        )
    if window is not None and window < 1:
        raise UnsupportedAttention(
            f"window={window}: a query reads at least its own key.\n  Use a window of 1 or more, or None."
        )

    def make(kernel: str) -> tuple[Kernel | None, str]:
        return _make(kernel, device_type, dtype, max(head_dim, value_dim), softcap)

    if name != "auto":
        kernel, why = make(name)
        if kernel is None:
            raise UnsupportedAttention(f"kernel={name!r}: {why}.\n  Use kernel='auto' or 'reference'.")
        return kernel, f"{name}: asked for ({why})"

    passed_over: dict[str, list[str]] = {}
    for candidate in (*FASTEST.get(device_type, ()), "reference"):
        kernel, why = make(candidate)
        if kernel is not None:
            others = [f"{' and '.join(names)} passed over: {reason}" for reason, names in passed_over.items()]
            return kernel, "; ".join([f"{candidate}: fastest exact here ({why})", *others])
        passed_over.setdefault(why, []).append(candidate)
    raise AssertionError("the reference computes everything")


def _make(
    name: str, device_type: str, dtype: torch.dtype, head_dim: int, softcap: float | None
) -> tuple[Kernel | None, str]:
    """The kernel and what it is; or None and why it cannot do what is asked."""
    # Here, not above: the kernels import this module.
    from sap_hf.kernels import flash, flex, reference, sdpa, varlen

    if name == "reference":
        return reference.Reference(), "plain torch, slow"
    if name == "sdpa":
        if device_type != "cpu":
            return None, f"on the CPU only, the tensors are on {device_type}"
        if softcap is not None:
            return None, f"torch's CPU attention has no softcap, the model asks for {softcap}"
        return sdpa.Sdpa(), "torch's CPU flash attention"

    if device_type != "cuda":
        return None, f"on CUDA only, the tensors are on {device_type}"
    if dtype not in HALF_DTYPES:
        return None, f"float16 or bfloat16 only, q is {dtype}; train with bf16=True (autocast)"
    if head_dim > FLASH_MAX_HEAD_DIM:
        return None, f"head_dim {head_dim} is over {FLASH_MAX_HEAD_DIM}"
    major, minor = varlen.capability()
    if major < 8:
        return None, f"from compute capability 8.0 (Ampere) on, this GPU has {major}.{minor}"
    if name == "flash":
        return flash.find(head_dim)
    if name == "flex":
        why_not = flex.why_no_flex()
        return (flex.Flex(), "torch's FlexAttention, compiled") if why_not is None else (None, why_not)
    why_not = varlen.why_no_varlen()
    if softcap is not None:
        why_not = f"torch.nn.attention.varlen has no softcap, the model asks for {softcap}; flash-attn has it"
    return (varlen.Varlen(), "torch.nn.attention.varlen") if why_not is None else (None, why_not)
