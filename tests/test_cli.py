"""sap-hf plan: what it prints for lengths, workloads and bad input."""

import json

import numpy as np

import sap_hf
from sap_hf.cli import main
from sap_hf.planning.workloads import pack

LENGTHS = ["--lengths", "5,3,8", "--cp", "4"]


def test_json_holds_the_figures_of_the_plan(capsys):
    assert main(["plan", *LENGTHS, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    plan = sap_hf.plan([5, 3, 8], cp_size=4)
    assert figures["digest"] == plan.digest
    assert figures["rows_moved"] == plan.rows_moved.tolist()
    assert figures["imbalance"] == plan.imbalance


def test_a_program_names_every_message_of_its_rank(capsys):
    assert main(["plan", *LENGTHS, "--layout", "contiguous", "--program", "3"]) == 0
    printed = capsys.readouterr().out
    assert "receive rows [4, 8) from rank 2" in printed
    assert "forward:  post 0, attend 0, wait 0, attend 1" in printed


def test_a_workload_is_the_pack_of_its_generator(capsys):
    assert main(["plan", "--workload", "short", "--rows", "4096", "--seed", "3", "--cp", "2", "--json"]) == 0
    plan = sap_hf.plan(pack("short", 4096, np.random.default_rng(3)), cp_size=2)
    assert json.loads(capsys.readouterr().out)["digest"] == plan.digest


def test_bad_input_ends_with_a_message_and_code_2(capsys):
    for arguments in (
        ["--workload", "chort", "--cp", "2"],
        ["--lengths", "5,0", "--cp", "2"],
        [*LENGTHS, "--layout", "zigzak"],
        [*LENGTHS, "--program", "4"],
    ):
        assert main(["plan", *arguments]) == 2
        assert capsys.readouterr().err.startswith("sap-hf: ")
