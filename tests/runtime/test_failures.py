"""A rank that dies or raises in the middle ends the job with its reason, before the group's timeout."""

import os
import time

import pytest
import torch

import sap_hf
from tests.dist import GROUP_TIMEOUT_SECONDS, RankError, run_ranks, run_script


def two_layers(rank, world, die):
    plan = sap_hf.plan(lengths=[24], cp_size=world, strategy="sap", layout="zigzag")
    x = torch.randn(len(plan.rows(rank)), 2, 8, requires_grad=True)
    hidden = sap_hf.attention(x, x, x, plan)
    if rank == 1:
        die()
    sap_hf.attention(hidden, hidden, hidden, plan).sum().backward()


def vanish():
    os._exit(3)


def give_up():
    raise ValueError("in the middle")


@pytest.mark.parametrize(
    "die, message",
    [
        (vanish, "rank 1 of 3 died with exit code 3"),
        (give_up, r"(?s)rank 1 of 3 failed.*two_layers.*ValueError: in the middle"),
    ],
    ids=["vanish", "raise"],
)
def test_a_dying_rank_ends_the_job_with_its_reason(die, message):
    started = time.monotonic()
    with pytest.raises(RankError, match=message):
        run_ranks(two_layers, 3, die)
    assert time.monotonic() - started < GROUP_TIMEOUT_SECONDS


SCRIPT = """
import os, torch, torch.distributed as dist
from tests.runtime.test_failures import give_up, two_layers

torch.set_num_threads(1)
dist.init_process_group("gloo")
two_layers(dist.get_rank(), dist.get_world_size(), give_up)
"""


def test_under_torchrun_the_job_ends_with_the_traceback(tmp_path, request):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    # Starting torch three times on a busy machine is slow; the group's own timeout would be half an hour here.
    done = run_script(script, 2, timeout=150, env={"PYTHONPATH": str(request.config.rootpath)})
    assert done.code != 0
    assert "ValueError: in the middle" in done.output
