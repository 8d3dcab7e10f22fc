"""The launcher itself: it must show the rank that failed, and where."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.dist import RankError, run_ranks, run_script


def add(rank, world, amount):
    total = torch.tensor([float(rank + amount)])
    dist.all_reduce(total)
    return {
        "rank": rank,
        "total": total,
        "threads": torch.get_num_threads(),
        "world": os.environ["WORLD_SIZE"],
    }


def one_raises(rank, world):
    if rank == 1:
        raise ValueError("the reason")
    dist.barrier()


def one_dies(rank, world):
    if rank == 1:
        os._exit(7)
    dist.barrier()


def one_sleeps(rank, world):
    if rank == 1:
        time.sleep(100)
    dist.barrier()


def initialise_from_environment(rank, world):
    assert not dist.is_initialized()
    dist.init_process_group("gloo")
    return dist.get_rank(), dist.get_world_size()


def unwritten(rank, world):
    values = [torch.empty(3), torch.ones(2).new_empty(2), torch.empty_like(torch.ones(1))]
    return [bool(value.isnan().all()) for value in values], torch.empty(2, dtype=torch.int64).dtype


def test_results_come_back_by_rank():
    results = run_ranks(add, 3, 10)
    assert [result["rank"] for result in results] == [0, 1, 2]
    assert [result["total"].item() for result in results] == [33.0] * 3
    assert [result["threads"] for result in results] == [1] * 3
    assert [result["world"] for result in results] == ["3"] * 3


def test_the_first_failing_rank_is_shown_with_its_traceback():
    started = time.monotonic()
    with pytest.raises(RankError, match=r"(?s)rank 1 of 3 failed.*one_raises.*ValueError: the reason"):
        run_ranks(one_raises, 3)
    assert time.monotonic() - started < 20


def test_a_rank_that_dies_silently_is_named():
    with pytest.raises(RankError, match="rank 1 of 3 died with exit code 7"):
        run_ranks(one_dies, 3)


def test_a_timeout_shows_where_each_rank_stood():
    with pytest.raises(RankError, match=r"(?s)2 of 2 ranks.*rank 1 stood here.*one_sleeps"):
        run_ranks(one_sleeps, 2, timeout=6)


def test_a_function_may_initialise_the_group_itself():
    assert run_ranks(initialise_from_environment, 2, init=False) == [(0, 2), (1, 2)]


def test_unwritten_memory_is_nan_when_poisoned():
    assert run_ranks(unwritten, 1, poison=True) == [([True, True, True], torch.int64)]
    assert "nan" not in str(torch.zeros(2).new_zeros(2))


def test_a_script_runs_under_torchrun(tmp_path):
    script = tmp_path / "script.py"
    # One write per rank: print() would make several, and the ranks' could mix.
    script.write_text(
        "import os, sys\n"
        "os.write(1, f\"rank {os.environ['RANK']} {sys.argv[1:]}\\n\".encode())\n"
        "sys.exit(3)\n"
    )
    done = run_script(script, 2, "--flag")
    assert "rank 0 ['--flag']" in done.output and "rank 1 ['--flag']" in done.output
    assert done.code != 0
    script.write_text("import time; time.sleep(100)")
    with pytest.raises(RankError, match=r"(?s)still running after 3 s on 1"):
        run_script(script, 1, timeout=3)
