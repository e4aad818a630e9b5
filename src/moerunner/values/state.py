"""The state of the value that flows through a plan, and the algebra that forbids the classic faults."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from moerunner.errors import PlanError

AXES = ("dp", "ep", "tp")


@dataclass(frozen=True)
class ValueState:
    """What is true of a value at one point of a plan; every method is one step and returns the state after it.

    width: features that carry meaning; padded_to: features that are stored. weighted: the router's weights are in it;
    summed: the K slots are one; scaled: the routed scaling factor is in it. placements: one of PyTorch's `Replicate()`,
    `Partial()`, `Shard(0)` per axis (dp, ep, tp). rounded: it is float32 no longer, and nothing may compute with it. by: which
    step made each fact true, for the error that names both.
    """

    width: int
    padded_to: int
    weighted: bool
    summed: bool
    scaled: bool
    dtype: str
    placements: tuple[Placement, Placement, Placement]
    by: tuple[tuple[str, str], ...] = field(default=(), compare=False)
    rounded: bool = False

    def at(self, axis: str) -> Placement:
        return self.placements[AXES.index(axis)]

    @property
    def partial_axes(self) -> tuple[str, ...]:
        return tuple(a for a in AXES if self.at(a).is_partial())

    def maker(self, fact: str) -> str:
        return dict(self.by).get(fact, "the input")

    def _set(self, step: str, facts: tuple[str, ...], **changes: Any) -> ValueState:
        by = {**dict(self.by), **dict.fromkeys(facts, step)}
        return dataclasses.replace(self, by=tuple(by.items()), **changes)

    def _place(self, step: str, axes: tuple[str, ...], placement: Placement) -> ValueState:
        moved = tuple(placement if a in axes else p for a, p in zip(AXES, self.placements, strict=True))
        return self._set(step, tuple(f"placed on {a}" for a in axes), placements=moved)

    def _refuse(self, step: str, fact: str, what: str) -> None:
        raise PlanError(what, first=self.maker(fact), second=step)

    def pad(self, step: str, to: int) -> ValueState:
        if self.padded_to != self.width:
            self._refuse(step, "padded", f"pads a value that is already padded to {self.padded_to}")
        if to < self.width:
            self._refuse(step, "width", f"pads width {self.width} to {to}, which would cut it")
        return self._set(step, ("padded",), padded_to=to)

    def trim(self, step: str, width: int) -> ValueState:
        if self.padded_to == self.width:
            self._refuse(step, "trimmed", "trims a value that has no padding")
        if width != self.width:
            self._refuse(step, "width", f"trims to {width}, the true width is {self.width}")
        return self._set(step, ("trimmed",), padded_to=width)

    def round(self, step: str) -> ValueState:
        """To the tokens' dtype, which is done once and last."""
        if not self.summed:
            self._refuse(step, "made", "rounds a value that has not been summed")
        return self._set(step, ("rounded",), rounded=True)

    def _wide(self, step: str, does: str) -> None:
        if self.rounded:
            self._refuse(step, "rounded", f"{does} a value that has been rounded already")

    def transform(self, step: str, takes: int, gives: int, *, linear: bool) -> ValueState:
        self._wide(step, "transforms")
        if self.padded_to != self.width:
            self._refuse(step, "padded", f"reads {self.padded_to} features of which {self.width} are true")
        if takes != self.width:
            self._refuse(step, "width", f"takes width {takes}, the value has {self.width}")
        if self.partial_axes and not linear:
            axis = self.partial_axes[0]
            self._refuse(step, f"placed on {axis}", f"is not linear and the value is a partial sum over {axis}")
        return self._set(step, ("width",), width=gives, padded_to=gives)

    def row_norm(self, step: str) -> ValueState:
        if self.summed or self.weighted:
            fact = "summed" if self.summed else "weighted"
            self._refuse(step, fact, f"norms each expert's row, but the rows are already {fact}")
        if self.padded_to != self.width:
            self._refuse(step, "padded", f"norms {self.padded_to} features of which {self.width} are true")
        if "tp" in self.partial_axes:
            self._refuse(step, "placed on tp", "norms rows that are partial sums over tp")
        return self._set(step, ("row norm",))

    def weigh(self, step: str) -> ValueState:
        if self.weighted:
            self._refuse(step, "weighted", "applies the routing weights a second time")
        return self._set(step, ("weighted",), weighted=True)

    def sum_slots(self, step: str) -> ValueState:
        if self.summed:
            self._refuse(step, "summed", "sums the chosen experts a second time")
        if not self.weighted:
            self._refuse(step, "made", "sums experts that have not been weighted")
        return self._set(step, ("summed",), summed=True)

    def scale(self, step: str) -> ValueState:
        self._wide(step, "scales")
        if self.scaled:
            self._refuse(step, "scaled", "applies the routed scaling factor a second time")
        return self._set(step, ("scaled",), scaled=True)

    def make_partial(self, step: str, axes: tuple[str, ...]) -> ValueState:
        """The step computes one rank's share of a sum over these axes, from a value that is whole on them."""
        for axis in axes:
            if self.at(axis) != Replicate():
                self._refuse(step, f"placed on {axis}", f"needs the whole value on {axis}, it is {self.at(axis)!r}")
        return self._place(step, axes, Partial())

    def gather(self, step: str, axes: tuple[str, ...]) -> ValueState:
        for axis in axes:
            if self.at(axis) != Shard(0):
                self._refuse(step, f"placed on {axis}", f"gathers tokens over {axis}, the value is {self.at(axis)!r}")
        return self._place(step, axes, Replicate())

    def reduce(self, step: str, axes: tuple[str, ...], *, scatter: bool = False) -> ValueState:
        self._wide(step, "reduces")
        for axis in axes:
            if not self.at(axis).is_partial():
                self._refuse(step, f"placed on {axis}", f"reduces over {axis} a value that is {self.at(axis)!r} there")
        return self._place(step, axes, Shard(0) if scatter else Replicate())

    def select(self, step: str, axes: tuple[str, ...]) -> ValueState:
        """Keep a replicated value on coordinate 0 of an axis, zeros elsewhere, so that it joins a partial sum once."""
        return self.make_partial(step, axes)

    def take_shard(self, step: str, axes: tuple[str, ...]) -> ValueState:
        """Each rank keeps its own tokens of a replicated value."""
        for axis in axes:
            if self.at(axis) != Replicate():
                self._refuse(step, f"placed on {axis}", f"takes its tokens over {axis} of a value that is {self.at(axis)!r}")
        return self._place(step, axes, Shard(0))

    def add(self, step: str, other: ValueState) -> ValueState:
        for name, state in (("first", self), ("second", other)):
            state._wide(step, "adds to")
            if state.padded_to != state.width:
                state._refuse(step, "padded", f"adds a padded value ({name}: {state.padded_to} for {state.width})")
            for fact in ("weighted", "summed", "scaled"):
                if not getattr(state, fact):
                    state._refuse(step, "made", f"adds a value that has never been {fact}")
        if self.width != other.width:
            other._refuse(step, "width", f"adds widths {self.width} and {other.width}")
        for axis in AXES:
            if self.at(axis) != other.at(axis):
                maker = other if other.at(axis) != Replicate() else self
                maker._refuse(step, f"placed on {axis}", f"adds {self.at(axis)!r} and {other.at(axis)!r} over {axis}")
        return self._set(step, ("joined",))
