"""Fit: the committed constants come from 8 and 16 GPUs alone, and carry to 32 and 64."""

import math

import numpy as np
import pytest

from sap_hf.cli import main
from sap_hf.simulation import chart
from sap_hf.simulation.fit import BOUNDS, FITTED, HELD_OUT, SEEN, TOOLS, fit, machine_of, modelled, workload
from sap_hf.simulation.report import constants_table


def test_the_fit_finds_the_committed_constants_without_a_look_at_more_than_16_gpus(monkeypatch):
    def packs(ranks):
        assert ranks in SEEN, "the fit asked for packs that it must not see"
        return seen[ranks]

    seen = {ranks: chart.packs(ranks) for ranks in SEEN}
    blind = {
        name: tuple((*way[: len(SEEN)], math.nan, math.nan) for way in ways)
        for name, ways in chart.PUBLISHED.items()
    }
    monkeypatch.setattr(chart, "packs", packs)
    monkeypatch.setattr(chart, "PUBLISHED", blind)
    found = fit()
    assert max(SEEN) == 16
    assert found == pytest.approx(FITTED, rel=1e-3)


def test_constants_keep_to_what_the_chip_and_its_links_have():
    for name, (_, least, most) in BOUNDS.items():
        assert least <= FITTED[name] <= most


@pytest.fixture(scope="module")
def errors():
    """{ranks: (tools, ways) relative errors}."""
    machine, timed = machine_of(FITTED), workload(chart.RANKS)
    return {
        ranks: np.array(
            [
                [
                    rate / chart.PUBLISHED[name][way][at] - 1
                    for way, rate in enumerate(modelled(timed[name][ranks], machine))
                ]
                for name in TOOLS
            ]
        )
        for at, ranks in enumerate(chart.RANKS)
    }


def test_every_fitted_point_is_within_15_percent(errors):
    assert max(abs(errors[ranks]).max() for ranks in SEEN) <= 0.15


def test_most_points_that_were_not_fitted_are_within_15_percent(errors):
    held_out = abs(np.concatenate([errors[ranks].ravel() for ranks in HELD_OUT]))
    assert held_out.mean() <= 0.09
    assert (held_out <= 0.15).sum() >= 29 and held_out.max() <= 0.20


@pytest.mark.parametrize("ranks", chart.RANKS)
def test_packs_are_full_and_no_document_is_longer_than_a_quarter(ranks):
    made = chart.packs(ranks)
    assert len(made) == chart.PACKS
    for documents in made:
        assert documents.rows == chart.ROWS_PER_RANK * ranks
        assert documents.lengths.max() <= documents.rows // 4


def test_the_command_prints_every_point_and_every_policy(capsys):
    assert main(["simulate", "--chart"]) == 0
    printed = capsys.readouterr().out
    for ways in chart.PUBLISHED.values():
        for way in ways:
            assert all(f"/ {rate} " in printed for rate in way)
    arguments = ["--workload", "short", "--ranks", "2", "--rows-per-rank", "512", "--packs", "2"]
    assert main(["simulate", *arguments]) == 0
    printed = capsys.readouterr().out
    assert all(name[:11] in printed for name in TOOLS)
    assert "best single peer policy" in printed


def test_constants_at_a_bound_are_marked():
    printed = constants_table(FITTED, FITTED).splitlines()
    at = {name for name, (_, least, most) in BOUNDS.items() if FITTED[name] in (least, most)}
    assert {line.split()[0] for line in printed} == set(FITTED)
    assert {line.split()[0] for line in printed if " at its " in line} == at


def test_bad_input_ends_with_a_message_and_code_2(capsys):
    for arguments in (["--ranks", "1"], ["--packs", "0"], ["--workload", "chort"], ["--hardware", "h1000"]):
        assert main(["simulate", "--ranks", "2", "--packs", "1", *arguments]) == 2
        assert capsys.readouterr().err.startswith("sap-hf: ")
