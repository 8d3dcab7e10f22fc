"""How the CUDA kernels call their libraries: bounds, alignment, window, scale, softcap and lse layout.

On the CPU, through stand-ins with the libraries' own signatures; tests/gpu runs the libraries.
"""

import sys
from types import SimpleNamespace

import pytest
import torch

from sap_hf.kernels import Scoring, Segments, merge
from sap_hf.kernels.flash import Flash, Flash2, Flash3, Flash4
from sap_hf.kernels.varlen import Varlen
from tests.kernels import dense, stand_ins
from tests.kernels.stand_ins_newer import PACKAGES, flash_3_on_cpu, install, load_from_hub

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


LIBRARIES = {"flash2": Flash2, "flash3": Flash3, "flash4": Flash4}


@pytest.fixture(autouse=True)
def libraries(monkeypatch):
    install(monkeypatch, *PACKAGES)
    stand_ins.CALLS.clear()
    with stand_ins.aten_flash_on_cpu(), flash_3_on_cpu():
        yield


@pytest.fixture
def kernel(request):
    return Varlen() if request.param == "varlen" else Flash(LIBRARIES[request.param]())


every_flash = pytest.mark.parametrize("kernel", LIBRARIES, indirect=True)
every_kernel = pytest.mark.parametrize("kernel", [*LIBRARIES, "varlen"], indirect=True)


def run(kernel, shape, heads, dims, softcap=None):
    cu_q, cu_k, causal, window = shape
    q, k, v, dout = dense.inputs(cu_q[-1], cu_k[-1], *heads, *dims, torch.float64)
    segments = Segments.build(cu_q, cu_k, causal, "cpu")
    scoring = Scoring(SCALE, window, softcap)
    out, lse = kernel.forward(q, k, v, segments, scoring)
    # Merged over several calls, it lies row by row.
    grads = kernel.backward(dout, q, k, v, out, lse.contiguous(), segments, scoring)

    seen = dense.visible(cu_q, cu_k, causal, window)
    want = (
        *dense.attend(q, k, v, seen, SCALE, softcap),
        *dense.gradients(dout, q, k, v, seen, SCALE, softcap),
    )
    for x, y in zip((out, lse, *grads), want):
        assert dense.error(x, y) < 1e-12


@pytest.mark.parametrize("shape", SHAPES)
@every_kernel
def test_the_call_means_what_the_segments_say(kernel, shape):
    run(kernel, SHAPES[shape], (4, 2), (16, 16))
    # One call for all segments in each direction.
    assert len(stand_ins.CALLS) == 2


@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("heads", [(9, 3), (8, 2), (4, 1), (4, 4)], ids=str)
@every_kernel
def test_grouped_heads_and_odd_head_dims_are_passed_in_a_form_that_flash_takes(kernel, heads, dims):
    run(kernel, SHAPES["older-keys"], heads, dims)


@every_flash
def test_flash_passes_the_softcap(kernel):
    run(kernel, SHAPES["older-keys"], (4, 2), (16, 16), softcap=1.5)
    run(kernel, SHAPES["window-older-keys"], (4, 2), (16, 16), softcap=1.5)


@every_kernel
def test_backward_takes_the_out_and_lse_merged_over_two_calls(kernel):
    q, k, v, dout = dense.inputs(10, 30, 8, 2, 16, 8, torch.float64)
    local, remote = slice(20, 30), slice(0, 20)
    square = Segments.build((0, 10), (0, 10), True, "cpu")
    full = Segments.build((0, 10), (0, 20), False, "cpu")
    scoring = Scoring(SCALE)

    out, lse = merge(
        *kernel.forward(q, k[local], v[local], square, scoring),
        *kernel.forward(q, k[remote], v[remote], full, scoring),
    )
    dq_a, dk_a, dv_a = kernel.backward(dout, q, k[local], v[local], out, lse, square, scoring)
    dq_b, dk_b, dv_b = kernel.backward(dout, q, k[remote], v[remote], out, lse, full, scoring)

    seen = dense.visible((0, 10), (0, 30), True, None)
    want = (*dense.attend(q, k, v, seen, SCALE, None), *dense.gradients(dout, q, k, v, seen, SCALE, None))
    got = (out, lse, dq_a + dq_b, torch.cat([dk_b, dk_a]), torch.cat([dv_b, dv_a]))
    for x, y in zip(got, want):
        assert dense.error(x, y) < 1e-12


@every_kernel
def test_rows_that_start_between_two_words_are_copied_first(kernel):
    # The stand-ins assert alignment, the real kernels would fault: k's rows are 16 + 5 apart.
    run(kernel, SHAPES["documents"], (4, 2), (16, 5))


@every_kernel
def test_a_view_that_starts_between_two_words_is_copied_first(kernel):
    q, k, v, _ = dense.inputs(9, 9, 4, 2, 16, 16, torch.float64)
    shifted = torch.cat([torch.zeros(4), q.flatten()])[4:].view_as(q)
    segments = Segments.build((0, 9), (0, 9), True, "cpu")
    scoring = Scoring(SCALE)
    got, want = (kernel.forward(x, k, v, segments, scoring) for x in (shifted, q))
    for x, y in zip(got, want):
        assert torch.equal(x, y)


@pytest.mark.parametrize("asked, expected", [(True, True), (False, False), (None, False)])
@pytest.mark.parametrize("library", LIBRARIES.values())
def test_deterministic_reaches_the_backward(library, asked, expected):
    run(Flash(library(), deterministic=asked), SHAPES["documents"], (4, 2), (16, 16))
    assert stand_ins.CALLS[-1] == f"flash {library.generation} backward deterministic={expected}"


@every_flash
def test_deterministic_follows_torch(kernel):
    torch.use_deterministic_algorithms(True)
    try:
        run(kernel, SHAPES["documents"], (4, 2), (16, 16))
    finally:
        torch.use_deterministic_algorithms(False)
    assert stand_ins.CALLS[-1].endswith("backward deterministic=True")


@every_kernel
def test_no_segments_call_nothing(kernel):
    q, k, v, dout = dense.inputs(0, 0, 4, 2, 16, 16, torch.bfloat16)
    segments = Segments.build((0,), (0,), True, "cpu")
    scoring = Scoring(SCALE)
    out, lse = kernel.forward(q, k, v, segments, scoring)
    assert out.shape == (0, 4, 16) and lse.shape == (0, 4) and lse.dtype == torch.float32
    grads = kernel.backward(dout, q, k, v, out, lse, segments, scoring)
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape] and not stand_ins.CALLS


def test_a_loaded_hub_kernel_is_called_like_its_package(monkeypatch):
    install(monkeypatch)
    interface = SimpleNamespace(
        _flash_attn_varlen_forward=stand_ins._wrapped_flash_attn_varlen_forward,
        _flash_attn_varlen_backward=stand_ins._wrapped_flash_attn_varlen_backward,
    )
    load_from_hub(monkeypatch, "flash_attn2", SimpleNamespace(flash_attn_interface=interface))
    run(Flash(Flash2()), SHAPES["window-older-keys"], (4, 2), (16, 16), softcap=1.5)
    with flash_3_on_cpu("_flash_attn3_cuda_abc") as ops:
        load_from_hub(monkeypatch, "flash_attn3", SimpleNamespace(_ops=SimpleNamespace(ops=ops)))
        run(Flash(Flash3()), SHAPES["window-older-keys"], (4, 2), (16, 16), softcap=1.5)
    assert [call[:7] for call in stand_ins.CALLS] == ["flash 2"] * 2 + ["flash 3"] * 2


def test_a_library_that_is_too_old_says_so(monkeypatch):
    monkeypatch.delattr(sys.modules["flash_attn.flash_attn_interface"], "_wrapped_flash_attn_varlen_forward")
    with pytest.raises(ImportError, match=r"older than 2\.7"):
        Flash2()
    monkeypatch.setattr(
        sys.modules["flash_attn.cute.interface"], "_flash_attn_bwd", lambda q, k, v, dlse=None: None
    )
    with pytest.raises(ImportError, match=r"older than 4\.0\.0b26"):
        Flash4()
