"""Where each number of a stored tensor goes in a tensor of the model, worked out on shapes alone, before anything is read.

Checkpoints stack, concatenate, cut, transpose and interleave; all of these only move numbers. A `Laid` is a tensor as it
will be, described by the boxes that its sources fill; the verbs below make one `Laid` of others. As every verb keeps boxes
apart and leaves no gap, a tensor whose shape comes out right has each of its numbers written exactly once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moerunner.values import Run, Runs, joined, length, take

Shape = tuple[int, ...]
Box = tuple[slice, ...]


class Unfit(Exception):
    """Shapes that do not go together; the message says which."""


@dataclass(frozen=True)
class Axis:
    """One dimension of a box: `size` places from `at` on, holding the source's dimension `dim` at first, first + step, ...

    dim: None for a dimension that the source does not have; size is 1 then.
    """

    dim: int | None
    at: int
    size: int
    first: int = 0
    step: int = 1

    def cut(self, start: int, stop: int) -> Axis | None:
        """What of it lies between two places, which are counted from the start then."""
        low, high = max(self.at, start), min(self.at + self.size, stop)
        if low >= high:
            return None
        return replace(self, at=low - start, size=high - low, first=self.first + (low - self.at) * self.step)


@dataclass(frozen=True)
class Part:
    """The box that a source fills, one `Axis` for each dimension of the target."""

    source: str
    axes: tuple[Axis, ...]

    @property
    def numel(self) -> int:
        return math.prod(axis.size for axis in self.axes)

    def reads(self) -> list[range]:
        """The places of the source's dimensions that it takes."""
        taken = {a.dim: range(a.first, a.first + (a.size - 1) * a.step + 1, a.step) for a in self.axes if a.dim is not None}
        return [taken[dim] for dim in range(len(taken))]

    def box(self, within: Box) -> tuple[int | slice, ...] | None:
        """Where a box of the source lies in the target, if it lies there as it is: not turned, not cut, not spread."""
        found: list[int | slice] = []
        dims = [axis.dim for axis in self.axes if axis.dim is not None]
        for axis in self.axes:
            if axis.dim is None:
                found.append(axis.at)
                continue
            at, size = within[axis.dim].start - axis.first, within[axis.dim].stop - within[axis.dim].start
            if axis.step != 1 or at < 0 or at + size > axis.size:
                return None
            found.append(slice(axis.at + at, axis.at + at + size))
        return tuple(found) if dims == list(range(len(within))) else None

    def write(self, target: Tensor, box: Sequence[slice], values: Tensor, *, stays: bool = False) -> int:
        """Copies those values that lie in this part: `values` are a box of the source. Gives back how many they are.

        stays: they stay as they are until a GPU has copied them, so nobody waits for that here.
        """
        take = [slice(None)] * values.ndim
        put: list[int | slice] = []
        order = []
        for axis in self.axes:
            if axis.dim is None:
                put.append(axis.at)
                continue
            begin, end = box[axis.dim].start, box[axis.dim].stop
            low = max(0, -((axis.first - begin) // axis.step))  # the first place whose number is not before the box
            high = min(axis.size, -((axis.first - end) // axis.step))
            if low >= high:
                return 0
            first = axis.first + low * axis.step - begin
            take[axis.dim] = slice(first, first + (high - low - 1) * axis.step + 1, axis.step)
            put.append(slice(axis.at + low, axis.at + high))
            order.append(axis.dim)
        values = values[tuple(take)].permute(order)
        target[tuple(put)].copy_(values, non_blocking=stays)
        return values.numel()


@dataclass(frozen=True)
class Laid:
    """A tensor by its shape and the parts that fill it."""

    shape: Shape
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Cut:
    """The numbers of one tensor that are kept. shape: of the whole tensor. runs: what is kept along each dimension."""

    shape: Shape
    runs: tuple[Runs, ...]

    @classmethod
    def of(cls, shape: Shape, kept: dict[int, Runs]) -> Cut:
        """kept: along the dimensions that are cut; the others are whole."""
        return cls(shape, tuple(kept.get(dim, (Run(0, size),) if size else ()) for dim, size in enumerate(shape)))

    @property
    def local(self) -> Shape:
        """The shape of what is kept."""
        return tuple(length(runs) for runs in self.runs)

    @property
    def numel(self) -> int:
        """How many numbers of the whole are written; beside them there are zeros."""
        return math.prod(sum(run.size for run in runs if run.start is not None) for runs in self.runs)

    @property
    def has_zeros(self) -> bool:
        return self.numel < math.prod(self.local)

    def take(self, tensor: Tensor) -> Tensor:
        """The part of a tensor, in memory of its own."""
        for dim, runs in enumerate(self.runs):
            tensor = take(tensor, dim, runs)
        return tensor.clone(memory_format=torch.contiguous_format)

    def transposed(self) -> Cut:
        """The same of a tensor whose last two dimensions are swapped."""
        return Cut(_swapped(self.shape), _swapped(self.runs))

    def merged(self) -> Cut:
        """The same of a tensor whose first two dimensions are one."""
        outer, inner = self.runs[:2]
        size = self.shape[1]
        places = (run.start if run.start is None else run.start + i for run in outer for i in range(run.size))
        runs = (
            Run(None if place is None or run.start is None else place * size + run.start, run.size)
            for place in places
            for run in inner
        )
        return Cut((self.shape[0] * size, *self.shape[2:]), (joined(runs), *self.runs[2:]))

    def parts(self, part: Part) -> Iterator[Part]:
        """What is left of a part of the whole tensor."""
        for axes in itertools.product(*(_left(axis, runs) for axis, runs in zip(part.axes, self.runs, strict=True))):
            yield Part(part.source, axes)


def _left(axis: Axis, runs: Runs) -> list[Axis]:
    found, at = [], 0
    for run in runs:
        left = axis.cut(run.start, run.start + run.size) if run.start is not None else None
        if left is not None:
            found.append(replace(left, at=left.at + at))
        at += run.size
    return found


def _swapped(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return *values[:-2], values[-1], values[-2]


def regions(parts: Sequence[tuple[str, Part]], shape: Shape, least: int) -> list[tuple[Box, list[tuple[str, Part]]]]:
    """Boxes of a source, apart from each other and each contiguous in its file, and the parts that take numbers of each.

    parts: with the names of their targets. least: how many numbers in a row are read by themselves; fewer are read together
    with what lies between them.
    """
    reads = [part.reads() for _, part in parts]
    if len(reads) == 1 and reads[0] == [range(size) for size in shape]:  # nearly all
        return [(tuple(slice(0, size) for size in shape), list(parts))]
    depth = 0
    for dim in range(1, len(shape)):
        inner = math.prod(shape[dim + 1 :])
        cut = any(len(each[dim]) * each[dim].step < shape[dim] for each in reads)
        if cut and all((each[dim].stop - each[dim].start) * inner >= least for each in reads):
            depth = dim
    if not shape or not math.prod(shape):
        return [(tuple(slice(0, size) for size in shape), list(parts))] if parts else []
    found: dict[tuple[int, ...], list[tuple[int, int, list[tuple[str, Part]]]]] = {}
    for each, part in sorted(zip(reads, parts, strict=True), key=lambda one: one[0][depth].start):
        low, high = each[depth].start, each[depth].stop
        for outer in itertools.product(*each[:depth]):
            spans = found.setdefault(outer, [])
            if spans and low < spans[-1][1]:
                start, stop, mine = spans.pop()
                spans.append((start, max(stop, high), [*mine, part]))
            else:
                spans.append((low, high, [part]))
    rest = tuple(slice(0, size) for size in shape[depth + 1 :])
    return [
        ((*(slice(place, place + 1) for place in outer), slice(low, high), *rest), mine)
        for outer, spans in sorted(found.items())
        for low, high, mine in spans
    ]


def whole(source: str, shape: Shape) -> Laid:
    """A source as it is."""
    return Laid(shape, (Part(source, tuple(Axis(dim, 0, size) for dim, size in enumerate(shape))),))


def stack(tensors: Sequence[Laid], dim: int) -> Laid:
    """As `torch.stack`."""
    shape = _common(tensors, None)
    dim = _within(dim, len(shape) + 1)
    parts = [
        Part(part.source, (*part.axes[:dim], Axis(None, index, 1), *part.axes[dim:]))
        for index, tensor in enumerate(tensors)
        for part in tensor.parts
    ]
    return Laid((*shape[:dim], len(tensors), *shape[dim:]), tuple(parts))


def concatenate(tensors: Sequence[Laid], dim: int) -> Laid:
    """As `torch.cat`."""
    shape = _common(tensors, dim)
    dim = _within(dim, len(shape))
    parts, at = [], 0
    for tensor in tensors:
        for part in tensor.parts:
            moved = replace(part.axes[dim], at=part.axes[dim].at + at)
            parts.append(Part(part.source, (*part.axes[:dim], moved, *part.axes[dim + 1 :])))
        at += tensor.shape[dim]
    return Laid((*shape[:dim], at, *shape[dim + 1 :]), tuple(parts))


def split(tensor: Laid, sizes: Sequence[int], dim: int) -> list[Laid]:
    """As `torch.split` with a list of sizes."""
    dim = _within(dim, len(tensor.shape))
    if sum(sizes) != tensor.shape[dim]:
        raise Unfit(f"{list(tensor.shape)} cannot be cut into {list(sizes)} along dimension {dim}")
    found, at = [], 0
    for size in sizes:
        cuts = [(part, part.axes[dim].cut(at, at + size)) for part in tensor.parts]
        parts = tuple(Part(p.source, (*p.axes[:dim], cut, *p.axes[dim + 1 :])) for p, cut in cuts if cut is not None)
        found.append(Laid((*tensor.shape[:dim], size, *tensor.shape[dim + 1 :]), parts))
        at += size
    return found


def transpose(tensor: Laid, dim0: int, dim1: int) -> Laid:
    """As `torch.transpose`."""
    order = list(range(len(tensor.shape)))
    a, b = _within(dim0, len(order)), _within(dim1, len(order))
    order[a], order[b] = b, a
    parts = (Part(part.source, tuple(part.axes[d] for d in order)) for part in tensor.parts)
    return Laid(tuple(tensor.shape[d] for d in order), tuple(parts))


def evens_then_odds(tensor: Laid, dim: int) -> Laid:
    """Along one dimension first the numbers at even places, then those at odd ones."""
    dim = _within(dim, len(tensor.shape))
    size = tensor.shape[dim]
    if size % 2:
        raise Unfit(f"{list(tensor.shape)} has an odd size along dimension {dim}, where pairs were expected")
    parts = []
    for part in tensor.parts:
        axis = part.axes[dim]
        if axis.dim is None or axis.size != size:
            raise NotImplementedError("pairs that lie in several sources")
        for odd in (0, 1):
            moved = Axis(axis.dim, odd * (size // 2), size // 2, axis.first + odd * axis.step, 2 * axis.step)
            parts.append(Part(part.source, (*part.axes[:dim], moved, *part.axes[dim + 1 :])))
    return Laid(tensor.shape, tuple(parts))


def _common(tensors: Sequence[Laid], free: int | None) -> Shape:
    """The shape that all share, except along `free`."""
    if not tensors:
        raise Unfit("there is nothing to join")
    shape = tensors[0].shape
    for tensor in tensors[1:]:
        same = len(tensor.shape) == len(shape) and all(
            a == b for d, (a, b) in enumerate(zip(tensor.shape, shape, strict=True)) if free is None or d != free % len(shape)
        )
        if not same:
            raise Unfit(f"{list(shape)} and {list(tensor.shape)} cannot be joined")
    return shape


def _within(dim: int, ndim: int) -> int:
    if not -ndim <= dim < ndim:
        raise Unfit(f"there is no dimension {dim} among {ndim}")
    return dim % ndim
