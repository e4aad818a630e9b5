"""Modules of a Transformers model that compute something simple, with another forward while text is generated."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from moerunner.models.block import forward_of, listens


def plain(model: nn.Module) -> Iterator[nn.Module]:
    """Those that have no parts, that nobody listens to, and that lie in no patched block: it looks whether anything in it was
    replaced."""
    ours = {inner for block in model.modules() if forward_of(block) is not None for inner in block.modules()}
    for module in model.modules():
        if module not in ours and not module._modules and not listens(module):
            yield module


@contextmanager
def replaced(found: Iterable[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Inside, each of the modules has this forward."""
    held = list(found)
    try:
        for module, forward in held:
            module.forward = forward
        yield
    finally:
        for module, _ in held:
            module.__dict__.pop("forward", None)  # it may not have come to it
