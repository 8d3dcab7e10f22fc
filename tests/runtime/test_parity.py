"""sap_hf.attention over real processes gives what each document gives alone: out and all gradients."""

import functools
import itertools

import pytest
import torch
import torch.distributed as dist

import sap_hf
from tests.dist import run_ranks
from tests.runtime.parity import Case, inputs, judge, right_answer, run_case, run_cases

# float64 end to end: what is left is the order of summation.
FLOAT64 = 1e-10

WORLDS = (1, 2, 3, 4)
STRATEGIES = ("sap", "all_gather")
LAYOUTS = ("contiguous", "zigzag", "balanced")
HEADS = ((9, 3), (8, 2), (4, 1), (8, 8))

PACKS = (
    (24,),  # one document as long as the pack
    (1,) * 9,  # one-token documents
    (2,),  # on four ranks, two of them hold nothing but padding
    (5, 3, 8, 1, 6),  # 23 rows: divides by nothing
    (1, 17, 1, 1, 4),
    (7, 7, 7),
    (3, 14, 2, 9, 1, 1, 6, 12),
    (11, 1),
)
FEATURES = (
    {},
    {"options": (("window", 1),)},
    {"options": (("window", 4),)},
    {"options": (("softcap", 1.5),)},
    {"sinks": True},
    {"value_dim": 5, "options": (("softmax_scale", 0.4),)},
    {
        "sinks": True,
        "value_dim": 12,
        "options": (("window", 3), ("softcap", 2.0), ("softmax_scale", 0.5)),
    },
)
COMBINATIONS = [(strategy, layout, heads) for strategy in STRATEGIES for layout in LAYOUTS for heads in HEADS]
# 8 packs and 7 features have no common divisor: 7 cases meet every feature, and the combinations start at different
# places, so that together they meet every pair. `make matrix` goes on to as many other pairs of each combination.
CASES_EACH = 7
ROUNDS = (0, pytest.param(1, marks=pytest.mark.matrix))


def cases_of(combination, round_):
    strategy, layout, (heads, kv_heads) = combination
    start = (round_ * len(COMBINATIONS) + COMBINATIONS.index(combination)) * CASES_EACH
    return [
        Case(
            lengths=PACKS[number % len(PACKS)],
            strategy=strategy,
            layout=layout,
            heads=heads,
            kv_heads=kv_heads,
            whole=number // len(PACKS) % 2 == 0,
            seed=number,
            **FEATURES[number % len(FEATURES)],
        )
        for number in range(start, start + CASES_EACH)
    ]


@functools.cache
def answers(world, round_):
    """All cases of a world in one set of processes: by case, the answers of its ranks."""
    cases = [case for combination in COMBINATIONS for case in cases_of(combination, round_)]
    by_rank = run_ranks(run_cases, world, cases, poison=True, timeout=150)
    return dict(zip(cases, zip(*by_rank)))


def test_the_cases_meet_every_pack_with_every_feature():
    cases = {case for combination in COMBINATIONS for case in cases_of(combination, 0)}
    met = {(case.lengths, case.options, case.sinks, case.value_dim) for case in cases}
    assert len(met) == len(PACKS) * len(FEATURES)


@pytest.mark.parametrize("heads", HEADS, ids=lambda heads: f"heads{heads[0]}over{heads[1]}")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("world", WORLDS, ids=lambda world: f"W{world}")
@pytest.mark.parametrize("round_", ROUNDS)
def test_out_and_gradients_match_documents_run_alone(round_, world, strategy, layout, heads):
    for case in cases_of((strategy, layout, heads), round_):
        judge(case, world, answers(world, round_)[case], FLOAT64)


# strategy, delivery, stages, max_remote_rows, remote_kv
SETTINGS = [
    ("sap", "p2p", 1, None, "refetch"),
    ("sap", "p2p", 1, None, "keep"),
    ("sap", "all_to_all", 1, None, "refetch"),
    ("sap", "all_to_all", 1, None, "keep"),
    ("sap", "p2p", 2, None, "keep"),
    ("sap", "p2p", 3, None, "refetch"),
    ("sap", "all_to_all", 2, None, "refetch"),
    ("sap", "all_to_all", 3, None, "keep"),
    ("sap", "p2p", 1, 4, "refetch"),
    ("sap", "all_to_all", 1, 5, "refetch"),
    ("all_gather", "p2p", 1, None, "refetch"),
    ("all_gather", "all_to_all", 1, None, "keep"),
    ("all_gather", "all_gather", 1, None, "refetch"),
    ("all_gather", "all_gather", 1, None, "keep"),
    ("ring", "p2p", 1, None, "refetch"),
    ("ring", "all_to_all", 1, None, "refetch"),
]


def cases_with(strategy, delivery, stages, max_remote_rows, remote_kv):
    return [
        Case(
            lengths=lengths,
            strategy=strategy,
            layout=layout,
            remote_kv=remote_kv,
            delivery=delivery,
            stages=stages,
            whole=whole,
            max_remote_rows=max_remote_rows,
            sinks=True,
            value_dim=6,
            heads_first=window is not None,
            options=(("window", window),) if window else (),
        )
        for layout in LAYOUTS
        for lengths in ((5, 3, 8, 1, 6), (24,), (2,), (7, 7, 7), (3, 14, 2, 9, 1, 1, 6, 12))
        # Under a window every query is whole.
        for window, whole in ((None, True), (None, False), (3, True))
    ]


def some_with(setting, round_):
    # Of 3 layouts, 5 packs and 3 forms, every other one: the numbers are odd, so that a round meets all pairs of them.
    return cases_with(*setting)[round_::2]


@functools.cache
def answers_by_setting(world, round_):
    cases = [case for setting in SETTINGS for case in some_with(setting, round_)]
    by_rank = run_ranks(run_cases, world, cases, poison=True, timeout=120)
    return dict(zip(cases, zip(*by_rank)))


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: "-".join(map(str, setting)))
@pytest.mark.parametrize("round_", ROUNDS)
def test_delivery_stages_and_budgets_do_not_change_the_answer(round_, setting):
    for case in some_with(setting, round_):
        judge(case, 4, answers_by_setting(4, round_)[case], FLOAT64)


def test_every_setting_meets_every_pair_of_layout_pack_and_form():
    def pairs(cases):
        values = [(case.layout, case.lengths, (case.whole, case.options)) for case in cases]
        return {
            (number, *pair) for each in values for number, pair in enumerate(itertools.combinations(each, 2))
        }

    for round_ in range(2):
        assert pairs(some_with(SETTINGS[0], round_)) == pairs(cases_with(*SETTINGS[0]))


def test_the_settings_meet_several_stages_and_slots_that_are_used_again():
    plans = [case.plan(4) for setting in SETTINGS for case in some_with(setting, 0)]
    schedules = [plan.widest for plan in plans]
    assert {2, 3} <= {schedule.stages for schedule in schedules}
    assert any(schedule.slots == 2 and schedule.stages > 3 for schedule in schedules)
    assert {way for plan in plans for way in plan.deliveries} == {"p2p", "all_to_all", "all_gather"}


# Two cp groups in a world of four, neither in the order nor at the place of the world's first ranks.
GROUPS = ((2, 0), (1, 3))
GROUP_CASES = [Case(lengths=(5, 3, 8, 1, 6), layout="zigzag"), Case(lengths=(9, 4, 2), strategy="all_gather")]


def in_groups(rank, world):
    made = [dist.new_group(list(ranks), sort_ranks=False) for ranks in GROUPS]
    mine = next(number for number, ranks in enumerate(GROUPS) if rank in ranks)
    return run_case(dist.get_rank(made[mine]), 2, GROUP_CASES[mine], group=made[mine])


def test_a_group_that_is_part_of_the_world_answers_for_itself():
    answers = run_ranks(in_groups, 4, poison=True)
    for ranks, case in zip(GROUPS, GROUP_CASES):
        judge(case, 2, [answers[rank] for rank in ranks], FLOAT64)


FROZEN = Case(lengths=(5, 3, 8, 1, 6), layout="zigzag")


def partly_frozen(rank, world):
    given, plan = inputs(FROZEN, world), FROZEN.plan(world)
    rows = torch.from_numpy(plan.rows(rank))
    results = {"rows": rows}
    for name in "qkv":
        tensors = {each: getattr(given, each)[rows].requires_grad_(each == name) for each in "qkv"}
        out = sap_hf.attention(tensors["q"], tensors["k"], tensors["v"], plan)
        out.backward(given.dout[rows])
        results[name] = tensors[name].grad
    with torch.no_grad():
        results["out"] = sap_hf.attention(*(getattr(given, each)[rows] for each in "qkv"), plan)
    return results


def test_one_of_q_k_v_may_need_a_gradient_alone_and_evaluation_needs_none():
    answers = run_ranks(partly_frozen, 3, poison=True)
    right = right_answer(FROZEN, 3)
    for answer in answers:
        real = answer["rows"] < sum(FROZEN.lengths)
        assert not answer["out"].requires_grad
        for name, expected in (("q", "dq"), ("k", "dk"), ("v", "dv"), ("out", "out")):
            found, wanted = answer[name][real], right[expected][answer["rows"][real]]
            assert (found - wanted).abs().max() <= FLOAT64, name
