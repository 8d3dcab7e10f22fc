"""SapPlugin: the mesh (dp_replicate, dp_shard, cp = sap x ulysses) as accelerate's ParallelismConfig.

Accelerate and Trainer then divide token counts and batch sizes by cp_size, give all ranks of a cp group the same
batch, and let FSDP2 shard and reduce over cp. Their own context parallelism stays off.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any

import torch.distributed as dist
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState

from sap_hf.config import check_ulysses_size
from sap_hf.errors import LayoutError
from sap_hf.runtime.group import ALONE, CpGroup, attach_group, consecutive, leave_at_exit, ranks_per_node


class SapPlugin(ParallelismConfig):  # type: ignore[misc]
    """Data-parallel groups x cp groups, for `Accelerator(parallelism_config=...)` or TrainingArguments.

    Args:
        cp_size: ranks that share one pack; None is all ranks that data parallelism leaves over.
        ulysses_size: neighbours in the cp group that exchange heads, best inside a node; auto: for each batch what is
            fastest.
        dp_shard_size: data-parallel ranks over which FSDP2 shards beside cp; None is what is left, under FSDP2.
        dp_replicate_size: data-parallel replicas; None is what is left, without FSDP2.

    `str` of it is one line with every axis, its size and the nodes.

    Raises:
        LayoutError: a ulysses_size that does not divide cp_size; when the mesh is built, sizes whose product is not
            the number of processes.
    """

    def __init__(
        self,
        cp_size: int | None = None,
        ulysses_size: int | str = "auto",
        dp_shard_size: int | None = None,
        dp_replicate_size: int | None = None,
    ):
        check_ulysses_size(ulysses_size)
        for name, size in (("cp", cp_size), ("dp_shard", dp_shard_size), ("dp_replicate", dp_replicate_size)):
            if size is not None and size < 1:
                raise LayoutError(f"{name}_size={size}: at least one rank is needed.")
        self.ulysses_size = ulysses_size
        self.requested = {"cp": cp_size, "dp_shard": dp_shard_size, "dp_replicate": dp_replicate_size}
        if cp_size is not None:
            self._check_degree(cp_size)
        self.group = ALONE
        self._resolved = False
        self._hierarchy: Any = None
        # The base class would refuse cp on the CPU and with plain DDP, so it is told of it afterwards.
        super().__init__(dp_replicate_size=1, dp_shard_size=1, tp_size=1, cp_size=1, sp_size=1)

    @property
    def cp_enabled(self) -> bool:
        """False, whatever cp_size: accelerate's ring attention, Trainer's sharding and trl's ban key on it."""
        return False

    @property
    def non_dp_dim_names(self) -> list[str]:
        """Mesh axes whose ranks receive the same batch."""
        return ["cp"] if self.cp_size > 1 else []

    @property
    def dp_shard_cp_dim_names(self) -> list[str]:
        """Mesh axes over which FSDP2 shards: without cp it would neither shard nor reduce over it."""
        return (["dp_shard"] if self.dp_shard_enabled else []) + self.non_dp_dim_names

    @property
    def dp_cp_dim_names(self) -> list[str]:
        """Mesh axes over which the loss is averaged."""
        return list(self.dp_dim_names) + self.non_dp_dim_names

    def resolve(self, processes: int, fsdp: bool) -> None:
        """Settle the sizes that were left open.

        Raises:
            LayoutError: they do not multiply to `processes`; a size that would is named.
        """
        sizes = {name: size or 1 for name, size in self.requested.items()}
        cp, shard, replicate = (self.requested[name] for name in ("cp", "dp_shard", "dp_replicate"))
        rest, left = divmod(processes, math.prod(sizes.values()))
        if left:
            raise LayoutError(self._misfit(processes))
        if cp is None:
            sizes["cp"] = rest
        elif fsdp and shard is None:
            sizes["dp_shard"] = rest
        elif not fsdp and replicate is None:
            sizes["dp_replicate"] = rest
        elif rest > 1:
            raise LayoutError(self._misfit(processes))
        self._check_degree(sizes["cp"])
        for name, size in sizes.items():
            self._set_size(name, size)
        self._resolved = True

    def _check_degree(self, cp_size: int) -> None:
        if self.ulysses_size != "auto" and cp_size % int(self.ulysses_size):
            fits = [str(n) for n in range(1, cp_size + 1) if cp_size % n == 0]
            raise LayoutError(
                f"ulysses_size={self.ulysses_size} does not divide cp_size={cp_size}.\n"
                f"  Use one of {', '.join(fits)}."
            )

    def _misfit(self, processes: int) -> str:
        cp = self.requested["cp"]
        given = {f"{name}_size": size for name, size in self.requested.items() if size is not None}
        product = math.prod(given.values())
        several, degree = len(given) > 1, 1 if self.ulysses_size == "auto" else int(self.ulysses_size)
        if cp is None:
            fits, start = processes // math.gcd(product, processes), _multiple(product * degree, processes)
        else:
            fits, start = math.gcd(cp, processes), product if several else _multiple(product, processes)
        # The advice leaves the data-parallel sizes out: what cp_size leaves over is theirs.
        advice = f"cp_size={fits}"
        advice += f", ulysses_size={math.gcd(degree, fits)}" if fits % degree else ""
        advice += " and no other size" if cp is None or several else ""
        problem = (
            "are too few for"
            if processes % product == 0
            else "do not divide"
            if several
            else "does not divide"
        )
        asked = " x ".join(f"{name}={size}" for name, size in given.items())
        return (
            f"{asked}{f' = {product} ranks' if several else ''} {problem} the {_count(processes, 'process')} of this "
            f"run.\n  Use {advice} (x {_count(processes // fits, 'data-parallel group')}) or start "
            f"{_count(start, 'process')}."
        )

    def get_device_mesh(self, device_type: str | None = None) -> Any:
        """The mesh, built on first use; also makes the cp group the one that `sap_hf.attention` uses."""
        if self.device_mesh is None:
            processes = dist.get_world_size() if dist.is_initialized() else 1
            self.resolve(processes, AcceleratorState().distributed_type == "FSDP")
            if processes > 1 and device_type is not None:
                self.device_mesh = self.build_device_mesh(device_type)
                self.group = self._cp_group()
                if dist.get_rank() == 0:
                    self._warn_of_straddling(processes)
        attach_group(self.group)
        return self.device_mesh

    @property
    def hierarchy(self) -> Any:
        """The mesh with cp as its two axes, sap and ulysses, whose ranks are neighbours: `hierarchy["sap", "ulysses"]`.

        Attention has no use for it: rows and heads travel on the one cp group, whatever the degree. So the process
        groups of the two axes are made when this is first asked for, which all ranks must do alike.

        Raises:
            LayoutError: no mesh has been built yet, there is no cp axis, or ulysses_size is auto: then each batch has
                axes of its own.
        """
        if self._hierarchy is None:
            if self.device_mesh is None or self.cp_size == 1:
                raise LayoutError(
                    f"There is no cp axis to split: {self}.\n"
                    "  Start several processes, and build the Accelerator or attach first."
                )
            if self.ulysses_size == "auto":
                raise LayoutError(
                    f"ulysses_size='auto' splits the {self.cp_size} ranks of cp anew for each batch.\n"
                    "  Use a number for axes that stay."
                )
            self._hierarchy = self.device_mesh._unflatten("cp", self._cp_axes(), ("sap", "ulysses"))
        return self._hierarchy

    def _cp_axes(self) -> tuple[int, int]:
        """Ranks along sap and along ulysses."""
        return self.cp_size // int(self.ulysses_size), int(self.ulysses_size)

    def __str__(self) -> str:
        if not self._resolved:
            sizes = " x ".join(f"{name} {size or 'auto'}" for name, size in self.requested.items())
            return f"mesh: {sizes} (ulysses {self.ulysses_size}), not built yet"
        text = (
            f"mesh: dp_replicate {self.dp_replicate_size} x dp_shard {self.dp_shard_size} x cp {self.cp_size}"
        )
        if self.cp_size > 1 and self.ulysses_size == "auto":
            text += " (sap x ulysses: chosen for each batch)"
        elif self.cp_size > 1:
            text += " (sap {} x ulysses {})".format(*self._cp_axes())
        text += f", {_count(self.total_size, 'process')}"
        node = ranks_per_node()
        if node is None:
            return text
        if self.total_size % node:
            return f"{text}, nodes of unequal size, the first of {node}"
        return f"{text}, {_count(self.total_size // node, 'node')} of {node}"

    def _warn_of_straddling(self, processes: int) -> None:
        """Heads move in every layer, whatever the documents: between nodes that costs most."""
        size, node = self.ulysses_size, ranks_per_node()
        if size == "auto" or node is None:
            return
        size = int(size)
        groups = [(first, first + size - 1) for first in range(0, processes, size)]
        torn = [(first, last) for first, last in groups if first // node != last // node]
        if torn:
            fits = max(n for n in range(1, size + 1) if math.gcd(self.cp_size, node) % n == 0)
            warnings.warn(
                f"ulysses_size={size} on nodes of {node} processes: {len(torn)} of {len(groups)} groups exchange heads "
                f"between nodes in every layer, the first is ranks {torn[0][0]}-{torn[0][1]}.\n"
                f"  ulysses_size={fits} stays inside a node: it divides both cp_size={self.cp_size} and {node}.",
                stacklevel=3,
            )

    def _cp_group(self) -> CpGroup:
        """The ranks of the cp axis, the mesh's fastest-varying one, on other process groups than the mesh's."""
        if self.cp_size == 1:
            return ALONE
        leave_at_exit()
        return dataclasses.replace(consecutive(self.cp_size), ulysses_size=self.ulysses_size)

    def _validate_accelerator(self, accelerator: Any) -> None:
        """Sizes were settled against the processes when the mesh was built."""
        if self.total_size != accelerator.num_processes:
            raise LayoutError(self._misfit(accelerator.num_processes))

    def to_json(self) -> dict[str, Any]:
        """The sizes that were asked for, as they are shown among the TrainingArguments."""
        return {
            "ulysses_size": self.ulysses_size,
            **{f"{name}_size": size for name, size in self.requested.items()},
        }

    def __reduce__(self) -> tuple[type[SapPlugin], tuple[int | str | None, ...]]:
        # Trainer saves its arguments with the model; process groups cannot be saved.
        cp, shard, replicate = (self.requested[name] for name in ("cp", "dp_shard", "dp_replicate"))
        return type(self), (cp, self.ulysses_size, shard, replicate)

    def __deepcopy__(self, memo: dict[int, Any]) -> SapPlugin:
        # TrainingArguments are copied; process groups cannot be.
        return self


def _multiple(of: int, least: int) -> int:
    return -(-least // of) * of


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "es" if noun.endswith("s") else "s")
