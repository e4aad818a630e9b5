"""Tokens are replicated: each rank runs its own experts on all of them and has a partial sum. No collective at all."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from moerunner.ops.permute import sum_slots
from moerunner.parallel.comm import Comm
from moerunner.parallel.pairs import PairInfo, SlotMap, Trip
from moerunner.parallel.rows import Work
from moerunner.values import TopK

INFO = PairInfo(name="local", tokens="replicated", reduces=False, experts_return="any")


def dispatch(x_TH: Tensor, topk: TopK, slots: SlotMap, comm: Comm, *, dtype: torch.dtype) -> Work[tuple[Tensor, Trip]]:
    """The tokens as they are; ids of other ranks' experts become -1."""
    if not slots.whole:
        topk = dataclasses.replace(topk, ids=slots.local(slots.physical(topk), comm.coordinates["ep"]), space="physical")
    return Work(lambda: (x_TH, Trip(topk)))


def combine(y: Tensor, trip: Trip, comm: Comm, *, weigh: bool, dtype: torch.dtype) -> Tensor:
    """Rows are weighted and summed; sums pass through."""
    if y.ndim == 2:
        return y
    return sum_slots(y, trip.topk.weights if weigh else None, trip.topk.ids >= 0)
