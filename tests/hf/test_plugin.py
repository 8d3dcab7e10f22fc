"""The mesh by name: which ranks share a batch, exchange rows and exchange heads, on 4 and 8 ranks."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist

import sap_hf
from sap_hf.errors import LayoutError
from sap_hf.runtime import transport
from tests.dist import run_ranks
from tests.hf import material

Groups = dict[str, list[list[int]]]


@dataclasses.dataclass(frozen=True)
class Shape:
    """A mesh, and by the name of each axis the ranks of every group along it."""

    replicate: int
    shard: int
    cp: int
    ulysses: int | str
    node: int
    line: str
    groups: Groups


ON_RANKS = {
    4: [
        Shape(
            *(1, 1, 4, 2, 4),
            "mesh: dp_replicate 1 x dp_shard 1 x cp 4 (sap 2 x ulysses 2), 4 processes, 1 node of 4",
            {"sap": [[0, 2], [1, 3]], "ulysses": [[0, 1], [2, 3]]},
        ),
        Shape(
            *(2, 1, 2, 2, 2),
            "mesh: dp_replicate 2 x dp_shard 1 x cp 2 (sap 1 x ulysses 2), 4 processes, 2 nodes of 2",
            {"dp_replicate": [[0, 2], [1, 3]], "sap": [[0], [1], [2], [3]], "ulysses": [[0, 1], [2, 3]]},
        ),
        Shape(
            *(1, 2, 2, 1, 1),
            "mesh: dp_replicate 1 x dp_shard 2 x cp 2 (sap 2 x ulysses 1), 4 processes, 4 nodes of 1",
            {"dp_shard": [[0, 2], [1, 3]], "sap": [[0, 1], [2, 3]], "ulysses": [[0], [1], [2], [3]]},
        ),
    ],
    8: [
        Shape(
            *(2, 1, 4, 2, 4),
            "mesh: dp_replicate 2 x dp_shard 1 x cp 4 (sap 2 x ulysses 2), 8 processes, 2 nodes of 4",
            {
                "dp_replicate": [[0, 4], [1, 5], [2, 6], [3, 7]],
                "sap": [[0, 2], [1, 3], [4, 6], [5, 7]],
                "ulysses": [[0, 1], [2, 3], [4, 5], [6, 7]],
            },
        ),
        Shape(
            *(2, 2, 2, 2, 8),
            "mesh: dp_replicate 2 x dp_shard 2 x cp 2 (sap 1 x ulysses 2), 8 processes, 1 node of 8",
            {
                "dp_replicate": [[0, 4], [1, 5], [2, 6], [3, 7]],
                "dp_shard": [[0, 2], [1, 3], [4, 6], [5, 7]],
                "sap": [[0], [1], [2], [3], [4], [5], [6], [7]],
                "ulysses": [[0, 1], [2, 3], [4, 5], [6, 7]],
            },
        ),
        Shape(
            *(1, 1, 8, 4, 4),
            "mesh: dp_replicate 1 x dp_shard 1 x cp 8 (sap 2 x ulysses 4), 8 processes, 2 nodes of 4",
            {"sap": [[0, 4], [1, 5], [2, 6], [3, 7]], "ulysses": [[0, 1, 2, 3], [4, 5, 6, 7]]},
        ),
        Shape(
            *(1, 2, 4, 4, 4),
            "mesh: dp_replicate 1 x dp_shard 2 x cp 4 (sap 1 x ulysses 4), 8 processes, 2 nodes of 4",
            {
                "dp_shard": [[0, 4], [1, 5], [2, 6], [3, 7]],
                "sap": [[0], [1], [2], [3], [4], [5], [6], [7]],
                "ulysses": [[0, 1, 2, 3], [4, 5, 6, 7]],
            },
        ),
    ],
}
AUTO = Shape(
    *(2, 1, 4, "auto", 3),
    "mesh: dp_replicate 2 x dp_shard 1 x cp 4 (sap x ulysses: chosen for each batch), 8 processes, nodes of unequal "
    "size, the first of 3",
    {},
)
# Ranks, ulysses_size, processes per node; groups that cross a border, the first of them, the size that fits.
STRADDLING = [
    (8, 8, 4, "1 of 1", "0-7", 4),
    (8, 4, 2, "2 of 2", "0-3", 2),
    (8, 4, 6, "1 of 2", "4-7", 2),
    (8, 2, 3, "1 of 4", "2-3", 1),
    (4, 4, 2, "1 of 1", "0-3", 2),
]


def build(shape: Shape) -> tuple[sap_hf.SapPlugin, list[str]]:
    """The plugin with its mesh, and what building it twice warned of."""
    from accelerate import Accelerator

    material.fresh_state()
    os.environ["LOCAL_WORLD_SIZE"] = str(shape.node)
    plugin = sap_hf.SapPlugin(shape.cp, shape.ulysses, shape.shard, shape.replicate)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Accelerator(cpu=True, parallelism_config=plugin)
        plugin.get_device_mesh("cpu")
    return plugin, [str(warning.message) for warning in caught if "ulysses_size" in str(warning.message)]


class Peers(transport.Transport):
    """Notes with whom heads (flat messages) and rows (of keys and values) are exchanged, as ranks of the run."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.ranks = dist.get_process_group_ranks(group)
        self.heads: set[int] = set()
        self.rows: set[int] = set()

    def post(self, sends: Any, receives: Any, group: Any) -> transport.Pending:
        for peer, tensor in [*sends, *receives]:
            (self.heads if tensor.dim() == 1 else self.rows).add(self.ranks[peer])
        return super().post(sends, receives, group)


def talk(plugin: sap_hf.SapPlugin, shape: Shape, rank: int) -> Peers:
    """One layer over one document that all ranks of the cp group share."""
    plan = sap_hf.plan(
        [8 * shape.cp],
        cp_size=shape.cp,
        ulysses_size=shape.ulysses,
        layout="contiguous",
        delivery="p2p",
        strategy="sap",
        num_heads=4,
        num_kv_heads=4,
    )
    q, k, v = (torch.ones(plan.rows_per_rank, 4, 8, requires_grad=True) for _ in range(3))
    assert plugin.group.device is not None
    with transport.using(Peers(plugin.group.device)) as peers:
        sap_hf.attention(q, k, v, plan).sum().backward()
    assert isinstance(peers, Peers)
    return peers


def meshes(rank: int, world: int, shapes: list[Shape]) -> list[dict[str, Any]]:
    """What this rank finds along every axis of every shape."""
    found = []
    for shape in shapes:
        plugin, warned = build(shape)
        mesh = plugin.device_mesh
        peers = talk(plugin, shape, rank)
        groups_before = len(dist.distributed_c10d._world.pg_map)
        line, again = str(plugin), pickle.loads(pickle.dumps(plugin))
        groups_unused = len(dist.distributed_c10d._world.pg_map) - groups_before
        hierarchy = plugin.hierarchy
        axes = {name: hierarchy[name].mesh.tolist() for name in hierarchy.mesh_dim_names}
        groups = {name: dist.get_process_group_ranks(hierarchy.get_group(name)) for name in axes}
        found.append(
            {
                "line": line,
                "saved": (again.to_json(), json.loads(json.dumps(plugin.to_json()))),
                "warned": warned,
                "mesh": mesh.mesh_dim_names,
                "same": plugin.hierarchy is hierarchy and plugin.get_device_mesh("cpu") is mesh,
                "axes": axes,
                "groups": groups,
                "groups unused": groups_unused,
                "two": hierarchy["sap", "ulysses"].mesh.flatten().tolist(),
                "cp": dist.get_process_group_ranks(plugin.group.device),
                "apart": plugin.group.device not in (dist.group.WORLD, *mesh.get_all_groups()),
                "heads": peers.heads,
                "rows": peers.rows,
            }
        )
    return found


def others(rank: int, world: int) -> dict[str, Any]:
    """Meshes without axes that stay, and meshes that straddle nodes."""
    found: dict[str, Any] = {"warned": {}}
    auto, _ = build(AUTO)
    found["auto"] = str(auto), auto.device_mesh.mesh_dim_names, _refusal(lambda: auto.hierarchy)
    alone, _ = build(dataclasses.replace(AUTO, cp=1, replicate=8))
    found["alone"] = str(alone), _refusal(lambda: alone.hierarchy)
    del os.environ["LOCAL_WORLD_SIZE"]
    found["no launcher"] = str(auto)
    found["not built"] = _refusal(lambda: sap_hf.SapPlugin(cp_size=4, ulysses_size=2).hierarchy)
    for ranks, ulysses, node, *_ in STRADDLING:
        shape = dataclasses.replace(AUTO, cp=ranks, replicate=8 // ranks, ulysses=ulysses, node=node)
        _, found["warned"][ranks, ulysses, node] = build(shape)
    return found


def _refusal(act: Any) -> str | None:
    try:
        act()
    except LayoutError as error:
        return str(error)
    return None


@pytest.fixture(scope="module")
def found() -> dict[int, list[list[dict[str, Any]]]]:
    return {
        world: [list(ranks) for ranks in zip(*run_ranks(meshes, world, shapes, init=False), strict=True)]
        for world, shapes in ON_RANKS.items()
    }


@pytest.fixture(scope="module")
def on_8() -> list[dict[str, Any]]:
    return run_ranks(others, 8, init=False)


ALL = [
    pytest.param(world, at, id="x".join(map(str, (s.replicate, s.shard, s.cp, s.ulysses))))
    for world, shapes in ON_RANKS.items()
    for at, s in enumerate(shapes)
]


@pytest.mark.parametrize(("world", "at"), ALL)
def test_every_axis_has_its_name_and_its_ranks(found: Any, world: int, at: int) -> None:
    shape = ON_RANKS[world][at]
    for rank, result in enumerate(found[world][at]):
        expected = {
            name: next(ranks for ranks in groups if rank in ranks) for name, groups in shape.groups.items()
        }
        assert result["axes"] == expected, f"rank {rank}"
        assert result["groups"] == expected, f"rank {rank}"
        assert result["two"] == result["cp"]
        assert result["apart"]
        assert result["same"]


@pytest.mark.parametrize(("world", "at"), ALL)
def test_heads_travel_along_ulysses_and_rows_along_sap(found: Any, world: int, at: int) -> None:
    shape = ON_RANKS[world][at]
    for rank, result in enumerate(found[world][at]):
        assert result["heads"] == (set(result["axes"]["ulysses"]) - {rank} if shape.ulysses != 1 else set())
        assert result["rows"] == set(result["axes"]["sap"]) - {rank}


@pytest.mark.parametrize(("world", "at"), ALL)
def test_accelerate_sees_cp_and_no_group_is_made_for_an_axis_that_nobody_asks_for(
    found: Any, world: int, at: int
) -> None:
    shape = ON_RANKS[world][at]
    for result in found[world][at]:
        assert result["mesh"] == (*(name for name in shape.groups if name.startswith("dp")), "cp")
        assert result["groups unused"] == 0


@pytest.mark.parametrize(("world", "at"), ALL)
def test_one_line_names_every_axis_and_the_nodes(found: Any, world: int, at: int) -> None:
    shape = ON_RANKS[world][at]
    assert [result["line"] for result in found[world][at]] == [shape.line] * world
    assert [result["warned"] for result in found[world][at]] == [[]] * world


@pytest.mark.parametrize(("world", "at"), ALL)
def test_a_mesh_in_use_is_saved_as_the_sizes_that_were_asked_for(found: Any, world: int, at: int) -> None:
    shape = ON_RANKS[world][at]
    asked = {
        "cp_size": shape.cp,
        "ulysses_size": shape.ulysses,
        "dp_shard_size": shape.shard,
        "dp_replicate_size": shape.replicate,
    }
    assert [result["saved"] for result in found[world][at]] == [(asked, asked)] * world


def test_a_degree_chosen_per_batch_has_no_axes_that_stay(on_8: list[dict[str, Any]]) -> None:
    for result in on_8:
        line, names, refusal = result["auto"]
        assert line == AUTO.line
        assert names == ("dp_replicate", "cp")
        assert "ulysses_size='auto'" in refusal
        assert result["no launcher"] == line.partition(", nodes")[0]


def test_a_mesh_without_cp_has_no_axes_to_name(on_8: list[dict[str, Any]]) -> None:
    for result in on_8:
        line, refusal = result["alone"]
        assert line.startswith("mesh: dp_replicate 8 x dp_shard 1 x cp 1, 8 processes")
        assert "no cp axis" in refusal and line in refusal
        assert "not built yet" in result["not built"]


@pytest.mark.parametrize("case", STRADDLING, ids=lambda case: f"W{case[0]}U{case[1]}N{case[2]}")
def test_groups_that_straddle_nodes_warn_once_on_the_first_rank(
    on_8: list[dict[str, Any]], case: tuple[Any, ...]
) -> None:
    ranks, ulysses, node, torn, first, fits = case
    (message,), *silent = [result["warned"][ranks, ulysses, node] for result in on_8]
    assert silent == [[]] * 7
    if ranks == 4:
        torn = f"2 of {8 // ulysses}"
    for part in (f"ulysses_size={ulysses} ", f"nodes of {node} ", f"{torn} groups", f"ranks {first}."):
        assert part in message
    assert f"ulysses_size={fits} stays" in message
    assert ranks % fits == node % fits == 0
