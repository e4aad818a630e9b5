"""The spec of one MoE layer: its parts put together, checked against each other, and the tensors they need."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from moerunner.errors import SpecError
from moerunner.spec.parts import (
    ExpertsSpec,
    Linear,
    RMSNorm,
    RoutingSpec,
    SharedSpec,
    TransformSpec,
    flags,
    instances,
    number,
    one_of,
    positive,
    refuse,
)
from moerunner.spec.plain import build, to_plain

SPEC_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class MoESpec:
    """One MoE layer.

    y = final_transform(join(output_transform(factor * sum_k w_k expert_k(input_transform(x))), shared(x), zero(x), bias))

    routed_scaling_factor multiplies the routed part only, once: the router's weights, or with apply_routed_scale_to_output
    the routed sum. zero_experts are identity experts with ids num_experts and up: they add w * x (LongCat-Flash).
    join: `sum`, or `average` (routed + shared) / 2 (Cohere 2 MoE). output_bias: a vector added to the joined output (JetMoe).
    """

    hidden_size: int
    num_experts: int
    top_k: int
    routing: RoutingSpec
    experts: ExpertsSpec
    apply_routed_scale_to_output: bool
    routed_scaling_factor: float = 1.0
    shared: SharedSpec | None = None
    input_transform: TransformSpec | None = None
    output_transform: TransformSpec | None = None
    final_transform: TransformSpec | None = None
    zero_experts: int = 0
    join: Literal["sum", "average"] = "sum"
    output_bias: bool = False

    def __post_init__(self) -> None:
        w = "MoESpec"
        positive(w, hidden_size=self.hidden_size, num_experts=self.num_experts, top_k=self.top_k)
        for name, kind in (("routing", RoutingSpec), ("experts", ExpertsSpec)):
            if not isinstance(getattr(self, name), kind):
                refuse(f"{w}.{name}", f"must be a {kind.__name__}, not {getattr(self, name)!r}")
        instances(w, SharedSpec, shared=self.shared)
        flags(w, apply_routed_scale_to_output=self.apply_routed_scale_to_output, output_bias=self.output_bias)
        number(w, routed_scaling_factor=self.routed_scaling_factor)
        if self.routed_scaling_factor == 0:
            refuse(f"{w}.routed_scaling_factor", "is 0, so that the routed experts would be ignored")
        if isinstance(self.zero_experts, bool) or not isinstance(self.zero_experts, int) or self.zero_experts < 0:
            refuse(f"{w}.zero_experts", f"must be a whole number of at least 0, not {self.zero_experts!r}")
        one_of(f"{w}.join", Literal["sum", "average"], self.join)
        if self.join == "average" and self.shared is None:
            refuse(f"{w}.join", "'average' is of routed and shared experts, and there is no shared expert")
        self._check_routing()
        self._check_widths()

    def _check_routing(self) -> None:
        w, r = "MoESpec", self.routing
        choosable = self.num_experts + self.zero_experts
        if self.num_experts % r.modalities:
            refuse(f"{w}.num_experts", f"{self.num_experts} experts do not form {r.modalities} equal sets")
        if self.top_k > choosable // r.modalities:
            refuse(f"{w}.top_k", f"chooses {self.top_k} of {choosable // r.modalities} experts")
        if r.modalities > 1 and self.zero_experts:
            refuse(f"{w}.zero_experts", "do not combine with expert sets by token type")
        if r.modalities > 1 and self.experts.row_norm is not None:
            refuse("ExpertsSpec.row_norm", "does not combine with expert sets by token type")
        sizes = self.experts.intermediate_size
        if isinstance(sizes, tuple) and len(sizes) != r.modalities:
            refuse("ExpertsSpec.intermediate_size", f"gives {len(sizes)} widths for {r.modalities} expert sets")
        if r.score == "sparsemixer" and self.top_k != 2:
            refuse(f"{w}.top_k", f"sparsemixer is defined for top_k=2, not {self.top_k}")
        if r.groups is not None:
            g = r.groups
            if choosable % g.count:
                refuse("GroupSpec.count", f"{choosable} experts do not form {g.count} equal groups")
            size = choosable // g.count
            if g.score == "top2_sum" and size < 2:
                refuse("GroupSpec.score", f"'top2_sum' needs groups of 2 experts, these have {size}")
            if g.kept * size < self.top_k:
                refuse("GroupSpec.kept", f"{g.kept} groups of {size} hold fewer than top_k={self.top_k} experts")
        if self.shared is not None and self.shared.gate == "router" and r.score != "sigmoid":
            refuse("SharedSpec.gate", f"'router' is defined for score='sigmoid', not {r.score!r}")
        if self.shared is not None and self.shared.gate == "router" and self.apply_routed_scale_to_output:
            refuse(
                f"{w}.apply_routed_scale_to_output",
                "the router weighs the shared experts too, so the factor is in the weights",
            )
        if r.weights_on == "input":
            clash = [n for n in ("experts.bias", "experts.row_norm") if getattr(self.experts, n.split(".")[1])]
            if self.zero_experts:
                clash.append("zero_experts")
            if clash:
                refuse("RoutingSpec.weights_on", f"'input' does not combine with {', '.join(clash)}")

    def _check_widths(self) -> None:
        hidden = self.hidden_size
        for name, takes, gives in (
            ("input_transform", hidden, None),
            ("output_transform", self.routed_hidden_size, hidden),
            ("final_transform", hidden, hidden),
        ):
            transform: TransformSpec | None = getattr(self, name)
            if transform is None:
                continue
            if not isinstance(transform, TransformSpec):
                refuse(f"MoESpec.{name}", f"must be a TransformSpec, not {transform!r}")
            if transform.in_features != takes:
                refuse(f"MoESpec.{name}", f"takes {transform.in_features} features where the value has {takes}")
            if gives is not None and transform.out_features != gives:
                refuse(f"MoESpec.{name}", f"gives {transform.out_features} features where {gives} are needed")
        if self.output_transform is None and self.routed_hidden_size != hidden:
            refuse(
                "MoESpec.output_transform",
                f"routed experts work at width {self.routed_hidden_size}, the layer at {hidden}",
                "Give an output_transform back to the full width",
            )
        gate = self.routing.input_transform
        if gate is not None and (gate.in_features, gate.out_features) != (hidden, hidden):
            refuse("RoutingSpec.input_transform", f"must keep the width {hidden}")
        norm = self.experts.row_norm
        if norm is not None and norm.features != self.routed_hidden_size:
            refuse("ExpertsSpec.row_norm", f"has {norm.features} features, the expert {self.routed_hidden_size}")

    @property
    def routed_hidden_size(self) -> int:
        """Width that the routed experts read and write: the hidden size unless the MoE is latent."""
        return self.input_transform.out_features if self.input_transform is not None else self.hidden_size

    @property
    def num_logits(self) -> int:
        """Rows of the gate: routed, zero and router-weighted shared experts."""
        shared = self.shared.count if self.shared is not None and self.shared.gate == "router" else 0
        return self.num_experts + self.zero_experts + shared

    @property
    def expert_widths(self) -> tuple[int, ...]:
        """Intermediate size of each modality set; a single set for most layers."""
        sizes = self.experts.intermediate_size
        return sizes if isinstance(sizes, tuple) else (sizes,) * self.routing.modalities

    def weight_shapes(self, *, vocab_size: int | None = None) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that `MoERunner` needs for this spec, in logical order.

        Modality sets beyond one carry the suffix `.0`, `.1`, ... on the experts' names. `hash_table` [vocab_size, top_k]
        holds int64 ids, everything else is floating. Custom transform operations are functions and have no shape here.
        """
        r, e, hidden, width = self.routing, self.experts, self.hidden_size, self.routed_hidden_size
        shapes: dict[str, tuple[int, ...]] = {}
        if r.score != "external" and r.simulate is None:
            shapes["gate"] = (self.num_logits, hidden)
            if r.logit_bias:
                shapes["gate_bias"] = (self.num_logits,)
        choosable = self.num_experts + self.zero_experts
        if r.selection_bias:
            shapes["selection_bias"] = (choosable,)
        if r.per_expert_scale:
            shapes["per_expert_scale"] = (choosable,)
        if r.global_scale:
            shapes["global_scale"] = (1,)
        if r.choose == "hash":
            shapes["hash_table"] = (vocab_size or 0, self.top_k)
        count = self.num_experts // r.modalities
        for index, size in enumerate(self.expert_widths):
            suffix = f".{index}" if r.modalities > 1 else ""
            rows = 2 * size if e.gated else size
            shapes[f"w13{suffix}"], shapes[f"w2{suffix}"] = (count, rows, width), (count, width, size)
            if e.bias:
                shapes[f"b13{suffix}"], shapes[f"b2{suffix}"] = (count, rows), (count, width)
            if e.row_norm is not None and e.row_norm.weight:
                shapes[f"row_norm{suffix}"] = (width,)
        if self.shared is not None:
            s = self.shared
            total = s.width * s.count
            rows = 2 * total if s.gated else total
            if s.gate == "router":
                shapes["shared_w13"] = (s.count, rows // s.count, hidden)
                shapes["shared_w2"] = (s.count, hidden, s.width)
            else:
                shapes["shared_w13"], shapes["shared_w2"] = (rows, hidden), (hidden, total)
            if s.bias:
                shapes["shared_b13"], shapes["shared_b2"] = (rows,), (hidden,)
            if s.gate == "sigmoid":
                shapes["shared_gate"] = (1, hidden)
        for name, transform in self.transforms().items():
            for i, op in enumerate(transform.ops):
                if isinstance(op, Linear):
                    shapes[f"{name}.{i}.weight"] = (op.out_features, op.in_features)
                    if op.bias:
                        shapes[f"{name}.{i}.bias"] = (op.out_features,)
                elif isinstance(op, RMSNorm) and op.weight:
                    shapes[f"{name}.{i}.weight"] = (op.features,)
        if self.output_bias:
            shapes["output_bias"] = (hidden,)
        return shapes

    def transforms(self) -> dict[str, TransformSpec]:
        """The transforms that exist, by the name their weights are found under."""
        named = {
            "gate_transform": self.routing.input_transform,
            "input_transform": self.input_transform,
            "output_transform": self.output_transform,
            "final_transform": self.final_transform,
        }
        return {name: transform for name, transform in named.items() if transform is not None}

    def to_dict(self) -> dict[str, Any]:
        """Plain data with a version, for JSON."""
        return {"version": SPEC_VERSION, **to_plain(self)}

    def to_json(self, *, indent: int | None = None) -> str:
        return json.dumps(self.to_dict(), indent=indent)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> MoESpec:
        """The inverse of `to_dict`. Unknown keys, wrong types and other versions are a `SpecError`."""
        if not isinstance(data, dict):
            refuse("MoESpec", f"expects an object, not {data!r}")
        version = data.get("version", SPEC_VERSION)
        if version != SPEC_VERSION or isinstance(version, bool):
            refuse("MoESpec.version", f"is {version!r}, this package reads {SPEC_VERSION}", "Upgrade moerunner")
        return build(cls, {k: v for k, v in data.items() if k != "version"}, "MoESpec")

    @classmethod
    def from_json(cls, text: str) -> MoESpec:
        try:
            data = json.loads(text)
        except (ValueError, TypeError, RecursionError) as error:
            raise SpecError(f"is not JSON: {error}", where="MoESpec") from error
        return cls.from_dict(data)
