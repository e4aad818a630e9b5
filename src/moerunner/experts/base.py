"""What an expert backend declares, what it is asked for, and how it is called."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from torch import Tensor

from moerunner.ops.precision import linear, wide
from moerunner.spec import ActivationSpec
from moerunner.values import ExpertWeights, TopK

ALL_ACTIVATIONS = frozenset(
    {
        "silu",
        "gelu",
        "gelu_tanh",
        "relu",
        "relu2",
        "alpha",
        "beta",
        "limit",
        "clamp_after",
        "gate_softcap",
        "up_softcap",
    }
)


@dataclass(frozen=True, kw_only=True)
class BackendInfo:
    """Everything a backend can do. What is not declared here is refused.

    dtypes: per device type. activations: kinds, and the constants it honours, of `ALL_ACTIVATIONS`; `ungated` and `bias`
    apart. stride_bytes: every stride but one must be a multiple of this, of weights and of the rows that they read.
    row_output: can return unweighted rows. applies_scale: multiplies by the routed scaling factor itself, `call.scale`.
    reduced: its result needs no reduction over ranks. rounds: can give sums in the tokens' dtype.
    adds: can add the shared experts' output to its sums, see `Addend`.
    priority: larger is preferred by "auto", per device type, or per `device/dtype` where that differs.
    few_tokens: up to so many tokens it is preferred all the same, per device type.
    requires: a module that must be installed. unavailable: gives another reason why it cannot run here, or nothing.
    """

    name: str
    dtypes: Mapping[str, frozenset[str]]
    activations: frozenset[str] = field(default=ALL_ACTIVATIONS)
    formats: frozenset[str] = frozenset({"none"})
    gate_up: frozenset[str] = frozenset({"concat", "interleaved", "none"})
    stride_bytes: int = 1
    bias: bool = False
    input_weighting: bool = False
    id_minus_one: bool = False
    row_output: bool = False
    applies_scale: bool = False
    reduced: bool = False
    rounds: bool = False
    adds: bool = False
    backward: bool = False
    deterministic: bool = False
    batch_invariant: bool = False
    capturable: bool = False
    host_sync: bool = True
    writes_input: bool = False
    priority: Mapping[str, int] = field(default_factory=dict)
    few_tokens: Mapping[str, int] = field(default_factory=dict)
    requires: str = ""
    unavailable: Callable[[], str] = str


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a plan needs of a backend. strides and shapes: of w13 and w2, in elements.

    id_minus_one: slots without an expert may come; every caller may pass them, so they do unless a caller knows better.
    """

    device: str
    dtype: str
    activation: ActivationSpec
    gate_up: str
    shapes: tuple[tuple[int, ...], ...]
    strides: tuple[tuple[int, ...], ...]
    format: str = "none"
    bias: bool = False
    input_weighting: bool = False
    rows: bool = False
    id_minus_one: bool = True
    grad: bool = False
    deterministic: bool = False
    batch_invariant: bool = False
    capturable: bool = False


@dataclass(frozen=True, kw_only=True)
class ExpertsCall:
    """How a backend is called: what the plan fixed.

    output: `summed` [T, H] in float32, weighted and summed over the slots; `final`, the same rounded to x's dtype, asked of
    backends that declare `rounds`; `rows` [T, K, H], one unweighted row per slot, zeros where the id is -1.
    down_bias: whether this rank adds b2 (one rank of a tensor-parallel group does).
    scale: the routed scaling factor for a backend that `applies_scale`, 1 where it is applied elsewhere.
    batch_invariant: a token's bits must not depend on the others; asked of backends that declare it.
    """

    activation: ActivationSpec
    input_weighting: bool = False
    output: Literal["summed", "final", "rows"] = "summed"
    down_bias: bool = True
    scale: float = 1.0
    batch_invariant: bool = False


class Addend(NamedTuple):
    """What is added to the sum over a token's experts once that has been scaled: the output of its shared experts.

    rows: [T, H]; with `down` [H, S] they are [T, S] still, and the output is rows down^T. share: [T] float32 (float64 for
    float64 tokens), what it is multiplied by; None for 1.
    """

    rows: Tensor
    down: Tensor | None = None
    share: Tensor | None = None

    def output(self) -> Tensor:
        """[T, H] in float32 (float64 for float64 tokens)."""
        y = wide(self.rows if self.down is None else linear(self.rows, self.down))
        return y if self.share is None else y * self.share[:, None]


class Backend(Protocol):
    """A module of this package, or any object, with these two names."""

    INFO: BackendInfo

    def run(self, x_TH: Tensor, topk: TopK, weights: ExpertWeights, call: ExpertsCall) -> Tensor:
        """Runs the chosen experts. ids index `weights`, -1 is no expert; x is not written to.

        A backend that declares `adds` takes an `Addend` as an optional fifth argument.
        """
        ...


def unavailable(info: BackendInfo) -> str:
    """Why the backend cannot run at all here; empty when it can."""
    if info.requires and importlib.util.find_spec(info.requires) is None:
        return f"needs {info.requires}, which is not installed"
    return info.unavailable()


def refusals(info: BackendInfo, request: Request) -> list[str]:
    """Why this backend cannot do what is asked; empty when it can."""
    a = request.activation.resolved()
    needs = {a.kind}
    needs |= {"alpha"} if a.alpha not in (None, 1.0) else set()
    needs |= {"beta"} if a.beta else set()
    needs |= {n for n in ("limit", "gate_softcap", "up_softcap") if getattr(a, n) is not None}
    needs |= {"clamp_after"} if a.clamp_after else set()
    reasons = []
    if absent := unavailable(info):
        reasons.append(absent)
    if request.device not in info.dtypes:
        reasons.append(f"runs on {', '.join(sorted(info.dtypes))}, not on {request.device}")
    elif request.dtype not in info.dtypes[request.device]:
        reasons.append(f"takes {', '.join(sorted(info.dtypes[request.device]))} on {request.device}, not {request.dtype}")
    if needs - info.activations:
        reasons.append(f"does not know the activation's {', '.join(sorted(needs - info.activations))}")
    if request.format not in info.formats:
        reasons.append(f"does not read the format {request.format!r}")
    if request.gate_up not in info.gate_up:
        reasons.append(f"does not read gate_up={request.gate_up!r}")
    for flag in ("bias", "input_weighting"):
        if getattr(request, flag) and not getattr(info, flag):
            reasons.append(f"has no {flag.replace('_', ' ')}")
    if request.id_minus_one and not info.id_minus_one:
        reasons.append("does not skip slots without an expert (id -1)")
    if request.rows and not info.row_output:
        reasons.append("does not return rows")
    if request.grad and not info.backward:
        reasons.append("has no backward")
    for flag in ("deterministic", "batch_invariant", "capturable"):
        if getattr(request, flag) and not getattr(info, flag):
            reasons.append(f"is not {flag.replace('_', ' ')}")
    return reasons + _stride_problem(info, request)


def _stride_problem(info: BackendInfo, request: Request) -> list[str]:
    size = {"float64": 8, "float32": 4}.get(request.dtype, 2)
    for shape, strides in zip(request.shapes, request.strides, strict=True):
        if shape[-1] * size % info.stride_bytes:
            return [f"needs rows in multiples of {info.stride_bytes} bytes, a weight of {list(shape)} reads {shape[-1] * size}"]
        matrix = strides[-2:]
        if info.stride_bytes > 1 and (1 not in matrix or any(s != 1 and s * size % info.stride_bytes for s in matrix)):
            return [f"needs strides in multiples of {info.stride_bytes} bytes, a weight of {list(shape)} has {strides}"]
    return []
