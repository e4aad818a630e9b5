"""What a dispatch/combine pair declares, and what it carries from one to the other."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from moerunner.parallel.comm import Comm
from moerunner.parallel.layout import Layout
from moerunner.parallel.rows import Work
from moerunner.values import TopK


@dataclass(frozen=True, kw_only=True)
class PairInfo:
    """tokens: the placement of tokens it is made for. reduces: its combine returns finished rows, no reduction is left.

    experts_return: what it takes from the experts; `any` or `rows`. overlaps: shared experts may run while it travels.
    host_sync: the host waits for counts of rows.
    """

    name: str
    tokens: Literal["replicated", "sharded"]
    reduces: bool
    experts_return: Literal["any", "rows"]
    overlaps: bool = False
    host_sync: bool = False


@dataclass(frozen=True)
class Trip:
    """What combine needs to undo a dispatch. Each pair reads only what it wrote."""

    topk: TopK
    counts: tuple[int, ...] = ()
    send: tuple[int, ...] = ()
    received: tuple[int, ...] = ()
    order: Tensor | None = None
    home: TopK | None = None
    handle: Any = None


class Pair(Protocol):
    """A module of this package with these names."""

    INFO: PairInfo

    def dispatch(
        self, x_TH: Tensor, topk: TopK, slots: SlotMap, comm: Comm, *, dtype: torch.dtype
    ) -> Work[tuple[Tensor, Trip]]:
        """Starts; then gives the rows that this rank's experts run on, with ids of its own slots (-1: not here).

        Where ranks run experts on the same token, the parts of its gradient travel in `dtype`.
        """
        ...

    def combine(self, y: Tensor, trip: Trip, comm: Comm, *, weigh: bool, dtype: torch.dtype) -> Tensor:
        """Back to the tokens. y: [R, H] summed, or [R, K, H] rows, then weighted if `weigh`, and summed.

        Partial sums travel in `dtype`.
        """
        ...


class SlotMap:
    """Which physical slot (ep coordinate * slots per rank + slot) serves a logical expert; made once per layer.

    rank: whose tokens it is for.
    """

    def __init__(self, layout: Layout, num_experts: int, sets: int = 1, zero_experts: int = 0, rank: int = 0) -> None:
        self.slots = layout.slots(num_experts, sets)
        self.per_rank, self.num_experts, self.zero_experts = len(self.slots[0]), num_experts, zero_experts
        where: list[list[int]] = [[] for _ in range(num_experts)]
        for slot, expert in enumerate(itertools.chain.from_iterable(self.slots)):
            if expert >= 0:
                where[expert].append(slot)
        self.plain = [w[0] for w in where] == list(range(num_experts)) and max(map(len, where)) == 1
        # One rank that holds all experts in order, and ids that can be nothing else: no id changes.
        self.whole = self.plain and len(self.slots) == 1 and not zero_experts
        near = layout.near(rank)
        where = [[slot for slot in w if slot // self.per_rank in near] or w for w in where]
        width = max(map(len, where))
        self._table = torch.tensor([w + [w[0]] * (width - len(w)) for w in where])
        self._sizes = torch.tensor([len(w) for w in where])

    def physical(self, topk: TopK) -> Tensor:
        """[T, K] slots; a token picks among an expert's copies by its position. -1 and zero experts become -1."""
        ids = topk.ids
        if topk.space == "physical":
            return ids
        real = (ids >= 0) & (ids < self.num_experts)
        if self.plain:
            return torch.where(real, ids, -1)
        if self._table.device != ids.device:
            self._table, self._sizes = self._table.to(ids.device), self._sizes.to(ids.device)
        safe = ids.clamp(0, self.num_experts - 1)
        turn = torch.arange(ids.shape[0], device=ids.device).unsqueeze(1) % self._sizes[safe]
        return torch.where(real, self._table[safe, turn], -1)

    def logical(self, physical: Tensor) -> Tensor:
        """The experts in these slots; -1 for an empty slot and for -1."""
        experts = torch.tensor([*itertools.chain.from_iterable(self.slots), -1], device=physical.device)
        return experts[physical]

    def local(self, physical: Tensor, ep_coordinate: int) -> Tensor:
        """Slots of this rank, -1 for those of others."""
        local = physical - ep_coordinate * self.per_rank
        return torch.where((physical >= 0) & (local >= 0) & (local < self.per_rank), local, -1)


def gather_tokens(
    x_TH: Tensor, topk: TopK, physical_TK: Tensor, comm: Comm, axes: tuple[str, ...], dtype: torch.dtype
) -> tuple[Tensor, TopK, tuple[int, ...]]:
    """Everyone's tokens with their slots and weights, and how many each rank had; gradients of tokens travel in `dtype`."""
    rows = (x_TH, topk.weights, physical_TK.to(torch.int32))
    (x, weights, ids), counts = comm.all_gather(rows, axes, (dtype, topk.weights.dtype))
    ids = ids.to(torch.int64)
    return x, dataclasses.replace(topk, ids=ids, weights=weights, space="physical", shared_weights=None), tuple(counts)
