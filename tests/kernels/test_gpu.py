"""The CUDA kernels themselves against dense float64 attention; needs a GPU."""

import pytest
import torch

from sap_hf.kernels import Segments
from sap_hf.kernels.varlen import Flash, Varlen, why_no_flash
from tests.kernels import dense
from tests.kernels.test_exactness import SHAPES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("dims", [(64, 64), (96, 64)], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kernel", [Flash(), Varlen()], ids=lambda kernel: kernel.name)
def test_bfloat16_error_is_at_most_twice_that_of_plain_bfloat16(kernel, shape, dims):
    if kernel.name == "flash" and why_no_flash() is not None:
        pytest.skip(why_no_flash())
    cu_q, cu_k, causal, window = SHAPES[shape]
    scale = dims[0] ** -0.5
    q, k, v, dout = (x.cuda() for x in dense.inputs(cu_q[-1], cu_k[-1], 9, 3, *dims, torch.bfloat16))
    seen = dense.visible(cu_q, cu_k, causal, window).cuda()
    want = (
        *dense.attend(q.double(), k.double(), v.double(), seen, scale, None),
        *dense.gradients(dout, q, k, v, seen, scale, None),
    )
    q_, k_, v_ = (x.detach().requires_grad_() for x in (q, k, v))
    out, lse = dense.attend(q_, k_, v_, seen, scale, None)
    plain = (out, lse, *torch.autograd.grad(out, (q_, k_, v_), dout))

    segments = Segments.build(cu_q, cu_k, causal, "cuda")
    options = {"scale": scale, "window": window, "softcap": None}
    out, lse = kernel.forward(q, k, v, segments, **options)
    got = (out, lse, *kernel.backward(dout, q, k, v, out, lse, segments, **options))
    for x, y, z in zip(got, want, plain):
        assert dense.error(x, y) <= 2 * dense.error(z, y)
