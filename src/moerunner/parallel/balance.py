"""Measured loads to an explicit `Layout.placement`: hot experts get copies, and every rank about equally much to do."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from moerunner.errors import SpecError
from moerunner.parallel.comm import Comm
from moerunner.parallel.pairs import SlotMap
from moerunner.values import AXES, TopK


class LoadCounter:
    """How often each expert of one layer was chosen by the tokens that this rank passed.

    counts: [num_experts] int64, on the device of the tokens; zero experts are not counted.
    """

    def __init__(self, num_experts: int) -> None:
        # One entry more, for what is no expert of a rank: nothing has to be filtered, and the device is not waited for.
        self._counts, self._num_experts = torch.zeros(num_experts + 1, dtype=torch.int64), num_experts

    @property
    def counts(self) -> Tensor:
        return self._counts[: self._num_experts]

    def add(self, topk: TopK, slots: SlotMap) -> None:
        """Counts these choices, [T, K]. Copies of an expert count together."""
        ids = topk.ids.reshape(-1)
        if self._counts.device != ids.device:
            self._counts = self._counts.to(ids.device)
        if topk.space == "physical":
            ids = slots.logical(ids)
        ids = torch.where((ids >= 0) & (ids < self._num_experts), ids, self._num_experts)
        self._counts.scatter_add_(0, ids, torch.ones_like(ids))

    def total(self, comm: Comm) -> Tensor:
        """[num_experts]: of all ranks, a token that several ranks hold counted once. Every rank must call it."""
        layout = comm.layout
        if layout.world == 1:
            return self.counts.clone()
        total = comm.all_reduce(self.counts, AXES)
        return total // (layout.ep * layout.tp) if layout.tokens == "replicated" else total

    def reset(self) -> None:
        """Starts at zero again."""
        self._counts.zero_()


def placement(
    loads: Sequence[float], ep: int, *, redundant: int = 0, nodes: int = 1, sets: int = 1
) -> tuple[tuple[int, ...], ...]:
    """Experts to ep coordinates, for `Layout(ep=ep, placement=...)` and `MoERunner.rebalance`.

    Every coordinate gets equally many slots. Slots beyond one for each expert go to copies of those with the highest load per
    copy; copies share the load. Then the heaviest copy goes to the least loaded coordinate with room, first among nodes, so
    that copies of an expert lie on different nodes before two of them lie on one, then within the node.

    Args:
        loads: how often each expert is chosen, [num_experts]; only proportions matter.
        ep: coordinates. redundant: slots for copies; rounded up until every coordinate has equally many.
        nodes: machines, which hold `ep / nodes` consecutive coordinates each. `Layout.node` sends tokens to copies on their
            own machine.
        sets: equal, consecutive sets of experts (text and vision, say), each spread by itself.

    Returns:
        The experts of each coordinate, in ascending order, none of them twice. Equal input gives equal output.

    Raises:
        SpecError: loads that are no loads, nodes or sets that do not divide, more slots than there are different experts.
    """
    loads = [float(n) for n in loads]
    size = _check(loads, ep, redundant, nodes, sets)
    room = -(-(size + redundant) // ep)
    totals = [0.0] * ep  # over all sets
    rows: list[list[int]] = [[] for _ in range(ep)]
    for first in range(0, len(loads), size):
        experts = range(first, first + size)
        copies = _copies({e: loads[e] for e in experts}, min(room, size) * ep, ep)
        shares = {e: loads[e] / copies[e] for e in experts}
        per_node = ep // nodes
        starts = range(0, ep, per_node)
        spread = _pack(copies, shares, [room * per_node] * nodes, [math.fsum(totals[i : i + per_node]) for i in starts])
        for start, held in zip(starts, spread, strict=True):
            here = range(start, start + per_node)
            parts = _pack(held, shares, [room] * per_node, [totals[i] for i in here])
            for i, part in zip(here, parts, strict=True):
                rows[i] += sorted(part)
                totals[i] += sum(shares[e] for e in part)
    return tuple(map(tuple, rows))


def rank_loads(loads: Sequence[float], slots: Sequence[Sequence[int]]) -> list[float]:
    """The load of each ep coordinate when these experts are in its slots (-1: empty); copies share their expert's load."""
    copies = [0] * len(loads)
    for e in (e for row in slots for e in row if e >= 0):
        copies[e] += 1
    return [math.fsum(loads[e] / copies[e] for e in row if e >= 0) for row in slots]


def imbalance(per_rank: Sequence[float]) -> float:
    """The busiest rank's load over the mean; 1.0 is even, and what no load at all gives."""
    mean = math.fsum(per_rank) / len(per_rank)
    return max(per_rank) / mean if mean else 1.0


def _check(loads: list[float], ep: int, redundant: int, nodes: int, sets: int) -> int:
    """The experts of one set."""
    where = "placement"
    if not loads or not all(math.isfinite(n) and n >= 0 for n in loads):
        raise SpecError("loads must be finite numbers of at least 0, one for each expert", where=where)
    for name, value, least in (("ep", ep, 1), ("redundant", redundant, 0), ("nodes", nodes, 1), ("sets", sets, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise SpecError(f"{name} must be a whole number of at least {least}, not {value!r}", where=where)
    if ep % nodes:
        raise SpecError(f"{nodes} nodes do not hold equally many of {ep} ranks", where=where)
    if len(loads) % sets:
        raise SpecError(f"{len(loads)} experts are not {sets} equal sets", where=where)
    size = len(loads) // sets
    if redundant and size + redundant > size * ep:
        what = f"{redundant} copies of {size} experts do not fit {ep} ranks, each of which holds an expert once"
        raise SpecError(what, where=where, next_step=f"At most {size * (ep - 1)} copies")
    return size


def _copies(loads: dict[int, float], slots: int, most: int) -> dict[int, int]:
    """How many copies each expert gets: every further one goes to the highest load per copy."""
    copies = dict.fromkeys(loads, 1)
    for _ in range(slots - len(loads)):
        hottest = max((e for e in loads if copies[e] < most), key=lambda e: (loads[e] / copies[e], -copies[e], -e))
        copies[hottest] += 1
    return copies


def _pack(copies: dict[int, int], shares: dict[int, float], room: list[int], totals: list[float]) -> list[dict[int, int]]:
    """How many copies of each expert every bin holds, heaviest first to the least loaded.

    Of one expert, no bin holds two copies more than another: as many copies as bins, or fewer, are all in different ones.
    """
    bins: list[dict[int, int]] = [{} for _ in room]

    def put(e: int, b: int, count: int) -> None:
        bins[b][e] = bins[b].get(e, 0) + count
        room[b] -= count
        totals[b] += count * shares[e]

    def held(e: int, b: int) -> int:
        return bins[b].get(e, 0)

    for e in sorted((e for e, n in copies.items() for _ in range(n)), key=lambda e: (-shares[e], e)):
        fewest = min(held(e, b) for b in range(len(bins)))
        wanted = [b for b in range(len(bins)) if held(e, b) == fewest]
        free = [b for b in wanted if room[b]]
        if free:
            put(e, min(free, key=lambda b: (totals[b], -room[b], b)), 1)
            continue
        # Where there is room, it lies already. A full bin has more than that one of some other expert, which makes way.
        _, b, full, other = min(
            (max(totals[b] + shares[f], totals[full] - shares[f] + shares[e]), b, full, f)
            for b in range(len(bins))
            if room[b]
            for full in wanted
            for f in bins[full]
            if held(f, full) > held(f, b)
        )
        put(other, full, -1)
        put(other, b, 1)
        put(e, full, 1)
    return [{e: n for e, n in held.items() if n} for held in bins]
