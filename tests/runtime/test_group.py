"""The one thing that ranks tell each other per batch: whether they were given the same one."""

import pytest
import torch.distributed as dist

from sap_hf.errors import DocumentError, SapError
from sap_hf.runtime.group import ALONE, CpGroup, agree, agree_ahead
from tests.dist import run_ranks

LARGEST = 2**64 - 1


def check(rank, world):
    """By name of the situation: the error that this rank met, or None."""
    group = CpGroup(None, dist.group.WORLD, None, world, rank)
    odd = rank == 1
    situations = {
        "same": ((7, LARGEST), None),
        "inputs": ((8 if odd else 7, 5), None),
        "plan": ((7, LARGEST if odd else LARGEST - 1), None),
        "refused": ((7, 5), DocumentError("no boundaries in this batch") if odd else None),
    }
    return {name: _error(group, *situation) for name, situation in situations.items()}


def check_ahead(rank, world):
    """By name of the situation: what this rank, of two groups of two, was told."""
    odd, group = rank == 3, 7 + rank // 2
    situations = {
        "same": (True, (group, LARGEST)),
        "all-came-otherwise": (False, (group, 5)),
        "one-came-otherwise": (not odd, (group, 5)),
        "inputs": (True, (group + odd, 5)),
        "plan": (True, (group, LARGEST - odd)),
        "one-has-none": (True, None if odd else (group, 5)),
        "none": (True, None),
    }
    return {name: agree_ahead(dist.group.WORLD, 2, *situation) for name, situation in situations.items()}


def _error(group, fingerprint, problem):
    try:
        agree(group, fingerprint, problem, training=False)
    except SapError as error:
        return type(error).__name__, str(error)
    return None


@pytest.fixture(scope="module")
def met():
    return run_ranks(check, 3, poison=True)


def test_equal_batches_pass(met):
    assert [errors["same"] for errors in met] == [None] * 3


@pytest.mark.parametrize("what", ["inputs", "plan"])
def test_a_difference_is_an_error_on_every_rank_and_names_the_odd_one(met, what):
    for errors in met:
        kind, message = errors[what]
        assert kind == "BatchMismatch"
        assert what in message and "rank 1" in message


def test_a_batch_that_one_rank_refuses_is_refused_by_all_with_its_reason(met):
    assert [errors["refused"][0] for errors in met] == ["BatchMismatch", "DocumentError", "BatchMismatch"]
    for errors in met:
        assert "no boundaries in this batch" in errors["refused"][1]


def test_a_single_process_agrees_with_itself():
    agree(ALONE, (1, 2), None, training=False)
    with pytest.raises(DocumentError, match="the reason"):
        agree(ALONE, (1, 2), DocumentError("the reason"), training=True)


def test_agreeing_ahead_tells_all_ranks_of_all_groups_the_same():
    told = run_ranks(check_ahead, 4, poison=True)
    assert all(others == told[0] for others in told)
    assert told[0] == {
        "same": (True, True),
        "all-came-otherwise": (True, True),
        "one-came-otherwise": (False, False),
        "inputs": (True, False),
        "plan": (True, False),
        "one-has-none": (True, False),
        "none": (True, False),
    }


def test_a_single_process_agrees_ahead_when_there_is_a_batch():
    assert agree_ahead(None, 1, True, (1, 2)) == (True, True)
    assert agree_ahead(None, 1, True, None) == (True, False)
