"""Gradients over ranks: where each begins its part of a sum."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from moerunner.parallel.comm import Comm
from moerunner.plan.plan import Plan
from moerunner.values import LayerWeights, TopK


class Spread:
    """Where each rank begins its part of a sum, under gradients: what is whole on every rank is marked as such.

    Tokens replicated: the gradients of `Plan.parts` are added up over the ranks, so every rank has whole ones of everything.
    Tokens sharded: the ranks' gradients of a tensor that all of them hold add up to the whole one, as with data parallelism;
    those of the experts are whole. A bias that counts on one rank only has its gradient on all of them.
    """

    def __init__(self, plan: Plan, comm: Comm) -> None:
        self._comm, layout, sets = comm, plan.layout, plan.spec.routing.modalities
        self._axes = layout.split_axes if layout.tokens == "replicated" else ()
        tokens, rest = (
            getattr(torch, plan.options.travels(plan.dtype)),
            torch.float64 if plan.dtype == "float64" else torch.float32,
        )
        self._travels = {part: tokens if part in ("tokens", "routed") else rest for part in plan.parts}
        # Over an axis on which the value that it made was whole already, every rank has the same gradient: one of them counts.
        alike = {part: set(layout.split_axes) - set(axes) for part, axes in plan.parts.items()}
        if layout.tokens == "sharded" and layout.tp > 1 and plan.step("row_norm") is not None:
            self._travels["row_norm"], alike["row_norm"] = rest, {"tp"}
        self._counts = {part: all(comm.coordinates[a] == 0 for a in axes) for part, axes in alike.items()}
        each = {name: [f"{name}_{i}" if sets > 1 else name for i in range(sets)] for name in ("b2", "row_norm")}
        self._tensors = {n: part for part in self._travels for n in each.get(part, [part.replace(".", "_")])}
        shared, join = plan.step("shared"), plan.step("join")
        self._once = {n: ("tp",) for n in each["b2"] if layout.tp > 1}
        self._once |= {"shared_b2": shared.axes} if shared is not None else {}
        self._once |= {"output_bias": join.axes} if join is not None else {}

    def __call__(self, x_TH: Tensor, routed: Tensor, topk: TopK, w: LayerWeights) -> tuple[Tensor, Tensor, TopK, LayerWeights]:
        """The same, on the way into sums: the shared experts' tokens, the routed ones', the weights and the tensors."""
        values: dict[str, Tensor] = {"tokens": x_TH, "routed": routed, "topk": topk.weights}
        if topk.shared_weights is not None:
            values["shared_weights"] = topk.shared_weights
        if routed is x_TH and "routed" in self._travels:  # one value with two readers, whose gradients are added here
            del values["tokens"]
        named = {part: value for part, value in values.items() if part in self._travels}
        w.map(lambda n, t: named.setdefault(n, t) if n in self._tensors and t.requires_grad else t)
        part = [self._tensors.get(n, n) for n in named]
        out = self._comm.fan_out(
            list(named.values()),
            self._axes,
            travels=[self._travels[p] for p in part],
            counts=[self._counts[p] for p in part],
        )
        got = dict(zip(named, out, strict=True))
        topk = dataclasses.replace(
            topk, weights=got.get("topk", topk.weights), shared_weights=got.get("shared_weights", topk.shared_weights)
        )
        w = w.map(lambda n, t: got[n] if n in got else self._comm.once(t, self._once[n]) if n in self._once else t)
        seen = got.get("routed", x_TH) if routed is x_TH and "tokens" in self._travels else got.get("tokens", x_TH)
        return seen, got.get("routed", routed), topk, w


def as_it_is(*values: Any) -> Any:
    """Without gradients nothing is marked."""
    return values
