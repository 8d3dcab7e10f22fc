"""The CUDA kernels themselves, one by one: parity with dense float64 attention, no wait for the host, speed."""

from __future__ import annotations

import time

import pytest
import torch

from sap_hf.kernels import Scoring, Segments, merge
from sap_hf.kernels.flash import LIBRARIES, Flash
from sap_hf.kernels.flex import Flex, why_no_flex
from sap_hf.kernels.varlen import Varlen, why_no_varlen
from tests.kernels import dense
from tests.kernels.test_exactness import SHAPES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda"
FLASH = [f"flash-attn {generation}" for generation in (2, 3, 4)]
KERNELS = [*FLASH, "varlen", "flex"]
SOFTCAP = [*FLASH, "flex"]
# Compiled once for each kind of call, and that waits for the host.
PREPARED = [*FLASH, "varlen"]


@pytest.fixture
def kernel(request):
    """The kernel of this name, where the machine has its library and a GPU for it."""
    name = request.param
    major, _ = torch.cuda.get_device_capability()
    if major < 8:
        pytest.skip(f"{name} needs compute capability 8.0")
    if name in ("varlen", "flex"):
        why_not = why_no_varlen() if name == "varlen" else why_no_flex()
        if why_not is not None:
            pytest.skip(why_not)
        return Varlen() if name == "varlen" else Flex()
    for library in LIBRARIES.get(major, LIBRARIES[max(LIBRARIES)]):
        if name == f"flash-attn {library.generation}":
            try:
                return Flash(library())
            except ImportError as error:
                pytest.skip(f"{name}: {error}")
    return pytest.skip(f"{name} is not used on compute capability {major}")


def compare(got, q, k, v, dout, seen, scale, softcap=None):
    """At most twice the error of the same formulas in plain torch and bfloat16, against float64."""
    exact = (x.double() for x in (q, k, v))
    want = (
        *dense.attend(*exact, seen, scale, softcap),
        *dense.gradients(dout, q, k, v, seen, scale, softcap),
    )
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = dense.attend(*leaves, seen, scale, softcap)
    plain = (out, lse, *torch.autograd.grad(out, leaves, dout))
    for name, x, y, z in zip(("out", "lse", "dq", "dk", "dv"), got, want, plain):
        assert dense.error(x, y) <= 2 * dense.error(z, y), name


def check(kernel, shape, heads, dims, dtype=torch.bfloat16, softcap=None):
    cu_q, cu_k, causal, window = shape
    scale = dims[0] ** -0.5
    q, k, v, dout = (x.to(DEVICE) for x in dense.inputs(cu_q[-1], cu_k[-1], *heads, *dims, dtype))
    segments = Segments.build(cu_q, cu_k, causal, DEVICE)
    scoring = Scoring(scale, window, softcap)
    out, lse = kernel.forward(q, k, v, segments, scoring)
    got = (out, lse, *kernel.backward(dout, q, k, v, out, lse, segments, scoring))
    compare(got, q, k, v, dout, dense.visible(cu_q, cu_k, causal, window).to(DEVICE), scale, softcap)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernel", KERNELS, indirect=True)
def test_bfloat16_error_is_at_most_twice_that_of_plain_bfloat16(kernel, shape):
    check(kernel, SHAPES[shape], (9, 3), (64, 64))


@pytest.mark.parametrize("dims", [(128, 128), (96, 64), (60, 60), (192, 128), (256, 256)], ids=str)
@pytest.mark.parametrize("kernel", KERNELS, indirect=True)
def test_head_widths(kernel, dims):
    if isinstance(kernel, Flash):
        why_not = kernel.library.lacks(torch.cuda.get_device_capability()[0], max(dims), False)
        if why_not is not None:
            pytest.skip(why_not)
    for shape in ("short-documents", "older-keys"):
        check(kernel, SHAPES[shape], (8, 2), dims)


@pytest.mark.parametrize("kernel", KERNELS, indirect=True)
def test_float16(kernel):
    check(kernel, SHAPES["window-older-keys"], (4, 4), (64, 64), torch.float16)


@pytest.mark.parametrize("shape", ["short-documents", "full", "older-keys", "window-older-keys"])
@pytest.mark.parametrize("kernel", SOFTCAP, indirect=True)
def test_softcap(kernel, shape):
    check(kernel, SHAPES[shape], (8, 2), (64, 64), softcap=1.5)


@pytest.mark.parametrize("kernel", KERNELS, indirect=True)
def test_two_calls_over_disjoint_keys_merge_to_one(kernel):
    q, k, v, dout = (x.to(DEVICE) for x in dense.inputs(300, 900, 8, 2, 64, 64, torch.bfloat16))
    square = Segments.build((0, 300), (0, 300), True, DEVICE)
    full = Segments.build((0, 300), (0, 600), False, DEVICE)
    scoring = Scoring(0.125)
    parts = ((k[600:], v[600:], square), (k[:600], v[:600], full))
    out, lse = merge(*(x for part in parts for x in kernel.forward(q, *part, scoring)))
    (dq_a, dk_a, dv_a), (dq_b, dk_b, dv_b) = (
        kernel.backward(dout, q, *part[:2], out, lse, part[2], scoring) for part in parts
    )
    got = (out, lse, dq_a.float() + dq_b, torch.cat([dk_b, dk_a]), torch.cat([dv_b, dv_a]))
    seen = dense.visible((0, 300), (0, 900), True, None).to(DEVICE)
    compare(got, q, k, v, dout, seen, 0.125)


@pytest.mark.parametrize("kernel", KERNELS, indirect=True)
def test_results_are_as_exact_in_their_places_and_nothing_is_written_beside_them(kernel):
    q, k, v, dout = (x.to(DEVICE) for x in dense.inputs(300, 900, 8, 2, 64, 64, torch.bfloat16))
    segments = Segments.build((0, 300), (0, 900), True, DEVICE)
    around = [x.new_full((len(x) + 16, *x.shape[1:]), torch.nan) for x in (dout, q, k, v)]
    place, *places = (memory[8:-8] for memory in around)
    out, lse = kernel.forward(q, k, v, segments, Scoring(0.125), place)
    gradients = kernel.backward(dout, q, k, v, out, lse, segments, Scoring(0.125), tuple(places))
    seen = dense.visible((0, 300), (0, 900), True, None).to(DEVICE)
    compare((out, lse, *gradients), q, k, v, dout, seen, 0.125)
    if isinstance(kernel, Flash):
        assert all(x is there for x, there in zip(gradients, places))
    for memory in around:
        assert memory[:8].isnan().all() and memory[-8:].isnan().all()


@pytest.mark.parametrize("kernel", FLASH, indirect=True)
def test_reproducible_gradients_are_the_same_bits_again(kernel):
    kernel.deterministic = True
    q, k, v, dout = (x.to(DEVICE) for x in dense.inputs(4096, 4096, 8, 2, 64, 64, torch.bfloat16))
    segments = Segments.build((0, 4096), (0, 4096), True, DEVICE)
    scoring = Scoring(0.125)
    out, lse = kernel.forward(q, k, v, segments, scoring)
    first, *others = (kernel.backward(dout, q, k, v, out, lse, segments, scoring) for _ in range(5))
    for again in others:
        assert all(torch.equal(x, y) for x, y in zip(first, again))


@pytest.mark.parametrize("kernel", PREPARED, indirect=True)
def test_a_call_never_waits_for_the_gpu(kernel):
    q, k, v, dout = (x.to(DEVICE) for x in dense.inputs(300, 300, 8, 2, 64, 64, torch.bfloat16))
    segments = Segments.build((0, 100, 300), (0, 100, 300), True, DEVICE)
    scoring = Scoring(0.125)

    def both():
        out, lse = kernel.forward(q, k, v, segments, scoring)
        kernel.backward(dout, q, k, v, out, lse, segments, scoring)

    both()
    torch.cuda.set_sync_debug_mode("error")
    try:
        both()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kernel", KERNELS, indirect=True)
def test_256_documents_cost_far_less_than_one_of_as_many_rows(kernel):
    rows = 65536
    q, k, v, dout = (x.to(DEVICE) for x in dense.inputs(rows, rows, 8, 2, 64, 64, torch.bfloat16))
    scoring = Scoring(0.125)
    seconds = {}
    for documents in (1, 256):
        bounds = tuple(range(0, rows + 1, rows // documents))
        segments = Segments.build(bounds, bounds, True, DEVICE)
        out, lse = kernel.forward(q, k, v, segments, scoring)
        kernel.backward(dout, q, k, v, out, lse, segments, scoring)
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(10):
            out, lse = kernel.forward(q, k, v, segments, scoring)
            kernel.backward(dout, q, k, v, out, lse, segments, scoring)
        torch.cuda.synchronize()
        seconds[documents] = time.perf_counter() - started
    # A 256th of the pairs; a Python loop over the documents would cost more than the large one.
    assert seconds[256] < seconds[1] / 5, seconds
