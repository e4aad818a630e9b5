"""The routed experts alone, from top-k ids to the summed output: ours and others' side by side.

Every implementation is judged against float64 before it is timed. Weights and routings rotate, so that it is the memory that is
measured and not the cache, and the implementations take turns.

Shape suffixes: T tokens, K chosen experts, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from moerunner.bench.peers import Implementation, implementations, words
from moerunner.bench.shapes import Peaks, Shape, floor_seconds
from moerunner.bench.timing import capture, replay_seconds, turns_seconds
from moerunner.ops.activation import activate
from moerunner.ops.reference import gated_activation
from moerunner.values import ExpertWeights, TopK

Routing = Literal["uniform", "zipf", "half"]
ROUTINGS = get_args(Routing)

_CACHE_BYTES = 256 * 2**20
"""Weights that rotate add up to at least this, several times any cache."""
_CHECKED = 64
"""Tokens whose result is compared with float64."""
_MOST_COPIED = 2**31  # bytes of a call on a CPU: the system ends a process that wants too much, without an error to catch
_STORED_FROM = 512
"""Tokens from which the rows between both products count as traffic: before, the cache may hold them."""

Inputs = tuple[Tensor, TopK, ExpertWeights]


@dataclass(frozen=True)
class Measured:
    """One implementation on one shape. Times in seconds; error: relative to float64; yardstick: that of plain PyTorch.

    floor: what the device cannot fall below. floor_stored: the same if the rows between both products go to memory and back,
    from 512 tokens on. graph: inside a CUDA graph. eager: launched from Python. problem: why there is no time.
    """

    shape: str
    tokens: int
    routing: str
    implementation: str
    floor: float
    floor_stored: float
    graph: float | None
    eager: float | None
    error: float | None
    yardstick: float
    problem: str = ""
    ours: bool = False

    @property
    def seconds(self) -> float | None:
        """Inside a graph where it could be captured."""
        return self.eager if self.graph is None else self.graph

    @property
    def ratio(self) -> float | None:
        return None if self.seconds is None else self.seconds / self.floor

    def to_dict(self) -> dict[str, object]:
        return {**dataclasses.asdict(self), "ratio": self.ratio}


def draw_ids(tokens: int, shape: Shape, routing: Routing, generator: torch.Generator) -> Tensor:
    """[T, K] distinct experts per token. zipf: expert r is chosen with weight 1 / (r + 1); half: expert 0 by every second."""
    like: dict[str, Any] = dict(generator=generator, dtype=torch.float64, device=generator.device)
    score = torch.rand(tokens, shape.experts, **like)
    if routing == "zipf":  # exponential races: the first K arrivals are a draw without replacement
        score = score.log() * torch.arange(1, shape.experts + 1, device=score.device)
    elif routing == "half":
        score[:, 0] = torch.rand(tokens, **like).sub(0.5).sign() * 2
    return score.topk(shape.top_k).indices


def make_weights(shape: Shape, copies: int, dtype: torch.dtype, device: str) -> list[ExpertWeights]:
    """So many of this shape; by default as many as keep each from being in the cache when its turn comes."""

    def draw(*size: int) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device).normal_(std=size[-1] ** -0.5)

    e, h, i = shape.experts, shape.hidden, shape.inter
    layout, rows = ("concat", 2 * i) if shape.gated else ("none", i)
    return [ExpertWeights.of({"w13": draw(e, rows, h), "w2": draw(e, h, i)}, layout) for _ in range(copies)]


def copies_of(shape: Shape, dtype: torch.dtype) -> int:
    """How many sets of weights rotate."""
    return max(2, min(8, -(-_CACHE_BYTES // (shape.experts * shape.expert_size * dtype.itemsize))))


def draw_inputs(
    shape: Shape, tokens: int, routing: Routing, weights: list[ExpertWeights], generator: torch.Generator
) -> tuple[list[Inputs], float]:
    """What is called in turn, each with another routing, and how many distinct experts it hits on average."""
    rounds = 16 if tokens <= 64 else 8 if tokens <= 1024 else 4
    inputs, hit, w = [], 0.0, weights[0].w2
    for r in range(rounds):
        ids = draw_ids(tokens, shape, routing, generator)
        hit += ids.unique().numel() / rounds
        p = torch.rand(ids.shape, generator=generator, device=generator.device)
        x = torch.randn(tokens, shape.hidden, generator=generator, device=generator.device).to(w.device, w.dtype)
        topk = TopK(ids.to(w.device), (p / p.sum(-1, keepdim=True)).to(w.device))
        inputs.append((x, topk, weights[r % len(weights)]))
    return inputs, hit


@dataclass(frozen=True)
class Judge:
    """float64 for some of the tokens, and the error that plain PyTorch has on them."""

    rows: Tensor
    exact: Tensor
    yardstick: float

    @classmethod
    def of(cls, shape: Shape, inputs: Inputs) -> Judge:
        x, topk, w = inputs
        rows = torch.linspace(0, len(x) - 1, min(len(x), _CHECKED), device=x.device).long()
        x, topk = x[rows], TopK(topk.ids[rows], topk.weights[rows])
        exact, plain = torch.zeros_like(x, dtype=torch.float64), torch.zeros_like(x, dtype=torch.float32)
        for e in topk.ids.unique().tolist():
            token, k = (topk.ids == e).nonzero(as_tuple=True)
            weight = topk.weights[token, k, None]
            h = x[token].double() @ w.w13[e].double().T
            g, u = h.chunk(2, -1) if shape.gated else (h, None)
            y = gated_activation(g, u, shape.activation) @ w.w2[e].double().T
            exact.index_add_(0, token, y * weight.double())
            h = activate(x[token] @ w.w13[e].T, shape.activation, gate_up=w.gate_up)
            plain.index_add_(0, token, (h @ w.w2[e].T).float() * weight)
        return cls(rows, exact, error(plain, exact))

    def error(self, y: Tensor) -> float:
        return error(y[self.rows], self.exact)

    def bound(self, dtype: torch.dtype, *, ours: bool) -> float:
        """Ours may err twice as much as plain PyTorch. Others round where they like: they are only held to be right."""
        strict = 2 * self.yardstick + 1e-6
        return strict if ours else max(strict, 4 * torch.finfo(dtype).eps)


def error(y: Tensor, exact: Tensor) -> float:
    """max|y - exact| / max|exact|; infinite if anything is not finite."""
    value = ((y.double() - exact).abs().max() / exact.abs().max()).item()
    return value if math.isfinite(value) else math.inf


def time_all(
    calls: Mapping[str, list[Callable[[], object]]], capturable: Mapping[str, bool], device: str
) -> tuple[dict[str, float], dict[str, float], dict[str, str]]:
    """Seconds of one call in a CUDA graph, and launched from Python, of each; and the graphs that could not be made."""
    graphs, problems = {}, {}
    if torch.device(device).type == "cuda":
        for name, each in calls.items():
            if capturable[name]:
                try:
                    graphs[name] = capture(each)
                except Exception as problem:  # noqa: BLE001 - one that cannot be captured must not hide the others
                    torch.cuda.synchronize()
                    problems[name] = f"no CUDA graph: {words(problem)}"
    in_graph = {name: t / len(calls[name]) for name, t in replay_seconds(graphs).items()}
    if graphs:  # what they keep is memory that calls from Python may need
        graphs.clear()
        torch.cuda.empty_cache()
    return in_graph, turns_seconds(calls), problems


def measure(
    name: str,
    shape: Shape,
    tokens: Iterable[int],
    *,
    peaks: Peaks,
    routing: Routing = "uniform",
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    only: Iterable[str] | None = None,
    seed: int = 0,
    absent: dict[str, str] | None = None,
) -> Iterator[list[Measured]]:
    """Every implementation, one list per number of tokens. One whose result is wrong is not timed.

    only: implementations by name. absent: receives the reason of each that cannot run.
    """
    generator = torch.Generator(torch.device(device).type).manual_seed(seed)
    able, missing = implementations(shape, dtype, device)
    if absent is not None:
        absent.update({n: why for n, why in missing.items() if only is None or n in set(only)})
    chosen = {n: f for n, f in able.items() if only is None or n in set(only)}
    weights = make_weights(shape, copies_of(shape, dtype), dtype, device)
    for count in tokens:
        inputs, hit = draw_inputs(shape, count, routing, weights, generator)
        floor = floor_seconds(shape, count, peaks, hit=hit, itemsize=dtype.itemsize)
        stored = floor_seconds(shape, count, peaks, hit=hit, itemsize=dtype.itemsize, stored=count >= _STORED_FROM)
        judge = Judge.of(shape, inputs[0])
        copied = sum(t[0].nbytes for t in (weights[0].w13, weights[0].w2)) * count * shape.top_k
        large = [n for n, f in chosen.items() if f.gathers and copied > _MOST_COPIED and torch.device(device).type == "cpu"]
        errors, problems = _check({n: f for n, f in chosen.items() if n not in large}, inputs[0], judge, dtype)
        problems |= dict.fromkeys(large, f"not tried: it would copy {copied / 1e9:.0f} GB of weights")
        right = {n: f for n, f in chosen.items() if n not in problems}
        calls = {n: [lambda run=f.run, i=i: run(*i) for i in inputs] for n, f in right.items()}
        graph, eager, uncaptured = time_all(calls, {n: f.capturable for n, f in right.items()}, device)
        problems |= uncaptured
        yield [
            Measured(
                name, count, routing, n, floor, stored, graph.get(n), eager.get(n), errors.get(n), judge.yardstick,
                problems.get(n, ""), f.ours,
            )
            for n, f in chosen.items()
        ]  # fmt: skip


def _check(
    chosen: Mapping[str, Implementation], inputs: Inputs, judge: Judge, dtype: torch.dtype
) -> tuple[dict[str, float], dict[str, str]]:
    """The error of each, and why it is not timed."""
    errors, problems = {}, {}
    for name, implementation in chosen.items():
        try:
            errors[name] = judge.error(implementation.run(*inputs))
        except Exception as problem:  # noqa: BLE001 - another library's failure is a result
            problems[name] = words(problem)
            continue
        bound = judge.bound(dtype, ours=implementation.ours)
        if not errors[name] <= bound:
            problems[name] = f"wrong: error {errors[name]:.1e}, allowed {bound:.1e}"
    return errors, problems
