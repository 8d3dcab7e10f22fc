"""What ranks tell each other per batch, whether they were given the same one, and the groups that they do it on."""

import pytest
import torch
import torch.distributed as dist

import sap_hf
from sap_hf.errors import DocumentError, SapError
from sap_hf.runtime.collectives import sum_over_ranks
from sap_hf.runtime.group import ALONE, CpGroup, agree, agree_ahead, consecutive
from sap_hf.runtime.group import world as world_group
from tests.dist import GROUP_TIMEOUT_SECONDS, run_ranks

LARGEST = 2**64 - 1
WORLD = 4


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


def check_apart(rank, world):
    """By cp_size, what this rank's groups are like; meanwhile others' all-reduces wait for the last ranks."""
    found = {}
    for cp_size in (2, 4):
        group = consecutive(cp_size)
        # More than gloo has threads for one group: whatever else came to it would wait for the others too.
        pending = [dist.all_reduce(torch.ones(1), async_op=True) for _ in range(4)] if rank == 0 else []
        for options in (
            {"strategy": "all_gather", "delivery": "all_gather"},
            {"strategy": "sap", "delivery": "all_to_all"},
            {"strategy": "sap", "delivery": "p2p"},
            {"strategy": "ulysses", "ulysses_size": cp_size},
        ):
            plan = sap_hf.plan([8 * cp_size], cp_size=cp_size, num_heads=4, num_kv_heads=4, **options)
            q, k, v = (torch.ones(plan.rows_per_rank, 4, 8, requires_grad=True) for _ in range(3))
            sap_hf.attention(q, k, v, plan, group=group.device).sum().backward()
            sum_over_ranks(torch.ones(()), group)
            agree(group, (7, cp_size), None, training=True)
            agree(group, (7, cp_size), None, training=False)
        pending += [dist.all_reduce(torch.ones(1), async_op=True) for _ in range(4)] if rank else []
        for work in pending:
            work.wait()
        found[cp_size] = {
            "ranks": [dist.get_process_group_ranks(each) for each in (group.device, group.host, group.job)],
            "rank": group.rank,
            "again": consecutive(cp_size) is group,
            "timeouts": {
                each._get_backend(torch.device("cpu")).options._timeout.total_seconds()
                for each in (group.device, group.host, group.job)
            },
        }
    found["world"] = world_group() is consecutive(world)
    return found


@pytest.fixture(scope="module")
def apart():
    return run_ranks(check_apart, WORLD, timeout=50)


def test_rows_and_agreements_do_not_wait_for_gradients(apart):
    # The ranks came back.
    assert len(apart) == WORLD


@pytest.mark.parametrize("cp_size", [2, 4])
def test_every_rank_is_among_its_consecutive_ranks(apart, cp_size):
    for rank, found in enumerate(apart):
        first = rank - rank % cp_size
        mine = list(range(first, first + cp_size))
        assert found[cp_size]["ranks"] == [mine, mine, list(range(WORLD))]
        assert found[cp_size]["rank"] == rank - first


def test_groups_are_made_once_and_are_as_patient_as_the_script_wants(apart):
    for found in apart:
        assert found["world"]
        for cp_size in (2, 4):
            assert found[cp_size]["again"]
            assert found[cp_size]["timeouts"] == {GROUP_TIMEOUT_SECONDS}
