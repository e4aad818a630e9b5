"""What a Transformers model lacks to make one token after the other at the speed of the hardware."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from torch import nn

from moerunner.models.decoding import linears, norms, rotary
from moerunner.models.decoding.attention import without_copies


@contextmanager
def fused(model: nn.Module) -> Iterator[None]:
    """Inside, what a model computes around its products takes fewer launches; its results are the same."""
    with ExitStack() as inside:
        inside.enter_context(without_copies())
        inside.enter_context(norms.one_launch(model))
        inside.enter_context(linears.in_native_code(model))
        if kernels_run(model):
            inside.enter_context(rotary.one_launch(model))
        yield


def kernels_run(model: nn.Module) -> bool:
    """Whether the model is on a GPU, and Triton is there."""
    return next(model.parameters()).is_cuda and importlib.util.find_spec("triton") is not None
