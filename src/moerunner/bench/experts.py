"""The routed experts alone, from top-k ids to the summed output: ours and others' side by side.

Every implementation is judged against float64 before it is timed. Weights and routings rotate, so that it is the memory that is
measured and not the cache.

Shape suffixes: T tokens, K chosen experts, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

import torch
from torch import Tensor

from moerunner.bench.shapes import Shape, floor_seconds, peaks_of
from moerunner.bench.timing import eager_seconds, graph_seconds
from moerunner.experts import registry
from moerunner.experts.base import ExpertsCall
from moerunner.spec import ActivationSpec
from moerunner.values import ExpertWeights, TopK

Routing = Literal["uniform", "zipf", "half"]

_CALL = ExpertsCall(activation=ActivationSpec())
_CACHE_BYTES = 256 * 2**20
"""Weights that rotate add up to at least this, several times any cache."""


@dataclass(frozen=True)
class Implementation:
    """run(x, topk, weights); capturable: in bfloat16 it waits for nothing, so that a CUDA graph can hold it."""

    run: Callable[[Tensor, TopK, ExpertWeights], Tensor]
    capturable: bool


@dataclass(frozen=True)
class Measured:
    """One implementation on one shape. Times in seconds; error: relative to float64; yardstick: that of plain PyTorch.

    graph: inside a CUDA graph. eager: launched from Python.
    """

    shape: str
    tokens: int
    routing: str
    implementation: str
    floor: float
    graph: float | None
    eager: float | None
    error: float
    yardstick: float

    @property
    def ratio(self) -> float | None:
        return None if self.graph is None else self.graph / self.floor

    def to_dict(self) -> dict[str, object]:
        return {**dataclasses.asdict(self), "ratio": self.ratio}


def draw_ids(tokens: int, shape: Shape, routing: Routing, generator: torch.Generator) -> Tensor:
    """[T, K] distinct experts per token. zipf: expert r is chosen with weight 1 / (r + 1); half: expert 0 by every second."""
    e = torch.arange(shape.experts, dtype=torch.float64)
    score = torch.rand(tokens, shape.experts, generator=generator, dtype=torch.float64)
    if routing == "zipf":  # exponential races: the first K arrivals are a draw without replacement
        score = -(-score.log() * (e + 1))
    elif routing == "half":
        score[:, 0] = torch.rand(tokens, generator=generator, dtype=torch.float64).sub(0.5).sign() * 2
    return score.topk(shape.top_k).indices


def make_weights(shape: Shape, copies: int, dtype: torch.dtype, device: str) -> list[ExpertWeights]:
    def draw(*size: int, scale: float) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device).normal_(std=scale)

    e, h, i = shape.experts, shape.hidden, shape.inter
    return [
        ExpertWeights.of({"w13": draw(e, 2 * i, h, scale=h**-0.5), "w2": draw(e, h, i, scale=i**-0.5)}) for _ in range(copies)
    ]


def _ours(name: str) -> Implementation:
    backend = registry.get(name)
    return Implementation(lambda x, topk, w: backend.run(x, topk, w, _CALL), backend.INFO.capturable or name == "grouped_mm")


def _transformers() -> Implementation:
    from transformers.integrations.moe import grouped_mm_experts_forward

    def run(x: Tensor, topk: TopK, w: ExpertWeights) -> Tensor:
        def gate(h: Tensor) -> Tensor:
            g, u = h.chunk(2, dim=-1)
            return torch.nn.functional.silu(g) * u

        experts = SimpleNamespace(
            num_experts=w.num_experts, has_gate=True, has_bias=False, has_post_expert_norm=False, is_transposed=False,
            gate_up_proj=w.w13, down_proj=w.w2, _apply_gate=gate, _is_expert_parallel=False,
        )  # fmt: skip
        return grouped_mm_experts_forward(experts, x, topk.ids, topk.weights)  # type: ignore[arg-type]

    return Implementation(run, capturable=True)


def implementations(device: str) -> dict[str, Implementation]:
    """Every implementation that can be imported and runs on this device type."""
    found = {name: _ours(name) for name, able, _ in registry.available(device) if able}
    with contextlib.suppress(ImportError):
        found["transformers.grouped_mm"] = _transformers()
    return found


def reference(x_TH: Tensor, topk: TopK, w: ExpertWeights) -> tuple[Tensor, float]:
    """[T, H] in float64, and the error of the same layer in plain PyTorch."""
    exact, plain = torch.zeros_like(x_TH, dtype=torch.float64), torch.zeros_like(x_TH, dtype=torch.float32)
    for e in topk.ids.unique().tolist():
        token, k = (topk.ids == e).nonzero(as_tuple=True)
        weight = topk.weights[token, k, None]
        for total, dtype in ((exact, torch.float64), (plain, x_TH.dtype)):
            g, u = (x_TH[token].to(dtype) @ w.w13[e].to(dtype).T).chunk(2, -1)
            y = (torch.nn.functional.silu(g) * u) @ w.w2[e].to(dtype).T
            total.index_add_(0, token, y.to(total.dtype) * weight.to(total.dtype))
    return exact, error(plain, exact)


def error(y: Tensor, exact: Tensor) -> float:
    """max|y - exact| / max|exact|; infinite if anything is not finite."""
    value = ((y.double() - exact).abs().max() / exact.abs().max()).item()
    return value if math.isfinite(value) else math.inf


def measure(
    name: str,
    shape: Shape,
    tokens: Iterable[int],
    *,
    routing: Routing = "uniform",
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    only: Iterable[str] | None = None,
    checked: int = 64,
) -> Iterator[Measured]:
    """Every implementation at every token count. One whose result is wrong is not timed.

    checked: tokens whose result is compared with float64.
    """
    generator = torch.Generator().manual_seed(0)
    chosen = {n: f for n, f in implementations(device).items() if only is None or n in set(only)}
    size = 3 * shape.experts * shape.hidden * shape.inter * dtype.itemsize
    copies = make_weights(shape, max(2, min(8, -(-_CACHE_BYTES // size))), dtype, device)
    peaks = peaks_of(torch.cuda.get_device_name() if device == "cuda" else "")
    for count in tokens:
        rounds = 16 if count <= 64 else 8 if count <= 1024 else 4
        inputs, hit = [], 0.0
        for r in range(rounds):
            ids = draw_ids(count, shape, routing, generator)
            hit += ids.unique().numel() / rounds
            weights = torch.rand(count, shape.top_k, generator=generator)
            x = torch.randn(count, shape.hidden, device=device, dtype=dtype)
            topk = TopK(ids.to(device), (weights / weights.sum(-1, keepdim=True)).to(device))
            inputs.append((x, topk, copies[r % len(copies)]))
        floor = floor_seconds(shape, count, peaks, hit=hit, itemsize=dtype.itemsize)
        x, topk, w = inputs[0]
        exact, yardstick = reference(x[:checked], TopK(topk.ids[:checked], topk.weights[:checked]), w)
        for label, implementation in chosen.items():
            err = error(implementation.run(x, topk, w)[:checked], exact)
            graph = eager = None
            if err <= 2 * yardstick + 1e-6:
                calls = [lambda run=implementation.run, i=i: run(*i) for i in inputs]
                graph = graph_seconds(calls) if device == "cuda" and implementation.capturable else None
                eager = eager_seconds(calls)
            yield Measured(name, count, routing, label, floor, graph, eager, err, yardstick)
