"""Every mesh of data parallel x sap x ulysses on 4 and 8 ranks trains as the documents alone in one process.

And no row travels on a group that reduces gradients.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml

import sap_hf
from sap_hf.planning.hardware import PRESETS
from sap_hf.runtime import transport
from tests.hf import material, oracle
from tests.hf.scenarios import Case, build, force_fsdp2, parity
from tests.hf.together import Together

PACKS = (*material.PACKS, (13, 12), (1,) * 9)
STRATEGIES = itertools.cycle(("sap", "ring", "all_gather"))


def llama() -> torch.nn.Module:
    """8 ranks can exchange its heads; from 4 on they share kv heads."""
    return material.tiny_llama(num_attention_heads=8, num_key_value_heads=2)


def case_of(dp: int, sap: int, ulysses: int, **changes: Any) -> Case:
    """Two steps, or one where all packs are dealt at once."""
    strategy = next(STRATEGIES) if sap > 1 else "auto"
    return Case(
        cp_size=sap * ulysses,
        groups=dp,
        packs=PACKS[: 2 * dp],
        model=llama,
        options={"ulysses_size": ulysses, "strategy": strategy},
        **changes,
    )


def meshes_of(world: int) -> list[tuple[int, int, int]]:
    """(dp, sap, ulysses), all whose product is the world."""
    sizes = [size for size in range(1, world + 1) if world % size == 0]
    return [mesh for mesh in itertools.product(sizes, repeat=3) if mesh[0] * mesh[1] * mesh[2] == world]


# With DDP over dp; then with FSDP2, which shards over dp x sap x ulysses, or over all but two replicas.
CASES = {world: {"x".join(map(str, mesh)): case_of(*mesh) for mesh in meshes_of(world)} for world in (4, 8)}
CASES[4]["fsdp2-1x2x2"] = case_of(1, 2, 2, fsdp2=True)
CASES[4]["fsdp2-2x1x2"] = case_of(2, 1, 2, fsdp2=True)
CASES[8]["fsdp2-2x2x2"] = case_of(2, 2, 2, fsdp2=True)
REPLICAS = sap_hf.SapPlugin(cp_size=2, ulysses_size=2, dp_shard_size=2, dp_replicate_size=2)
CASES[8]["fsdp2-4x1x2-two-replicas"] = case_of(4, 1, 2, fsdp2=True, args={"parallelism_config": REPLICAS})
# Messages that cost nothing to start, over slow links: heads are worth exchanging for long documents of few rows, too.
BYTES_COUNT = dataclasses.replace(
    PRESETS["cpu"],
    name="bytes",
    flops_per_s=1e9,
    backward_flops_per_s=1e9,
    node_bytes_per_s=1e6,
    call_seconds=1e-9,
    tile_keys=0,
    tile_rows=0,
    blocking_seconds=1e-9,
    message_seconds=1e-9,
    step_seconds=1e-9,
)
# Without the pack of one-token documents: it has no targets.
CHANGING = Case(cp_size=4, packs=PACKS[:-1], model=llama)


def changing(folder: str, hardware: str) -> dict[str, Any]:
    """Train with everything chosen for each batch; by step, the degree that was chosen and the groups that exist."""
    from transformers import TrainerCallback

    from sap_hf.models.patch import find_patch

    degrees: list[int] = []
    groups: list[int] = []

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            degrees.append(find_patch(trainer.model).sharding.last_plan.ulysses_size)
            groups.append(len(dist.distributed_c10d._world.pg_map))

    trainer = build(CHANGING, folder, callbacks=[Look()])
    sap_hf.attach(trainer, cp_size=4, hardware=hardware)
    trainer.train()
    return {
        "degrees": degrees,
        "groups": groups,
        "losses": material.logged(trainer, "loss"),
        "parameters": material.parameters(trainer.accelerator.unwrap_model(trainer.model)),
    }


class Carriers(transport.Transport):
    """Notes the groups that carry rows and heads."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def post(self, sends: Any, receives: Any, group: Any) -> transport.Pending:
        self.names.add(group.group_name)
        return super().post(sends, receives, group)

    def post_all_to_all(
        self, send: Any, receive: Any, send_rows: Any, receive_rows: Any, group: Any
    ) -> transport.Pending:
        self.names.add(group.group_name)
        return super().post_all_to_all(send, receive, send_rows, receive_rows, group)

    def post_all_gather(self, send: Any, receive: Any, group: Any) -> transport.Pending:
        self.names.add(group.group_name)
        return super().post_all_gather(send, receive, group)


def carriers(folder: str, case: Case) -> dict[str, Any]:
    """Train; the names of the groups that carried rows and agreements, and of those of DDP, FSDP and the mesh."""
    from accelerate.state import AcceleratorState

    trainer = build(case, folder)
    if case.fsdp2:
        force_fsdp2(trainer)
    sap_hf.attach(trainer, cp_size=case.cp_size, **case.options)
    with transport.using(Carriers()) as seen:
        trainer.train()
    plugin = AcceleratorState().parallelism_config
    mesh = plugin.device_mesh
    joined = [mesh[name] for name in ("dp_cp", "dp_shard_cp")]
    groups = [dist.group.WORLD, *mesh.get_all_groups(), *(each.get_group() for each in joined)]
    if not case.fsdp2:
        groups.append(trainer.model_wrapped.process_group)
    assert isinstance(seen, Carriers)
    return {
        "carried": seen.names,
        "ours": {each.group_name for each in (plugin.group.device, plugin.group.host, plugin.group.job)},
        "theirs": {each.group_name for each in groups},
        "cp is the default group": mesh["cp"].get_group() is dist.group.WORLD,
        "same ranks": dist.get_process_group_ranks(plugin.group.device)
        == dist.get_process_group_ranks(mesh["cp"].get_group()),
        "steps": trainer.state.global_step,
    }


# A long document: rows of it travel in every way.
CARRIED = {
    f"carriers-{dp}x{sap}x{ulysses}{'-fsdp2' * fsdp2}": Case(
        cp_size=sap * ulysses,
        groups=dp,
        packs=((40,),) * dp,
        model=llama,
        fsdp2=fsdp2,
        options={"ulysses_size": ulysses},
    )
    for dp, sap, ulysses in ((1, 4, 1), (1, 2, 2), (2, 2, 1))
    for fsdp2 in (False, True)
}

ALL = [(world, name) for world, cases in CASES.items() for name in cases]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Mapping[int, Together]:
    started = {}
    for world, cases in CASES.items():
        folder = tmp_path_factory.mktemp(f"meshes-{world}")
        scenarios: dict[str, Any] = {name: (parity, {"case": case}) for name, case in cases.items()}
        if world == CHANGING.cp_size:
            hardware = folder / "bytes.yaml"
            hardware.write_text(yaml.safe_dump(dataclasses.asdict(BYTES_COUNT)))
            scenarios["changing"] = (changing, {"hardware": str(hardware)})
            scenarios |= {name: (carriers, {"case": case}) for name, case in CARRIED.items()}
        started[world] = Together(folder, world, scenarios)
    return started


@pytest.mark.parametrize(("world", "name"), ALL, ids=[f"W{world}-{name}" for world, name in ALL])
def test_training_equals_documents_run_alone(trained: Mapping[int, Together], world: int, name: str) -> None:
    run, _, _ = CASES[world][name].truth()
    for rank, result in enumerate(trained[world][name]):
        assert result["steps"] == len(run.losses), f"rank {rank}"
        assert oracle.worst(result["losses"], run.losses) < material.EXACT, f"rank {rank}"
        assert oracle.worst(result["grad_norms"], run.grad_norms) < material.EXACT, f"rank {rank}"
        assert oracle.worst(result["parameters"], run.parameters) < material.EXACT, f"rank {rank}"


def test_the_degree_changes_from_batch_to_batch_and_no_group_is_made_for_it(
    trained: Mapping[int, Together],
) -> None:
    run, _, _ = CHANGING.truth()
    for result in trained[4]["changing"]:
        assert set(result["degrees"]) == {1, 2}
        assert len(set(result["groups"])) == 1
        assert oracle.worst(result["losses"], run.losses) < material.EXACT
        assert oracle.worst(result["parameters"], run.parameters) < material.EXACT


@pytest.mark.parametrize("name", CARRIED)
def test_rows_and_agreements_share_no_group_with_gradients_or_the_mesh(
    trained: Mapping[int, Together], name: str
) -> None:
    for result in trained[4][name]:
        assert result["steps"] == 1
        assert len(result["carried"]) == 1 and result["carried"] <= result["ours"]
        assert not result["ours"] & result["theirs"]
        assert result["same ranks"]
        # What torch does, and why the mesh's group would not do.
        assert result["cp is the default group"] == (CARRIED[name].cp_size == 4)
