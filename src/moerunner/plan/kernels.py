"""Which kernels may carry out a step, and why not others."""

from __future__ import annotations

import dataclasses
import importlib.util

from moerunner import quant
from moerunner.errors import UnsupportedError
from moerunner.experts.base import Request
from moerunner.experts.registry import Chosen, choose
from moerunner.kernels.cpu import library
from moerunner.plan.options import Options
from moerunner.spec import MoESpec

ONE_LAUNCH = {"cuda": "triton", "cpu": "cpu"}
"""By device, the kernels that route in one launch."""


def against_one_launch(spec: MoESpec, device: str, dtype: str, options: Options) -> str:
    """Why no kernel of this device can route this layer in one launch; empty when one does."""
    experts, k = spec.num_experts + spec.zero_experts, spec.top_k
    if device not in ONE_LAUNCH:
        return f"runs on {' and '.join(ONE_LAUNCH)}, not on {device}"
    if dtype == "float64":
        return "computes in float32, the tokens are float64"
    if options.grad:
        return "has no backward"
    if device == "cpu":
        return library.why_not()
    if not has_triton():
        return "needs triton, which is not installed"
    if options.batch_invariant:
        return "is not batch invariant"
    return f"holds 1024 experts of which 32 are chosen, not {k} of {experts}" if experts > 1024 or k > 32 else ""


def has_triton() -> bool:
    """Whether Triton is installed; it is not imported."""
    return importlib.util.find_spec("triton") is not None


def choose_experts(request: Request, backend: str, plain: tuple[tuple[int, ...], ...]) -> tuple[Chosen, str]:
    """A backend that reads the format as it is; else one for the plain weights that the format gives, slow and right."""
    if request.format == quant.PLAIN:
        return choose(request, backend), ""
    quant.get(request.format)
    try:
        return choose(request, backend), ""
    except UnsupportedError:
        rows = tuple((shape[-1], 1) for shape in plain)
        return choose(dataclasses.replace(request, format=quant.PLAIN, shapes=plain, strides=rows), backend), request.format
