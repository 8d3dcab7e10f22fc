"""What a plan says about itself: lower bounds, digest, text, and what auto chose."""

import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given

import sap_hf
from sap_hf.errors import ConfigError, DocumentError, LayoutError, SapError
from sap_hf.planning.hardware import PRESETS
from sap_hf.planning.wires import link_seconds
from tests.planning.cases import LAYOUTS, STRATEGIES, both, packs, ranks, windows


def test_the_packs_of_the_first_page():
    # By hand: documents 0-4, 5-7, 8-15; four ranks of four rows. Rank 1 lacks row 4's document, 0-3 (4 rows);
    # rank 2 begins with a document; rank 3 lacks rows 8-11 (4 rows).
    plan = sap_hf.plan(lengths=[5, 3, 8], cp_size=4, strategy="sap", layout="contiguous")
    assert plan.rows_moved.tolist() == [[0, 4, 0, 0], [0, 0, 0, 0], [0, 0, 0, 4], [0, 0, 0, 0]]
    assert plan.pairs.tolist() == [10, 5 + 6, 10, 5 + 6 + 7 + 8]
    assert plan.lower_bound_rows == 8
    assert plan.imbalance == pytest.approx(26 / 14.25)
    gathered = sap_hf.plan(lengths=[5, 3, 8], cp_size=4, strategy="all_gather", layout="contiguous")
    assert gathered.rows_moved.tolist() == (4 * (1 - np.eye(4, dtype=int))).tolist()


@given(packs, ranks)
def test_contiguous_sap_meets_its_lower_bound(lengths, cp_size):
    total = sum(lengths)
    share = -(-total // cp_size)
    starts = np.cumsum([0, *lengths])
    bound = 0
    for rank in range(cp_size):
        first = rank * share
        if first < total:
            bound += first - max(start for start in starts.tolist() if start <= first)
    for strategy in STRATEGIES:
        plan = sap_hf.plan(lengths=lengths, cp_size=cp_size, strategy=strategy, layout="contiguous")
        assert plan.lower_bound_rows == bound
        assert plan.rows_moved.sum() >= bound
    assert (
        sap_hf.plan(lengths=lengths, cp_size=cp_size, strategy="sap", layout="contiguous").rows_moved.sum()
        == bound
    )


@given(packs, ranks)
def test_other_layouts_state_the_bound_that_holds_for_any_placement(lengths, cp_size):
    share = -(-sum(lengths) // cp_size)
    parts = [-(-length // share) for length in lengths]
    bound = sum((m - 1) * length - share * (m * (m - 1) // 2) for m, length in zip(parts, lengths))
    plan = sap_hf.plan(lengths=lengths, cp_size=cp_size, strategy="sap", layout="zigzag")
    assert plan.lower_bound_rows == bound
    assert plan.rows_moved.sum() >= bound


@given(packs, ranks, both, windows)
def test_cu_seqlens_and_lengths_mean_the_same(lengths, cp_size, names, window):
    options = {"cp_size": cp_size, "strategy": names[0], "layout": names[1], "window": window}
    by_lengths = sap_hf.plan(lengths=lengths, **options)
    boundaries = np.cumsum([0, *lengths])
    as_a_model_gets_them = torch.from_numpy(boundaries).to(torch.int32)
    for cu_seqlens in (boundaries, boundaries.astype(np.int32), boundaries.tolist(), as_a_model_gets_them):
        by_boundaries = sap_hf.plan(cu_seqlens=cu_seqlens, **options)
        assert by_boundaries.digest == by_lengths.digest
        np.testing.assert_array_equal(by_boundaries.rows_moved, by_lengths.rows_moved)
        np.testing.assert_array_equal(by_boundaries.pairs, by_lengths.pairs)
        for rank in range(cp_size):
            np.testing.assert_array_equal(by_boundaries.rows(rank), by_lengths.rows(rank))


DIGESTS = [
    {"lengths": [5, 3, 8], "cp_size": 4},
    {"lengths": [5, 3, 9], "cp_size": 4},
    {"lengths": [3, 5, 8], "cp_size": 4},
    {"lengths": [5, 11], "cp_size": 4},
    {"lengths": [5, 3, 8], "cp_size": 2},
    {"lengths": [5, 3, 8], "cp_size": 4, "strategy": "sap", "layout": "contiguous", "window": 2},
    {"lengths": [5, 3, 8], "cp_size": 4, "strategy": "sap", "layout": "contiguous"},
    {"lengths": [5, 3, 8], "cp_size": 4, "strategy": "sap", "layout": "zigzag"},
    {"lengths": [5, 3, 8], "cp_size": 4, "strategy": "all_gather", "layout": "contiguous"},
]


def test_the_digest_is_the_same_in_another_process_with_another_hash_seed():
    here = [sap_hf.plan(**options).digest for options in DIGESTS]
    script = "import json, sys, sap_hf\n"
    script += "print(json.dumps([sap_hf.plan(**options).digest for options in json.loads(sys.argv[1])]))"
    for seed in ("1", "4321"):
        done = subprocess.run(
            [sys.executable, "-c", script, json.dumps(DIGESTS)],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert json.loads(done.stdout) == here


def test_the_digest_differs_where_the_inputs_differ():
    # The first entry leaves strategy and layout to auto, so it may well be the plan of a later one.
    digests = [sap_hf.plan(**options).digest for options in DIGESTS]
    assert len(set(digests[1:])) == len(digests) - 1
    assert all(isinstance(digest, int) and -(2**63) <= digest < 2**64 for digest in digests)


@given(packs, ranks, both)
def test_two_plans_of_one_input_are_equal(lengths, cp_size, names):
    plans = [
        sap_hf.plan(lengths=lengths, cp_size=cp_size, strategy=names[0], layout=names[1]) for _ in range(2)
    ]
    assert plans[0].digest == plans[1].digest
    assert str(plans[0]) == str(plans[1])


@given(packs, ranks, windows)
def test_auto_names_what_it_chose_and_is_that_plan(lengths, cp_size, window):
    auto = sap_hf.plan(lengths=lengths, cp_size=cp_size, window=window)
    assert auto.strategy in STRATEGIES and auto.layout in LAYOUTS and auto.ulysses_size == 1
    named = sap_hf.plan(
        lengths=lengths, cp_size=cp_size, window=window, strategy=auto.strategy, layout=auto.layout
    )
    if auto.layout == "balanced":
        # Balanced is a family: by name, the member that moves least among the even ones; auto takes the fastest.
        assert auto.seconds <= named.seconds
        return
    np.testing.assert_array_equal(named.rows_moved, auto.rows_moved)
    for rank in range(cp_size):
        np.testing.assert_array_equal(named.rows(rank), auto.rows(rank))


def test_asking_for_a_name_gives_that_name():
    for strategy in STRATEGIES:
        for layout in LAYOUTS:
            plan = sap_hf.plan(lengths=[9, 4], cp_size=2, strategy=strategy, layout=layout)
            assert (plan.strategy, plan.layout) == (strategy, layout)


def test_a_plan_prints_as_readable_text():
    for layout in LAYOUTS:
        text = str(sap_hf.plan(lengths=[500, 30, 900, 7], cp_size=4, strategy="sap", layout=layout))
        assert "sap" in text and layout in text
        assert len(text.splitlines()) >= 5 and max(map(len, text.splitlines())) <= 120
        assert text.replace("\n", "").isprintable()
        assert " object at 0x" not in text and "array(" not in text


@given(packs, ranks, both)
def test_peak_bytes_is_positive_and_grows_with_what_is_received(lengths, cp_size, names):
    made = [
        sap_hf.plan(lengths=lengths, cp_size=cp_size, strategy=name, layout=names[1])
        for name in ("sap", "all_gather")
    ]
    for whole in (False, True):
        plan, gathered = (dataclasses.replace(one, whole=whole) for one in made)
        assert isinstance(plan.peak_bytes, int) and 0 < plan.peak_bytes <= gathered.peak_bytes


REFUSED = [
    ({"lengths": [5, -3, 8]}, DocumentError, "-3"),
    ({"lengths": []}, DocumentError, "."),
    ({"lengths": [2.5, 3]}, DocumentError, "."),
    ({"cu_seqlens": [1, 5, 8]}, DocumentError, "1"),
    ({"cu_seqlens": [0, 5, 3, 8]}, DocumentError, "."),
    ({"cu_seqlens": [0]}, DocumentError, "."),
    ({"lengths": [5, 3], "cu_seqlens": [0, 5, 8]}, (DocumentError, ConfigError), "both|one of"),
    ({}, (DocumentError, ConfigError), "lengths"),
    ({"lengths": [5, 3], "cp_size": 0}, (LayoutError, ConfigError), "cp_size=0"),
    ({"lengths": [5, 3], "cp_size": -2}, (LayoutError, ConfigError), "cp_size=-2"),
    ({"lengths": [5, 3], "strategy": "sapp"}, ConfigError, "'sap'"),
    ({"lengths": [5, 3], "strategy": "allgather"}, ConfigError, "'all_gather'"),
    ({"lengths": [5, 3], "layout": "zig_zag"}, ConfigError, "'zigzag'"),
    ({"lengths": [5, 3], "window": 0}, ConfigError, "window=0"),
    ({"lengths": [5, 3], "window": -4}, ConfigError, "window=-4"),
    ({"lengths": [5, 3], "num_heads": 9, "num_kv_heads": 2}, (ConfigError, LayoutError), "9"),
]


@pytest.mark.parametrize("options, kind, message", REFUSED, ids=[str(options) for options, _, _ in REFUSED])
def test_bad_input_is_refused_with_its_numbers(options, kind, message):
    with pytest.raises(kind, match=message) as caught:
        sap_hf.plan(**{"cp_size": 2, **options})
    assert isinstance(caught.value, SapError)


def test_a_document_without_rows_means_the_same_by_lengths_and_by_boundaries():
    def outcome(**options):
        try:
            return sap_hf.plan(cp_size=2, **options).digest
        except DocumentError:
            return "refused"

    assert outcome(lengths=[3, 0, 2]) == outcome(cu_seqlens=[0, 3, 3, 5])


def test_ranks_of_a_node_share_its_network_card_and_no_rank_is_slower_than_its_share():
    hardware = dataclasses.replace(
        PRESETS["h100"], ranks_per_node=2, network_bytes_per_s=10.0, network_alone_bytes_per_s=15.0
    )
    nothing = np.zeros(4)

    def seconds(sent, received):
        return link_seconds(nothing, np.array(sent), np.array(received), hardware).tolist()

    # Both cards of bytes: 20 a second leave a node, at most 15 of one rank's.
    assert seconds([600, 600, 0, 0], [0, 0, 600, 600]) == [60.0, 60.0, 60.0, 60.0]
    assert seconds([600, 0, 0, 0], [0, 0, 0, 600]) == [40.0, 0.0, 0.0, 40.0]
    # 600 of one and 100 of the other are through after 35 seconds; the 100 have their share and need 10 at most.
    assert seconds([600, 100, 0, 0], [0, 0, 0, 0]) == [40.0, 10.0, 0.0, 0.0]
    # What leaves does not slow down what comes.
    assert seconds([600, 0, 0, 0], [0, 600, 0, 0]) == [40.0, 40.0, 0.0, 0.0]


def test_a_rank_that_sends_alone_has_the_whole_card_of_its_node():
    shared = dataclasses.replace(PRESETS["pcie"], ranks_per_node=2)
    apart = dataclasses.replace(shared, network_alone_bytes_per_s=shared.network_bytes_per_s)
    options = {"cu_seqlens": [0, 4000, 12000, 16000], "cp_size": 4, "strategy": "sap", "layout": "contiguous"}
    on_shared, on_apart = (sap_hf.plan(**options, hardware=machine) for machine in (shared, apart))
    assert on_shared.seconds < on_apart.seconds
