"""Which kernel is chosen, and how the others are refused."""

import sys

import pytest
import torch

from sap_hf.errors import UnsupportedAttention
from sap_hf.kernels import pick
from sap_hf.kernels.varlen import why_no_flash, why_no_varlen


@pytest.fixture(autouse=True)
def without_flash(monkeypatch):
    """As on a machine where flash_attn is not installed."""
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    why_no_flash.cache_clear()
    yield
    why_no_flash.cache_clear()


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
        ({}, "varlen", "flash_attn is not installed"),
        ({"softcap": 30.0}, "reference", "varlen has no softcap"),
        ({"dtype": torch.float32}, "reference", "float16 or bfloat16 only"),
        ({"head_dim": 320}, "reference", "head_dim 320"),
    ],
    ids=str,
)
def test_auto_takes_the_fastest_exact_kernel_and_says_why(asked, expected, reason):
    kernel, why = choose(**asked)
    assert kernel.name == expected and reason in why


def test_a_torch_whose_varlen_lacks_grouped_heads_is_passed_over(monkeypatch):
    import torch.nn.attention.varlen as torch_varlen

    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None):
        raise AssertionError("not to be called")

    monkeypatch.setattr(torch_varlen, "varlen_attn", varlen_attn)
    why_no_varlen.cache_clear()
    kernel, why = choose()
    why_no_varlen.cache_clear()
    assert kernel.name == "reference" and "varlen_attn has no enable_gqa, window_size" in why


@pytest.mark.parametrize("name", ["reference", "sdpa"])
def test_a_named_kernel_is_taken(name):
    kernel, why = choose(name, device_type="cpu", dtype=torch.float32)
    assert kernel.name == name and "asked for" in why


@pytest.mark.parametrize(
    "asked, message",
    [
        ({"name": "sdpa", "device_type": "cpu", "softcap": 30.0}, "no softcap"),
        ({"name": "sdpa"}, "CPU only"),
        ({"name": "flash"}, "flash_attn is not installed"),
        ({"name": "flash", "device_type": "cpu"}, "CUDA only"),
        ({"name": "varlen", "device_type": "cpu"}, "CUDA only"),
        ({"name": "varlen", "dtype": torch.float32}, "float16 or bfloat16 only, q is torch.float32"),
        ({"name": "varlen", "softcap": 30.0}, "no softcap"),
        ({"name": "varlen", "head_dim": 320}, "head_dim 320 is over its 256"),
        ({"name": "flsh"}, "does not exist"),
        ({"window": 0}, "window=0"),
    ],
    ids=str,
)
def test_a_kernel_that_cannot_is_refused_with_a_way_out(asked, message):
    with pytest.raises(UnsupportedAttention, match=message) as refused:
        choose(**asked)
    assert "\n  Use " in str(refused.value)
