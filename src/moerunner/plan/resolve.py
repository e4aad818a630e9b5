"""From spec, layout and weights to a plan. A pure function: no tensors, no ranks, nothing global."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial

from moerunner import quant
from moerunner.errors import PlanError, UnsupportedError, WeightsError
from moerunner.experts.base import BackendInfo, Request
from moerunner.kernels.cpu.linear import AT_ONCE, worthwhile
from moerunner.kernels.tiles import few_tokens
from moerunner.parallel import allgather, alltoall, deepep, local
from moerunner.parallel.layout import Layout
from moerunner.parallel.pairs import PairInfo
from moerunner.plan.kernels import ONE_LAUNCH, against_one_launch, choose_experts, has_triton
from moerunner.plan.options import Options
from moerunner.plan.plan import Plan
from moerunner.plan.steps import Step, flow, start_states
from moerunner.spec import Custom, MoESpec, TransformSpec
from moerunner.values import Replicate, TensorMeta, ValueState


def resolve(
    spec: MoESpec,
    layout: Layout | None,
    weights_meta: Mapping[str, TensorMeta],
    device: str,
    options: Options | None = None,
) -> Plan:
    """The checked plan.

    Args:
        spec, layout: what is computed and who holds what; None is one rank.
        weights_meta: shapes, strides, dtypes and formats of one rank's tensors, from `LayerWeights.meta()`.
        device: a device type, `cpu` or `cuda`.

    Raises:
        PlanError: the steps contradict each other. UnsupportedError: no kernel does what is asked; every reason is given.
        WeightsError: the weights do not fit the spec.
    """
    layout, options = layout or Layout(), options or Options()
    w2 = weights_meta.get("experts.0.w2")
    if w2 is None or "experts.0.w13" not in weights_meta:
        raise WeightsError("have no experts.0.w13 and experts.0.w2", where="resolve", next_step="Pass LayerWeights.meta()")
    if w2.format != quant.PLAIN and options.dtype is None:
        what = f"experts in the format {w2.format!r} do not say in which dtype the layer computes"
        raise WeightsError(what, where="resolve", next_step="Give Options(dtype=...)")
    dtype = options.dtype or w2.dtype
    return _Builder(spec, layout, dict(weights_meta), str(device).split(":")[0], dtype, options).plan()


_FEW_GATE_TOKENS = 16
"""Up to this many tokens the gate's product is a kernel of ours too, which reads its weight as it is stored."""
_FEWER_GATE_TOKENS = 4
"""The same where a GPU's matrix unit does it for more: measured on an H200, 7168 to 256 features, 8 tokens 15 us and 7."""

_FEW_SIDE_TOKENS = 256
"""Up to this many tokens the routed experts, or the router, leave room on a GPU for the shared experts beside them."""
_ANY = 1 << 62


class _Builder:
    """Collects steps, and asks the algebra for the state before each decision."""

    def __init__(
        self, spec: MoESpec, layout: Layout, meta: dict[str, TensorMeta], device: str, dtype: str, options: Options
    ) -> None:
        self.spec, self.layout, self.meta, self.device, self.dtype, self.options = (
            spec,
            layout,
            meta,
            device,
            dtype,
            options,
        )
        self.steps: list[Step] = []
        self.finish = partial(Plan, spec, layout, device, dtype, options)
        self.reduce_dtype = options.travels(dtype)
        self._kernel_rounds = False

    def add(self, verb: str, **facts: object) -> None:
        self.steps.append(Step(verb=verb, **facts))  # type: ignore[arg-type]

    def state(self, value: str) -> ValueState | None:
        start = start_states(self.spec, self.layout, self.dtype)
        states = flow(tuple(self.steps), self.spec, start)
        return (states[-1] if states else start).get(value)

    def plan(self) -> Plan:
        spec = self.spec
        self._route()
        if spec.zero_experts:
            own = spec.apply_routed_scale_to_output and spec.routed_scaling_factor != 1.0
            self.add("zero", value="zero", reads="tokens", scales=own)
        if spec.input_transform is not None:
            self._transform("input_transform", spec.input_transform, "routed")
        padded = self.meta["experts.0.w2"].shape[1]
        if padded != spec.routed_hidden_size:
            self.add("pad", width=padded, reason=f"the experts' weights are stored at width {padded}")
        pair = self._dispatch()
        if spec.shared is not None:
            self.steps.append(self._shared(pair))
        self._experts(pair)
        follows = [spec.output_transform, spec.shared, spec.final_transform, spec.zero_experts, spec.output_bias]
        early = any(bool(f) for f in follows)
        trimmed = padded == spec.routed_hidden_size or spec.experts.row_norm is not None
        if not trimmed and early:
            self.add("trim", width=spec.routed_hidden_size, reason="before what reads the true width")
        if spec.apply_routed_scale_to_output and spec.routed_scaling_factor != 1.0:
            experts = next(s for s in self.steps if s.verb == "experts")
            if not experts.scales:
                self.add("scale", reason=f"the spec applies its factor {spec.routed_scaling_factor} to the output")
        if spec.output_transform is not None:
            self._reduce_before(spec.output_transform, "routed", "output_transform")
            self._transform("output_transform", spec.output_transform, "routed")
        self._join()
        if spec.final_transform is not None:
            self._reduce_before(spec.final_transform, "out", "final_transform")
            self._transform("final_transform", spec.final_transform, "out")
        self._output()
        if not trimmed and not early:
            self.add("trim", value="out", at="finish", width=spec.routed_hidden_size, reason="nothing reads it before")
        return self._rounded() or self.finish(tuple(self.steps))

    def _rounded(self) -> Plan | None:
        """The plan in which the experts' kernel rounds, if it can and nothing computes with its sums."""
        if not self._kernel_rounds:
            return None
        at = next(i for i, step in enumerate(self.steps) if step.verb == "experts")
        step = self.steps[at]
        step = dataclasses.replace(step, rounds=True, reason=f"{step.reason}; rounds the sum")
        try:
            return self.finish((*self.steps[:at], step, *self.steps[at + 1 :]))
        except PlanError:
            return None

    def _route(self) -> None:
        r, spec = self.spec.routing, self.spec
        against, kernels = against_one_launch(self.spec, self.device, self.dtype, self.options), ONE_LAUNCH.get(self.device, "")
        if r.score != "external" and r.simulate is None:
            rounds = r.logits_dtype == "float32" or kernels == "triton"
            plain = against or not rounds or self.options.batch_invariant
            unit = kernels == "triton" and self.dtype in ("bfloat16", "float16")
            few = (0, "") if plain else (_FEWER_GATE_TOKENS if unit else _FEW_GATE_TOKENS, kernels)
            self.add("gate", value="topk", reads="tokens", few=few, reason="reads the caller's tokens at full width")
        in_weights = not spec.apply_routed_scale_to_output and spec.routed_scaling_factor != 1.0
        reason = f"the factor {spec.routed_scaling_factor} is applied to the weights" if in_weights else ""
        if r.simulate is not None or r.score == "external":
            kernel = "simulated" if r.simulate else "the caller"
            self.add("route", value="topk", kernel=kernel, scales=in_weights, reason=reason)
            return
        kernel = r.score if against else f"{r.score} in one launch"
        refused = (("one launch", against),) if against else ((r.score, f"one launch is preferred on {self.device}"),)
        one_launch = "" if against else kernels
        self.add("route", value="topk", kernel=kernel, scales=in_weights, reason=reason, refused=refused, one_launch=one_launch)

    def _shared(self, pair: PairInfo, *, added: bool = False) -> Step:
        """added: by the experts' kernel, so that they are computed before it starts."""
        axes = self.layout.split_axes if self.layout.shards_shared else ()
        held = f"a slice of the width over {'+'.join(axes)}" if axes else "whole on every rank"
        held += "; runs while the routed tokens travel" if pair.overlaps else ""
        side, against = (_ANY if pair.overlaps else _FEW_SIDE_TOKENS), self._against_side_stream()
        if not against:
            other = "the router" if added else "the routed experts"
            held += "; on a side stream" + ("" if pair.overlaps else f" beside {other} up to {side} tokens")
        joined = self._joined() if added else 0
        if joined:
            held += f"; up to {joined} tokens in the launches of the router and of the routed experts"
        triton = self.device == "cuda" and self.dtype != "float64" and not self.options.grad and has_triton()
        held += "; the activation in one launch" if triton else ""
        half = self.device == "cpu" and self.dtype in ("bfloat16", "float16")
        native = half and worthwhile() and not (self.options.grad or self.options.batch_invariant)
        return Step(
            verb="shared",
            value="shared",
            reads="tokens",
            axes=axes,
            few=(AT_ONCE, "products in native code") if native else (0, ""),
            overlaps=pair.overlaps,
            reason=held,
            side=0 if against else side,
            joined=joined,
            one_launch="triton" if triton else "",
            refused=(("a side stream", against),) if against and self.device == "cuda" else (),
        )

    def _joined(self) -> int:
        """Up to how many tokens the router's and the experts' launches hold the shared experts too."""
        gate = next((s for s in self.steps if s.verb == "gate"), None)
        one_launch = any(s.verb == "route" and s.one_launch == "triton" for s in self.steps)
        if gate is None or not one_launch or self.spec.shared is None or self.spec.shared.bias:
            return 0
        return min(gate.few[0], few_tokens(self.spec.top_k, self.meta["experts.0.w2"].shape[0]))

    def _add_shared(self, pair: PairInfo, kernels: list[BackendInfo]) -> None:
        """Has the experts' kernel add the shared experts' output, if it can and the two are parts of one sum there.

        Not those that the router weighs: they would have to wait for it, and the experts for them. Not under gradients: they
        would begin before the tokens are marked as the beginning of a sum over ranks.
        """
        shared, able = self.spec.shared, all(kernel.adds for kernel in kernels) and pair.name == "local"
        if shared is None or shared.gate == "router" or self.options.grad or not able:
            return
        *before, experts = self.steps
        experts = dataclasses.replace(experts, adds=True, reason=f"{experts.reason}; adds the shared experts")
        try:
            flow((*before, experts), self.spec, start_states(self.spec, self.layout, self.dtype))
        except PlanError:
            return
        self.steps = [self._shared(pair, added=True) if s.verb == "shared" else s for s in before] + [experts]

    def _against_side_stream(self) -> str:
        """Why shared experts run on the stream of all else; empty where they do not."""
        if self.device != "cuda":
            return f"exists on cuda, not on {self.device}"
        if not self.options.overlap:
            return "Options.overlap is off"
        return "a backward runs where its forward ran, beside collectives" if self.options.grad else ""

    def _transform(self, verb: str, transform: TransformSpec, value: str) -> None:
        self.add(
            verb,
            value=value,
            takes=transform.in_features,
            width=transform.out_features,
            linear=transform.linear,
            kernel=" ".join(type(op).__name__ for op in transform.ops),
        )

    def _dispatch(self) -> PairInfo:
        pair = self._pair()
        if self.options.capturable and pair.host_sync:
            what = f"tokens that travel by {pair.name} have the host wait for their counts, which no CUDA graph can hold"
            raise UnsupportedError(
                what, where="Options.capturable", next_step="Replicate the tokens: Layout(tokens='replicated')"
            )
        return pair

    def _pair(self) -> PairInfo:
        layout, wish = self.layout, self.options.dispatch
        if layout.tokens == "replicated" or not layout.split_axes:
            if wish != "auto":
                raise UnsupportedError(f"tokens are not sharded, {wish!r} has nothing to do", where="Options.dispatch")
            self.add("dispatch", kernel="local", reason="every rank has all tokens and runs its own experts")
            return local.INFO
        if wish == "deepep":
            facts = {"device": self.device, "dtype": self.dtype, "travels": self.reduce_dtype, "grad": bool(self.options.grad)}
            against = deepep.refusal(layout, **facts, width=self.meta["experts.0.w2"].shape[1])
            if against:
                step = "Use 'alltoall', which sends the same rows through torch.distributed"
                raise UnsupportedError(f"'deepep' {against}", where="Options.dispatch", next_step=step)
            self.add("dispatch", kernel="deepep", gathers=("ep",), reason="asked for; each token goes to a rank once")
            return deepep.INFO
        use_all = layout.ep > 1 and (wish == "alltoall" or (wish == "auto" and self.spec.top_k < layout.ep))
        if wish == "alltoall" and layout.ep == 1:
            raise UnsupportedError("'alltoall' needs ep above 1", where="Options.dispatch")
        if use_all:
            gathers = ("tp",) if layout.tp > 1 else ()
            reason = f"a token visits at most {self.spec.top_k} of {layout.ep} ranks" if wish == "auto" else "asked for"
            self.add("dispatch", kernel="alltoall", gathers=gathers, reason=reason)
            return alltoall.INFO
        reason = f"top_k={self.spec.top_k} reaches most of {layout.ep} ranks" if wish == "auto" else "asked for"
        self.add("dispatch", kernel="allgather", gathers=layout.split_axes, reason=reason)
        return allgather.INFO

    def _experts(self, pair: PairInfo) -> None:
        spec, e = self.spec, self.spec.experts
        on_input = spec.routing.weights_on == "input"
        rows = pair.experts_return == "rows" or e.row_norm is not None
        sets = sorted({n.split(".")[1] for n in self.meta if n.startswith("experts.")})
        products = [self.meta[f"experts.{i}.{n}"] for i in sets for n in ("w13", "w2")]
        request = Request(
            device=self.device,
            dtype=self.dtype,
            activation=e.activation,
            gate_up=products[0].gate_up,
            shapes=tuple(m.shape for m in products),
            strides=tuple(m.stride for m in products),
            format=products[0].format,
            bias=e.bias,
            input_weighting=on_input,
            rows=rows,
            grad=bool(self.options.grad),
            deterministic=self.options.deterministic,
            batch_invariant=self.options.batch_invariant,
            capturable=self.options.capturable,
        )
        widths = [-(-width // self.layout.tp) for width in spec.expert_widths]
        plain = [shape for width in widths for shape in ((1, spec.routed_hidden_size), (1, width))]
        chosen, dequantises = choose_experts(request, self.options.backend, tuple(plain))
        info = chosen.backend.INFO
        axes = tuple(a for a in self.layout.split_axes if not (pair.name == "alltoall" and a == "ep"))
        kernels = [info] if chosen.few is None else [info, chosen.few[1].INFO]
        self._kernel_rounds = self.dtype in ("bfloat16", "float16") and not rows and all(kernel.rounds for kernel in kernels)
        applies = info.applies_scale and spec.apply_routed_scale_to_output and spec.routed_scaling_factor != 1.0
        self.add(
            "experts",
            kernel=info.name,
            reason=chosen.reason + (f", on weights dequantised from {dequantises!r} at each call" if dequantises else ""),
            refused=chosen.refused,
            dequantises=dequantises,
            few=(chosen.few[0], chosen.few[1].INFO.name) if chosen.few is not None else (0, ""),
            axes=() if info.reduced else axes,
            weighs=on_input or not rows,
            sums=not rows,
            scales=applies and not rows,
        )
        self._add_shared(pair, kernels)
        if e.row_norm is not None:
            if self.meta["experts.0.w2"].shape[1] != spec.routed_hidden_size:
                self.add("trim", width=spec.routed_hidden_size, at="row_norm", reason="before what reads the true width")
            if "tp" in axes and not info.reduced:
                why = "a norm of the expert's whole row, each rank has a partial sum of it"
                self.add("reduce", axes=("tp",), at="row_norm", dtype=self.reduce_dtype, reason=why)
            self.add("row_norm", kernel="RMSNorm")
        back = {"allgather": self.layout.split_axes, "deepep": ("ep",), "alltoall": ("tp",) if self.layout.tp > 1 else ()}.get(
            pair.name, ()
        )
        routed = self.state("routed")
        assert routed is not None
        whole = tuple(a for a in back if routed.at(a) == Replicate())
        if whole:
            self.add("select", axes=whole, at="combine", reason="the row is whole on these ranks and must count once")
        self.add(
            "combine",
            kernel=pair.name,
            axes=back,
            weighs=rows and not on_input,
            sums=rows,
            dtype=self.reduce_dtype if back else "",
            reason="brings finished rows home" if pair.reduces else "",
        )

    def _reduce_before(self, transform: TransformSpec, value: str, verb: str) -> None:
        state = self.state(value)
        trained = bool(self.options.grad) and any(isinstance(op, Custom) for op in transform.ops)
        if state is not None and state.partial_axes and (trained or not transform.linear):
            why = f"{verb} is a module whose gradients would be partial sums" if transform.linear else f"{verb} is not linear"
            self.add("reduce", value=value, axes=state.partial_axes, at=verb, dtype=self.reduce_dtype, reason=why)

    def _join(self) -> None:
        values = [v for v in ("routed", "shared", "zero") if self.state(v) is not None]
        states = {v: self.state(v) for v in values}
        routed = states["routed"]
        assert routed is not None
        shared = states.get("shared")
        if shared is not None and shared.partial_axes and not routed.partial_axes and self.options.output != "partial":
            why = "the routed part is finished, the shared part alone is a partial sum"
            self.add("reduce", value="shared", axes=shared.partial_axes, at="join", dtype=self.reduce_dtype, reason=why)
            states["shared"] = self.state("shared")
        split = [a for a in self.layout.split_axes if any(s is not None and a in s.partial_axes for s in states.values())]
        for value, state in states.items():
            assert state is not None
            axes = tuple(a for a in split if state.at(a) == Replicate())
            if axes:
                why = "whole on every rank: counts on coordinate 0"
                self.add("select", value=value, axes=axes, at="join", reason=why)
        self.add("join", value="out", kernel=" + ".join(values) if self.spec.join == "sum" else "average", axes=tuple(split))

    def _output(self) -> None:
        out = self.state("out")
        assert out is not None
        wanted, layout = self.options.output, self.layout
        if wanted == "partial":
            if layout.tokens == "sharded" and layout.split_axes:
                raise PlanError("asks for partial sums of sharded tokens", first="Layout.tokens", second="Options.output")
            missing = tuple(a for a in layout.split_axes if a not in out.partial_axes)
            if missing:
                self.add("select", value="out", axes=missing, at="finish", reason="the caller reduces over these ranks too")
            return
        scatter = wanted == "shard" and layout.tokens == "replicated"
        rest = tuple(a for a in layout.split_axes if a not in out.partial_axes)
        if not out.partial_axes:
            if scatter and rest:
                self.add("shard", value="out", axes=rest, at="finish", reason="each rank keeps its own tokens")
            return
        if scatter and rest:
            self.add("select", value="out", axes=rest, at="finish", reason="whole on these ranks: counts on coordinate 0")
        self.add(
            "reduce",
            value="out",
            axes=layout.split_axes if scatter else out.partial_axes,
            at="finish",
            scatter=scatter,
            dtype=self.reduce_dtype,
            reason="the one reduction of routed and shared together" if self.spec.shared else "the one reduction",
        )
