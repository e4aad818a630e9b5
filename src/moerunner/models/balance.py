"""Measured loads of a model over ranks to a better place for its experts, layer by layer, while it goes on running."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from moerunner.errors import SpecError, UnsupportedError
from moerunner.models.block import PatchedForward, forward_of
from moerunner.models.shards import Share, cut_tensors
from moerunner.parallel.balance import imbalance, placement, rank_loads
from moerunner.parallel.layout import BoundLayout

_WHERE = "rebalance"


@dataclass(frozen=True)
class Rebalanced:
    """One layer whose experts have moved.

    name: of its block. loads: how often each expert was chosen. placement: the experts of each ep coordinate. before, after:
    the busiest rank's load over the mean, under these loads; copies share the load of their expert.
    """

    name: str
    loads: list[float]
    placement: tuple[tuple[int, ...], ...]
    before: float
    after: float


def rebalance(
    model: nn.Module, *, redundant: int = 0, nodes: int = 1, loads: Mapping[str, Sequence[float]] | None = None
) -> list[Rebalanced]:
    """Moves the experts of every patched block so that each rank has about equally much to do; every rank calls it alike.

    Whole records move, weights with their biases, between ranks of one copy of the model; what the model computes stays as it
    is but for the order of sums. The parameters stay the objects that they are, have the shapes of the new part and no
    gradients: make an optimizer anew. What was counted starts from zero.

    Args:
        model: loaded or patched with a `Layout` whose `ep` is above 1.
        redundant: slots of each layer for second copies of its hottest experts, over all ranks.
        nodes: machines; copies of an expert lie on different ones first. Each has equally many of the ranks, in order.
        loads: by the name of a block, how often each expert is chosen; blocks that are not named stay as they are. None: what
            was counted on all ranks since `count_loads(model)`; a block that no token has reached stays as it is.

    Returns:
        The layers that moved, the same on every rank.

    Raises:
        SpecError: nothing was counted; loads of an unknown block, or not one for each expert; copies that do not fit.
        UnsupportedError: the experts are not spread over ep, or by Transformers itself, or two blocks share them.
        DistributedError: a rank failed, or ranks were given different loads.
    """
    found = _movable(model)
    given = _counted(found) if loads is None else loads
    wanted = {}
    for name, row in given.items():
        if name not in found:
            raise SpecError(f"there is no patched block {name!r}", where=_WHERE, next_step=f"There are {', '.join(found)}")
        spec, layout = found[name].source.spec, _bound(found[name]).layout
        if len(row) != spec.num_experts:
            raise SpecError(f"{len(row)} loads for {spec.num_experts} experts", where=name)
        wanted[name] = placement(row, layout.ep, redundant=redundant, nodes=nodes, sets=spec.routing.modalities)
    moved = []
    for name, rows in wanted.items():
        forward, row = found[name], [float(n) for n in given[name]]
        before = _bound(forward).layout.slots(len(row), forward.source.spec.routing.modalities)
        forward.runner.rebalance(rows)
        moved.append(Rebalanced(name, row, rows, *(imbalance(rank_loads(row, slots)) for slots in (before, rows))))
    for forward in found.values():
        if forward.runner.loads is not None:
            forward.runner.loads.reset()
    return moved


def _movable(model: nn.Module) -> dict[str, PatchedForward]:
    """The patched blocks by name. Raises, on every rank alike, unless experts of each can move."""
    found = {name: forward for name, block in model.named_modules() if (forward := forward_of(block)) is not None}
    if not found:
        raise UnsupportedError("the model has no patched block", where=_WHERE)
    for name, forward in found.items():
        if forward.layout is None or forward.layout.layout.ep == 1:
            step = "Load or patch the model with Layout(ep=...)"
            raise UnsupportedError("every rank has all experts", where=f"{_WHERE}, {name}", next_step=step)
        if not isinstance(forward.source, Share):
            what = "Transformers has spread the experts by a plan of its own, in which each has its place"
            step = "moerunner.load(path, layout=Layout(ep=...)) spreads them so that they can move"
            raise UnsupportedError(what, where=f"{_WHERE}, {name}", next_step=step)
    owners = Counter(t for forward in found.values() for t in {id(tensor) for tensor, _ in cut_tensors(forward.source)})
    if any(count > 1 for count in owners.values()):
        raise UnsupportedError("two blocks share their experts, and each would move them", where=_WHERE)
    return found


def _bound(forward: PatchedForward) -> BoundLayout:
    assert forward.layout is not None
    return forward.layout


def _counted(found: Mapping[str, PatchedForward]) -> dict[str, list[float]]:
    """What all ranks have counted, by block; those that no token has reached are left out."""
    totals = {}
    for name, forward in found.items():
        if forward.runner.loads is None:
            step = "moerunner.count_loads(model), and run some text"
            raise SpecError("loads are not counted", where=f"{_WHERE}, {name}", next_step=step)
        totals[name] = forward.runner.loads.total(_bound(forward).comm).tolist()
    reached = {name: row for name, row in totals.items() if any(row)}
    if not reached:
        raise SpecError("no token was counted since count_loads(model)", where=_WHERE, next_step="Run some text first")
    return reached
