"""Experts of a loaded model in a format of fewer bits, made once; their parameters keep their names and give up their data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moerunner.errors import PlanError, UnsupportedError, WeightsError
from moerunner.models.block import Changed, Held, PatchedForward, Source
from moerunner.models.prepare import prepare, sites
from moerunner.plan import Options
from moerunner.quant import int8
from moerunner.values import ExpertWeights, LayerWeights

FORMATS: dict[str, Callable[[ExpertWeights], ExpertWeights]] = {int8.NAME: int8.quantize}


class Quantized(Source):
    """A block's tensors with experts that were quantised; the block's own have no data any more."""

    holds = "its experts are held quantised"

    def __init__(self, source: Source, experts: tuple[ExpertWeights, ...]) -> None:
        super().__init__(source.block, source.parts, source.built, source.family, source.spec)
        self.experts, self.is_cut = experts, True

    def _layer(self, read: Callable[[Held, nn.Module], Tensor]) -> LayerWeights:
        return dataclasses.replace(super()._layer(read), experts=self.experts)

    def of(self, block: nn.Module) -> Quantized:
        return Quantized(super().of(block), self.experts)

    def __reduce__(self) -> tuple[Any, ...]:
        return Quantized, (Source(self.block, self.parts, self.built, self.family, self.spec), self.experts)


def known(name: str | None) -> None:
    """Raises UnsupportedError for a format that `load` cannot make."""
    if name is not None and name not in FORMATS:
        known = ", ".join(map(repr, FORMATS))
        raise UnsupportedError(f"experts cannot be quantised to {name!r}", where="quantize", next_step=f"Known: {known}")


@torch.no_grad()
def quantized(model: nn.Module, name: str) -> dict[nn.Module, PatchedForward]:
    """What will stand in for the forward of each block, with experts in this format. The block's own lose their data.

    A block that cannot be run is left as it is. Block by block, so that memory holds one of them twice at most.
    """
    ready = {}
    for site in sites(model):
        try:
            source = prepare(site, Options()).source
            layer = source()
        except (UnsupportedError, PlanError, WeightsError, Changed):  # the report will say why
            continue
        dtype = layer.experts[0].w2.dtype
        experts = tuple(FORMATS[name](one) for one in layer.experts)
        del layer
        for part, module in source.modules():
            for held in part.held:
                if held.name.split(".")[0] in ("w13", "w2"):
                    _drop(module, held.attribute)
        ready[site.block] = PatchedForward(Quantized(source, experts), Options(dtype=dtype))
    return ready


def _drop(module: nn.Module, attribute: str) -> None:
    """The parameter or buffer without its data."""
    empty = getattr(module, attribute).detach().to("meta")
    if attribute in module._buffers:
        module._buffers[attribute] = empty
    else:
        setattr(module, attribute, nn.Parameter(empty, requires_grad=False))
