"""SapPlugin: the mesh (dp_replicate, dp_shard, cp) as accelerate's ParallelismConfig.

Accelerate and Trainer then divide token counts and batch sizes by cp_size, give all ranks of a cp group the same
batch, and let FSDP2 shard and reduce over cp. Their own context parallelism stays off.
"""

from __future__ import annotations

import math
from typing import Any

import torch.distributed as dist
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState

from sap_hf.config import check_ulysses_size
from sap_hf.errors import LayoutError
from sap_hf.runtime.group import ALONE, CpGroup, attach_group, leave_at_exit


class SapPlugin(ParallelismConfig):  # type: ignore[misc]
    """Data-parallel groups x cp groups, for `Accelerator(parallelism_config=...)` or TrainingArguments.

    Args:
        cp_size: ranks that share one pack; None is all ranks that data parallelism leaves over.
        ulysses_size: neighbours in the cp group that exchange heads; auto: for each batch what is fastest.
        dp_shard_size: data-parallel ranks over which FSDP2 shards beside cp; None is what is left, under FSDP2.
        dp_replicate_size: data-parallel replicas; None is what is left, without FSDP2.

    Raises:
        LayoutError: sizes whose product is not the number of processes, or a ulysses_size that does not divide cp_size
            (when the mesh is built).
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
        self.group = ALONE
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
        rest, left = divmod(processes, sizes["cp"] * sizes["dp_shard"] * sizes["dp_replicate"])
        if left or rest == 0:
            raise LayoutError(self._misfit(processes))
        if cp is None:
            sizes["cp"] = rest
        elif fsdp and shard is None:
            sizes["dp_shard"] *= rest
        elif replicate is None and not fsdp:
            sizes["dp_replicate"] *= rest
        elif rest > 1:
            raise LayoutError(self._misfit(processes))
        if self.ulysses_size != "auto" and sizes["cp"] % int(self.ulysses_size):
            fits = [str(n) for n in range(1, sizes["cp"] + 1) if sizes["cp"] % n == 0]
            raise LayoutError(
                f"ulysses_size={self.ulysses_size} does not divide cp_size={sizes['cp']}.\n"
                f"  Use one of {', '.join(fits)}."
            )
        for name, size in sizes.items():
            self._set_size(name, size)

    def _misfit(self, processes: int) -> str:
        asked = " x ".join(f"{name}_size={size}" for name, size in self.requested.items() if size is not None)
        cp = self.requested["cp"] or 1
        fits = math.gcd(cp, processes)
        more = -(-processes // cp) * cp
        return (
            f"{asked} does not divide the {processes} processes of this run.\n"
            f"  Use cp_size={fits} (x {processes // fits} data-parallel groups) or start {more} processes."
        )

    def get_device_mesh(self, device_type: str | None = None) -> Any:
        """The mesh, built on first use; also makes the cp group the one that `sap_hf.attention` uses."""
        if self.device_mesh is None:
            processes = dist.get_world_size() if dist.is_initialized() else 1
            self.resolve(processes, AcceleratorState().distributed_type == "FSDP")
            if processes > 1 and device_type is not None:
                self.device_mesh = self.build_device_mesh(device_type)
                self.group = self._cp_group(device_type)
        attach_group(self.group)
        return self.device_mesh

    def _cp_group(self, device_type: str) -> CpGroup:
        if self.cp_size == 1:
            return ALONE
        group = self.device_mesh["cp"].get_group()
        host, job = group, dist.group.WORLD
        if device_type != "cpu":
            host, job = _host_group(self.cp_size), dist.new_group(backend="gloo")
        leave_at_exit()
        return CpGroup(group, host, job, self.cp_size, dist.get_rank(group), self.ulysses_size)

    def _validate_accelerator(self, accelerator: Any) -> None:
        """Sizes were settled against the processes when the mesh was built."""
        if self.total_size != accelerator.num_processes:
            raise LayoutError(self._misfit(accelerator.num_processes))

    def __deepcopy__(self, memo: dict[int, Any]) -> SapPlugin:
        # TrainingArguments are copied; process groups cannot be.
        return self


def _host_group(cp_size: int) -> dist.ProcessGroup:
    """A gloo group over this rank's cp group: cp is the fastest-varying mesh axis. All ranks make all groups."""
    mine = None
    for first in range(0, dist.get_world_size(), cp_size):
        ranks = list(range(first, first + cp_size))
        group = dist.new_group(ranks, backend="gloo")
        if dist.get_rank() in ranks:
            mine = group
    assert mine is not None
    return mine
