"""The oracle itself, against torch's own attention and against sums written out by hand."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests import oracles


def drawn(rows, heads, kv_heads, width=4, value_width=4):
    draw = torch.Generator().manual_seed(rows)
    shapes = (rows, heads, width), (rows, kv_heads, width), (rows, kv_heads, value_width)
    return [torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("window", [None, 1, 3])
def test_it_agrees_with_torch_given_the_mask(window):
    lengths = (5, 1, 7)
    q, k, v = drawn(13, 6, 2, value_width=3)
    allowed = torch.from_numpy(oracles.mask(lengths, window))
    parts = [tensor.transpose(0, 1)[None] for tensor in (q, k, v)]
    expected = F.scaled_dot_product_attention(*parts, attn_mask=allowed, enable_gqa=True, scale=0.3)
    found = oracles.documents_alone(q, k, v, lengths, scale=0.3, window=window)
    torch.testing.assert_close(found, expected[0].transpose(0, 1), rtol=0, atol=1e-13)


def test_softcap_and_sink_by_hand():
    q, k, v = drawn(2, 1, 1)
    sink = torch.tensor([0.7], dtype=torch.float64)
    logits = [1.5 * math.tanh(float(q[1, 0] @ key[0]) / 2 / 1.5) for key in k]
    weights = [math.exp(logit) for logit in logits]
    total = sum(weights) + math.exp(0.7)
    expected = (weights[0] * v[0, 0] + weights[1] * v[1, 0]) / total
    found = oracles.documents_alone(q, k, v, (2,), softcap=1.5, sinks=sink)
    torch.testing.assert_close(found[1, 0], expected, rtol=0, atol=1e-14)


def test_its_gradients_are_those_of_finite_differences():
    q, k, v = (tensor.requires_grad_() for tensor in drawn(4, 2, 1))
    sinks = torch.tensor([0.2, -0.4], dtype=torch.float64, requires_grad=True)

    def attend(q, k, v, sinks):
        return oracles.documents_alone(q, k, v, (3, 1), window=2, softcap=2.0, sinks=sinks)

    assert torch.autograd.gradcheck(attend, (q, k, v, sinks))


def test_the_mask_by_hand():
    seen = oracles.mask([2, 3], window=2)
    expected = [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]
    np.testing.assert_array_equal(seen, np.array(expected, dtype=bool))
    assert oracles.rows_needed(oracles.mask([2, 3]), np.array([0, 0, 0, 1, 1]), 1) == {2}
