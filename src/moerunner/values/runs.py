"""Which places of a dimension a rank keeps: runs of consecutive places, and places that hold zeros."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Run:
    """`size` places of a dimension from `start` on, or, where start is None, as many places that hold zeros."""

    start: int | None
    size: int


Runs = tuple[Run, ...]


def joined(runs: Iterable[Run]) -> Runs:
    """The same places in as few runs as can be."""
    found: list[Run] = []
    for run in runs:
        last = found[-1] if found else None
        if last is not None and run.start == (None if last.start is None else last.start + last.size):
            found[-1] = Run(last.start, last.size + run.size)
        elif run.size:
            found.append(run)
    return tuple(found)


def slot_runs(experts: Iterable[int]) -> Runs:
    """One place for each of these experts; -1 is an empty slot."""
    return joined(Run(None if expert < 0 else expert, 1) for expert in experts)


def width_runs(width: int, rank: int, size: int, *, parts: int = 1, unit: int = 1) -> Runs:
    """Slice `rank` of `size`, in each of `parts` equal blocks of a width, in whole `unit`s, padded with zeros."""
    block, runs = width // parts, []
    step = -(-(block // unit) // size) * unit
    start, stop = min(rank * step, block), min((rank + 1) * step, block)
    for first in range(0, parts * block, block or 1):
        runs += [Run(first + start, stop - start), Run(None, step - (stop - start))]
    return joined(runs)


def length(runs: Runs) -> int:
    """How many places there are, those with zeros too."""
    return sum(run.size for run in runs)


def take(tensor: Tensor, dim: int, runs: Runs) -> Tensor:
    """These places of a tensor along `dim`: a view where they are one run, otherwise a copy."""
    if len(runs) == 1 and runs[0].start is not None:
        return tensor.narrow(dim, runs[0].start, runs[0].size)
    pieces = []
    for run in runs:
        if run.start is None:
            shape = list(tensor.shape)
            shape[dim] = run.size
            pieces.append(tensor.new_zeros(shape))
        else:
            pieces.append(tensor.narrow(dim, run.start, run.size))
    return torch.cat(pieces, dim) if pieces else tensor.narrow(dim, 0, 0)
