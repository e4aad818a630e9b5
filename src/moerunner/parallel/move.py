"""Experts change ranks: whole records, weights, biases and scales, go where another placement wants them."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from moerunner.parallel.comm import Comm
from moerunner.parallel.pairs import SlotMap
from moerunner.parallel.rows import reinterpreted
from moerunner.values import ExpertWeights, LayerWeights


def rebalanced(
    w: LayerWeights, comm: Comm, slots: SlotMap, placement: tuple[tuple[int, ...], ...]
) -> tuple[LayerWeights, Comm, SlotMap]:
    """One rank's weights, its view of the others and the places of experts, after the experts have moved to `placement`.

    Every rank must call it. Experts that a rank has already are copied there; the others travel over ep, one tensor after
    another, so that a rank never holds more than its old and its new experts. `w` and `comm` stay as they are.

    Args:
        w: this rank's weights under `slots`. placement: as `Layout.placement` takes it.

    Raises:
        SpecError: the placement does not fit. DistributedError: ranks were given different ones.
    """
    layout = dataclasses.replace(comm.layout, placement=placement, redundant=0)
    after = SlotMap(layout, slots.num_experts, len(w.experts), slots.zero_experts, comm.rank)
    comm.same({"the placement to move to": str(placement)})
    moved = copy.copy(comm)  # other layers may use this one, with a placement of their own
    moved.layout = layout
    experts = []
    for index, one in enumerate(w.experts):
        old, new = (_of_set(s, index, len(w.experts)) for s in (slots, after))
        experts.append(_move(one, comm, senders(old, new), old, new))
    return dataclasses.replace(w, experts=tuple(experts)), moved, after


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


def _move(
    experts: ExpertWeights,
    comm: Comm,
    sources: list[list[int]],
    old: Sequence[Sequence[int]],
    new: Sequence[Sequence[int]],
) -> ExpertWeights:
    here = comm.coordinates["ep"]
    # By receiver, and then by its slots, as the receiver counts them.
    leaving = [
        [old[here].index(e) for e, source in zip(new[there], sources[there], strict=True) if source == here]
        if there != here
        else []
        for there in range(comm.layout.ep)
    ]
    arriving = [slot for r in range(comm.layout.ep) if r != here for slot, source in enumerate(sources[here]) if source == r]
    kept = [(slot, old[here].index(new[here][slot])) for slot, source in enumerate(sources[here]) if source == here]
    sent, counts = [slot for part in leaving for slot in part], [len(part) for part in leaving]
    tensors = {}
    for name, entry in experts.tensors.items():
        if entry.expert_dim is None:
            tensors[name] = entry
            continue
        rows = entry.tensor.detach().movedim(entry.expert_dim, 0)
        filled = _like(rows, len(new[here]))
        for slot, before in kept:
            filled[slot] = rows[before]
        packed = rows[torch.tensor(sent, dtype=torch.int64, device=rows.device)]
        packed = packed.reshape(len(sent), math.prod(rows.shape[1:]))
        (received,), _ = comm.all_to_all((reinterpreted(packed, torch.uint8),), counts, ("ep",)).wait()
        for slot, row in zip(arriving, reinterpreted(received, rows.dtype), strict=True):
            filled[slot] = row.view(rows.shape[1:])
        tensor = filled.movedim(0, entry.expert_dim)
        if isinstance(entry.tensor, torch.nn.Parameter):
            tensor = torch.nn.Parameter(tensor, requires_grad=entry.tensor.requires_grad)
        tensors[name] = dataclasses.replace(entry, tensor=tensor)
    return dataclasses.replace(experts, tensors=tensors)


def _like(rows: Tensor, count: int) -> Tensor:
    """Zeros [count, ...] whose dimensions lie in memory in the order of those of `rows`: kernels ask for it."""
    order = sorted(range(rows.ndim), key=lambda d: -rows.stride(d))
    shape = (count, *rows.shape[1:])
    inverse = sorted(range(rows.ndim), key=order.__getitem__)
    return rows.new_zeros([shape[d] for d in order]).permute(inverse)
