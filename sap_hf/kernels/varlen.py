"""torch.nn.attention.varlen, the CUDA kernel that comes with torch: one call for all segments, no loop, no host sync.

q, k, v and Segments (cu_seqlens already on the device) -> out in q's dtype, lse float32. Below it is what the calls of
all flash attention libraries have in common.
"""

from __future__ import annotations

import inspect
from functools import lru_cache, partial

import torch
from torch.nn.functional import pad

from sap_hf.kernels.interface import NOWHERE, Places, Scoring, Segments, cut, fitting

__all__ = ["Varlen", "capability", "fit", "max_q", "nothing", "why_no_varlen", "window_of", "zeros"]

# The libraries read 16 bytes (8 half-precision numbers) at a time.
ALIGNMENT = 8


class Varlen:
    """torch.nn.attention.varlen: GQA and window inside, no softcap."""

    name = "varlen"

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        segments: Segments,
        scoring: Scoring,
        place: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Kernel.forward`; float16 or bfloat16 in, out in the same dtype."""
        assert scoring.softcap is None, "refused by pick"
        if segments.max_q == 0:
            return nothing(q, v)
        from torch.nn.attention import varlen

        value_dim = v.shape[2]
        q, k, v = fit(q, k, v)
        # TODO(torch>=2.13): older ones have no varlen_attn_out.
        place = fitting(place, q) if hasattr(varlen, "varlen_attn_out") else None
        attend = varlen.varlen_attn if place is None else partial(varlen.varlen_attn_out, place)
        out, lse_Hn = attend(
            q,
            k,
            v,
            segments.cu_q_device,
            segments.cu_k_device,
            max_q(segments),
            segments.max_k,
            return_aux=varlen.AuxRequest(lse=True),
            scale=scoring.scale,
            window_size=window_of(segments, scoring.window),
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return cut(out, value_dim), lse_Hn.transpose(0, 1)

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
        """See `Kernel.backward`; the gradients are in q's dtype, in new memory."""
        assert scoring.softcap is None, "refused by pick"
        if segments.max_q == 0:
            return zeros(q, k, v)
        from torch.nn.attention.varlen import _varlen_attn_backward

        head_dim, value_dim = q.shape[2], v.shape[2]
        dout, q, k, v, out = fit(dout.to(q.dtype), q, k, v, out.to(q.dtype))
        left, right = window_of(segments, scoring.window)
        dq, dk, dv = _varlen_attn_backward(
            dout,
            q,
            k,
            v,
            out,
            lse.transpose(0, 1).contiguous(),
            segments.cu_q_device,
            segments.cu_k_device,
            max_q(segments),
            segments.max_k,
            # As varlen_attn itself derives it: the flag means "no left limit".
            (left, right) == (-1, 0),
            # State of the dropout generator; there is no dropout.
            torch.zeros(2, dtype=torch.uint64, device=q.device),
            scoring.scale,
            [left, right],
        )
        return cut(dq, head_dim), cut(dk, head_dim), cut(dv, value_dim)


@lru_cache(maxsize=1)
def why_no_varlen() -> str | None:
    """Why torch.nn.attention.varlen cannot be used here; None when it can."""
    from torch.nn.attention.varlen import varlen_attn

    missing = {"scale", "window_size", "enable_gqa"} - set(inspect.signature(varlen_attn).parameters)
    if missing:
        return f"torch {torch.__version__}'s varlen_attn has no {', '.join(sorted(missing))}; 2.12 has"
    return None


def capability() -> tuple[int, int]:
    """Compute capability of the current CUDA device; flash attention needs 8.0."""
    return torch.cuda.get_device_capability()


def window_of(segments: Segments, window: int | None) -> tuple[int, int]:
    """(keys to the left, keys to the right) of a query's own, bottom-right aligned; -1 is no limit."""
    assert window is None or (segments.causal and window > 0), f"window {window} needs causal segments"
    left = -1 if window is None else window - 1
    return left, 0 if segments.causal else -1


def max_q(segments: Segments) -> int:
    """An upper bound of the rows per segment; 1 would enter the decoding branch, which has no backward."""
    return max(segments.max_q, 2)


def fit(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Equal widths, a multiple of 8, by zero columns (they change neither logits nor out); aligned rows."""
    width = -(-max(x.shape[2] for x in tensors) // ALIGNMENT) * ALIGNMENT
    padded = (x if x.shape[2] == width else pad(x, (0, width - x.shape[2])) for x in tensors)
    return tuple(x if _aligned(x) else x.clone(memory_format=torch.contiguous_format) for x in padded)


def _aligned(x: torch.Tensor) -> bool:
    """False for a slice whose rows start between two 16-byte words, e.g. k in a buffer of 64 + 60 columns."""
    return (
        x.stride(2) == 1
        and x.stride(0) % ALIGNMENT == x.stride(1) % ALIGNMENT == 0
        and x.storage_offset() % ALIGNMENT == 0
    )


def nothing(q: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Out and lse of no queries."""
    return q.new_zeros(0, q.shape[1], v.shape[2]), q.new_zeros(0, q.shape[1], dtype=torch.float32)


def zeros(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients where nothing was attended to."""
    return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
