"""A place for a result changes where it lies, and nothing else: by kernel, which results are written there."""

import pytest
import torch
from torch.nn.attention import flex_attention as torch_flex

from sap_hf.kernels import Scoring, Segments, Uneven, flex
from sap_hf.kernels.flash import Flash, Flash2, Flash3, Flash4
from sap_hf.kernels.flex import Flex
from sap_hf.kernels.reference import Reference
from sap_hf.kernels.sdpa import Sdpa
from sap_hf.kernels.varlen import Varlen
from tests.kernels import dense
from tests.kernels.stand_ins import aten_flash_on_cpu
from tests.kernels.stand_ins_newer import PACKAGES, flash_3_on_cpu, install

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

KERNELS = {
    "reference": Reference,
    "sdpa": Sdpa,
    "flash 2": lambda: Flash(Flash2()),
    "flash 3": lambda: Flash(Flash3()),
    "flash 4": lambda: Flash(Flash4()),
    "varlen": Varlen,
    "flex": Flex,
    "uneven": lambda: Uneven(Reference(), (2, 2)),
}
ALL, NONE = {"out", "dq", "dk", "dv"}, set()
# In float64, with heads of equal widths that every library takes as they are.
WRITTEN = {
    "reference": ALL,
    "sdpa": ALL,
    "flash 2": {"dq", "dk", "dv"},
    "flash 3": ALL,
    "flash 4": ALL,
    "varlen": {"out"},
    "flex": NONE,
    "uneven": {"out", "dq"},
}


@pytest.fixture(autouse=True)
def libraries(monkeypatch):
    install(monkeypatch, *PACKAGES)
    monkeypatch.setattr(flex, "_compiled", lambda: torch_flex.flex_attention)
    monkeypatch.setattr(torch_flex, "_validate_device", lambda query, key, value: None)
    with aten_flash_on_cpu(), flash_3_on_cpu():
        yield


def results(kernel, dims, dtype, places):
    """By name, of one call with these places for out, dq, dk and dv."""
    cu_q, cu_k = (0, 5, 20, 21), (0, 9, 50, 60)
    q, k, v, dout = dense.inputs(cu_q[-1], cu_k[-1], 4, 2, *dims, dtype)
    segments, scoring = Segments.build(cu_q, cu_k, True, "cpu"), Scoring(0.3, window=11)
    out, lse = kernel.forward(q, k, v, segments, scoring, places.get("out"))
    of_inputs = tuple(places.get(name) for name in ("dq", "dk", "dv"))
    gradients = kernel.backward(dout, q, k, v, out, lse, segments, scoring, of_inputs)
    return dict(zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *gradients)))


def rooms(shapes, dtype):
    """By name, places in the middle of memory that holds NaN, and that memory."""
    around = {name: torch.full((rows + 4, *rest), torch.nan, dtype=dtype) for name, (rows, *rest) in shapes}
    return {name: memory[2:-2] for name, memory in around.items()}, around


def hold(name, dims, dtype, written):
    plain = results(KERNELS[name](), dims, dtype, {})
    shapes = [(x, plain[x].shape) for x in ("out", "dq", "dk", "dv")]
    places, around = rooms(shapes, dtype)
    found = results(KERNELS[name](), dims, dtype, places)
    for result, tensor in found.items():
        assert torch.equal(tensor, plain[result]) and tensor.dtype == plain[result].dtype, result
        assert (tensor is places.get(result)) == (result in written), result
    for result, memory in around.items():
        assert memory[:2].isnan().all() and memory[-2:].isnan().all(), result


@pytest.mark.parametrize("name", KERNELS)
def test_results_are_the_same_bits_and_lie_where_the_kernel_can_write_them(name):
    hold(name, (16, 16), torch.float64, WRITTEN[name])


@pytest.mark.parametrize("name", ["reference", "sdpa"])
def test_wide_results_of_narrow_inputs_are_not_rounded_into_the_place(name):
    hold(name, (16, 16), torch.bfloat16, NONE)


@pytest.mark.parametrize("name", ["flash 2", "flash 3", "flash 4", "varlen"])
def test_padded_heads_are_written_elsewhere(name):
    hold(name, (20, 12), torch.float64, NONE)


def test_a_narrower_value_is_padded_on_the_cpu_but_its_out_is_not():
    hold("sdpa", (24, 8), torch.float64, {"out", "dq", "dk"})
