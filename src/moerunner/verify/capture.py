"""What Transformers' own blocks get and give, seen by hooks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Call:
    """One call of a block. ids [T, K] and weights [T, K]: its choice of experts, None where it cannot be seen."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor
    ids: Tensor | None
    weights: Tensor | None

    def repeat(self, block: nn.Module) -> Tensor:
        """The output of another block, or of this one as it is now, for the same call."""
        return first_tensor(block(*_copy(self.args), **_copy(self.kwargs)))


@contextmanager
def recorded(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Call]]:
    """Collects the last call of each of these blocks.

    Routers return their choice in many forms, but the module that holds the experts is handed [T, K] ids and weights of the
    same shape: that call is looked for inside the block.
    """
    calls: dict[str, Call] = {}
    hooks = []
    for name in names:
        block = model.get_submodule(name)
        watch = _Watch(name, calls)
        hooks += [m.register_forward_pre_hook(watch.inside, with_kwargs=True) for m in block.modules() if m is not block]
        hooks.append(block.register_forward_hook(watch.after, with_kwargs=True))
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


class _Watch:
    def __init__(self, name: str, calls: dict[str, Call]) -> None:
        self.name, self.calls = name, calls
        self.ids: Tensor | None = None
        self.weights: Tensor | None = None

    def inside(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tables = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.ndim == 2]
        ids = [v for v in tables if v.dtype in (torch.int64, torch.int32)]
        weights = [v for v in tables if ids and v.is_floating_point() and v.shape == ids[0].shape]
        if weights:
            self.ids, self.weights = ids[0].long(), weights[0].clone()

    def after(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        kept = first_tensor(output).clone()
        self.calls[self.name] = Call(_copy(args), _copy(kwargs), kept, self.ids, self.weights)


def first_tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _copy(values: Any) -> Any:
    """Tensors are copied, since a block may write into its input."""
    if isinstance(values, dict):
        return {k: _copy(v) for k, v in values.items()}
    if isinstance(values, tuple):
        return tuple(_copy(v) for v in values)
    return values.clone() if isinstance(values, Tensor) else values
