"""A training script whose second process fails in the middle of training; started by test_dying_rank.py."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import sap_hf
from tests.hf.scenarios import Case, build

case = Case()
trainer = build(case, sys.argv[1])
how, calls, collate = sys.argv[2], [], trainer.data_collator


def failing(features):
    calls.append(1)
    if len(calls) == 3 and os.environ["RANK"] == "1":
        if how == "killed":
            os._exit(17)
        raise RuntimeError("the disk is full")
    return collate(features)


trainer.data_collator = failing
sap_hf.attach(trainer, cp_size=2)
trainer.train()
