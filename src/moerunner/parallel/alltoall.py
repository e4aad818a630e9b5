"""Tokens are sharded: each chosen (token, expert) pair travels to the expert's rank and its row travels back.

Counts are exchanged first, so splits are uneven, nothing has a capacity and no token is dropped. With tp, the tokens of a
tp group are gathered before the trip and its partial rows are summed and scattered after it.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from moerunner.ops.permute import sum_slots
from moerunner.parallel.comm import Comm
from moerunner.parallel.pairs import PairInfo, SlotMap, Trip, pack, unpack
from moerunner.values import TopK

INFO = PairInfo(name="alltoall", tokens="sharded", reduces=True, experts_return="rows", overlaps=True)


def dispatch(x_TH: Tensor, topk: TopK, slots: SlotMap, comm: Comm) -> tuple[Tensor, Trip]:
    """The pairs that other ranks sent here, one row and one expert each."""
    physical, weights, counts = slots.physical(topk), topk.weights, ()
    k = physical.shape[1]
    if comm.layout.tp > 1:
        packed, sizes = comm.all_gather(pack(x_TH, physical, weights), ("tp",))
        x_TH, physical, weights = unpack(packed, x_TH, weights)
        counts = tuple(sizes)
    flat = physical.reshape(-1)
    owner = torch.where(flat >= 0, flat // slots.per_rank, comm.layout.ep)
    order = owner.sort(stable=True).indices[: int((flat >= 0).sum())]
    send = torch.bincount(owner, minlength=comm.layout.ep + 1)[: comm.layout.ep].tolist()
    pairs = pack(x_TH[order // k], flat[order, None], weights.reshape(-1)[order, None])
    packed, received = comm.all_to_all(pairs, send, ("ep",))
    rows, ids, weights_R1 = unpack(packed, x_TH, weights[:, :1])
    here = TopK(slots.local(ids, comm.coordinates["ep"]), weights_R1, space="physical", scaled=topk.scaled)
    home = dataclasses.replace(topk, ids=physical, weights=weights, space="physical", shared_weights=None)
    return rows, Trip(here, counts, tuple(send), tuple(received), order, home)


def combine(y: Tensor, trip: Trip, comm: Comm, *, weigh: bool, dtype: torch.dtype) -> Tensor:
    """Rows come home, and are weighted and summed in slot order on the token's rank."""
    assert trip.order is not None
    assert trip.home is not None
    back, _ = comm.all_to_all(y[:, 0], list(trip.received), ("ep",))
    tokens, k = trip.home.ids.shape
    y_TKH = back.new_zeros(tokens * k, back.shape[1])
    y_TKH[trip.order] = back
    total = sum_slots(y_TKH.view(tokens, k, back.shape[1]), trip.home.weights if weigh else None, trip.home.ids >= 0)
    return comm.reduce_scatter(total.to(dtype), list(trip.counts), ("tp",)) if comm.layout.tp > 1 else total
