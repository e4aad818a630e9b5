"""Tokens are sharded: all ranks gather them, run their own experts, and a reduce-scatter brings finished sums home.

Moves world * T * H numbers each way whatever the routing: best when a token's experts lie on most ranks anyway.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from moerunner.ops.permute import sum_slots
from moerunner.parallel.comm import Comm
from moerunner.parallel.pairs import PairInfo, SlotMap, Trip, gather_tokens
from moerunner.parallel.rows import Work
from moerunner.values import TopK

INFO = PairInfo(name="allgather", tokens="sharded", reduces=True, experts_return="any", host_sync=True)


def dispatch(x_TH: Tensor, topk: TopK, slots: SlotMap, comm: Comm, *, dtype: torch.dtype) -> Work[tuple[Tensor, Trip]]:
    """Everyone's tokens, in rank order."""
    x, topk, counts = gather_tokens(x_TH, topk, slots.physical(topk), comm, comm.layout.split_axes, dtype)
    here = dataclasses.replace(topk, ids=slots.local(topk.ids, comm.coordinates["ep"]))
    return Work(lambda: (x, Trip(here, counts=counts)))


def combine(y: Tensor, trip: Trip, comm: Comm, *, weigh: bool, dtype: torch.dtype) -> Tensor:
    """This rank's tokens, summed over all ranks' experts."""
    if y.ndim == 3:
        y = sum_slots(y, trip.topk.weights if weigh else None, trip.topk.ids >= 0)
    return comm.reduce_scatter(y.to(dtype), list(trip.counts), comm.layout.split_axes)
