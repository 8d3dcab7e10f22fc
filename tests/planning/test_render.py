"""Figures, table and JSON of plans: what they say is what the plans are."""

import dataclasses
import json
import math

import numpy as np
import pytest

import sap_hf
from sap_hf.planning.balance import LESS_EVEN, MEMBERS, start_of
from sap_hf.planning.cost import Shape
from sap_hf.planning.hardware import PRESETS
from sap_hf.planning.plan import Plan
from sap_hf.planning.render import as_dict, as_json, figures, table
from sap_hf.strategies.auto import Request, candidates

# Several ranks wait for rows here, so that stages and an all-gather are weighed too.
LENGTHS = [1900, 310, 2750, 480, 1200, 95, 860, 597]


def weighed(plan: Plan, strategy: str = "auto", layout: str = "auto") -> list[Plan]:
    names = ("documents", "cp_size", "windows", "delivery", "shape", "hardware", "max_remote_rows")
    asked = {name: getattr(plan, name) for name in names}
    return list(candidates(Request(**asked, strategy=strategy, layout=layout)))


def lines_of(plan: Plan, members: list[Plan]) -> list[str]:
    """The table's lines of members, without its head and c*."""
    return table(plan, members).splitlines()[1:-1]


@pytest.mark.parametrize("hardware", PRESETS)
@pytest.mark.parametrize("window", [None, 300])
def test_the_plan_is_the_first_of_the_fastest_that_were_weighed(hardware: str, window: int | None) -> None:
    plan = sap_hf.plan(LENGTHS, cp_size=4, window=window, hardware=hardware)
    members = weighed(plan)
    assert len(members) >= 3 + len(LESS_EVEN)
    assert plan.seconds == min(member.seconds for member in members)
    first = next(member for member in members if member.seconds == plan.seconds)
    assert first.digest == plan.digest


def test_every_placement_of_a_small_pack_is_weighed_and_named() -> None:
    members = weighed(sap_hf.plan(LENGTHS, cp_size=4, hardware="pcie"))
    named = {(member.layout, member.placement.start) for member in members}
    less_even = {("balanced", start_of(*member)) for member in LESS_EVEN}
    assert named > {("contiguous", ""), ("zigzag", "")} | less_even
    ((layout, tight),) = named - {("contiguous", ""), ("zigzag", "")} - less_even
    assert layout == "balanced" and tight in MEMBERS
    assert {"sap"} <= {member.strategy for member in members} <= {"sap", "all_gather"}
    assert {member.whole for member in members} == {True, False}


@pytest.mark.parametrize("layout", ["contiguous", "zigzag", "balanced"])
@pytest.mark.parametrize("strategy", ["sap", "all_gather", "ring"])
def test_figures_are_those_of_the_plan_with_that_strategy_and_layout(strategy: str, layout: str) -> None:
    plan = sap_hf.plan(LENGTHS, cp_size=4, strategy=strategy, layout=layout)
    best = min(map(figures, weighed(plan, strategy, layout)), key=lambda found: found["modelled_seconds"])
    moved = plan.rows_moved.sum()
    assert best == {
        "layout": layout,
        "start": plan.placement.start,
        "strategy": strategy,
        "ulysses_size": 1,
        "turns": 1,
        "stages": plan.widest.stages,
        "whole": plan.widest.whole,
        "deliveries": list(plan.deliveries),
        "modelled_seconds": plan.layer_seconds.total.max(),
        "imbalance": plan.pairs.max() / plan.pairs.mean(),
        "rows_moved_total": moved,
        "share_of_all_gather": moved / (sum(LENGTHS) * 3),
        "ratio_to_lower_bound": moved / plan.lower_bound_rows,
        "digest": plan.digest,
    }
    # What "auto" weighs of this strategy and layout is the same plan.
    if strategy == "sap":
        assert plan.digest in [member.digest for member in weighed(plan)]


def test_a_pack_that_need_not_move_has_no_ratio_to_its_bound() -> None:
    plan = sap_hf.plan([4, 4], cp_size=2)
    assert plan.lower_bound_rows == 0
    assert figures(plan)["ratio_to_lower_bound"] is None
    assert figures(plan)["stages"] == 0
    for line in lines_of(plan, weighed(plan)):
        assert line.split()[-1] == "-"


def test_the_table_has_the_fastest_first_and_marks_the_plan() -> None:
    members = weighed(sap_hf.plan(LENGTHS, cp_size=4, hardware="pcie"))
    chosen = min(members, key=lambda member: member.seconds)
    lines = lines_of(chosen, members)
    fastest: dict[tuple[str, str, str], Plan] = {}
    for member in sorted(members, key=lambda member: member.seconds):
        fastest.setdefault((member.layout, member.placement.start, member.strategy), member)
    in_order = list(fastest.values())
    assert len(members) > len(in_order) == len(lines)
    assert [line[0] for line in lines] == ["*"] + [" "] * (len(lines) - 1)
    for line, member in zip(lines, in_order, strict=True):
        name = f"balanced ({member.placement.start})" if member.placement.start else member.layout
        assert line[1:].strip().startswith(name)
        *_, milliseconds, imbalance, share, ratio = line.split()
        assert float(milliseconds) == pytest.approx(member.seconds * 1e3, rel=1e-3)
        assert float(imbalance) == pytest.approx(member.imbalance, abs=0.005)
        assert share == f"{member.rows_moved.sum() / member.all_gather_rows:.1%}"
        assert float(ratio) == pytest.approx(member.rows_moved.sum() / member.lower_bound_rows, abs=0.005)


def test_plans_that_read_the_same_have_one_line() -> None:
    plan = sap_hf.plan(LENGTHS, cp_size=4, strategy="sap", layout="zigzag", max_remote_rows=500)
    finer = dataclasses.replace(plan, stages=2)
    assert finer.digest == plan.digest
    for chosen in (plan, finer):
        (line,) = lines_of(chosen, [plan, finer])
        assert line.startswith("*")


def test_deliveries_in_a_row_are_counted() -> None:
    plan = sap_hf.plan(LENGTHS, cp_size=4, strategy="ring", layout="zigzag", delivery="p2p")
    assert plan.deliveries == ("p2p",) * 3
    assert "  p2p x3  " in table(plan, [plan])


@pytest.mark.parametrize("hardware", ["h100", "pcie"])
def test_critical_rows_are_flops_over_group_size_times_bandwidth(hardware: str) -> None:
    machine = PRESETS[hardware]
    plan = sap_hf.plan(LENGTHS, cp_size=4, num_heads=12, num_kv_heads=4, hardware=hardware)
    inside, between = (
        math.ceil(machine.flops_per_s / (3 * rate))
        for rate in (machine.node_bytes_per_s, machine.network_bytes_per_s)
    )
    assert as_dict(plan)["critical_rows"] == {"inside_node": inside, "between_nodes": between}
    last = table(plan, [plan]).splitlines()[-1]
    assert last.startswith("c*: ")
    assert f"{inside:,} rows" in last and f"({between:,} between nodes)" in last


def test_seconds_per_rank_add_up_to_the_modelled_seconds() -> None:
    plan = sap_hf.plan(LENGTHS, cp_size=4, window={None: 1, 300: 2}, hardware="pcie")
    parts = as_dict(plan)["seconds_per_rank"]
    assert set(parts) == {"forward", "forward_exposed", "backward", "backward_exposed"}
    assert parts["backward_exposed"] == plan.layer_seconds.backward_exposed.tolist()
    assert all(len(part) == 4 for part in parts.values())
    assert np.sum(list(parts.values()), axis=0).max() == pytest.approx(plan.seconds, rel=1e-12)


def test_json_lists_the_members_in_the_order_of_weighing_and_says_which_was_chosen() -> None:
    plan = sap_hf.plan(LENGTHS, cp_size=4)
    members = weighed(plan)
    chosen = min(members, key=lambda member: member.seconds)
    found = json.loads(as_json(chosen, members))
    assert [member["digest"] for member in found["members"]] == [member.digest for member in members]
    marks = [member["chosen"] for member in found["members"]]
    assert marks == [member is chosen for member in members]
    for key, value in figures(chosen).items():
        assert found[key] == value


def test_a_layer_without_whole_groups_or_width_is_refused_when_weighed() -> None:
    plan = sap_hf.plan(LENGTHS, cp_size=4)
    for shape in (Shape(8, 3, 64), Shape(8, 0, 64), Shape(8, 4, 0)):
        with pytest.raises(sap_hf.errors.LayoutError):
            list(candidates(Request(plan.documents, 4, shape=shape, hardware=plan.hardware)))


def test_turns_of_heads_are_told_where_there_are_several() -> None:
    plan = sap_hf.plan(LENGTHS, cp_size=4, ulysses_size=2)
    one, two = plan.in_turns(1), plan.in_turns(2)
    assert "turns" not in str(one) and "ulysses 2 x sap, 2 turns on" in str(two)
    assert [as_dict(each)["turns"] for each in (one, two)] == [1, 2]
    assert one.digest != two.digest
