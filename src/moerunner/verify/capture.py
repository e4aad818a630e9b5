"""What Transformers' own blocks get and give, seen by hooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Call:
    """One call of a block. answer: what its router returned, None where it has none."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor
    answer: Any

    def repeat(self, block: nn.Module) -> Tensor:
        """The output of another block, or of this one as it is now, for the same call."""
        return first_tensor(block(*_copy(self.args), **_copy(self.kwargs)))


@contextmanager
def recorded(model: nn.Module, routers: Mapping[str, str | None]) -> Iterator[dict[str, Call]]:
    """Collects the last call of each block, by its name, and what the router inside it, named beside it, returned."""
    calls: dict[str, Call] = {}
    hooks = []
    for name, router in routers.items():
        block = model.get_submodule(name)
        watch = _Watch(name, calls)
        hooks.append(block.register_forward_pre_hook(watch.before, with_kwargs=True))
        if router is not None:
            hooks.append(block.get_submodule(router).register_forward_hook(watch.routed))
        hooks.append(block.register_forward_hook(watch.after))
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


class _Watch:
    def __init__(self, name: str, calls: dict[str, Call]) -> None:
        self.name, self.calls = name, calls
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self.answer: Any = None

    def before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args, self.kwargs = _copy(args), _copy(kwargs)  # a block may write into its input

    def routed(self, _: nn.Module, args: tuple[Any, ...], answer: Any) -> None:
        self.answer = _copy(answer)

    def after(self, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.calls[self.name] = Call(self.args, self.kwargs, first_tensor(output).clone(), self.answer)


def moved(value: Any, device: str | torch.device) -> Any:
    """A call, or anything in one, with its tensors on this device."""
    if isinstance(value, Call):
        held = (value.args, value.kwargs, value.output, value.answer)
        return Call(*(moved(item, device) for item in held))
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(moved(item, device) for item in value)
    return value.to(device) if isinstance(value, Tensor) else value


def first_tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _copy(values: Any) -> Any:
    if isinstance(values, dict):
        return {k: _copy(v) for k, v in values.items()}
    if isinstance(values, tuple):
        return tuple(_copy(v) for v in values)
    return values.clone() if isinstance(values, Tensor) else values
