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
from moerunner.parallel.pairs import PairInfo, SlotMap, Trip, gather_tokens
from moerunner.parallel.rows import Work
from moerunner.values import TopK

INFO = PairInfo(name="alltoall", tokens="sharded", reduces=True, experts_return="rows", overlaps=True, host_sync=True)


def dispatch(x_TH: Tensor, topk: TopK, slots: SlotMap, comm: Comm, *, dtype: torch.dtype) -> Work[tuple[Tensor, Trip]]:
    """The pairs that other ranks sent here, one row and one expert each."""
    home, counts = dataclasses.replace(topk, ids=slots.physical(topk), space="physical", shared_weights=None), ()
    if comm.layout.tp > 1:
        x_TH, home, counts = gather_tokens(x_TH, topk, home.ids, comm, ("tp",), dtype)
    k, flat = home.ids.shape[1], home.ids.reshape(-1)
    owner = torch.where(flat >= 0, flat // slots.per_rank, comm.layout.ep)
    order = owner.sort(stable=True).indices[: int((flat >= 0).sum())]
    send = torch.bincount(owner, minlength=comm.layout.ep + 1)[: comm.layout.ep].tolist()
    pairs = (x_TH[order // k], home.weights.reshape(-1)[order, None], flat[order, None].to(torch.int32))
    travelling = comm.all_to_all(pairs, send, ("ep",))

    def arrive() -> tuple[Tensor, Trip]:
        (rows, weights, ids), received = travelling.wait()
        local = slots.local(ids.to(torch.int64), comm.coordinates["ep"])
        here = TopK(local, weights, space="physical", scaled=topk.scaled)
        return rows, Trip(here, counts, tuple(send), tuple(received), order, home)

    return Work(arrive)


def combine(y: Tensor, trip: Trip, comm: Comm, *, weigh: bool, dtype: torch.dtype) -> Tensor:
    """Rows come home, and are weighted and summed in slot order on the token's rank."""
    assert trip.order is not None
    assert trip.home is not None
    (back,), _ = comm.all_to_all((y[:, 0],), list(trip.received), ("ep",), receive=list(trip.send)).wait()
    tokens, k = trip.home.ids.shape
    y_TKH = back.new_zeros(tokens * k, back.shape[1])
    y_TKH[trip.order] = back
    total = sum_slots(y_TKH.view(tokens, k, back.shape[1]), trip.home.weights if weigh else None, trip.home.ids >= 0)
    return comm.reduce_scatter(total.to(dtype), list(trip.counts), ("tp",)) if comm.layout.tp > 1 else total
