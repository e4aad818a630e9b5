"""MoERunner: one forward, one finished tensor, whatever the model and the layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moerunner.errors import SpecError, UnsupportedError, WeightsError
from moerunner.execute import Verbs
from moerunner.kernels.replay import Replays
from moerunner.parallel.balance import LoadCounter
from moerunner.parallel.comm import comm_of, on_every_rank
from moerunner.parallel.cut import local_part
from moerunner.parallel.layout import BoundLayout, Layout
from moerunner.parallel.move import Move, Moves
from moerunner.parallel.pairs import SlotMap
from moerunner.plan import Options, resolve
from moerunner.spec import MoESpec
from moerunner.values import LayerWeights, TopK, register

Source = Callable[[], LayerWeights]


class MoERunner(nn.Module):
    """One MoE layer.

    Args:
        spec: what it computes.
        weights: a mapping from the names of `spec.weight_shapes()` to tensors (parameters are registered as such, plain
            tensors as buffers), a `LayerWeights`, or a function that returns one and is asked at every forward, for
            weights that live elsewhere. Whole tensors, which the runner cuts for its rank; a function returns its rank's.
        layout: None for one rank, or `Layout(...).bind(mesh)`.
        options: see `Options`.

    Raises:
        WeightsError, PlanError, UnsupportedError: when it is built, never in the middle of a forward.
    """

    def __init__(
        self,
        spec: MoESpec,
        weights: LayerWeights | Mapping[str, Any] | Source,
        layout: Layout | BoundLayout | None = None,
        options: Options | None = None,
    ) -> None:
        super().__init__()
        self.spec, self.options = spec, options or Options()
        self._comm = comm_of(layout)
        counts = (spec.num_experts, spec.routing.modalities, spec.zero_experts)
        self._slots = SlotMap(self._comm.layout, *counts, self._comm.rank)
        self.loads = LoadCounter(spec.num_experts) if self.options.count_loads else None
        if isinstance(weights, Mapping):
            weights = LayerWeights.of(spec, weights)
        if isinstance(weights, LayerWeights):
            self._template = register(self, local_part(weights, spec, self._comm, self._slots))
            self._source: Source | None = None
        else:
            self._source = weights
        self._verbs: dict[tuple[str, torch.dtype, bool], Verbs] = {}
        self._agreed: set[torch.dtype] = set()
        self._replays = Replays()
        self.plan = self._resolve(self.layer_weights(), bool(self.options.grad)).plan

    @on_every_rank
    def forward(
        self,
        x: Tensor,
        *,
        topk: TopK | None = None,
        router_logits: Tensor | None = None,
        router_input: Tensor | None = None,
        input_ids: Tensor | None = None,
        token_types: Tensor | None = None,
    ) -> Tensor:
        """The finished layer output.

        Args:
            x: [..., hidden_size], any leading shape, zero tokens too; not written to.
            topk: routing that was decided elsewhere; the router is not run.
            router_logits: [..., num_logits], in place of the gate's product. router_input: [..., hidden_size], what the gate
                reads in place of x. input_ids, token_types: [...], for routing by table or by modality.

        Returns:
            x's shape and dtype (with output="shard": this rank's rows [T', hidden_size]). A row with NaN in it gives NaN and
            leaves the others as they are.
        """
        w = self.layer_weights()
        v, x_TH = self._enter(x, w, router_logits, router_input, topk and topk.weights)
        said = {
            "router_logits": router_logits,
            "router_input": router_input,
            "input_ids": input_ids,
            "token_types": token_types,
        }
        said: dict[str, Any] = {name: value for name, value in said.items() if value is not None}
        if v.replayable and topk is None and not said and self.loads is None:
            out = self._replays(partial(self._run, v, w), x_TH, w, v)
        else:
            out = self._run(v, w, x_TH, topk=topk, **said)
        return out if v.plan.wanted == "shard" else out.reshape(x.shape)

    def _run(self, v: Verbs, w: LayerWeights, x_TH: Tensor, *, alone: bool = False, **said: Any) -> Tensor:
        """The plan's steps on tokens [T, H]. alone: on one stream. said: of the router's input, or its answer."""
        chosen, shared = v.begin(x_TH, w, alone=alone, **said)
        if self.loads is not None:
            self.loads.add(chosen, self._slots)
        zero = v.zero(x_TH, chosen)
        routed = v.input_transform(x_TH, w)
        routed = v.pad(routed, w)
        x_TH, routed, chosen, w = v.spread(x_TH, routed, chosen, w)
        travelling = v.dispatch(routed, chosen)
        shared = shared or v.shared(x_TH, w, chosen, alone=alone)
        rows, trip = travelling.wait()
        routed = v.experts(rows, trip, w, shared)
        routed = v.row_norm(routed, w)
        routed = v.combine(routed, trip, w)
        routed = v.trim(routed, w)
        routed = v.scale(routed, w)
        routed = v.output_transform(routed, w)
        out = v.join(routed, shared, zero, w)
        out = v.final_transform(out, w)
        return v.finish(out, w)

    def route(self, x: Tensor, **inputs: Any) -> TopK:
        """Ids and weights of every token, [T, K], from the keyword arguments of `forward`; logical ids."""
        w = self.layer_weights()
        v, x_TH = self._enter(x, w)
        return v.route(x_TH, w, **inputs)

    def explain(self) -> str:
        """The plan: every step, its kernel and why, every kernel refused, the collectives and their bytes."""
        return self.plan.explain()

    @on_every_rank
    def rebalance(self, placement: tuple[tuple[int, ...], ...]) -> None:
        """Moves the experts to another `Layout.placement`, see `parallel.balance.placement`; every rank must call it.

        Results stay as they are. Parameters lose their gradients, and become new ones if they are the runner's own: make the
        optimizer anew.
        """
        if self._source is not None and not isinstance(self._source, Moves):
            raise UnsupportedError("the experts belong to another module", where="rebalance", next_step="Give it weights")
        move = Move.to(placement, self._comm, self._slots, self.spec.routing.modalities)
        if self._source is not None:
            self._source.move(move)
        else:
            self._template = register(self, move.layer(self.layer_weights()))
        self._comm, self._slots, self._verbs, self._agreed = move.comm, move.after, {}, set()
        self.plan = self._resolve(self.layer_weights(), bool(self.options.grad)).plan

    def layer_weights(self) -> LayerWeights:
        """This rank's tensors as they are now."""
        if self._source is not None:
            return self._source()
        return self._template.map(lambda name, _: getattr(self, name))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_verbs": {}, "_replays": Replays()}  # what is bound is made again in the copy

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MoERunner:
        """The correction bias keeps its dtype in `runner.to(bfloat16)`: rounded, it would choose other experts."""
        exact = getattr(self, "selection_bias", torch.empty(0)).detach()
        super()._apply(fn, recurse)
        bias = getattr(self, "selection_bias", exact)
        bias.data = exact.to(bias.device) if bias.dtype != exact.dtype else bias.data
        return self

    def _enter(self, x: Tensor, w: LayerWeights, *others: Tensor | None) -> tuple[Verbs, Tensor]:
        """The plan for these tokens as functions, and the tokens as [T, H]. others: what else may want a gradient."""
        w2, grad = w.experts[0].w2, self.options.grad
        if x.shape[-1:] != (self.spec.hidden_size,):
            raise SpecError(f"has shape {list(x.shape)}, the hidden size is {self.spec.hidden_size}", where="x")
        if self.options.dtype not in (None, str(x.dtype).removeprefix("torch.")):
            raise WeightsError(f"tokens are {x.dtype}, Options.dtype is {self.options.dtype}", where="x")
        if x.dtype != w2.dtype and w.experts[0].format == "none":
            raise WeightsError(f"tokens are {x.dtype}, the experts {w2.dtype}", where="x", next_step="Cast one of them")
        if x.device != w2.device:
            raise WeightsError(f"tokens are on {x.device}, the experts on {w2.device}", where="x")
        if grad is None:
            given = any(t is not None and t.requires_grad for t in (x, *others))
            grad = torch.is_grad_enabled() and (given or w.requires_grad)
        verbs = self._verbs.get((x.device.type, x.dtype, grad)) or self._resolve(w, grad, x)
        if x.dtype not in self._agreed:
            self._agreed.add(verbs.agree(w))
        return verbs, x.reshape(-1, self.spec.hidden_size)

    def _resolve(self, w: LayerWeights, grad: bool, x: Tensor | None = None) -> Verbs:
        device = (w.experts[0].w2 if x is None else x).device.type
        options = self.options.replace(grad=grad, dtype=self.options.dtype if x is None else x.dtype)
        plan = resolve(self.spec, self._comm.layout, w.meta(), device, options)
        verbs = Verbs(plan, self._comm, self._slots)
        self._verbs[device, verbs.dtype, grad] = verbs
        return verbs
