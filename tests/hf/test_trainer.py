"""transformers.Trainer on packs shared by 2, 3 and 4 ranks against the documents alone in one process."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import pytest

import sap_hf
from tests.hf import material, oracle
from tests.hf.scenarios import Case, parity, shuffled
from tests.hf.together import Together

PADDED = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2}
EQUAL = [(9, 12, 3), (20, 1, 3), (8, 8, 8), (24,)]

ON_2_RANKS = {
    "plain": Case(evaluates=True, args={"include_num_input_tokens_seen": "all"}),
    "adam": Case(args={"optim": "adamw_torch", "learning_rate": 0.01}),
    "accumulation": Case(args={"gradient_accumulation_steps": 3, "max_grad_norm": 0.3}),
    "checkpointing-reentrant": Case(
        args={"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    ),
    "checkpointing": Case(
        args={"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    ),
    "lora": Case(model=material.lora_llama),
    "lora-checkpointing": Case(
        evaluates=True,
        model=material.lora_llama,
        args={
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
            "gradient_accumulation_steps": 2,
        },
    ),
    "right-padded": Case(
        evaluates=True,
        collator="right padded",
        args={**PADDED, "include_num_input_tokens_seen": "non_padding"},
    ),
    "two-packs-per-batch": Case(evaluates=True, packs=EQUAL, args=PADDED),
    "flattening": Case(
        evaluates=True,
        collator="flattening",
        args={"per_device_train_batch_size": 3, "per_device_eval_batch_size": 3},
    ),
    "sap-collator": Case(
        collator="sap", args={"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
    ),
    "label-smoothing": Case(
        evaluates=True, args={"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2}
    ),
    "second-rank-ignored": Case(packs=EQUAL, ignored=(12, 24), options={"layout": "contiguous"}),
    "first-rank-ignored": Case(packs=EQUAL, ignored=(0, 12), options={"layout": "contiguous"}),
    "a-pack-without-targets": Case(ignored_pack=3, args={"gradient_accumulation_steps": 2}),
    "no-sharing-two-groups": Case(cp_size=1, groups=2),
    "stream-not-dispatched": Case(
        stream=True,
        args={"max_steps": len(material.PACKS), "accelerator_config": {"dispatch_batches": False}},
    ),
    "own-token-average": Case(
        args={"average_tokens_across_devices": False, "gradient_accumulation_steps": 2}
    ),
    "model-init": Case(evaluates=True, model_init=True),
    "zigzag": Case(options={"layout": "zigzag"}),
    "all-gather-kept": Case(options={"strategy": "all_gather", "remote_kv": "keep"}),
    "stream": Case(stream=True, args={"max_steps": len(material.PACKS)}),
    "ulysses": Case(evaluates=True, options={"strategy": "ulysses"}),
    "ulysses-checkpointing": Case(
        options={"ulysses_size": 2},
        args={"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    ),
}
ON_3_RANKS = {
    "plain": Case(cp_size=3, evaluates=True),
    "accumulation": Case(cp_size=3, args={"gradient_accumulation_steps": 2}),
    "right-padded": Case(evaluates=True, cp_size=3, collator="right padded", args=PADDED),
    "checkpointing": Case(
        cp_size=3,
        args={"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    ),
}
TWO_GROUPS: dict[str, Any] = {"groups": 2}
ON_4_RANKS = {
    "two-groups": Case(**TWO_GROUPS, args={"include_num_input_tokens_seen": "all"}),
    "two-groups-accumulation": Case(**TWO_GROUPS, args={"gradient_accumulation_steps": 2}),
    "two-groups-own-average": Case(
        **TWO_GROUPS, args={"average_tokens_across_devices": False, "gradient_accumulation_steps": 2}
    ),
    "two-groups-padded": Case(
        **TWO_GROUPS,
        packs=[(5, 9), (12, 3), (7, 16), (1, 20)],
        collator="right padded",
        args={"per_device_train_batch_size": 2, "include_num_input_tokens_seen": "non_padding"},
    ),
    "two-groups-lora-checkpointing": Case(
        **TWO_GROUPS,
        model=material.lora_llama,
        args={"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    ),
    "two-groups-stream": Case(
        **TWO_GROUPS,
        stream=True,
        args={"max_steps": len(material.PACKS) // 2, "accelerator_config": {"dispatch_batches": False}},
    ),
    "cp-4": Case(cp_size=4, evaluates=True),
    "two-by-two": Case(cp_size=4, evaluates=True, options={"ulysses_size": 2, "layout": "balanced"}),
    "two-groups-ulysses": Case(**TWO_GROUPS, options={"ulysses_size": 2}),
    # Trainer saves its arguments, and the mesh in them, with every checkpoint.
    "two-by-two-plugin-saved": Case(
        cp_size=4,
        evaluates=True,
        args={
            "parallelism_config": sap_hf.SapPlugin(cp_size=4, ulysses_size=2),
            "save_strategy": "steps",
            "save_steps": 2,
        },
    ),
}
ON_8_RANKS = {
    "two-groups-two-by-two": Case(
        **TWO_GROUPS, cp_size=4, options={"ulysses_size": 2}, args={"gradient_accumulation_steps": 2}
    ),
}
ON_RANKS = {2: ON_2_RANKS, 3: ON_3_RANKS, 4: ON_4_RANKS, 8: ON_8_RANKS}

# In the order that a user gets without asking for one: every epoch shuffled anew.
SHUFFLED = {
    2: Case(args={"num_train_epochs": 2}),
    4: Case(groups=2, args={"num_train_epochs": 2}),
}


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> Mapping[int, Together]:
    """All runs of one number of ranks, in one start of them."""
    started = {}
    for world, cases in ON_RANKS.items():
        folder = tmp_path_factory.mktemp(f"ranks-{world}")
        scenarios: dict[str, Any] = {name: (parity, {"case": case}) for name, case in cases.items()}
        if world in SHUFFLED:
            scenarios["shuffled"] = (shuffled, {"case": SHUFFLED[world]})
        started[world] = Together(folder, world, scenarios)
    return started


ALL = [
    pytest.param(world, name, case, id=f"{name}-W{world}")
    for world, cases in ON_RANKS.items()
    for name, case in cases.items()
]


@functools.cache
def truth(world: int, name: str) -> tuple[oracle.Run, float | None, float | None]:
    return ON_RANKS[world][name].truth()


@pytest.mark.parametrize("world, name, case", ALL)
def test_training_equals_documents_run_alone(
    on_ranks: Mapping[int, Together], world: int, name: str, case: Case
) -> None:
    results = on_ranks[world][name]
    run, before, after = truth(world, name)
    for rank, result in enumerate(results):
        assert result["steps"] == len(run.losses), f"rank {rank}"
        assert oracle.worst(result["parameters"], run.parameters) < material.EXACT, f"rank {rank}"
        assert oracle.worst(result["grad_norms"], run.grad_norms) < material.EXACT, f"rank {rank}"
        assert oracle.worst(result["train_loss"], sum(run.losses) / len(run.losses)) < material.EXACT
        assert oracle.worst(result["losses"], run.losses) < material.EXACT, f"rank {rank}"
        if case.evaluates:
            assert oracle.worst(result["before"], before) < material.EXACT, f"rank {rank}"
            assert oracle.worst(result["after"], after) < material.EXACT, f"rank {rank}"


@pytest.mark.parametrize(
    "world, name, case", [row for row in ALL if row.values[2].args.get("include_num_input_tokens_seen")]
)
def test_tokens_seen_are_those_of_one_process(
    on_ranks: Mapping[int, Together], world: int, name: str, case: Case
) -> None:
    expected = sum(len(document.ids) for row in case.rows() for document in row)
    assert [result["tokens_seen"] for result in on_ranks[world][name]] == [expected] * world


def test_ranks_hold_bitwise_equal_parameters(on_ranks: Mapping[int, Together]) -> None:
    for name in ("two-groups", "cp-4"):
        first, *others = on_ranks[4][name]
        for other in others:
            assert all(
                (first["parameters"][key] == other["parameters"][key]).all() for key in first["parameters"]
            )


@pytest.mark.parametrize("world", SHUFFLED)
def test_shuffled_packs_are_the_same_within_a_group_and_trained_once(
    on_ranks: Mapping[int, Together], world: int
) -> None:
    case, results = SHUFFLED[world], on_ranks[world]["shuffled"]
    orders = [result["order"] for result in results]
    groups = orders[::2]
    assert orders == [order for order in groups for _ in range(2)], "ranks of a cp group saw other packs"
    rounds = list(zip(*groups, strict=True))
    half = len(rounds) // 2
    epochs = [[pack for packs in part for pack in packs] for part in (rounds[:half], rounds[half:])]
    assert [sorted(epoch) for epoch in epochs] == [list(range(len(case.packs)))] * 2
    assert epochs[0] != epochs[1]
    rows = case.rows()
    run = oracle.train(case.model(), [[[rows[at] for at in packs]] for packs in rounds], case.recipe())
    for result in results:
        assert oracle.worst(result["losses"], run.losses) < material.EXACT
        assert oracle.worst(result["parameters"], run.parameters) < material.EXACT
