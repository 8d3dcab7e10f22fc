"""Merging parts of a softmax."""

import pytest
import torch

from sap_hf.kernels import merge, merge_into
from tests.kernels import dense

NOTHING = float("-inf")


def parts(dtype, pieces=3):
    """(out, lse) over all keys, and the list of (out, lse) over disjoint pieces of them."""
    q, k, v, _ = dense.inputs(7, 30, 4, 2, 8, 8, dtype)
    everything = torch.ones(7, 30, dtype=torch.bool)
    whole = dense.attend(q, k, v, everything, 1.0, None)
    size = 30 // pieces
    cuts = [slice(i * size, (i + 1) * size) for i in range(pieces)]
    return whole, [dense.attend(q, k[cut], v[cut], everything[:, cut], 1.0, None) for cut in cuts]


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-6), (torch.float64, 1e-12)])
def test_merged_parts_equal_the_whole_in_any_order(dtype, tolerance):
    (out, lse), (a, b, c) = parts(dtype)
    for merged in (merge(*merge(*a, *b), *c), merge(*a, *merge(*c, *b))):
        assert merged[0].dtype == merged[1].dtype == dtype
        assert dense.error(merged[0], out) < tolerance and dense.error(merged[1], lse) < tolerance


def test_lse_far_apart_neither_overflows_nor_loses_the_large_side():
    out_a, out_b = torch.full((1, 1, 2), 3.0), torch.full((1, 1, 2), 5.0)
    out, lse = merge(out_a, torch.tensor([[1000.0]]), out_b, torch.tensor([[-1000.0]]))
    assert torch.equal(out, out_a) and lse.item() == 1000.0


def test_a_side_that_attended_to_nothing_changes_nothing():
    (out, lse), _ = parts(torch.float64)
    nothing = torch.zeros_like(out), torch.full_like(lse, NOTHING)
    for merged in (merge(out, lse, *nothing), merge(*nothing, out, lse)):
        assert torch.equal(merged[0], out) and torch.equal(merged[1], lse)


def test_two_sides_that_attended_to_nothing_give_zero_and_no_nan():
    out, lse = merge(*(torch.zeros(2, 3, 4), torch.full((2, 3), NOTHING)) * 2)
    assert torch.equal(out, torch.zeros(2, 3, 4)) and torch.equal(lse, torch.full((2, 3), NOTHING))


def test_half_precision_out_is_merged_in_float32():
    (_, _), (a, b, _) = parts(torch.float32)
    half = [(out.bfloat16(), lse) for out, lse in (a, b)]
    out, lse = merge(*half[0], *half[1])
    want = merge(half[0][0].float(), a[1], half[1][0].float(), b[1])
    assert out.dtype == torch.float32 and torch.equal(out, want[0]) and torch.equal(lse, want[1])


@pytest.mark.parametrize("rows", [slice(2, 5), torch.tensor([4, 0, 5])], ids=["slice", "indices"])
def test_merge_into_touches_only_the_given_rows(rows):
    _, (a, b, _) = parts(torch.float64)
    out, lse = (x.clone() for x in a)
    merge_into(out, lse, rows, b[0][rows], b[1][rows])

    want_out, want_lse = (x.clone() for x in a)
    whole_out, whole_lse = merge(*a, *b)
    want_out[rows], want_lse[rows] = whole_out[rows], whole_lse[rows]
    assert torch.equal(out, want_out) and torch.equal(lse, want_lse)


def test_merge_into_starts_from_nothing():
    _, (a, _, _) = parts(torch.float64)
    out, lse = torch.zeros_like(a[0]), torch.full_like(a[1], NOTHING)
    merge_into(out, lse, slice(0, 7), *a)
    assert torch.equal(out, a[0]) and torch.equal(lse, a[1])
