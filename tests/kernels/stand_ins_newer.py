"""flash-attn 3 and 4 on the CPU, with exactly their signatures, in the dense torch of stand_ins.

flash-attn 3: the operators of hopper/flash_api.cpp (TORCH_LIBRARY, 2.8.0 and later), which the dispatcher holds every
call against. flash-attn 4: flash_attn/cute/interface.py of 4.0.0b26, the oldest that is taken.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import torch

from tests.kernels.stand_ins import (
    CALLS,
    _backward,
    _forward,
    _wrapped_flash_attn_varlen_backward,
    _wrapped_flash_attn_varlen_forward,
    _written,
)

FORWARD_SCHEMA = """fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new = None, Tensor(v_new!)? v_new = None,
Tensor? q_v = None, Tensor(out!)? out = None, Tensor? cu_seqlens_q = None, Tensor? cu_seqlens_k = None,
Tensor? cu_seqlens_k_new = None, Tensor? seqused_q = None, Tensor? seqused_k = None, int? max_seqlen_q = None,
int? max_seqlen_k = None, Tensor? page_table = None, Tensor? kv_batch_idx = None, Tensor? leftpad_k = None,
Tensor? rotary_cos = None, Tensor? rotary_sin = None, Tensor? seqlens_rotary = None, Tensor? q_descale = None,
Tensor? k_descale = None, Tensor? v_descale = None, float? softmax_scale = None, bool is_causal = False,
int window_size_left = -1, int window_size_right = -1, int attention_chunk = 0, float softcap = 0.0,
bool is_rotary_interleaved = False, Tensor? scheduler_metadata = None, int num_splits = 0, bool? pack_gqa = None,
int sm_margin = 0) -> (Tensor(out!), Tensor, Tensor, Tensor)"""
# As in the hub's build and in later sources; 2.8 returns dq, dk and dv too.
BACKWARD_SCHEMA = """bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor softmax_lse,
Tensor(dq!)? dq = None, Tensor(dk!)? dk = None, Tensor(dv!)? dv = None, Tensor? cu_seqlens_q = None,
Tensor? cu_seqlens_k = None, Tensor? seqused_q = None, Tensor? seqused_k = None, int? max_seqlen_q = None,
int? max_seqlen_k = None, float? softmax_scale = None, bool is_causal = False, int window_size_left = -1,
int window_size_right = -1, float softcap = 0.0, bool deterministic = False, int sm_margin = 0)
-> (Tensor, Tensor, Tensor, Tensor, Tensor)"""


def _fwd(
    q,
    k,
    v,
    k_new,
    v_new,
    q_v,
    out,
    cu_q,
    cu_k,
    cu_k_new,
    used_q,
    used_k,
    max_q,
    max_k,
    page_table,
    kv_batch_idx,
    leftpad_k,
    rotary_cos,
    rotary_sin,
    seqlens_rotary,
    q_descale,
    k_descale,
    v_descale,
    scale,
    causal,
    left,
    right,
    attention_chunk,
    softcap,
    interleaved,
    scheduler_metadata,
    num_splits,
):
    # The dispatcher leaves out what stands at its default behind the last argument that does not.
    CALLS.append("flash 3 forward")
    assert num_splits == 1, "the default 0 lets the kernel split the keys, and round differently"
    assert used_q is used_k is q_v is page_table is None and attention_chunk == 0
    result, lse = _forward(q, k, v, cu_q, cu_k, max_q, max_k, scale, causal, left, right, softcap)
    return _written(out, result), lse, torch.empty(0), torch.empty(0)


def _bwd(
    dout,
    q,
    k,
    v,
    out,
    lse,
    dq,
    dk,
    dv,
    cu_q,
    cu_k,
    used_q,
    used_k,
    max_q,
    max_k,
    scale,
    causal=False,
    left=-1,
    right=-1,
    softcap=0.0,
    deterministic=False,
):
    CALLS.append(f"flash 3 backward {deterministic=}")
    assert used_q is used_k is None
    grads = _backward(
        *(dout, q, k, v, out, lse, cu_q, cu_k, max_q, max_k, scale, causal, left, right, softcap)
    )
    for place, grad in zip((dq, dk, dv), grads):
        _written(place, grad)
    return tuple(torch.empty(0) for _ in range(5))


@contextmanager
def flash_3_on_cpu(namespace="flash_attn_3"):
    """Define the operators, as loading the extension does; a hub kernel has a namespace of its own."""
    with torch.library._scoped_library(namespace, "DEF") as library:
        for schema in (FORWARD_SCHEMA, BACKWARD_SCHEMA):
            library.define(" ".join(schema.split()))
        library.impl("fwd", _fwd, "CPU")
        library.impl("bwd", _bwd, "CPU")
        yield getattr(torch.ops, namespace)


def _flash_attn_fwd(
    q,
    k,
    v,
    qv=None,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    seqused_q=None,
    seqused_k=None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    min_seqlen_k: int | None = None,
    page_table=None,
    softmax_scale: float | None = None,
    causal: bool = False,
    softcap: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    learnable_sink=None,
    tile_mn=None,
    mma_pv_is_rs=None,
    intra_wg_overlap=None,
    num_threads: int = 384,
    num_splits: int = 1,
    pack_gqa=None,
    _arch: int | None = None,
    score_mod=None,
    mask_mod=None,
    block_sparse_tensors=None,
    return_lse: bool = False,
    out=None,
    lse=None,
    aux_tensors=None,
    aux_scalars=None,
    q_descale=None,
    k_descale=None,
    v_descale=None,
    gather_kv_indices=None,
    scheduler_metadata=None,
    seqlen_k_per_split: int | None = None,
    disable_scheduler_metadata: bool = False,
):
    CALLS.append("flash 4 forward")
    assert return_lse, "without it lse is None unless something requires a gradient"
    assert num_splits == 1 and softcap != 0.0
    left, right = _limits(causal, window_size_left, window_size_right)
    result, lse = _forward(
        *(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal),
        *(left, right, softcap),
    )
    return _written(out, result), lse, None, None


def _flash_attn_bwd(
    q,
    k,
    v,
    out,
    dout,
    lse,
    softmax_scale: float | None = None,
    causal: bool = False,
    softcap: float = 0.0,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    m_block_size: int = 64,
    n_block_size: int = 128,
    num_threads: int = 256,
    pack_gqa: bool = False,
    num_stages_Q: int = 2,
    num_stages_dO: int = 2,
    SdP_swapAB: bool = False,
    dKV_swapAB: bool = False,
    dQ_swapAB: bool = False,
    AtomLayoutMSdP: int = 2,
    AtomLayoutNdKV: int = 2,
    AtomLayoutMdQ: int = 2,
    V_in_regs: bool = False,
    cu_seqlens_q=None,
    cu_seqlens_k=None,
    seqused_q=None,
    seqused_k=None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    deterministic: bool = False,
    dq=None,
    dk=None,
    dv=None,
    score_mod=None,
    score_mod_bwd=None,
    mask_mod=None,
    aux_tensors=None,
    aux_scalars=None,
    block_sparse_tensors=None,
    dlse=None,
    learnable_sink=None,
):
    CALLS.append(f"flash 4 backward {deterministic=}")
    # `softcap != 0.0` is how it asks: None would switch it on.
    assert softcap is not None and learnable_sink is dlse is None
    left, right = _limits(causal, window_size_left, window_size_right)
    grads = _backward(
        *(dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k),
        *(softmax_scale, causal, left, right, softcap),
    )
    for place, grad in zip((dq, dk, dv), grads):
        _written(place, grad)
    return dq, dk, dv


def _limits(causal, left, right):
    """As windows of the others. A side below 0 is a limit in some releases, and in others both sides are dropped."""
    assert (left is None or left >= 0) and (right is None or right >= 0)
    return -1 if left is None else left, 0 if causal else -1 if right is None else right


# What importing them finds: package -> module -> what it holds.
PACKAGES = {
    "flash-attn": {
        "flash_attn": {},
        "flash_attn.flash_attn_interface": {
            "_wrapped_flash_attn_varlen_forward": _wrapped_flash_attn_varlen_forward,
            "_wrapped_flash_attn_varlen_backward": _wrapped_flash_attn_varlen_backward,
        },
    },
    "flash-attn-3": {"flash_attn_interface": {}},
    "flash-attn-4": {
        "flash_attn": {},
        "flash_attn.cute": {},
        "flash_attn.cute.interface": {"_flash_attn_fwd": _flash_attn_fwd, "_flash_attn_bwd": _flash_attn_bwd},
    },
}


def install(monkeypatch, *packages):
    """As on a machine where these are installed and the others are not, and no hub kernel is loaded."""
    monkeypatch.setitem(sys.modules, "kernels", None)
    for name in {module for modules in PACKAGES.values() for module in modules}:
        # As absent: importing a module that stands for None fails.
        monkeypatch.setitem(sys.modules, name, None)
    for package in packages:
        for name, content in PACKAGES[package].items():
            module = ModuleType(name)
            vars(module).update(content)
            monkeypatch.setitem(sys.modules, name, module)


def load_from_hub(monkeypatch, name, module):
    """As in a process that has called kernels.get_kernel."""
    loaded = SimpleNamespace(metadata=SimpleNamespace(name=SimpleNamespace(python_name=name)), module=module)
    monkeypatch.setitem(sys.modules, "kernels", SimpleNamespace(get_loaded_kernels=lambda: [loaded]))
