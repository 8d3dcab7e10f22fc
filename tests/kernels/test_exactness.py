"""Every CPU kernel against dense float64 attention, in outputs and gradients."""

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sap_hf.kernels import Scoring, Segments, merge, reference, sdpa
from sap_hf.kernels.reference import Reference
from sap_hf.kernels.sdpa import Sdpa
from tests.kernels import dense

KERNELS = {"reference": Reference(), "sdpa": Sdpa()}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}
SCALE = 0.3

# name: (cu_q, cu_k, causal, window)
SHAPES = {
    "one-document": ((0, 37), (0, 37), True, None),
    "short-documents": ((0, 5, 6, 20, 50, 51, 180), (0, 5, 6, 20, 50, 51, 180), True, None),
    "full": ((0, 3, 30, 33), (0, 40, 41, 120), False, None),
    "short-full": ((0, 3, 10, 11), (0, 4, 5, 30), False, None),
    "older-keys": ((0, 3, 30, 130), (0, 40, 70, 300), True, None),
    "short-older-keys": ((0, 3, 10, 11), (0, 4, 12, 30), True, None),
    "window": ((0, 5, 300, 301), (0, 5, 300, 301), True, 7),
    "window-2": ((0, 5, 200), (0, 5, 200), True, 2),
    "window-older-keys": ((0, 5, 290, 300), (0, 40, 400, 500), True, 33),
    "window-hides-one-key": ((0, 5, 140), (0, 7, 150), True, 142),
    "window-wider-than-all": ((0, 5, 140), (0, 7, 150), True, 1000),
}
HEADS = [(9, 3), (8, 2), (4, 1), (4, 4)]


def run(kernel, shape, heads, kv_heads, head_dim, value_dim, dtype, softcap=None):
    """(out, lse, dq, dk, dv) of the kernel, and of the oracle."""
    cu_q, cu_k, causal, window = shape
    q, k, v, dout = dense.inputs(cu_q[-1], cu_k[-1], heads, kv_heads, head_dim, value_dim, dtype)
    segments = Segments.build(cu_q, cu_k, causal, "cpu")
    scoring = Scoring(SCALE, window, softcap)
    out, lse = kernel.forward(q, k, v, segments, scoring)
    grads = kernel.backward(dout, q, k, v, out, lse, segments, scoring)

    seen = dense.visible(cu_q, cu_k, causal, window)
    want = dense.attend(q.double(), k.double(), v.double(), seen, SCALE, softcap)
    return (out, lse, *grads), (*want, *dense.gradients(dout, q, k, v, seen, SCALE, softcap))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernel", KERNELS)
def test_out_lse_and_gradients_match_dense_attention(kernel, shape, dtype):
    got, want = run(KERNELS[kernel], SHAPES[shape], 9, 3, 16, 16, dtype)
    for x, y in zip(got, want):
        assert x.dtype == dtype
        assert dense.error(x, y) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_window_of_one_returns_the_own_value_and_no_gradient_for_q_and_k(kernel, dtype):
    q, k, v, dout = dense.inputs(200, 200, 4, 4, 16, 16, dtype)
    segments = Segments.build((0, 5, 200), (0, 5, 200), True, "cpu")
    scoring = Scoring(SCALE, 1)
    out, lse = KERNELS[kernel].forward(q, k, v, segments, scoring)
    dq, dk, dv = KERNELS[kernel].backward(dout, q, k, v, out, lse, segments, scoring)
    assert torch.equal(out, v)
    assert dense.error(dv, dout) < TOLERANCE[dtype]
    # dP - delta is x - x, twice computed: what may remain is the rounding of x, times scale and q or k.
    x = (dout * v).abs().sum(-1, keepdim=True)
    assert (dq.abs() <= TOLERANCE[dtype] * SCALE * x * k.abs()).all()
    assert (dk.abs() <= TOLERANCE[dtype] * SCALE * x * q.abs()).all()


@pytest.mark.parametrize("dims", [(16, 16), (24, 8), (8, 24)], ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_grouped_heads_and_unequal_value_dim_match_dense_attention(kernel, heads, dims):
    for shape in ("short-documents", "older-keys", "window-older-keys"):
        got, want = run(KERNELS[kernel], SHAPES[shape], *heads, *dims, torch.float64)
        for x, y in zip(got, want):
            assert dense.error(x, y) < 1e-12


@pytest.mark.parametrize("shape", ["short-documents", "full", "older-keys", "window-older-keys"])
def test_softcap_matches_dense_attention(shape):
    got, want = run(KERNELS["reference"], SHAPES[shape], 9, 3, 16, 8, torch.float64, softcap=1.5)
    for x, y in zip(got, want):
        assert dense.error(x, y) < 1e-12


@pytest.mark.parametrize("shape", ["short-documents", "full", "older-keys", "window-older-keys"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_bfloat16_error_is_at_most_twice_that_of_plain_bfloat16(kernel, shape):
    cu_q, cu_k, causal, window = SHAPES[shape]
    got, want = run(KERNELS[kernel], SHAPES[shape], 9, 3, 16, 16, torch.bfloat16)
    q, k, v, dout = dense.inputs(cu_q[-1], cu_k[-1], 9, 3, 16, 16, torch.bfloat16)
    q, k, v = (x.detach().requires_grad_() for x in (q, k, v))
    out, lse = dense.attend(q, k, v, dense.visible(cu_q, cu_k, causal, window), SCALE, None)
    plain = (out, lse, *torch.autograd.grad(out, (q, k, v), dout))
    for x, y, z in zip(got, want, plain):
        assert dense.error(x, y) <= 2 * dense.error(z, y)


@pytest.mark.parametrize("kernel, softcap", [("reference", None), ("reference", 2.0), ("sdpa", None)])
def test_two_calls_over_disjoint_keys_merge_to_one(kernel, softcap):
    kernel = KERNELS[kernel]
    # A document of 300 rows; this rank owns the last 100: local tile square causal, remote tile full.
    q, k, v, dout = dense.inputs(100, 300, 8, 2, 16, 8, torch.float64)
    local, remote = slice(200, 300), slice(0, 200)
    square = Segments.build((0, 100), (0, 100), True, "cpu")
    full = Segments.build((0, 100), (0, 200), False, "cpu")
    scoring = Scoring(SCALE, softcap=softcap)

    out, lse = merge(
        *kernel.forward(q, k[local], v[local], square, scoring),
        *kernel.forward(q, k[remote], v[remote], full, scoring),
    )
    dq_a, dk_a, dv_a = kernel.backward(dout, q, k[local], v[local], out, lse, square, scoring)
    dq_b, dk_b, dv_b = kernel.backward(dout, q, k[remote], v[remote], out, lse, full, scoring)
    got = (out, lse, dq_a + dq_b, torch.cat([dk_b, dk_a]), torch.cat([dv_b, dv_a]))

    seen = dense.visible((0, 100), (0, 300), True, None)
    want = (
        *dense.attend(q, k, v, seen, SCALE, softcap),
        *dense.gradients(dout, q, k, v, seen, SCALE, softcap),
    )
    for x, y in zip(got, want):
        assert dense.error(x, y) < 1e-12


@pytest.mark.parametrize("kernel", KERNELS)
@settings(max_examples=25)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 90), st.integers(0, 60)), min_size=1, max_size=6),
    window=st.none() | st.integers(1, 150),
    causal=st.booleans(),
)
def test_any_segments_match_dense_attention(kernel, sizes, window, causal):
    cu_q, cu_k = [0], [0]
    for rows, older in sizes:
        cu_q.append(cu_q[-1] + rows)
        cu_k.append(cu_k[-1] + rows + older)
    shape = (cu_q, cu_k, causal, window if causal else None)
    got, want = run(KERNELS[kernel], shape, 4, 2, 8, 8, torch.float64)
    for x, y in zip(got, want):
        assert dense.error(x, y) < 1e-12


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_segments_give_empty_outputs_and_zero_gradients(kernel):
    q, k, v, dout = dense.inputs(0, 0, 4, 2, 8, 8, torch.float32)
    segments = Segments.build((0,), (0,), True, "cpu")
    scoring = Scoring(SCALE)
    out, lse = KERNELS[kernel].forward(q, k, v, segments, scoring)
    assert out.shape == (0, 4, 8) and lse.shape == (0, 4)
    assert [g.shape for g in KERNELS[kernel].backward(dout, q, k, v, out, lse, segments, scoring)] == [
        (0, 4, 8),
        (0, 2, 8),
        (0, 2, 8),
    ]


def test_tiles_are_cut_once_per_batch_and_freed_with_it(monkeypatch):
    cuts = []
    cut = sdpa._cut
    monkeypatch.setattr(sdpa, "_cut", lambda *args: cuts.append(args[1:]) or cut(*args))
    q, k, v, dout = dense.inputs(20, 20, 4, 2, 8, 8, torch.float32)
    segments = Segments.build((0, 5, 20), (0, 5, 20), True, "cpu")
    before = len(sdpa._tiles_of)
    for window in (None, 3, None, 3):
        scoring = Scoring(SCALE, window)
        out, lse = Sdpa().forward(q, k, v, segments, scoring)
        Sdpa().backward(dout, q, k, v, out, lse, segments, scoring)
    assert cuts == [(None, torch.float32), (3, torch.float32)]
    assert len(sdpa._tiles_of) == before + 1
    del segments
    gc.collect()
    assert len(sdpa._tiles_of) <= before


def test_reference_chunks_give_the_unchunked_answer(monkeypatch):
    monkeypatch.setattr(reference, "CHUNK_ROWS", 16)
    for shape in ("older-keys", "full", "window-older-keys"):
        got, want = run(KERNELS["reference"], SHAPES[shape], 4, 2, 8, 8, torch.float64, softcap=2.0)
        for x, y in zip(got, want):
            assert dense.error(x, y) < 1e-12


@pytest.mark.parametrize(
    "cu_q, cu_k, causal, message",
    [
        ((0, 3, 3), (0, 3, 4), False, "empty segment"),
        ((0, 3, 4), (0, 3, 3), False, "empty segment"),
        ((0, 5), (0, 4), True, "fewer keys"),
        ((0, 5), (0, 4, 5), False, "bounds of queries"),
        ((1, 5), (0, 4), False, "start at"),
    ],
)
def test_segments_that_no_kernel_can_run_are_a_bug(cu_q, cu_k, causal, message):
    with pytest.raises(AssertionError, match=message):
        Segments.build(cu_q, cu_k, causal, "cpu")
