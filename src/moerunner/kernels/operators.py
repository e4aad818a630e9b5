"""How a function that runs kernels becomes an operator of PyTorch, and an activation the numbers that operators take.

`torch.library.custom_op` does as much, and its way from the call to the function takes longer than a kernel for one token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moerunner.spec import ActivationSpec

KINDS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")

_library = torch.library.Library("moerunner", "FRAGMENT")


def operator(name: str, *, fake: Callable[..., Any], device: str = "", schema: str = "") -> Callable[[Callable[..., Any]], Any]:
    """Makes `torch.ops.moerunner.<name>` of a function that changes none of its arguments, and puts it in the function's place.

    fake: gives results of the right shape and dtype without data, for `torch.compile` and `torch.export`. device: a dispatch
    key, such as CPU; empty: every device. schema: of arguments and results, where the annotations do not say it. It has no
    backward.
    """

    def define(run: Callable[..., Any]) -> Any:
        _library.define(name + (schema or torch.library.infer_schema(run, mutates_args=())))
        _library.impl(name, run, device or "CompositeExplicitAutograd")
        torch.library.register_fake(f"moerunner::{name}", fake, lib=_library)
        return getattr(torch.ops.moerunner, name).default

    return define


def numbers_of(activation: ActivationSpec) -> tuple[Any, ...]:
    """kind (index into `KINDS`), alpha, beta, limit, clamp_after, gate_softcap and up_softcap."""
    a = activation.resolved()
    alpha = 1.0 if a.alpha is None else a.alpha
    return KINDS.index(a.kind), alpha, a.beta or 0.0, a.limit, a.clamp_after, a.gate_softcap, a.up_softcap
