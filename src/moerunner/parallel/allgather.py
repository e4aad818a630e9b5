"""Tokens are sharded: all ranks gather them, run their own experts, and a reduce-scatter brings finished sums home.

Moves world * T * H numbers each way whatever the routing: best when a token's experts lie on most ranks anyway.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from moerunner.ops.permute import sum_slots
from moerunner.parallel.comm import Comm
from moerunner.parallel.pairs import PairInfo, SlotMap, Trip, pack, unpack
from moerunner.values import TopK

INFO = PairInfo(name="allgather", tokens="sharded", reduces=True, experts_return="any")


def dispatch(x_TH: Tensor, topk: TopK, slots: SlotMap, comm: Comm) -> tuple[Tensor, Trip]:
    """Everyone's tokens, in rank order."""
    physical = slots.physical(topk)
    packed, counts = comm.all_gather(pack(x_TH, physical, topk.weights), comm.layout.split_axes)
    x, ids, weights = unpack(packed, x_TH, topk.weights)
    local = slots.local(ids, comm.coordinates["ep"])
    gathered = dataclasses.replace(topk, ids=local, weights=weights, space="physical", shared_weights=None)
    return x, Trip(gathered, counts=tuple(counts))


def combine(y: Tensor, trip: Trip, comm: Comm, *, weigh: bool, dtype: torch.dtype) -> Tensor:
    """This rank's tokens, summed over all ranks' experts."""
    if y.ndim == 3:
        y = sum_slots(y, trip.topk.weights if weigh else None, trip.topk.ids >= 0)
    return comm.reduce_scatter(y.to(dtype), list(trip.counts), comm.layout.split_axes)
