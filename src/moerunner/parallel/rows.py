"""What moves between ranks: rows of several tensors as bytes, work under way, and functions with a backward of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

R = TypeVar("R")
Tensors = tuple[Tensor, ...]


class Work(Generic[R]):
    """Something that has been started; `wait` finishes it and gives its result."""

    def __init__(self, finish: Callable[[], R]) -> None:
        self.wait = finish


class SideStream:
    """A stream of a GPU beside the current one, made when it is first asked for."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def on(self, device: torch.device) -> torch.cuda.Stream:
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        return self._streams[device]


def beside(compute: Callable[[], Tensor | tuple[Tensor | None, ...]], side: SideStream, *read: Tensor | None) -> Work[Any]:
    """Starts `compute` on a side stream, after what the current stream has been given so far; it must issue no collective.

    `wait` has the current stream wait for it. read: what it reads that may be freed before. Fit for CUDA graphs.
    """
    tensors = [t for t in read if t is not None]
    stream, current = side.on(tensors[0].device), torch.cuda.current_stream(tensors[0].device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        y = compute()
    for tensor in tensors:
        tensor.record_stream(stream)

    def finish() -> Any:
        here = torch.cuda.current_stream(tensors[0].device)
        here.wait_stream(stream)
        for tensor in y if isinstance(y, tuple) else (y,):
            if tensor is not None:
                tensor.record_stream(here)
        return y

    return Work(finish)


def pack(rows: Sequence[Tensor]) -> Tensor:
    """Tensors [R, n] as one byte tensor [R, bytes], so that they travel in one collective; a single one as it is."""
    return rows[0] if len(rows) == 1 else torch.cat([reinterpreted(part, torch.uint8) for part in rows], dim=1)


def unpack(packed: Tensor, like: Sequence[Tensor]) -> Tensors:
    """The inverse of `pack`; `like` gives dtypes and widths."""
    if len(like) == 1:
        return (packed,)
    parts = packed.split([part.shape[1] * part.element_size() for part in like], dim=1)
    return tuple(reinterpreted(part, model.dtype) for part, model in zip(parts, like, strict=True))


def reinterpreted(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The same bytes, copied: a slice of few rows may start where PyTorch refuses the view, and without rows any may."""
    if rows.shape[0]:
        return rows.clone(memory_format=torch.contiguous_format).view(dtype)
    return rows.new_empty(0, rows.shape[1] * rows.element_size() // dtype.itemsize, dtype=dtype)


def differentiable(there: Callable[..., Tensors], back: Callable[..., Tensors], *values: Tensor) -> Tensors:
    """`there(*values)`, which gives one tensor for each, and `back` for the gradients: of floating tensors only, one for each.

    Where one of the values needs a gradient, `back` runs once in a backward and is given zeros for what nobody used: all
    ranks of a group run it, or none.
    """
    if torch.is_grad_enabled() and any(v.requires_grad for v in values):
        return _Function.apply(there, back, *values)  # type: ignore[return-value]
    return there(*values)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, there: Callable[..., Tensors], back: Callable[..., Tensors], *values: Tensor) -> Tensors:
        ctx.back, ctx.floats = back, [v.is_floating_point() for v in values]
        given = there(*values)
        ctx.mark_non_differentiable(*(t for t in given if not t.is_floating_point()))
        return given

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        got = iter(ctx.back(*(g for g, floats in zip(gradients, ctx.floats, strict=True) if floats)))
        return None, None, *(next(got) if floats else None for floats in ctx.floats)


def joined(y: Tensor, x: Tensor) -> Tensor:
    """y, of which a backward always reaches x: a rank whose y does not depend on x takes part in what brought x here."""
    return differentiable(lambda *both: tuple(t.view_as(t) for t in both), lambda *gradients: gradients, y, x)[0]
