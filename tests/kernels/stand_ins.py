"""flash-attn 2 and torch's own flash attention on the CPU, with exactly their signatures, in dense torch of any dtype.

The semantics are those of flash-attn's documentation: causal and windows are bottom-right aligned, a window
(left, right) lets query i read keys [i + n_k - n_q - left, i + n_k - n_q + right], both ends included; lse is
(H, total_q). What the real kernels refuse or would read wrongly is an assertion here.
"""

from __future__ import annotations

from contextlib import contextmanager

import torch

CALLS: list[str] = []


def _check(q, k, v, cu_q, cu_k, max_q, max_k):
    head_dim = q.shape[2]
    assert q.dim() == k.dim() == v.dim() == 3
    assert head_dim % 8 == 0 and head_dim <= 256
    assert k.shape[2] == v.shape[2] == head_dim and k.shape[:2] == v.shape[:2]
    assert q.shape[1] % k.shape[1] == 0
    for x in (q, k, v):
        assert x.stride(2) == 1 and x.stride(0) % 8 == x.stride(1) % 8 == x.storage_offset() % 8 == 0
    # 1 would enter flash-attn 2's decoding branch, which puts the groups of heads where rows belong.
    assert max_q > 1
    for cu, rows, most in ((cu_q, q.shape[0], max_q), (cu_k, k.shape[0], max_k)):
        assert cu.dtype == torch.int32 and cu.is_contiguous()
        assert cu[0] == 0 and cu[-1] == rows and cu.diff().max() <= most and cu.diff().min() > 0


def _written(place, result):
    """The result, in the place where there is one, as the libraries want it."""
    if place is None:
        return result
    assert place.shape == result.shape and place.dtype == result.dtype and place.stride(2) == 1
    assert place.stride(0) % 8 == place.stride(1) % 8 == place.storage_offset() % 8 == 0
    return place.copy_(result)


def _logits(q, k, cu_q, cu_k, scale, causal, left, right, softcap):
    """(H, n_q, n_k) with -inf where not read; and d(capped)/d(raw)."""
    if causal:
        right = 0
    seen = torch.zeros(q.shape[0], k.shape[0], dtype=torch.bool)
    for s in range(len(cu_q) - 1):
        for i in range(cu_q[s], cu_q[s + 1]):
            at = i - cu_q[s] + (cu_k[s + 1] - cu_k[s]) - (cu_q[s + 1] - cu_q[s])
            first = 0 if left < 0 else max(0, at - left)
            end = cu_k[s + 1] - cu_k[s] if right < 0 else min(cu_k[s + 1] - cu_k[s], at + right + 1)
            seen[i, cu_k[s] + first : cu_k[s] + end] = True
    raw = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(q.shape[1] // k.shape[1], 1)) * scale
    capped, slope = raw, torch.ones_like(raw)
    if softcap:
        capped = torch.tanh(raw / softcap) * softcap
        slope = 1 - (capped / softcap) ** 2
    return capped.masked_fill(~seen, float("-inf")), slope


def _forward(q, k, v, cu_q, cu_k, max_q, max_k, scale, causal, left, right, softcap):
    _check(q, k, v, cu_q, cu_k, max_q, max_k)
    logits, _ = _logits(q, k, cu_q.tolist(), cu_k.tolist(), scale, causal, left, right, softcap)
    v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    return torch.einsum("hqk,khd->qhd", logits.softmax(-1), v), logits.logsumexp(-1)


def _backward(dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, scale, causal, left, right, softcap):
    _check(q, k, v, cu_q, cu_k, max_q, max_k)
    assert dout.shape == out.shape == q.shape and dout.dtype == out.dtype == q.dtype
    assert lse.shape == (q.shape[1], q.shape[0]) and lse.is_contiguous()
    logits, slope = _logits(q, k, cu_q.tolist(), cu_k.tolist(), scale, causal, left, right, softcap)
    heads = q.shape[1] // k.shape[1]
    k_all, v_all = k.repeat_interleave(heads, 1), v.repeat_interleave(heads, 1)
    probs = torch.exp(logits - lse.unsqueeze(-1))
    dprobs = torch.einsum("qhd,khd->hqk", dout, v_all)
    dlogits = probs * (dprobs - (out * dout).sum(-1).T.unsqueeze(-1)) * slope * scale
    dk = torch.einsum("hqk,qhd->khd", dlogits, q).unflatten(1, (-1, heads)).sum(2)
    dv = torch.einsum("hqk,qhd->khd", probs, dout).unflatten(1, (-1, heads)).sum(2)
    return torch.einsum("hqk,khd->qhd", dlogits, k_all), dk, dv


# flash_attn 2.7 to 2.8.3, flash_attn/flash_attn_interface.py: names, order and defaults.


def _wrapped_flash_attn_varlen_forward(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes=None,
    return_softmax: bool = False,
    block_table=None,
    leftpad_k=None,
    seqused_k=None,
    zero_tensors: bool = False,
):
    CALLS.append("flash 2 forward")
    assert dropout_p == 0.0 and not return_softmax and not zero_tensors
    assert alibi_slopes is block_table is leftpad_k is seqused_k is None
    out, lse = _forward(
        *(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale),
        *(causal, window_size_left, window_size_right, softcap),
    )
    return out, lse, torch.empty(0), torch.empty(2, dtype=torch.int64)


def _wrapped_flash_attn_varlen_backward(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    dq,
    dk,
    dv,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes,
    deterministic: bool,
    rng_state=None,
    zero_tensors: bool = False,
):
    CALLS.append(f"flash 2 backward {deterministic=}")
    assert dropout_p == 0.0 and not zero_tensors and alibi_slopes is rng_state is None
    grads = _backward(
        *(dout, q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k),
        *(softmax_scale, causal, window_size_left, window_size_right, softcap),
    )
    for place, grad in zip((dq, dk, dv), grads):
        _written(place, grad)
    return torch.empty(0)


@contextmanager
def aten_flash_on_cpu():
    """Give aten's three flash operators a CPU kernel, so that torch.nn.attention.varlen runs here.

    The dispatcher checks every call against the operators' schemas.
    """

    def forward(
        query,
        key,
        value,
        cum_seq_q,
        cum_seq_k,
        max_q,
        max_k,
        dropout_p,
        is_causal,
        return_debug_mask,
        *,
        scale=None,
        window_size_left=None,
        window_size_right=None,
        seqused_k=None,
        alibi_slopes=None,
        block_table=None,
        num_splits=None,
    ):
        CALLS.append("aten forward")
        assert dropout_p == 0.0 and seqused_k is alibi_slopes is block_table is num_splits is None
        left = -1 if window_size_left is None else window_size_left
        right = -1 if window_size_right is None else window_size_right
        out, lse = _forward(
            query, key, value, cum_seq_q, cum_seq_k, max_q, max_k, scale, is_causal, left, right, None
        )
        return out, lse, torch.empty(2, dtype=torch.uint64), torch.empty(0), torch.empty(0)

    def forward_inplace(out, *args, **options):
        # The dropout's state, which it is named for, is all that the other has more.
        result, lse, *_ = forward(*args, **options)
        CALLS[-1] = "aten forward in place"
        _written(out, result)
        return lse

    def backward(
        grad_out,
        query,
        key,
        value,
        out,
        logsumexp,
        cum_seq_q,
        cum_seq_k,
        max_q,
        max_k,
        dropout_p,
        is_causal,
        rng_state,
        unused,
        *,
        scale=None,
        window_size_left=None,
        window_size_right=None,
    ):
        CALLS.append("aten backward")
        assert dropout_p == 0.0
        left = -1 if window_size_left is None else window_size_left
        right = -1 if window_size_right is None else window_size_right
        return _backward(
            *(grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k),
            *(scale, is_causal, left, right, None),
        )

    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_flash_attention_forward", forward, "CPU")
        library.impl("_flash_attention_forward_no_dropout_inplace", forward_inplace, "CPU")
        library.impl("_flash_attention_backward", backward, "CPU")
        yield
