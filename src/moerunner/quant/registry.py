"""Which formats are known. A backend that lists a format reads it as it is; for the others it is dequantised first."""

from __future__ import annotations

import importlib
from functools import cache
from importlib.metadata import entry_points
from typing import Protocol, cast

import torch

from moerunner.errors import UnsupportedError, WeightsError
from moerunner.values import ExpertWeights

PLAIN = "none"
_BUILT_IN = {"int8": "moerunner.quant.int8"}
_registered: dict[str, Format] = {}


class Format(Protocol):
    """A module, or any object, with these two names."""

    NAME: str

    def dequantize(self, experts: ExpertWeights, dtype: torch.dtype) -> ExpertWeights:
        """The same experts as plain tensors of this dtype: w13 [E, 2I, H], w2 [E, H, I], biases and norms as they are."""
        ...


def register(format: Format) -> None:
    """Makes a third party's format known under its `NAME`; a name that is taken is an error."""
    if format.NAME in (PLAIN, *names()):
        raise UnsupportedError(f"a format {format.NAME!r} exists", where="quant.register", next_step="Choose another name")
    _registered[format.NAME] = format


def unregister(name: str) -> None:
    """Takes back `register`."""
    _registered.pop(name, None)


@cache
def _entry_points() -> dict[str, str]:
    return {point.name: point.value for point in entry_points(group="moerunner.formats")}


def names() -> list[str]:
    return [*_BUILT_IN, *_registered, *_entry_points()]


def get(name: str) -> Format:
    """The format of this name."""
    if name in _registered:
        return _registered[name]
    path = _BUILT_IN.get(name) or _entry_points().get(name)
    if path is None:
        known = ", ".join(names())
        raise UnsupportedError(f"no format is called {name!r}", where="experts' weights", next_step=f"Known: {known}")
    module, _, attribute = path.partition(":")
    loaded = importlib.import_module(module)
    return cast("Format", getattr(loaded, attribute) if attribute else loaded)


def dequantized(experts: ExpertWeights, dtype: torch.dtype) -> ExpertWeights:
    """Plain tensors of the experts; the same object where they are plain already."""
    if experts.format == PLAIN:
        return experts
    plain = get(experts.format).dequantize(experts, dtype)
    if plain.format != PLAIN or plain.w2.dtype != dtype:
        what = f"dequantize gave the format {plain.format!r} in {plain.w2.dtype}, expected plain {dtype}"
        raise WeightsError(what, where=f"format {experts.format!r}")
    return plain
