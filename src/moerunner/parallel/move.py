"""Experts change ranks: whole records, weights, biases and scales, go where another placement wants them."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from moerunner.parallel.comm import Comm
from moerunner.parallel.pairs import SlotMap
from moerunner.parallel.rows import reinterpreted
from moerunner.values import ExpertWeights, LayerWeights


@dataclass(frozen=True)
class Move:
    """The experts of one layer go from one placement to another; each rank takes part in it.

    comm: this rank's view of the others, afterwards. before, after: where the experts lie. sets: of experts, as in
    `RoutingSpec.modalities`.
    """

    comm: Comm
    before: SlotMap
    after: SlotMap
    sets: int

    @classmethod
    def to(cls, placement: tuple[tuple[int, ...], ...], comm: Comm, slots: SlotMap, sets: int) -> Move:
        """Every rank must call it; nothing has moved then. placement: as `Layout.placement` takes it. `comm` stays as it is.

        Raises:
            SpecError: the placement does not fit. DistributedError: ranks were given different ones.
        """
        layout = dataclasses.replace(comm.layout, placement=placement, redundant=0)
        after = SlotMap(layout, slots.num_experts, sets, slots.zero_experts, comm.rank)
        comm.same({"the placement to move to": str(placement)})
        moved = copy.copy(comm)  # other layers may use this one, with a placement of their own
        moved.layout = layout
        return cls(moved, slots, after, sets)

    def layer(self, w: LayerWeights) -> LayerWeights:
        """One rank's weights afterwards; `w`, those before, stay as they are. Every rank must call it."""
        return dataclasses.replace(w, experts=tuple(self._experts(one, index) for index, one in enumerate(w.experts)))

    def _experts(self, experts: ExpertWeights, index: int) -> ExpertWeights:
        tensors = dict(experts.tensors)
        for name, entry in experts.tensors.items():
            if entry.expert_dim is None:
                continue
            tensor = self.tensor(entry.tensor.movedim(entry.expert_dim, 0), index).movedim(0, entry.expert_dim)
            if isinstance(entry.tensor, torch.nn.Parameter):
                tensor = torch.nn.Parameter(tensor, requires_grad=entry.tensor.requires_grad)
            tensors[name] = dataclasses.replace(entry, tensor=tensor)
        return dataclasses.replace(experts, tensors=tensors)

    def tensor(self, rows: Tensor, index: int = 0) -> Tensor:
        """One tensor of the experts of one set, [slots before, ...] to [slots after, ...], its other dimensions in the same
        order in memory. Every rank must call it.

        Experts that a rank has already are copied there; the others travel over ep.
        """
        old, new = (_of_set(slots, index, self.sets) for slots in (self.before, self.after))
        sources, here, comm = senders(old, new), self.comm.coordinates["ep"], self.comm
        others = [rank for rank in range(comm.layout.ep) if rank != here]
        # By receiver, and then by its slots, as the receiver counts them.
        leaving = {
            there: [old[here].index(e) for e, source in zip(new[there], sources[there], strict=True) if source == here]
            for there in others
        }
        arriving = [slot for rank in others for slot, source in enumerate(sources[here]) if source == rank]
        rows = rows.detach()
        filled = _like(rows, len(new[here]))
        for slot, source in enumerate(sources[here]):
            if source == here:
                filled[slot] = rows[old[here].index(new[here][slot])]
        sent = torch.tensor([slot for part in leaving.values() for slot in part], dtype=torch.int64, device=rows.device)
        packed = rows[sent].reshape(len(sent), math.prod(rows.shape[1:]))
        counts = [len(leaving.get(rank, ())) for rank in range(comm.layout.ep)]
        (received,), _ = comm.all_to_all((reinterpreted(packed, torch.uint8),), counts, ("ep",)).wait()
        for slot, row in zip(arriving, reinterpreted(received, rows.dtype), strict=True):
            filled[slot] = row.view(rows.shape[1:])
        return filled


@runtime_checkable
class Moves(Protocol):
    """What holds the tensors of a layer, and can have its experts move."""

    def move(self, move: Move) -> None: ...


def senders(old: Sequence[Sequence[int]], new: Sequence[Sequence[int]]) -> list[list[int]]:
    """The ep coordinate that each new slot is filled from, -1 for an empty one: itself if it can, else the least busy."""
    busy = [0] * len(old)
    sources = [[-1] * len(row) for row in new]
    for here, row in enumerate(new):
        for slot, expert in enumerate(row):
            if expert < 0:
                continue
            holders = [r for r, held in enumerate(old) if expert in held]
            sources[here][slot] = here if here in holders else min(holders, key=lambda r: (busy[r], r))
            busy[sources[here][slot]] += sources[here][slot] != here
    return sources


def _of_set(slots: SlotMap, index: int, sets: int) -> list[tuple[int, ...]]:
    size = slots.per_rank // sets
    return [row[index * size : (index + 1) * size] for row in slots.slots]


def _like(rows: Tensor, count: int) -> Tensor:
    """Zeros [count, ...] whose dimensions lie in memory in the order of those of `rows`: kernels ask for it."""
    order = sorted(range(rows.ndim), key=lambda d: -rows.stride(d))
    shape = (count, *rows.shape[1:])
    inverse = sorted(range(rows.ndim), key=order.__getitem__)
    return rows.new_zeros([shape[d] for d in order]).permute(inverse)
