"""What a step copies from the host to the device, which a CUDA graph cannot hold: made before the graph, and read in it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_PLAIN = (bool, int, float, complex, str, torch.dtype, torch.device, torch.memory_format, type(None))
_COPIES = (torch.tensor, torch.as_tensor, Tensor.to, Tensor.cuda)


class Uploads(TorchFunctionMode):
    """Active during a step from Python, it keeps what PyTorch's functions make on a device of numbers on the host.

    `reused`: during the same step again, an equal call gives a copy of what was kept. A call that differs, as one that depends
    on how many steps there were would, runs as always, so that the capture fails as without this class.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kept: list[tuple[Any, tuple[Any, ...], dict[str, Any], Tensor]] = []
        self._reuses = False

    @contextmanager
    def reused(self) -> Iterator[None]:
        self._reuses = True
        with self:
            yield

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _COPIES or not args or (isinstance(args[0], Tensor) and args[0].device.type != "cpu"):
            return func(*args, **kwargs)
        if self._reuses:
            for kept, its_args, its_kwargs, tensor in self._kept:
                if kept is func and _same(its_args, args) and _same(its_kwargs, kwargs):
                    return tensor.clone()  # the step may write to it
            return func(*args, **kwargs)
        made = func(*args, **kwargs)
        if made.device.type != "cpu":
            source = args[0].clone() if isinstance(args[0], Tensor) else args[0]
            self._kept.append((func, (source, *args[1:]), kwargs, made.clone()))
        return made


def _same(a: Any, b: Any) -> bool:
    """Whether two arguments say the same: numbers, dtypes, devices, tensors on the host, and what holds them."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.device == b.device and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[name], b[name]) for name in a)
    return type(a) is type(b) and isinstance(a, _PLAIN) and a == b
