"""A Transformers model's RMS norms in one launch each while text is generated; they are some seven otherwise.

Which of the usual forms a class computes is not read off its name but found out: it must say of random rows what the kernel
says, to the bit but for the last digit of a few. A class that fits none, and a module with hooks, stays as it is.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from moerunner.kernels.cpu import library
from moerunner.kernels.cpu import norm as native
from moerunner.models.block import PLAIN
from moerunner.models.decoding.modules import plain, replaced

_ROWS, _FEW = 16, 0.01  # how many rows are tried, and the share of numbers that may differ in their last digit


def one_launch(model: nn.Module) -> AbstractContextManager[None]:
    """Inside, the norms of a model run as kernels: Triton's on a GPU, native code on a CPU. Without them nothing changes."""
    return replaced(_norms(model))


def _norms(model: nn.Module) -> Iterator[tuple[nn.Module, Callable[[Tensor], Tensor]]]:
    forms: dict[tuple[Any, ...], int | None] = {}
    for module in plain(model):
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
        weight = module._parameters.get("weight")
        if not type(module).__name__.endswith("RMSNorm") or weight is None or weight.ndim != 1 or not isinstance(eps, float):
            continue
        rms_norm, dtypes = _kernel(weight.device.type)
        if type(weight) not in PLAIN or weight.dtype not in dtypes:
            continue
        if len(module._parameters) > 1:
            continue
        kind = (type(module), weight.device, weight.dtype, weight.shape, eps)
        if kind not in forms:
            forms[kind] = _form(module, weight, eps, rms_norm, native.FORMS.values())
        form = forms[kind]
        if form is not None:
            yield module, _forward(module, eps, form, rms_norm)


def _kernel(device: str) -> tuple[Callable[..., Tensor], Collection[torch.dtype]]:
    """What norms rows on this type of device, and of which dtypes; of none where there is nothing."""
    if device == "cpu" and not library.why_not():
        return native.rms_norm, native.DTYPES
    if device == "cuda" and importlib.util.find_spec("triton") is not None:
        from moerunner.kernels.norm import rms_norm

        return rms_norm, (torch.float32, torch.bfloat16, torch.float16)
    return native.rms_norm, ()


def _forward(module: nn.Module, eps: float, form: int, norm: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    own = type(module).forward

    def forward(x: Tensor) -> Tensor:
        weight = module._parameters["weight"]
        assert weight is not None
        return norm(x, weight, eps, form) if x.dtype == weight.dtype and x.shape[-1] == len(weight) else own(module, x)

    return forward


@torch.no_grad()
def _form(module: nn.Module, weight: Tensor, eps: float, norm: Callable[..., Tensor], forms: Any) -> int | None:
    """The form that the module computes, with weights of which no two forms make the same."""
    draw = torch.Generator(weight.device).manual_seed(0)
    x = torch.randn(_ROWS, len(weight), dtype=torch.float32, device=weight.device, generator=draw).to(weight.dtype)
    own, trial = weight.data, torch.rand(len(weight), device=weight.device, generator=draw).to(weight.dtype) + 0.3
    weight.data = trial
    try:
        expected = module(x)
    except (RuntimeError, TypeError, ValueError):  # it wants more than the rows
        return None
    finally:
        weight.data = own
    if not isinstance(expected, Tensor) or expected.dtype != x.dtype or expected.shape != x.shape:
        return None
    last_digit = 4 * torch.finfo(x.dtype).eps
    few = _FEW if x.dtype != torch.float32 else 1.0
    for form in forms:
        found = norm(x, trial, eps, form)
        off = (found.double() - expected.double()).abs() / expected.double().abs().clamp(min=1e-30)
        if float(off.max()) <= last_digit and float((off > 0).double().mean()) <= few:
            return form
    return None
