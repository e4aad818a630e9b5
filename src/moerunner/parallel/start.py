"""How a process finds the others: the process group that a program has made, or the one that torchrun describes."""

from __future__ import annotations

import atexit
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from moerunner.errors import DistributedError

if TYPE_CHECKING:
    from torch import Tensor

_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def join(sizes: Mapping[str, int], timeout: float) -> None:
    """Makes the process group that torchrun describes, unless there is one.

    Args:
        sizes: ranks along each dimension of the layout that it is for, by its name.
        timeout: seconds that a collective of a process group made here may take.

    Raises:
        DistributedError: there is neither a process group nor torchrun.
    """
    import torch.distributed as dist

    if not dist.is_available():
        raise DistributedError("this build of torch has no torch.distributed", where="Layout.bind")
    if dist.is_initialized():
        return
    if ranks_of_torchrun() is None:
        raise _other_size(sizes, "there is no process group")
    _init(timeout)


@dataclass(frozen=True)
class Grid:
    """What a `DeviceMesh` says of its ranks, without a group for each dimension: gloo's threads never rest."""

    device_type: str
    mesh: Tensor
    mesh_dim_names: tuple[str, ...]

    def size(self, dim: int) -> int:
        return self.mesh.shape[dim]


def grid_over_all(sizes: Mapping[str, int]) -> Any:
    """These dimensions over all ranks of the process group, the last counts fastest: a `Grid`, or on GPUs a `DeviceMesh`, which
    also picks the device.

    Raises:
        DistributedError: there are not this many ranks.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    if dist.get_world_size() != math.prod(sizes.values()):
        raise _other_size(sizes, f"there are {dist.get_world_size()} processes")
    if "nccl" in dist.get_backend_config():
        return init_device_mesh("cuda", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    return Grid("cpu", torch.arange(math.prod(sizes.values())).reshape(tuple(sizes.values())), tuple(sizes))


def _other_size(sizes: Mapping[str, int], found: str) -> DistributedError:
    world, text = math.prod(sizes.values()), " x ".join(f"{name} {size}" for name, size in sizes.items())
    return DistributedError(
        f"the layout has {world} ranks ({text}), {found}",
        where="Layout.bind",
        next_step=f"Start it as torchrun --nproc-per-node {world} ..., or call init_process_group in {world} processes",
    )


def ranks_of_torchrun() -> int | None:
    """How many processes torchrun started, None if this is not one of them."""
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in _TORCHRUN) else None


def _init(timeout: float) -> None:
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        local, devices = int(os.environ.get("LOCAL_RANK", os.environ["RANK"])), torch.cuda.device_count()
        if local >= devices:
            what = f"is process {local} on this machine, which shows it {devices} GPUs"
            step = "Start one process per GPU; CUDA_VISIBLE_DEVICES= runs them on CPUs"
            raise DistributedError(what, where=f"rank {os.environ['RANK']}", next_step=step)
        torch.cuda.set_device(local)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    atexit.register(_end)


def _end() -> None:
    """A process that ends with groups open aborts now and then, as their threads outlive what they use."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
