"""Tensors that Transformers itself has spread over ranks, by its TP or EP plan, and the hooks that it computes with."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from moerunner.models.places import Cut, Shape
from moerunner.values import width_runs

_PLANS = ("transformers.distributed.tensor_parallel", "transformers.distributed.expert_parallel")
_AXES = ("tp", "ep")  # others shard what is gathered before it is computed with (FSDP)


@dataclass(frozen=True)
class Placed:
    """How a tensor lies on its ranks."""

    mesh: DeviceMesh
    placements: tuple[Placement, ...]

    @classmethod
    def of(cls, tensor: object) -> Placed | None:
        """None for what is no DTensor."""
        return cls(tensor.device_mesh, tuple(tensor.placements)) if type(tensor) is DTensor else None

    @property
    def whole(self) -> bool:
        """Whether every rank has all of it."""
        return all(placement == Replicate() for placement in self.placements)

    @property
    def ranks(self) -> list[int]:
        return self.mesh.mesh.flatten().tolist()

    def cut(self, shape: Shape) -> Cut | None:
        """What this rank has of a tensor of this whole shape; None where that is no equal part over one axis of a plan."""
        if self.whole:
            return Cut.of(shape, {})
        (placement, *others), names, size = self.placements, self.mesh.mesh_dim_names or (), self.mesh.size()
        parts = int(placement.split_factor) if isinstance(placement, _StridedShard) else 1
        if others or names[:1] not in [(axis,) for axis in _AXES] or not isinstance(placement, (Shard, _StridedShard)):
            return None
        dim = placement.dim % len(shape)
        if shape[dim] % (size * parts):
            return None
        return Cut.of(shape, {dim: width_runs(shape[dim], self.mesh.get_local_rank(), size, parts=parts)})

    def __str__(self) -> str:
        over = " x ".join(
            f"{name} of {size}" for name, size in zip(self.mesh.mesh_dim_names or "?", self.mesh.shape, strict=False)
        )
        return f"{', '.join(map(repr, self.placements))} over {over}"


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor; gradients flow through."""
    return tensor.to_local() if type(tensor) is DTensor else tensor


def hooked_by_plan(module: nn.Module) -> bool:
    """Whether the instance's forward is what a plan of Transformers put there, to compute with this rank's part."""
    return getattr(module.__dict__.get("forward"), "__module__", None) in _PLANS
