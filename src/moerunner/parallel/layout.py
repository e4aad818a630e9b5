"""The only place that knows ranks: which expert, which slice and which tokens each one has."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from moerunner.errors import SpecError
from moerunner.values import AXES

if TYPE_CHECKING:
    from moerunner.parallel.comm import Comm

Placement = Literal["linear", "round_robin"] | tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Layout:
    """How one layer is spread over `world = dp * ep * tp` ranks; ranks count with tp fastest, then ep, then dp.

    ep: experts are split. tp: the intermediate width is split. dp: copies of the whole, each with tokens of its own.
    tokens: `replicated`: the ranks of one copy hold the same tokens (tensor-parallel attention); `sharded`: each rank has
        its own (data-parallel attention, sequence parallel).
    shared: shared experts `sharded` over the ranks of one copy, or `replicated`; `auto` shards them where tokens are
        replicated.
    placement: experts to ep coordinates: None or `linear` in order, `round_robin`, or one tuple of experts per coordinate.
    redundant: slots for second copies of experts (the first ones), whose tokens are then shared out.
    timeout: seconds that a collective may take.
    node: consecutive ranks on one machine; where tokens are sharded, they go to copies of an expert on their own machine, if
        there are any. None: all copies take turns.
    """

    dp: int = 1
    ep: int = 1
    tp: int = 1
    tokens: Literal["replicated", "sharded"] = "replicated"
    shared: Literal["auto", "sharded", "replicated"] = "auto"
    placement: Placement | None = None
    redundant: int = 0
    timeout: float = 120.0
    node: int | None = None

    def __post_init__(self) -> None:
        for name in AXES:
            size = getattr(self, name)
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise SpecError(f"must be a whole number of at least 1, not {size!r}", where=f"Layout.{name}")
        if self.tokens not in ("replicated", "sharded"):
            raise SpecError(f"must be 'replicated' or 'sharded', not {self.tokens!r}", where="Layout.tokens")
        if self.shared not in ("auto", "sharded", "replicated"):
            raise SpecError(f"must be 'auto', 'sharded' or 'replicated', not {self.shared!r}", where="Layout.shared")
        if isinstance(self.redundant, bool) or not isinstance(self.redundant, int) or self.redundant < 0:
            raise SpecError(f"must be a whole number of at least 0, not {self.redundant!r}", where="Layout.redundant")
        if isinstance(self.timeout, bool) or not isinstance(self.timeout, (int, float)) or not self.timeout > 0:
            raise SpecError(f"must be above 0 seconds, not {self.timeout!r}", where="Layout.timeout")
        if self.node is not None and (isinstance(self.node, bool) or not isinstance(self.node, int) or self.node < 1):
            raise SpecError(f"must be None or a whole number of at least 1, not {self.node!r}", where="Layout.node")
        if self.placement not in (None, "linear", "round_robin") and not _explicit(self.placement):
            what = f"must be 'linear', 'round_robin' or a tuple of experts for each rank, not {self.placement!r}"
            raise SpecError(what, where="Layout.placement")
        if isinstance(self.placement, tuple):
            if len(self.placement) != self.ep:
                raise SpecError(f"lists {len(self.placement)} ranks, ep is {self.ep}", where="Layout.placement")
            if self.redundant:
                raise SpecError("copies are written into an explicit placement", where="Layout.redundant")

    @property
    def world(self) -> int:
        return self.dp * self.ep * self.tp

    @property
    def split_axes(self) -> tuple[str, ...]:
        """The axes, beyond copies, on which there is more than one rank."""
        return tuple(a for a in ("ep", "tp") if getattr(self, a) > 1)

    @property
    def shards_shared(self) -> bool:
        """Whether the shared experts' width is split over the ranks of one copy."""
        wanted = self.tokens == "replicated" if self.shared == "auto" else self.shared == "sharded"
        return wanted and bool(self.split_axes)

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where a rank sits on each axis."""
        return {"dp": rank // (self.ep * self.tp), "ep": rank // self.tp % self.ep, "tp": rank % self.tp}

    def group(self, rank: int, axes: tuple[str, ...]) -> list[int]:
        """The ranks that differ from this one on these axes only, in order."""
        here = self.coordinates(rank)
        ranges = [range(getattr(self, a)) if a in axes else [here[a]] for a in AXES]
        return [(d * self.ep + e) * self.tp + t for d, e, t in itertools.product(*ranges)]

    def near(self, rank: int) -> tuple[int, ...]:
        """The ep coordinates whose copies of experts serve this rank's tokens first."""
        if self.node is None or self.tokens == "replicated":  # ranks with the same tokens must agree on a copy
            return ()
        group = self.group(rank, ("ep",))
        return tuple(i for i, other in enumerate(group) if other // self.node == rank // self.node)

    def slots(self, num_experts: int, sets: int = 1) -> tuple[tuple[int, ...], ...]:
        """The experts that each ep coordinate holds, by slot; -1 is an empty slot, so that all hold equally many of each set.

        Each of `sets` equal, consecutive sets of experts (text and vision, say) is spread by itself.
        """
        size = num_experts // sets
        rows: list[list[int]] = [[] for _ in range(self.ep)]
        spreads = [self._spread(range(first, first + size)) for first in range(0, num_experts, size)]
        longest = max(len(part) for spread in spreads for part in spread)
        for spread in spreads:
            for row, part in zip(rows, spread, strict=True):
                row += part + [-1] * (longest - len(part))
        missing = sorted(set(range(num_experts)) - {e for row in rows for e in row})
        if isinstance(self.placement, tuple):
            wrong = sorted({e for row in self.placement for e in row if not 0 <= e < num_experts})
            if missing or wrong:
                what = f"experts without a place: {missing}, places for experts that do not exist: {wrong}"
                raise SpecError(what, where="Layout.placement")
        return tuple(tuple(row) for row in rows)

    def _spread(self, experts: range) -> list[list[int]]:
        if isinstance(self.placement, tuple):
            return [[e for e in row if e in experts] for row in self.placement]
        order = [*experts, *(experts[i % len(experts)] for i in range(self.redundant))]
        if self.placement == "round_robin":
            return [order[i :: self.ep] for i in range(self.ep)]
        size = -(-len(order) // self.ep)
        return [order[i * size : (i + 1) * size] for i in range(self.ep)]

    def token_counts(self, tokens: int) -> list[int]:
        """How many of `tokens` rows each rank of one copy gets when they are sharded: split over ep, then over tp."""
        return [n for part in split_counts(tokens, self.ep) for n in split_counts(part, self.tp)]

    def bind(self, mesh: Any = None) -> BoundLayout:
        """Attaches the layout to its ranks.

        Args:
            mesh: a torch `DeviceMesh` with the dimensions dp, ep, tp (those above 1 must be there). None: one over all ranks
                of the process group that there is; where there is none, it is made from what torchrun puts into the
                environment, with NCCL where there are GPUs, of which each process takes that of its LOCAL_RANK, and gloo.

        Raises:
            DistributedError: there is neither a process group nor torchrun, or not with this many ranks, or the ranks have
                different layouts.
        """
        from moerunner.parallel.group import TorchComm
        from moerunner.parallel.start import grid_over_all, join
        from moerunner.parallel.watch import Watch

        sizes = {axis: getattr(self, axis) for axis in AXES}
        join(sizes, self.timeout)
        Watch.here().agree({"layout": asdict(self)}, self.timeout)
        mesh = grid_over_all(sizes) if mesh is None else mesh
        return BoundLayout(self, TorchComm(self, mesh))


def _explicit(placement: object) -> bool:
    rows = placement if isinstance(placement, tuple) else (None,)
    return all(isinstance(row, tuple) and all(type(e) is int for e in row) for row in rows)


def split_counts(total: int, parts: int) -> list[int]:
    """Rows per part: as even as can be with whole rows, the first parts full."""
    step = -(-total // parts)
    return [max(0, min(step, total - i * step)) for i in range(parts)]


@dataclass(frozen=True)
class BoundLayout:
    """A layout with the means to communicate; what a `MoERunner` on several ranks is given."""

    layout: Layout
    comm: Comm
