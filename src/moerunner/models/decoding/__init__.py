"""What a Transformers model lacks to make one token after the other at the speed of the hardware."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from moerunner.models.decoding import norms, rotary
from moerunner.models.decoding.attention import without_copies


@contextmanager
def fused(model: nn.Module) -> Iterator[None]:
    """Inside, what a model computes around its products takes fewer launches on a GPU; its results are the same."""
    with without_copies(), norms.one_launch(model), rotary.one_launch(model):
        yield
