"""Whether a model that moerunner loaded is the model that Transformers loads, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def compare_loading(model: Any, path: str | Path, dtype: torch.dtype | None) -> tuple[list[str], list[str]]:
    """Problems and notes. Every parameter and buffer is compared, computed ones such as rotary frequencies too.

    Both models are in memory for a while. A tensor that Transformers rounds and moerunner does not is a note.
    """
    theirs = dict(_tensors(type(model).from_pretrained(path, dtype=dtype or "auto", local_files_only=True)))
    problems, notes = [], []
    for name, ours in _tensors(model):
        other = theirs.pop(name, None)
        if other is None:
            problems.append(f"{name}: Transformers has no such tensor")
        elif ours.shape != other.shape or not _same(ours.to(other.device, other.dtype), other):
            problems.append(f"{name}: loaded otherwise than by Transformers")
        elif ours.dtype != other.dtype:
            notes.append(f"{name}: {_short(ours)} here, rounded to {_short(other)} when Transformers loads it")
    return problems + [f"{name}: not loaded, Transformers has it" for name in theirs], notes


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, with NaN equal to NaN: damage in the file is not the loader's."""
    return torch.equal(a, b) or bool(((a == b) | (a.isnan() & b.isnan())).all())


def _short(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
