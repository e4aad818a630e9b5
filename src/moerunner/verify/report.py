"""The numbers that a verification gives, and its verdict."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Difference:
    """How far a tensor is from its reference, relative to the reference's size."""

    max: float
    rms: float


def difference(y: Tensor, ref: Tensor) -> Difference:
    """max|y - ref| / max|ref|, and the RMS of both likewise. Infinite where a value is not finite or `ref` is all zero."""
    y, ref = y.detach().double().cpu(), ref.detach().double().cpu()
    if not (torch.isfinite(y).all() and torch.isfinite(ref).all()):
        return Difference(math.inf, math.inf)
    if torch.equal(y, ref):
        return Difference(0.0, 0.0)
    gap, size = y - ref, ref.abs().max()
    if not size:
        return Difference(math.inf, math.inf)
    return Difference(float(gap.abs().max() / size), float((gap.square().mean() / ref.square().mean()).sqrt()))


@dataclass(frozen=True)
class LayerCheck:
    """One MoE layer on the input that it had in Transformers.

    vs_transformers: the patched block with its own routing, on the tokens where both choose the same experts.
    vs_oracle, transformers_vs_oracle: moerunner and Transformers against float64, on `oracle_tokens` of the tokens.
    same_experts: share of tokens with the same set of experts, of those that are not tied. tied: tokens where the choices
    differ and rounding explains it. weights_error: routing weights at the same experts. worst_token and worst_expert: where
    the difference to Transformers is largest, the expert by the mean over its tokens. load: tokens per expert. notes: what is
    no mismatch and should be known.
    """

    name: str
    family: str
    backend: str
    oracle_tokens: int
    vs_transformers: Difference
    vs_oracle: Difference
    transformers_vs_oracle: Difference
    same_experts: float
    tied: int
    weights_error: float
    worst_token: int
    worst_expert: int | None
    load: list[int]
    problems: list[str]
    notes: list[str]

    @property
    def imbalance(self) -> float:
        """Tokens of the busiest expert over the mean: 1 is perfect balance."""
        return max(self.load) * len(self.load) / sum(self.load) if any(self.load) else math.nan


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a verification in one process and one over ranks both say.

    logits: end to end, over all tokens, of which the first `judged_tokens` must be within the bound: where a tie falls the
    other way, its token and those after it go another way; in low precision rounding alone leads to that. same_top_token:
    tokens whose most likely successor is the same.
    damaged: weights that are not finite. loading: tensors of a folder that Transformers loads otherwise. skipped: blocks that
    were not compared, and why. problems: end to end. notes: what is no mismatch and should be known.
    """

    model: str
    dtype: str
    device: str
    sample: str
    tokens: int
    layers: list[Any] = field(default_factory=list)
    logits: Difference | None = None
    judged_tokens: int = 0
    same_top_token: int = 0
    damaged: list[str] = field(default_factory=list)
    loading: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return not self.reasons()

    def reasons(self) -> list[str]:
        """Why the verdict is a mismatch, each with its place; empty if it is not one."""
        of_layers = [f"{layer.name}: {p}" for layer in self.layers for p in layer.problems]
        return self.damaged + self.loading + of_layers + self.problems

    def to_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, "reasons": self.reasons(), **dataclasses.asdict(self)}


@dataclass(frozen=True, kw_only=True)
class VerifyReport(Verdict):
    """The verdict and every number behind it. layers: a `LayerCheck` each."""

    def to_dict(self) -> dict[str, Any]:
        layers = [dataclasses.asdict(layer) | {"imbalance": layer.imbalance} for layer in self.layers]
        return super().to_dict() | {"layers": layers}

    def __str__(self) -> str:
        verdict = "ok" if self.ok else "MISMATCH"
        lines = [f"{verdict}: {len(self.layers)} MoE layers, {self.tokens} tokens, {self.dtype} on {self.device}"]
        if self.layers:
            worst = max(self.layers, key=lambda layer: layer.vs_transformers.max)
            lines.append(f"  blocks: at most {worst.vs_transformers.max:.1e} from Transformers ({worst.name})")
        if self.logits is not None:
            same = f"same top token {self.same_top_token}/{self.tokens}"
            judged = f" (judged up to a tie at token {self.judged_tokens})" if self.judged_tokens < self.tokens else ""
            note = judged if self.dtype == "float32" else " (not judged in low precision)"
            lines.append(f"  logits: {self.logits.max:.1e} from Transformers, RMS {self.logits.rms:.1e}, {same}{note}")
        return "\n".join(lines + [f"  {reason}" for reason in self.reasons()])
