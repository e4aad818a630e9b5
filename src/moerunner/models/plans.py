"""Models that Transformers itself has spread over ranks: which layout the DTensors of a block amount to.

The plan's hooks sit on modules inside a block and reduce there, each by itself. The runner reads this rank's parts of the
tensors, calls none of these modules, and reduces routed and shared experts together.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch.distributed as dist
from torch import nn

from moerunner.errors import UnsupportedError
from moerunner.models.block import Source
from moerunner.models.places import Cut
from moerunner.models.shards import part_of
from moerunner.parallel.group import GroupComm
from moerunner.parallel.layout import BoundLayout, Layout


def layout_of(source: Source, owners: Iterable[nn.Module]) -> BoundLayout | None:
    """The layout that a block is spread in, over the ranks of its DTensors; None where every rank has all of it.

    owners: the block and what encloses it.

    Raises:
        UnsupportedError: the block is spread in a way that no layout stands for. On every rank alike.
    """
    every = {f"{part.path}.{held.attribute}".lstrip("."): held for part in source.parts for held in part.held}
    spread = {path: held.placed for path, held in every.items() if held.placed is not None and not held.placed.whole}
    if not spread:
        return None
    (first, placed), *others = spread.items()
    for path, other in others:
        if other.ranks != placed.ranks:
            raise UnsupportedError(f"{first} is spread over the ranks {placed.ranks}, {path} over {other.ranks}")
    if placed.mesh.ndim > 1 or dist.get_process_group_ranks(placed.mesh.get_group()) != placed.ranks:
        raise UnsupportedError(f"{first} is {placed}, which is not one axis of a TP or EP plan")
    axis = "ep" if any("ep" in (p.mesh.mesh_dim_names or ()) for p in spread.values()) else "tp"
    if axis == "ep" and not _same_tokens(owners):
        raise UnsupportedError(
            "the ranks that its experts are spread over may have tokens of their own: ep_size is not tp_size"
        )
    shared = any(every[path].name.startswith("shared_") for path in spread)
    layout = Layout(
        ep=len(placed.ranks) if axis == "ep" else 1,
        tp=len(placed.ranks) if axis == "tp" else 1,
        shared="sharded" if shared else "replicated",
    )
    bound = BoundLayout(layout, GroupComm(layout, placed.mesh.get_group(), placed.mesh.device_type))
    _check(source, bound)
    return bound


def _check(source: Source, bound: BoundLayout) -> None:
    """Raises unless each tensor lies on its ranks as the layout has it."""
    block, layout = source.block, bound.layout
    for part, planned in zip(source.parts, part_of(source, bound).parts, strict=True):
        for held, own in zip(part.held, planned.held, strict=True):
            shape = tuple(getattr(part.find(block), held.attribute).shape)
            has = Cut.of(shape, {}) if held.placed is None else held.placed.cut(shape)
            if has != (own.cut or Cut.of(shape, {})):
                path = f"{part.path}.{held.attribute}".lstrip(".")
                wanted = f"ep={layout.ep}, tp={layout.tp}, shared={layout.shared!r}"
                is_now = "whole on every rank" if held.placed is None or held.placed.whole else str(held.placed)
                raise UnsupportedError(f"{path}, {list(shape)}, is {is_now}, which is not how a layout with {wanted} has it")


def _same_tokens(owners: Iterable[nn.Module]) -> bool:
    """Whether all ranks of the expert-parallel group are given the same tokens: it is the tensor-parallel group."""
    for owner in owners:
        config = getattr(getattr(owner, "config", None), "distributed_config", None)
        if config is not None:
            return config.ep_size == config.tp_size
    return False
