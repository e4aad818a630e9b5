"""The parts of a spec: transforms, routing, activation, experts, shared experts. Each refuses impossible values."""

from __future__ import annotations

import dataclasses
import sys
import typing
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

from moerunner.errors import SpecError

Score = Literal["softmax", "sigmoid", "sqrtsoftplus", "softmax_topk", "sigmoid_topk", "sparsemixer", "external"]
Choose = Literal["score", "logit", "hash"]
Renormalise = Literal["none", "sum", "max_sum", "p_norm"]
ActivationKind = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "swigluoai"]
Simulate = Literal["uniform", "balanced", "normal"]


def refuse(where: str, what: str, next_step: str = "") -> typing.NoReturn:
    raise SpecError(what, where=where, next_step=next_step)


def positive(where: str, **values: int) -> None:
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            refuse(f"{where}.{name}", f"must be a whole number of at least 1, not {value!r}")


def number(
    where: str,
    *,
    above: float | None = None,
    at_least: float | None = None,
    optional: bool = False,
    **values: float | None,
) -> None:
    for name, value in values.items():
        if value is None and optional:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
            refuse(f"{where}.{name}", f"must be a finite number, not {value!r}")
        if above is not None and not value > above:
            refuse(f"{where}.{name}", f"must be above {above}, not {value!r}")
        if at_least is not None and not value >= at_least:
            refuse(f"{where}.{name}", f"must be at least {at_least}, not {value!r}")


def instances(where: str, kind: type, **values: object) -> None:
    for name, value in values.items():
        if value is not None and not isinstance(value, kind):
            refuse(f"{where}.{name}", f"must be a {kind.__name__}, not {value!r}")


def one_of(where: str, allowed: Any, value: object) -> None:
    choices = typing.get_args(allowed)
    if value not in choices:
        refuse(where, f"must be one of {', '.join(map(repr, choices))}, not {value!r}")


def flags(where: str, **values: object) -> None:
    for name, value in values.items():
        if not isinstance(value, bool):
            refuse(f"{where}.{name}", f"must be true or false, not {value!r}")


@dataclass(frozen=True, kw_only=True)
class Linear:
    """`y = x W^T (+ b)`; W has shape [out_features, in_features]."""

    in_features: int
    out_features: int
    bias: bool = False

    def __post_init__(self) -> None:
        positive("Linear", in_features=self.in_features, out_features=self.out_features)
        flags("Linear", bias=self.bias)


@dataclass(frozen=True, kw_only=True)
class RMSNorm:
    """`y = n(x) * weight` with `n(x) = x / sqrt(mean(x^2) + eps)`, the weight optional (Zhang and Sennrich 2019).

    centred: what multiplies is 1 + weight (Gemma). weight_first: `y = n(x * weight)` (Muse Spark).
    """

    features: int
    eps: float = 1e-6
    weight: bool = True
    centred: bool = False
    weight_first: bool = False

    def __post_init__(self) -> None:
        positive("RMSNorm", features=self.features)
        number("RMSNorm", at_least=0.0, eps=self.eps)
        flags("RMSNorm", weight=self.weight, centred=self.centred, weight_first=self.weight_first)
        if not self.weight and (self.centred or self.weight_first):
            refuse("RMSNorm.weight", "is false, and centred and weight_first say how it is used")

    @property
    def in_features(self) -> int:
        return self.features

    @property
    def out_features(self) -> int:
        return self.features


@dataclass(frozen=True, kw_only=True)
class Custom:
    """A function of the caller's, given with the weights. `linear` is the caller's promise that f(a + b) = f(a) + f(b)."""

    in_features: int
    out_features: int
    linear: bool

    def __post_init__(self) -> None:
        positive("Custom", in_features=self.in_features, out_features=self.out_features)
        flags("Custom", linear=self.linear)


TransformOp = Linear | RMSNorm | Custom


@dataclass(frozen=True)
class TransformSpec:
    """A chain of operations on a token's vector, applied in order."""

    ops: tuple[TransformOp, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.ops, tuple) or not self.ops:
            refuse("TransformSpec.ops", "must be a tuple of at least one operation", "Leave the transform out instead")
        for op in self.ops:
            if not isinstance(op, TransformOp):
                refuse("TransformSpec.ops", f"holds {op!r}, expected a Linear, RMSNorm or Custom")
        for before, after in zip(self.ops, self.ops[1:], strict=False):
            if before.out_features != after.in_features:
                refuse(
                    "TransformSpec.ops",
                    f"{type(before).__name__} gives {before.out_features} features and {type(after).__name__} "
                    f"takes {after.in_features}",
                )

    @property
    def in_features(self) -> int:
        return self.ops[0].in_features

    @property
    def out_features(self) -> int:
        return self.ops[-1].out_features

    @property
    def linear(self) -> bool:
        """Whether f(a + b) = f(a) + f(b), so that it may run on partial sums. A bias counts as not linear."""
        return all((isinstance(op, Linear) and not op.bias) or (isinstance(op, Custom) and op.linear) for op in self.ops)


@dataclass(frozen=True, kw_only=True)
class GroupSpec:
    """Group-limited choice: experts lie in `count` equal groups, only `kept` of them may be chosen from.

    A group's score is the `max` of its experts' keys (DeepSeek-V2) or the sum of its two best, `top2_sum` (DeepSeek-V3).
    The keys of the groups that lose become -inf or 0.
    """

    count: int
    kept: int
    score: Literal["max", "top2_sum"] = "top2_sum"
    fill: Literal["-inf", "zero"] = "-inf"

    def __post_init__(self) -> None:
        positive("GroupSpec", count=self.count, kept=self.kept)
        one_of("GroupSpec.score", Literal["max", "top2_sum"], self.score)
        one_of("GroupSpec.fill", Literal["-inf", "zero"], self.fill)
        if self.kept > self.count:
            refuse("GroupSpec.kept", f"keeps {self.kept} of {self.count} groups")


@dataclass(frozen=True, kw_only=True)
class RoutingSpec:
    """From logits to ids and weights. All arithmetic is float32, ties go to the lowest expert id.

    score: `softmax`, `sigmoid`, `sqrtsoftplus` of all logits; `softmax_topk`, `sigmoid_topk` of the chosen logits alone;
        `sparsemixer` (Phi-MoE's two masked softmaxes, arXiv 2409.12136); `external`: ids and weights come from the caller.
    choose: the key that experts are chosen by: the score, the logit, or `hash`: a table by token id (DeepSeek-V4).
    selection_bias: a correction bias is added to the key and never to the weight (DeepSeek-V3, arXiv 2412.19437).
    logit_bias: the gate's linear product has a bias. logit_scale multiplies the logits, then logit_softcap c
        turns them into c * tanh(logit / c).
    groups: group-limited choice, or None.
    renormalise: `sum` w / (sum + eps); `max_sum` w / max(sum, eps); `p_norm` w / ||w||_p; `none`.
    per_expert_scale: weights are multiplied by a learned value of the chosen expert (Gemma 4).
    global_scale: weights (those of router-weighted shared experts too) are multiplied by one learned value (Inkling).
    weights_on: `output`, or `input`: the expert reads w * x and its output is not weighted (Llama 4).
    jitter: sparsemixer's threshold, used at inference too.
    logits_dtype: `float32`: gate product in float32; `model`: in the layer's dtype, then widened.
    modalities: the experts form this many equal sets, and a token may only choose from the set of its type (ERNIE-4.5-VL).
    input_transform: applied to the gate's input (Gemma 4's norm).
    simulate: random routing for benchmarks; logits are ignored and the weights are 1/k.
    """

    score: Score = "softmax"
    choose: Choose = "score"
    selection_bias: bool = False
    logit_bias: bool = False
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    groups: GroupSpec | None = None
    renormalise: Renormalise = "none"
    eps: float = 0.0
    p: float = 2.0
    per_expert_scale: bool = False
    global_scale: bool = False
    weights_on: Literal["output", "input"] = "output"
    jitter: float = 0.01
    logits_dtype: Literal["float32", "model"] = "float32"
    modalities: int = 1
    input_transform: TransformSpec | None = None
    simulate: Simulate | None = None

    def __post_init__(self) -> None:
        w = "RoutingSpec"
        one_of(f"{w}.score", Score, self.score)
        one_of(f"{w}.choose", Choose, self.choose)
        one_of(f"{w}.renormalise", Renormalise, self.renormalise)
        one_of(f"{w}.weights_on", Literal["output", "input"], self.weights_on)
        one_of(f"{w}.logits_dtype", Literal["float32", "model"], self.logits_dtype)
        if self.simulate is not None:
            one_of(f"{w}.simulate", Simulate, self.simulate)
        flags(
            w,
            selection_bias=self.selection_bias,
            logit_bias=self.logit_bias,
            per_expert_scale=self.per_expert_scale,
            global_scale=self.global_scale,
        )
        number(w, at_least=0.0, eps=self.eps, jitter=self.jitter)
        number(w, above=0.0, p=self.p)
        number(w, above=0.0, optional=True, logit_softcap=self.logit_softcap)
        number(w, logit_scale=self.logit_scale)
        positive(w, modalities=self.modalities)
        instances(w, GroupSpec, groups=self.groups)
        instances(w, TransformSpec, input_transform=self.input_transform)
        if self.logit_scale == 0:
            refuse(f"{w}.logit_scale", "is 0, so that every expert scores alike")
        if self.score in ("softmax_topk", "sigmoid_topk") and self.choose == "score":
            refuse(f"{w}.choose", f"score={self.score!r} is taken of the chosen logits", "Set choose='logit' or 'hash'")
        if self.renormalise == "max_sum" and self.eps == 0:
            refuse(f"{w}.eps", "renormalise='max_sum' divides by max(sum, eps) and needs eps above 0")
        if self.eps and self.renormalise in ("none", "p_norm"):
            refuse(f"{w}.eps", f"is {self.eps} but renormalise={self.renormalise!r} does not use it", "Set eps=0")
        if self.groups is not None and self.choose == "hash":
            refuse(f"{w}.groups", "a hash table chooses the experts, groups would be ignored")
        if self.selection_bias and self.choose == "hash":
            refuse(f"{w}.selection_bias", "a hash table chooses the experts, the bias would be ignored")
        if self.modalities > 1 and (self.groups is not None or self.choose == "hash" or self.score == "sparsemixer"):
            refuse(f"{w}.modalities", "expert sets by token type do not combine with groups, hash or sparsemixer")
        if self.score in ("sparsemixer", "external"):
            unused = [
                name
                for name, on in (
                    ("selection_bias", self.selection_bias),
                    ("groups", self.groups is not None),
                    ("renormalise", self.renormalise != "none"),
                    ("choose", self.choose != "score"),
                )
                if on
            ]
            if unused:
                refuse(f"{w}.{unused[0]}", f"score={self.score!r} does not use {', '.join(unused)}")


@dataclass(frozen=True, kw_only=True)
class ActivationSpec:
    """What stands between an expert's two products. g is the gate half, u the up half; all constants are data.

    kind: `silu` g * sigmoid(alpha * g), `gelu`, `gelu_tanh`, `relu`, `relu2` max(g, 0)^2, or `swigluoai` (gpt-oss), which is
        silu with alpha 1.702, beta 1 and limit 7 unless they are given. Gated: act(g) * (u + beta). Not gated: act(h).
    limit L: clamp_after=False: g = min(g, L) and u = clamp(u, -L, L) before the activation (DeepSeek-V4, gpt-oss);
        clamp_after=True: min(act(g), L) * clamp(u, -L, L) (Step-3.7).
    gate_softcap c: silu becomes c * tanh(g / c) * sigmoid(alpha * g); up_softcap c: u becomes c * tanh(u / c) (Inkling 2).
    """

    kind: ActivationKind = "silu"
    limit: float | None = None
    alpha: float | None = None
    beta: float | None = None
    clamp_after: bool = False
    gate_softcap: float | None = None
    up_softcap: float | None = None

    def __post_init__(self) -> None:
        w = "ActivationSpec"
        one_of(f"{w}.kind", ActivationKind, self.kind)
        caps = {"limit": self.limit, "gate_softcap": self.gate_softcap, "up_softcap": self.up_softcap}
        number(w, above=0.0, optional=True, **caps)
        number(w, optional=True, alpha=self.alpha, beta=self.beta)
        flags(w, clamp_after=self.clamp_after)
        if self.alpha is not None and self.kind not in ("silu", "swigluoai"):
            refuse(f"{w}.alpha", f"kind={self.kind!r} has no alpha")
        if self.gate_softcap is not None and self.kind != "silu":
            refuse(f"{w}.gate_softcap", f"is defined for silu, not for {self.kind!r}")
        if self.clamp_after and self.limit is None and self.kind != "swigluoai":
            refuse(f"{w}.clamp_after", "is set but there is no limit")

    @lru_cache(maxsize=256)  # noqa: B019 - asked at every call of an expert; specs are few
    def resolved(self) -> ActivationSpec:
        """The same function in terms of silu, gelu, gelu_tanh, relu and relu2, with every constant filled in."""
        if self.kind == "swigluoai":
            filled = {"alpha": self.alpha if self.alpha is not None else 1.702, "kind": "silu"}
            filled["beta"] = self.beta if self.beta is not None else 1.0
            filled["limit"] = self.limit if self.limit is not None else 7.0
            return dataclasses.replace(self, **typing.cast("dict[str, Any]", filled))
        alpha = self.alpha if self.alpha is not None else (1.0 if self.kind == "silu" else None)
        return dataclasses.replace(self, alpha=alpha, beta=self.beta if self.beta is not None else 0.0)


def _check_activation(where: str, activation: ActivationSpec, gated: bool) -> None:
    if not isinstance(activation, ActivationSpec):
        refuse(f"{where}.activation", f"must be an ActivationSpec, not {activation!r}")
    if not gated and (activation.beta or activation.up_softcap is not None or activation.kind == "swigluoai"):
        refuse(f"{where}.activation", "beta, up_softcap and swigluoai need a gated expert")


@dataclass(frozen=True, kw_only=True)
class ExpertsSpec:
    """One routed expert: `w2 act(w13 x)`.

    intermediate_size: I, or one width per modality set. gated: w13 has 2I rows (gate and up), else I rows.
    bias: both products have a bias per expert. row_norm: RMSNorm of an expert's output before it is weighted (Muse Spark).
    """

    intermediate_size: int | tuple[int, ...]
    activation: ActivationSpec = field(default_factory=ActivationSpec)
    gated: bool = True
    bias: bool = False
    row_norm: RMSNorm | None = None

    def __post_init__(self) -> None:
        sizes = self.intermediate_size if isinstance(self.intermediate_size, tuple) else (self.intermediate_size,)
        if not sizes:
            refuse("ExpertsSpec.intermediate_size", "is empty")
        for size in sizes:
            positive("ExpertsSpec", intermediate_size=size)
        flags("ExpertsSpec", gated=self.gated, bias=self.bias)
        instances("ExpertsSpec", RMSNorm, row_norm=self.row_norm)
        _check_activation("ExpertsSpec", self.activation, self.gated)


@dataclass(frozen=True, kw_only=True)
class SharedSpec:
    """Experts that see every token.

    width: intermediate size of one shared expert; count: how many. Without a router gate they are one MLP of width * count.
    gate: `none`; `sigmoid`: the output is multiplied by sigmoid(x . w_g) (Qwen2-MoE); `router`: each has a logit of the
        router and a weight that is normalised together with the chosen experts' (Inkling).
    """

    width: int
    count: int = 1
    gate: Literal["none", "sigmoid", "router"] = "none"
    activation: ActivationSpec = field(default_factory=ActivationSpec)
    gated: bool = True
    bias: bool = False

    def __post_init__(self) -> None:
        positive("SharedSpec", width=self.width, count=self.count)
        one_of("SharedSpec.gate", Literal["none", "sigmoid", "router"], self.gate)
        flags("SharedSpec", gated=self.gated, bias=self.bias)
        _check_activation("SharedSpec", self.activation, self.gated)
        if self.bias and self.gate == "router":
            refuse("SharedSpec.bias", "is not defined for shared experts weighted by the router")
