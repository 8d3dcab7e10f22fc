"""Which kernel is chosen, and how the others are refused."""

import importlib.util
from importlib.machinery import ModuleSpec

import pytest
import torch

from sap_hf.errors import UnsupportedAttention
from sap_hf.kernels import flex, pick
from sap_hf.kernels.varlen import why_no_varlen
from tests.kernels.stand_ins_newer import PACKAGES, flash_3_on_cpu, install

ALL = tuple(PACKAGES)


@pytest.fixture(autouse=True)
def hopper(monkeypatch):
    """As on a machine with a Hopper GPU and triton, where no flash-attn is installed."""
    install(monkeypatch)
    on(monkeypatch, 9, 0)
    with_triton(monkeypatch, True)
    yield
    flex.why_no_flex.cache_clear()


def on(monkeypatch, major, minor):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (major, minor))


def with_triton(monkeypatch, present):
    # torch's own imports ask too, for other names.
    asked = importlib.util.find_spec
    answer = ModuleSpec("triton", None) if present else None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: answer if name == "triton" else asked(name))
    flex.why_no_flex.cache_clear()


def choose(name="auto", device_type="cuda", dtype=torch.bfloat16, head_dim=64, softcap=None, window=None):
    return pick(
        name,
        device_type=device_type,
        dtype=dtype,
        head_dim=head_dim,
        value_dim=head_dim,
        softcap=softcap,
        window=window,
    )


@pytest.mark.parametrize(
    "asked, expected, reason",
    [
        ({"device_type": "cpu", "dtype": torch.float32}, "sdpa", "fastest"),
        ({"device_type": "cpu", "dtype": torch.bfloat16}, "sdpa", "fastest"),
        ({"device_type": "cpu", "dtype": torch.float64, "softcap": 30.0}, "reference", "softcap"),
        ({}, "varlen", "flash passed over: flash-attn 3 not installed"),
        ({"softcap": 30.0}, "flex", "varlen has no softcap"),
        (
            {"dtype": torch.float32},
            "reference",
            "flash and varlen and flex passed over: float16 or bfloat16 only",
        ),
        ({"head_dim": 320}, "reference", "head_dim 320"),
    ],
    ids=str,
)
def test_auto_takes_the_fastest_exact_kernel_and_says_why(asked, expected, reason):
    kernel, why = choose(**asked)
    assert kernel.name == expected and reason in why


@pytest.mark.parametrize(
    "capability, installed, asked, expected",
    [
        ((8, 0), ALL, {}, "flash-attn 2"),
        ((9, 0), ALL, {}, "flash-attn 3"),
        ((9, 0), ALL, {"softcap": 30.0}, "flash-attn 3"),
        ((9, 0), ("flash-attn", "flash-attn-4"), {}, "flash-attn 4"),
        ((9, 0), ("flash-attn",), {}, "flash-attn 2"),
        ((10, 0), ALL, {}, "flash-attn 4"),
        ((10, 0), ALL, {"head_dim": 192}, "flash-attn 2"),
        ((12, 0), ALL, {}, "flash-attn 2"),
        ((13, 0), ALL, {}, "flash-attn 2"),
    ],
    ids=str,
)
def test_flash_is_of_the_generation_that_suits_the_gpu(monkeypatch, capability, installed, asked, expected):
    on(monkeypatch, *capability)
    install(monkeypatch, *installed)
    with flash_3_on_cpu():
        kernel, why = choose(**asked)
    assert kernel.name == "flash" and f"fastest exact here ({expected} (package" in why
    assert f"on compute capability {capability[0]}.{capability[1]}" in why


def test_reproducible_gradients_of_wide_heads_pass_flash_attn_3_over(monkeypatch):
    install(monkeypatch, "flash-attn", "flash-attn-3")
    torch.use_deterministic_algorithms(True)
    try:
        with flash_3_on_cpu():
            _, wide = choose(head_dim=256)
            _, narrow = choose(head_dim=128)
    finally:
        torch.use_deterministic_algorithms(False)
    assert "(flash-attn 2" in wide and "reproducible backward ends at head_dim 192, here it is 256" in wide
    assert "(flash-attn 3" in narrow


def test_gpus_before_ampere_get_the_reference(monkeypatch):
    on(monkeypatch, 7, 5)
    install(monkeypatch, *PACKAGES)
    kernel, why = choose()
    assert kernel.name == "reference" and "from compute capability 8.0 (Ampere) on, this GPU has 7.5" in why


def test_without_triton_softcap_on_a_gpu_gets_the_reference(monkeypatch):
    with_triton(monkeypatch, False)
    kernel, why = choose(softcap=30.0)
    assert kernel.name == "reference" and "flex passed over: FlexAttention is compiled by triton" in why


def test_a_torch_whose_varlen_lacks_grouped_heads_is_passed_over(monkeypatch):
    import torch.nn.attention.varlen as torch_varlen

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None):
        raise AssertionError("not to be called")

    monkeypatch.setattr(torch_varlen, "varlen_attn", varlen_attn)
    why_no_varlen.cache_clear()
    kernel, why = choose()
    why_no_varlen.cache_clear()
    assert kernel.name == "flex" and "varlen_attn has no enable_gqa, window_size" in why


@pytest.mark.parametrize("name", ["reference", "sdpa"])
def test_a_named_kernel_is_taken(name):
    kernel, why = choose(name, device_type="cpu", dtype=torch.float32)
    assert kernel.name == name and "asked for" in why


@pytest.mark.parametrize(
    "asked, message",
    [
        ({"name": "sdpa", "device_type": "cpu", "softcap": 30.0}, "no softcap"),
        ({"name": "sdpa"}, "CPU only"),
        ({"name": "flash"}, "flash-attn 2 not installed"),
        ({"name": "flash", "device_type": "cpu"}, "CUDA only"),
        ({"name": "flex", "device_type": "cpu"}, "CUDA only"),
        ({"name": "varlen", "device_type": "cpu"}, "CUDA only"),
        ({"name": "varlen", "dtype": torch.float32}, "float16 or bfloat16 only, q is torch.float32"),
        ({"name": "varlen", "softcap": 30.0}, "no softcap"),
        ({"name": "varlen", "head_dim": 320}, "head_dim 320 is over 256"),
        ({"name": "flsh"}, "does not exist"),
        ({"window": 0}, "window=0"),
    ],
    ids=str,
)
def test_a_kernel_that_cannot_is_refused_with_a_way_out(asked, message):
    with pytest.raises(UnsupportedAttention, match=message) as refused:
        choose(**asked)
    assert "\n  Use " in str(refused.value)
