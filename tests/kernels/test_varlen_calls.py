"""How Flash and Varlen call flash attention: bounds, alignment, window, scale, softcap and lse layout.

On the CPU through stand-ins with the libraries' own signatures; on a GPU (marked) through the libraries.
"""

import sys
from types import ModuleType

import pytest
import torch

from sap_hf.kernels import Segments, merge, pick
from sap_hf.kernels.varlen import Flash, Varlen, why_no_flash
from tests.kernels import dense, stand_ins

SCALE = 0.3
# name: (cu_q, cu_k, causal, window)
SHAPES = {
    "documents": ((0, 5, 6, 20), (0, 5, 6, 20), True, None),
    "full": ((0, 3, 12, 13), (0, 9, 10, 40), False, None),
    "one-query-each": ((0, 1, 2, 3), (0, 4, 5, 9), False, None),
    "older-keys": ((0, 3, 12, 13), (0, 9, 19, 40), True, None),
    "window": ((0, 5, 30, 31), (0, 5, 30, 31), True, 7),
    "window-1": ((0, 5, 9), (0, 5, 9), True, 1),
    "window-older-keys": ((0, 5, 20, 21), (0, 9, 50, 60), True, 11),
    "window-wider-than-all": ((0, 5, 9), (0, 7, 20), True, 1000),
}
DIMS = [(16, 16), (24, 8), (20, 12), (8, 13)]


@pytest.fixture(autouse=True)
def libraries(monkeypatch):
    package = ModuleType("flash_attn")
    package.flash_attn_interface = stand_ins.flash_attn_interface
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    stand_ins.CALLS.clear()
    why_no_flash.cache_clear()
    with stand_ins.aten_flash_on_cpu():
        yield
    why_no_flash.cache_clear()


def run(kernel, shape, heads, dims, softcap=None):
    cu_q, cu_k, causal, window = shape
    q, k, v, dout = dense.inputs(cu_q[-1], cu_k[-1], *heads, *dims, torch.float64)
    segments = Segments.build(cu_q, cu_k, causal, "cpu")
    options = {"scale": SCALE, "window": window, "softcap": softcap}
    out, lse = kernel.forward(q, k, v, segments, **options)
    grads = kernel.backward(dout, q, k, v, out, lse, segments, **options)

    seen = dense.visible(cu_q, cu_k, causal, window)
    want = (
        *dense.attend(q, k, v, seen, SCALE, softcap),
        *dense.gradients(dout, q, k, v, seen, SCALE, softcap),
    )
    for x, y in zip((out, lse, *grads), want):
        assert dense.error(x, y) < 1e-12


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernel", [Flash(), Varlen()], ids=lambda kernel: kernel.name)
def test_the_call_means_what_the_segments_say(kernel, shape):
    run(kernel, SHAPES[shape], (4, 2), (16, 16))
    # One call for all segments in each direction.
    assert len(stand_ins.CALLS) == 2


@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("heads", [(9, 3), (8, 2), (4, 1), (4, 4)], ids=str)
@pytest.mark.parametrize("kernel", [Flash(), Varlen()], ids=lambda kernel: kernel.name)
def test_grouped_heads_and_odd_head_dims_are_passed_in_a_form_that_flash_takes(kernel, heads, dims):
    run(kernel, SHAPES["older-keys"], heads, dims)


def test_flash_passes_the_softcap():
    run(Flash(), SHAPES["older-keys"], (4, 2), (16, 16), softcap=1.5)


@pytest.mark.parametrize("kernel", [Flash(), Varlen()], ids=lambda kernel: kernel.name)
def test_backward_takes_the_out_and_lse_merged_over_two_calls(kernel):
    q, k, v, dout = dense.inputs(10, 30, 8, 2, 16, 8, torch.float64)
    local, remote = slice(20, 30), slice(0, 20)
    square = Segments.build((0, 10), (0, 10), True, "cpu")
    full = Segments.build((0, 10), (0, 20), False, "cpu")
    options = {"scale": SCALE, "window": None, "softcap": None}

    out, lse = merge(
        *kernel.forward(q, k[local], v[local], square, **options),
        *kernel.forward(q, k[remote], v[remote], full, **options),
    )
    dq_a, dk_a, dv_a = kernel.backward(dout, q, k[local], v[local], out, lse, square, **options)
    dq_b, dk_b, dv_b = kernel.backward(dout, q, k[remote], v[remote], out, lse, full, **options)

    seen = dense.visible((0, 10), (0, 30), True, None)
    want = (*dense.attend(q, k, v, seen, SCALE, None), *dense.gradients(dout, q, k, v, seen, SCALE, None))
    got = (out, lse, dq_a + dq_b, torch.cat([dk_b, dk_a]), torch.cat([dv_b, dv_a]))
    for x, y in zip(got, want):
        assert dense.error(x, y) < 1e-12


def test_rows_that_start_between_two_words_are_copied_first():
    # The stand-in asserts alignment, the real kernels would fault: k's rows are 16 + 5 apart.
    run(Flash(), SHAPES["documents"], (4, 2), (16, 5))
    run(Varlen(), SHAPES["documents"], (4, 2), (16, 5))


@pytest.mark.parametrize("kernel", [Flash(), Varlen()], ids=lambda kernel: kernel.name)
def test_a_view_that_starts_between_two_words_is_copied_first(kernel):
    q, k, v, _ = dense.inputs(9, 9, 4, 2, 16, 16, torch.float64)
    shifted = torch.cat([torch.zeros(4), q.flatten()])[4:].view_as(q)
    segments = Segments.build((0, 9), (0, 9), True, "cpu")
    options = {"scale": SCALE, "window": None, "softcap": None}
    got, want = (kernel.forward(x, k, v, segments, **options) for x in (shifted, q))
    for x, y in zip(got, want):
        assert torch.equal(x, y)


@pytest.mark.parametrize("asked, expected", [(True, True), (False, False), (None, False)])
def test_deterministic_reaches_the_backward(asked, expected):
    run(Flash(deterministic=asked), SHAPES["documents"], (4, 2), (16, 16))
    assert stand_ins.CALLS[-1] == f"flash backward deterministic={expected}"


def test_deterministic_follows_torch():
    torch.use_deterministic_algorithms(True)
    try:
        run(Flash(), SHAPES["documents"], (4, 2), (16, 16))
    finally:
        torch.use_deterministic_algorithms(False)
    assert stand_ins.CALLS[-1] == "flash backward deterministic=True"


@pytest.mark.parametrize("kernel", [Flash(), Varlen()], ids=lambda kernel: kernel.name)
def test_no_segments_call_nothing(kernel):
    q, k, v, dout = dense.inputs(0, 0, 4, 2, 16, 16, torch.bfloat16)
    segments = Segments.build((0,), (0,), True, "cpu")
    options = {"scale": SCALE, "window": None, "softcap": None}
    out, lse = kernel.forward(q, k, v, segments, **options)
    assert out.shape == (0, 4, 16) and lse.shape == (0, 4) and lse.dtype == torch.float32
    grads = kernel.backward(dout, q, k, v, out, lse, segments, **options)
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape] and not stand_ins.CALLS


def test_auto_prefers_flash_on_cuda_when_it_is_installed():
    kernel, reason = pick(
        "auto",
        device_type="cuda",
        dtype=torch.bfloat16,
        head_dim=64,
        value_dim=64,
        softcap=30.0,
        window=None,
    )
    assert kernel.name == "flash" and "flash" in reason
