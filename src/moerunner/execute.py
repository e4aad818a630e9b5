"""A plan as functions: every verb of the runner, bound once to the plan's steps, so that nothing is decided while it runs.

A verb that the plan does not have is the identity. Reductions and selections that the plan inserted run with the verb they
stand before. Values between experts and the end are in float32 (float64 for float64 tokens) and are rounded once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moerunner.errors import PlanError, SpecError
from moerunner.experts.base import Addend, ExpertsCall
from moerunner.experts.functional import check_ids
from moerunner.experts.registry import get
from moerunner.ops.activation import rms_norm
from moerunner.ops.precision import Product, linear, linear_by_blocks, linear_in_native_code, wide
from moerunner.ops.route import gate_logits, route
from moerunner.parallel import allgather, alltoall, deepep, local
from moerunner.parallel.comm import Comm
from moerunner.parallel.pairs import Pair, SlotMap, Trip
from moerunner.parallel.rows import SideStream, Work, beside, joined
from moerunner.plan import Plan, Step
from moerunner.plan.spread import Spread, as_it_is
from moerunner.quant import dequantized
from moerunner.shared import SharedExperts
from moerunner.spec import Custom, Linear, RMSNorm, RoutingSpec, TransformSpec
from moerunner.values import ExpertWeights, LayerWeights, TopK

Unary = Callable[[Tensor, LayerWeights], Tensor]
_PAIRS: dict[str, Pair] = {module.INFO.name: module for module in (local, allgather, alltoall, deepep)}  # type: ignore[misc]


class Verbs:
    """The functions of one plan on one rank."""

    def __init__(self, plan: Plan, comm: Comm, slots: SlotMap) -> None:
        self.plan, self.spec, self._comm, self._slots = plan, plan.spec, comm, slots
        self.dtype = getattr(torch, plan.dtype)
        self._travels = getattr(torch, plan.options.travels(plan.dtype))
        grad = self._reaches_tokens = bool(plan.options.grad) and bool(plan.layout.split_axes)
        dispatch = plan.step("dispatch")
        assert dispatch is not None
        self._pair = _PAIRS[dispatch.kernel]
        limit, small = self._only("experts").few
        self._backend, self._few_tokens, self._few_backend = get(plan.backend), limit, get(small) if limit else None
        self.input_transform, self.pad = self._chain("input_transform"), self._chain("pad")
        self.row_norm, self.trim, self.scale = self._chain("row_norm"), self._chain("trim"), self._chain("scale")
        self.output_transform = self._chain("output_transform")
        self.final_transform = self._chain("final_transform", "out")
        self._before_combine = self._chain("combine")
        self._before_join = {value: self._chain("join", value) for value in ("routed", "shared", "zero")}
        self._finish = self._chain("finish", "out")
        self._experts_step, self._combine_step = self._only("experts"), self._only("combine")
        self._scales_weights, self._route_name = self._only("route").scales, self._only("route").name
        gate, one_launch = plan.step("gate"), self._only("route").one_launch
        self._rule = _one_launch_rule(one_launch) if one_launch else route
        self._gate_tokens = gate.few[0] if one_launch and gate is not None else 0
        scale = plan.step("scale") or next((s for s in plan.steps if s.verb == "experts" and s.scales), None)
        self._scale_name = scale.name if scale is not None else ""
        on_input = self.spec.routing.weights_on == "input"
        self._call = ExpertsCall(
            activation=self.spec.experts.activation,
            input_weighting=on_input,
            output="final" if self._experts_step.rounds else "summed" if self._experts_step.sums else "rows",
            down_bias=comm.coordinates["tp"] == 0 or grad,
            scale=self.spec.routed_scaling_factor if self._experts_step.scales else 1.0,
            batch_invariant=plan.options.batch_invariant,
        )
        self._product = linear_by_blocks if plan.options.batch_invariant else linear
        shared, zero = plan.step("shared"), plan.step("zero")
        self._shared, self._adds = None, self._experts_step.adds
        if shared is not None and self.spec.shared is not None:
            first = all(comm.coordinates[a] == 0 for a in shared.axes)
            product = linear_in_native_code if shared.few[0] else self._product
            self._shared = SharedExperts(
                self.spec.shared, adds_bias=first or grad, product=product, kernels=bool(shared.one_launch)
            )
            added = self._shared.addend
            self._shared_run = (lambda x_TH, tensors, _: added(x_TH, tensors)) if self._adds else self._shared
        self._joined = shared.joined if shared is not None else 0
        self._rule_beside = _rule_beside() if self._joined else None
        self._side_tokens, self._side = (shared.side if shared is not None else 0), SideStream()
        self._zero_factor = None
        if zero is not None:
            self._zero_factor = self.spec.routed_scaling_factor if zero.scales else 1.0
        self._adds_bias = grad or all(comm.coordinates[a] == 0 for a in self._only("join").axes)
        self.spread = Spread(plan, comm) if grad else as_it_is
        self.replayable = self._is_replayable()

    def agree(self, w: LayerWeights) -> torch.dtype:
        """Raises on every rank unless all run this plan on weights of the same shapes. The dtype it is for."""
        if self._comm.layout.world > 1:
            self._comm.same({**self.plan.facts(), "weights": {name: meta.shape for name, meta in w.meta().items()}})
        return self.dtype

    def _is_replayable(self) -> bool:
        """Whether a call on tokens alone always does the same: nothing is drawn or asked of the GPU, and no rank is met."""
        plan, spec, options, step = self.plan, self.spec, self.plan.options, self._experts_step
        used = [backend.INFO for backend in (self._backend, self._few_backend) if backend is not None]
        own = any(isinstance(op, Custom) for transform in spec.transforms().values() for op in transform.ops)
        fixed = spec.routing.simulate is None and not own and not step.dequantises and not options.grad
        alone = plan.layout.world == 1 and all(info.capturable and not info.host_sync for info in used)
        return options.graphs and fixed and alone

    def _only(self, verb: str) -> Step:
        step = self.plan.step(verb)
        assert step is not None, verb
        return step

    def _chain(self, verb: str, value: str = "routed") -> Unary:
        run = [self._unary(s) for s in self.plan.at(verb) if s.value == value and s.verb in _UNARY]
        if not run:
            return lambda y, w: y
        if len(run) == 1:
            return run[0]

        def chain(y: Tensor, w: LayerWeights) -> Tensor:
            for step in run:
                y = step(y, w)
            return y

        return chain

    def _unary(self, s: Step) -> Unary:
        comm, spec = self._comm, self.spec
        if s.verb == "pad":
            return lambda y, w: F.pad(y, (0, s.width - y.shape[-1]))
        if s.verb == "trim":
            return lambda y, w: y[..., : s.width]
        if s.verb == "scale":
            return lambda y, w: y * spec.routed_scaling_factor
        if s.verb == "select":
            return lambda y, w: comm.once(y, s.axes)
        if s.verb == "shard":
            return lambda y, w: comm.own_rows(y, comm.layout.token_counts(y.shape[0]), s.axes)
        if s.verb == "reduce":
            travels = getattr(torch, s.dtype)
            if s.scatter:
                return lambda y, w: wide(comm.reduce_scatter(y.to(travels), comm.layout.token_counts(y.shape[0]), s.axes))
            return lambda y, w: wide(comm.all_reduce(y.to(travels), s.axes))
        if s.verb == "row_norm":
            norm = spec.experts.row_norm
            assert norm is not None
            return lambda y, w: rms_norm(y, _cut(w.experts[0].get("row_norm"), norm.features), norm)
        return lambda y, w: _transform(s.verb, spec.transforms()[s.verb], y, w, self.dtype, self._product)

    def route(
        self,
        x_TH: Tensor,
        w: LayerWeights,
        *,
        topk: TopK | None = None,
        router_logits: Tensor | None = None,
        router_input: Tensor | None = None,
        input_ids: Tensor | None = None,
        token_types: Tensor | None = None,
    ) -> TopK:
        """The gate and the routing rule; or what the caller brought, checked and with the factor where the plan wants it."""
        if topk is not None:
            return self._brought(topk, x_TH.shape[0])
        return self._routed(x_TH, w, None, router_logits, router_input, input_ids, token_types)[0]

    def begin(
        self, x_TH: Tensor, w: LayerWeights, *, alone: bool = False, topk: TopK | None = None, **inputs: Any
    ) -> tuple[TopK, Work[Any] | None]:
        """`route`, and the shared experts where the plan has them under way with or beside it, else None."""
        if not self._adds:
            return self.route(x_TH, w, topk=topk, **inputs), None
        if topk is None and 0 < x_TH.shape[0] <= self._joined:
            chosen, begun = self._routed(x_TH, w, self._shared, **inputs)
            return chosen, None if begun is None else Work(lambda: begun)
        shared = self.shared(x_TH, w, None, alone=alone)
        return self.route(x_TH, w, topk=topk, **inputs), shared

    def _routed(
        self,
        x_TH: Tensor,
        w: LayerWeights,
        beside: SharedExperts | None,
        router_logits: Tensor | None = None,
        router_input: Tensor | None = None,
        input_ids: Tensor | None = None,
        token_types: Tensor | None = None,
    ) -> tuple[TopK, Addend | None]:
        """beside: shared experts whose first product is to be in the same launch, where the gate's product is one of ours."""
        spec = self.spec
        routing, product = spec.routing, {}
        if routing.score == "external":
            raise SpecError("the spec's router is external", where="route", next_step="Pass topk to the runner")
        if router_logits is not None:
            logits = router_logits.reshape(-1, router_logits.shape[-1])
            if tuple(logits.shape) != (x_TH.shape[0], spec.num_logits):
                wanted = [x_TH.shape[0], spec.num_logits]
                raise SpecError(f"have shape {list(router_logits.shape)}, expected {wanted}", where="router_logits")
        elif routing.simulate is not None:
            logits = None
        else:
            seen = x_TH if router_input is None else router_input.reshape(-1, router_input.shape[-1])
            if tuple(seen.shape) != (x_TH.shape[0], spec.hidden_size):
                wanted = [x_TH.shape[0], spec.hidden_size]
                raise SpecError(f"has shape {list(seen.shape)}, expected {wanted}", where="router_input")
            if routing.input_transform is not None:
                seen = _transform("gate_transform", routing.input_transform, seen, w, self.dtype, self._product)
            gate, bias = w.tensors["gate"], w.tensors.get("gate_bias")
            if 0 < seen.shape[0] <= self._gate_tokens and _stored(seen, gate, bias, routing):
                logits, product = seen, {"gate": gate, "gate_bias": bias}
            else:
                logits = gate_logits(seen, gate, bias, routing, self._product)
        get, sets = w.tensors.get, range(routing.modalities)
        double = logits is not None and logits.dtype == torch.float64  # a caller's, which one launch would round to float32
        given = {
            "selection_bias": get("selection_bias"),
            "per_expert_scale": get("per_expert_scale"),
            "global_scale": get("global_scale"),
            "hash_table": get("hash_table"),
            "input_ids": _per_token("input_ids", input_ids, x_TH.shape[0], get("hash_table")),
            "token_types": _per_token("token_types", token_types, x_TH.shape[0], sets if len(sets) > 1 else None),
            "num_tokens": x_TH.shape[0],
            "device": x_TH.device,
            "scale": self._scales_weights,
            **product,
        }
        if beside is None or self._rule_beside is None or not product:
            return (route if double else self._rule)(logits, spec, **given), None
        first = (*beside.projections(w.tensors), get("shared_gate"), beside.spec.activation)
        topk, hidden, share = self._rule_beside(x_TH, *first, logits, spec, **given)
        return topk, Addend(hidden, w.tensors["shared_w2"], share)

    def _brought(self, topk: TopK, tokens: int) -> TopK:
        spec, ids, weights, shared = self.spec, topk.ids, topk.weights, topk.shared_weights
        if 0 in (ids.ndim, *ids.shape[-1:]) or ids.shape != weights.shape or ids.shape[:-1].numel() != tokens:
            what = f"ids {list(ids.shape)} and weights {list(weights.shape)} do not fit {tokens} tokens"
            raise SpecError(what, where="topk")
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise SpecError(f"are {ids.dtype}, expected whole numbers", where="topk ids")
        ids = ids.reshape(-1, ids.shape[-1]).to(torch.int64)
        if self._shared is not None and self._shared.spec.gate == "router":
            if shared is None:
                raise SpecError("shared experts are weighted by the router", where="topk", next_step="Pass shared_weights")
            wanted = [tokens, self._shared.spec.count]
            if shared.numel() != wanted[0] * wanted[1] or shared.shape[-1] != wanted[1]:
                raise SpecError(f"have shape {list(shared.shape)}, expected {wanted}", where="topk.shared_weights")
            shared = shared.reshape(wanted)
        physical = topk.space == "physical"
        if physical and spec.zero_experts:
            what = "are slots of a placement, in which zero experts have none"
            raise SpecError(what, where="topk ids", next_step="Pass logical ids")
        check_ids(ids, self._slots.per_rank * len(self._slots.slots) if physical else spec.num_experts + spec.zero_experts)
        if topk.scaled and self._scale_name:
            what = "applies the routed scaling factor a second time, the weights that were passed hold it"
            raise PlanError(what, first=f"topk (in place of {self._route_name})", second=self._scale_name)
        weights = wide(weights).reshape(ids.shape)
        if self._scales_weights and not topk.scaled:
            weights = weights * spec.routed_scaling_factor
            shared = None if shared is None else shared * spec.routed_scaling_factor
        return dataclasses.replace(topk, ids=ids, weights=weights, scaled=self._scales_weights, shared_weights=shared)

    def shared(self, x_TH: Tensor, w: LayerWeights, topk: TopK | None, *, alone: bool = False) -> Work[Any]:
        """The shared experts on the caller's tokens, under way where the plan has them on a side stream, unless alone.

        Their output [T, H], or an `Addend` where the experts' kernel adds it.
        """
        if self._shared is None:
            return Work(lambda: None)
        weights = None if topk is None else topk.shared_weights
        if 0 < x_TH.shape[0] <= self._side_tokens and not (alone or torch.compiler.is_compiling()):
            return beside(partial(self._shared_run, x_TH, w.tensors, weights), self._side, x_TH, weights)
        y = self._shared_run(x_TH, w.tensors, weights)
        return Work(lambda: y)

    def zero(self, x_TH: Tensor, topk: TopK) -> Tensor | None:
        """The identity experts: x times the weights of the slots that chose one."""
        if self._zero_factor is None:
            return None
        share = torch.where(topk.ids >= self.spec.num_experts, topk.weights, 0).sum(-1, keepdim=True)
        return wide(x_TH) * (share * self._zero_factor).to(wide(x_TH).dtype)

    def dispatch(self, x_TH: Tensor, topk: TopK) -> Work[tuple[Tensor, Trip]]:
        """Under way: the rows that this rank's experts run on, and how to come back."""
        return self._pair.dispatch(x_TH, topk, self._slots, self._comm, dtype=self._travels)

    def experts(self, x_RH: Tensor, trip: Trip, w: LayerWeights, shared: Work[Any]) -> Tensor:
        """This rank's experts; each modality set takes the slots that are its own. shared: they add it if the plan says so."""
        if self._adds:
            return self._run(x_RH, trip.topk, w.experts[0], shared.wait())
        y = self._all_sets(x_RH, trip, w)
        return joined(y, x_RH) if self._reaches_tokens else y

    def _all_sets(self, x_RH: Tensor, trip: Trip, w: LayerWeights) -> Tensor:
        if len(w.experts) == 1:
            return self._run(x_RH, trip.topk, w.experts[0])
        total, first = None, 0
        for experts in w.experts:
            count = experts.num_experts
            ids = trip.topk.ids - first
            own = dataclasses.replace(trip.topk, ids=torch.where((ids >= 0) & (ids < count), ids, -1))
            y = self._run(x_RH, own, experts)
            total, first = y if total is None else total + y, first + count
        assert total is not None
        return total

    def _run(self, x_RH: Tensor, topk: TopK, experts: ExpertWeights, *addend: Addend) -> Tensor:
        if self._experts_step.dequantises:
            experts = dequantized(experts, self.dtype)
        few = self._few_backend if x_RH.shape[0] <= self._few_tokens else None
        backend = few or self._backend
        x_RH = x_RH.clone() if backend.INFO.writes_input else x_RH
        return backend.run(x_RH, topk, experts, self._call, *addend)

    def combine(self, y: Tensor, trip: Trip, w: LayerWeights) -> Tensor:
        """Weighted, summed and back on the token's rank, as far as the experts and the pair have not done so."""
        step = self._combine_step
        y, travels = self._before_combine(y, w), getattr(torch, step.dtype or "float32")
        y = self._pair.combine(y, trip, self._comm, weigh=step.weighs, dtype=travels)
        return y if self._experts_step.rounds else wide(y)

    def join(self, routed: Tensor, shared: Work[Any], zero: Tensor | None, w: LayerWeights) -> Tensor:
        """Routed, shared and zero experts, summed or averaged, and the output bias once."""
        out = self._before_join["routed"](routed, w)
        for name, value in (("shared", None if self._adds else shared.wait()), ("zero", zero)):
            if value is not None:
                out = out + self._before_join[name](value, w)
        if self.spec.join == "average":
            out = out * 0.5
        bias = w.tensors.get("output_bias")
        return out if bias is None or not self._adds_bias else out + wide(bias)

    def finish(self, out: Tensor, w: LayerWeights) -> Tensor:
        """The last reduction or split, and one rounding to the tokens' dtype."""
        return self._finish(out, w).to(self.dtype)


_UNARY = {
    "pad", "trim", "scale", "select", "shard", "reduce", "row_norm", "input_transform", "output_transform", "final_transform"
}  # fmt: skip


def _one_launch_rule(kernels: str) -> Callable[..., TopK]:
    """Imported on first use: Triton may be absent."""
    if kernels == "cpu":
        from moerunner.kernels.cpu.route import route as one_launch
    else:
        from moerunner.kernels.route import route as one_launch
    return one_launch


def _rule_beside() -> Callable[..., tuple[TopK, Tensor, Tensor | None]]:
    """Imported on first use: Triton may be absent."""
    from moerunner.kernels.beside import route_beside

    return route_beside


def _stored(x: Tensor, gate: Tensor, bias: Tensor | None, routing: RoutingSpec) -> bool:
    """Whether a kernel may multiply what is stored: PyTorch's product in the model's dtype would cast none of it."""
    if routing.logits_dtype == "float32":
        return x.dtype != torch.float64
    same = x.dtype == gate.dtype and (bias is None or bias.dtype == x.dtype)
    return same and not torch.is_autocast_enabled(x.device.type)


def _cut(weight: Tensor | None, width: int) -> Tensor | None:
    return None if weight is None else weight[:width]


def _per_token(name: str, values: Tensor | None, tokens: int, allowed: Tensor | range | None) -> Tensor | None:
    """One whole number per token, that there is a row or an expert set of."""
    if values is None or allowed is None:
        return None
    if values.numel() != tokens:
        raise SpecError(f"has {values.numel()} entries for {tokens} tokens", where=name)
    if values.is_floating_point():
        raise SpecError(f"are {values.dtype}, expected whole numbers", where=name)
    check_ids(values, len(allowed), name, lowest=0)
    return values.reshape(-1)


def _transform(name: str, spec: TransformSpec, y: Tensor, w: LayerWeights, dtype: torch.dtype, product: Product) -> Tensor:
    """Linear operations run in the layer's dtype, float16 ones in float32 so that a large sum does not overflow."""
    for i, op in enumerate(spec.ops):
        weight = w.tensors.get(f"{name}.{i}.weight")
        if isinstance(op, Linear):
            assert weight is not None
            y = product(wide(y) if dtype == torch.float16 else y.to(dtype), weight, w.tensors.get(f"{name}.{i}.bias"))
        elif isinstance(op, RMSNorm):
            y = rms_norm(y, weight, op)
        else:
            assert isinstance(op, Custom)
            y = w.functions[f"{name}.{i}"](y.to(dtype))
            if y.shape[-1] != op.out_features:
                raise SpecError(f"gives {y.shape[-1]} features, the spec says {op.out_features}", where=f"{name}.{i}")
    return y.to(dtype) if name in ("input_transform", "gate_transform") else wide(y)
