"""FlexAttention on the CPU, uncompiled and in float64: its own dense formulas stand in for the compiled kernel.

They read the mask function but not the blocks, which have a test of their own.
"""

import gc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import flex_attention as torch_flex

from sap_hf.kernels import Scoring, Segments, flex, merge
from sap_hf.kernels.flex import BLOCK, Flex
from tests.kernels import dense
from tests.kernels.test_varlen_calls import SHAPES, run

SCALE = 0.3
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    monkeypatch.setattr(flex, "_compiled", lambda: torch_flex.flex_attention)
    # Only the compiled kernel has no backward on the CPU.
    monkeypatch.setattr(torch_flex, "_validate_device", lambda query, key, value: None)
    # Each shape of these tests is one to trace again.
    with torch._dynamo.config.patch(recompile_limit=1000):
        yield


@pytest.mark.parametrize(
    "shape, softcap",
    [("documents", None), ("window-1", None), ("documents", 1.5), ("full", 1.5), ("window-older-keys", 1.5)],
)
def test_the_call_means_what_the_segments_say(shape, softcap):
    run(Flex(), SHAPES[shape], (4, 2), (16, 16), softcap)


def test_grouped_heads_and_unequal_value_dim_match_dense_attention():
    run(Flex(), SHAPES["older-keys"], (9, 3), (20, 13), 1.5)


def test_backward_takes_the_out_and_lse_merged_over_two_calls():
    softcap = 2.0
    q, k, v, dout = dense.inputs(10, 30, 8, 2, 16, 8, torch.float64)
    local, remote = slice(20, 30), slice(0, 20)
    square = Segments.build((0, 10), (0, 10), True, "cpu")
    full = Segments.build((0, 10), (0, 20), False, "cpu")
    scoring = Scoring(SCALE, softcap=softcap)

    out, lse = merge(
        *Flex().forward(q, k[local], v[local], square, scoring),
        *Flex().forward(q, k[remote], v[remote], full, scoring),
    )
    with torch.no_grad():  # as inside an autograd.Function
        dq_a, dk_a, dv_a = Flex().backward(dout, q, k[local], v[local], out, lse, square, scoring)
        dq_b, dk_b, dv_b = Flex().backward(dout, q, k[remote], v[remote], out, lse, full, scoring)

    seen = dense.visible((0, 10), (0, 30), True, None)
    want = (
        *dense.attend(q, k, v, seen, SCALE, softcap),
        *dense.gradients(dout, q, k, v, seen, SCALE, softcap),
    )
    got = (out, lse, dq_a + dq_b, torch.cat([dk_b, dk_a]), torch.cat([dv_b, dv_a]))
    for x, y in zip(got, want):
        assert dense.error(x, y) < 1e-12


def test_bfloat16_gradients_of_a_merge_err_at_most_twice_as_much_as_plain_bfloat16():
    q, k, v, dout = dense.inputs(40, 160, 8, 2, 16, 16, torch.bfloat16)
    square = Segments.build((0, 40), (0, 40), True, "cpu")
    full = Segments.build((0, 40), (0, 120), False, "cpu")
    scoring = Scoring(SCALE, softcap=2.0)
    parts = ((k[120:], v[120:], square), (k[:120], v[:120], full))
    out, lse = merge(*(x for part in parts for x in Flex().forward(q, *part, scoring)))
    (dq_a, dk_a, dv_a), (dq_b, dk_b, dv_b) = (
        Flex().backward(dout, q, *part[:2], out, lse, part[2], scoring) for part in parts
    )
    seen = dense.visible((0, 40), (0, 160), True, None)
    want = dense.gradients(dout, q, k, v, seen, SCALE, 2.0)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    plain = torch.autograd.grad(dense.attend(*leaves, seen, SCALE, 2.0)[0], leaves, dout)
    for x, y, z in zip((dq_a + dq_b, torch.cat([dk_b, dk_a]), torch.cat([dv_b, dv_a])), want, plain):
        assert dense.error(x, y) <= 2 * dense.error(z, y)


def blocks(count, index, shape):
    """(rows, columns) bool of the blocks that these lists name."""
    named = torch.zeros(shape, dtype=torch.bool)
    for row, n in enumerate(count[0, 0].tolist()):
        listed = index[0, 0, row, :n]
        assert (listed.diff() > 0).all()
        named[row, listed.long()] = True
    return named


@settings(max_examples=60)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 400), st.integers(0, 500)), min_size=1, max_size=5),
    window=st.none() | st.integers(1, 600),
    causal=st.booleans(),
)
def test_blocks_hold_every_key_and_full_ones_nothing_else(sizes, window, causal):
    cu_q, cu_k = [0], [0]
    for rows, older in sizes:
        cu_q.append(cu_q[-1] + rows)
        cu_k.append(cu_k[-1] + rows + older)
    window = window if causal else None
    mask = flex._block_mask(Segments.build(cu_q, cu_k, causal, "cpu"), window)
    seen = dense.visible(cu_q, cu_k, causal, window)
    rows, keys = (-(-n // BLOCK) for n in seen.shape)
    assert mask.shape == (1, 1, *seen.shape)
    padded = torch.zeros(rows * BLOCK, keys * BLOCK, dtype=torch.bool)
    padded[: seen.shape[0], : seen.shape[1]] = seen
    held = padded.view(rows, BLOCK, keys, BLOCK).transpose(1, 2).flatten(2).sum(-1)

    partial = blocks(mask.kv_num_blocks, mask.kv_indices, held.shape)
    full = blocks(mask.full_kv_num_blocks, mask.full_kv_indices, held.shape)
    assert not (partial & full).any()
    assert (held[~(partial | full)] == 0).all()
    assert torch.equal(full, held == BLOCK * BLOCK)
    # The other way round, which the backward reads.
    assert torch.equal(blocks(mask.q_num_blocks, mask.q_indices, held.T.shape), partial.T)
    assert torch.equal(blocks(mask.full_q_num_blocks, mask.full_q_indices, held.T.shape), full.T)


def test_masks_are_made_once_per_batch_and_freed_with_it(monkeypatch):
    made = []
    make = flex._block_mask
    monkeypatch.setattr(flex, "_block_mask", lambda *args: made.append(args[1]) or make(*args))
    segments = Segments.build((0, 5, 20), (0, 5, 20), True, "cpu")
    before = len(flex._masks_of)
    for window in (None, 3, None, 3):
        flex._mask(segments, window)
    assert made == [None, 3] and len(flex._masks_of) == before + 1
    del segments
    gc.collect()
    assert len(flex._masks_of) == before


def test_no_segments_call_nothing(monkeypatch):
    monkeypatch.setattr(flex, "_compiled", lambda: None)
    q, k, v, dout = dense.inputs(0, 0, 4, 2, 16, 16, torch.bfloat16)
    segments = Segments.build((0,), (0,), True, "cpu")
    scoring = Scoring(SCALE, softcap=1.0)
    out, lse = Flex().forward(q, k, v, segments, scoring)
    assert out.shape == (0, 4, 16) and lse.shape == (0, 4) and lse.dtype == torch.float32
    assert [g.shape for g in Flex().backward(dout, q, k, v, out, lse, segments, scoring)] == [
        q.shape,
        k.shape,
        v.shape,
    ]
