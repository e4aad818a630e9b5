"""Hypothesis strategies for whole problems: a valid spec over all features, weights, tokens, a layout, options.

Structure is drawn by hypothesis, so that it shrinks; numbers come from one drawn seed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from moerunner import (
    ActivationSpec,
    Custom,
    ExpertsSpec,
    ExpertWeights,
    GroupSpec,
    LayerWeights,
    Layout,
    Linear,
    MoESpec,
    Options,
    RMSNorm,
    RoutingSpec,
    SharedSpec,
    TopK,
    TransformSpec,
)
from moerunner.ops.reference import Choice, reference_route
from moerunner.values import GateUp

VOCAB = 7
SCORES = ("softmax", "sigmoid", "sqrtsoftplus", "softmax_topk", "sigmoid_topk", "sparsemixer", "external")
KINDS = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "swigluoai")
SIZES = (8, 16, 12, 5)
FOCI = ("", "", "", "sets", "router", "input", "sparsemixer")


def maybe(value: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.none() | value


# ---- specs


@st.composite
def activations(draw: st.DrawFn, gated: bool = True) -> ActivationSpec:
    kind = draw(st.sampled_from((*KINDS, KINDS[-1]) if gated else KINDS[:-1]))
    limit = draw(maybe(st.sampled_from([0.4, 1.0, 7.0])))
    constants = st.sampled_from([0.5, 1.3])
    return ActivationSpec(
        kind=kind,
        limit=limit,
        alpha=draw(maybe(constants)) if kind in ("silu", "swigluoai") else None,
        beta=draw(st.sampled_from([None, 0.0, 1.0, 0.7])) if gated else None,
        clamp_after=draw(st.booleans()) if limit is not None else False,
        gate_softcap=draw(maybe(constants)) if kind == "silu" else None,
        up_softcap=draw(maybe(constants)) if gated else None,
    )


@st.composite
def norms(draw: st.DrawFn, width: int, eps: st.SearchStrategy[float]) -> RMSNorm:
    if not draw(st.booleans()):
        return RMSNorm(features=width, eps=draw(eps), weight=False)
    return RMSNorm(features=width, eps=draw(eps), centred=draw(st.booleans()), weight_first=draw(st.booleans()))


@st.composite
def transforms(draw: st.DrawFn, takes: int, gives: int, *, linear: bool | None = None) -> TransformSpec:
    """One to three operations; `Custom` ones are `custom_function` of their place."""
    straight = draw(st.booleans()) if linear is None else linear
    kinds = ["linear", "custom"] if straight else ["linear", "norm", "custom", "bias", "nonlinear"]
    ops: list[Linear | RMSNorm | Custom] = []
    width = takes
    for _ in range(draw(st.integers(0, 2))):
        kind = draw(st.sampled_from(kinds))
        out = draw(st.sampled_from(SIZES))
        if kind == "norm":
            ops.append(draw(norms(width, st.sampled_from([1e-6, 0.1]))))
        elif kind in ("custom", "nonlinear"):
            ops.append(Custom(in_features=width, out_features=width, linear=kind == "custom"))
        else:
            ops.append(Linear(in_features=width, out_features=out, bias=kind == "bias"))
            width = out
    if width != gives or not ops:
        ops.append(Linear(in_features=width, out_features=gives, bias=not straight and draw(st.booleans())))
    return TransformSpec(tuple(ops))


def custom_function(op: Custom) -> Callable[[Tensor], Tensor]:
    """What the tests pass for a `Custom` operation."""
    if op.linear:
        return lambda y: 0.75 * y.flip(-1)
    return lambda y: torch.tanh(y) + 0.25 * y


@st.composite
def routings(draw: st.DrawFn, num_experts: int, choosable: int, top_k: int, hidden: int, focus: str = "") -> RoutingSpec:
    scores = [s for s in SCORES if s != "sparsemixer" or top_k == 2]
    if focus in ("sets", "input"):
        scores = [s for s in scores if s not in ("external", "sparsemixer")]
    score = {"router": "sigmoid", "sparsemixer": "sparsemixer"}.get(focus) or draw(st.sampled_from(scores))
    if score == "external":
        return RoutingSpec(score=score)
    common: dict[str, Any] = {
        "score": score,
        "logit_bias": draw(st.booleans()),
        "logit_scale": draw(st.sampled_from([1.0, 1.0, 0.5, -1.5])),
        "logit_softcap": draw(maybe(st.sampled_from([1.0, 4.0]))),
        "per_expert_scale": draw(st.booleans()),
        "global_scale": draw(st.booleans()),
        "logits_dtype": draw(st.sampled_from(["float32", "model"])),
        "input_transform": draw(maybe(transforms(hidden, hidden))),
    }
    if score == "sparsemixer":
        return RoutingSpec(**common, jitter=draw(st.sampled_from([0.01, 0.3])))
    ways = ["logit"] if score in ("softmax_topk", "sigmoid_topk") else ["score", "logit"]
    choose = draw(st.sampled_from(ways if focus == "sets" else [*ways, "hash"]))
    modalities = 2 if focus == "sets" else 1
    groups = None
    if choose != "hash" and modalities == 1:
        groups = draw(maybe(group_specs(choosable, top_k)))
    renormalise = draw(st.sampled_from(["sum", "none", "p_norm", "max_sum"]))
    eps = {"sum": st.sampled_from([0.0, 1e-20, 0.1]), "max_sum": st.sampled_from([1e-9, 0.5])}.get(renormalise, st.just(0.0))
    return RoutingSpec(
        **common,
        choose=choose,
        selection_bias=choose != "hash" and draw(st.booleans()),
        groups=groups,
        renormalise=renormalise,
        eps=draw(eps),
        p=draw(st.sampled_from([3.0, 1.0, 2.0])) if renormalise == "p_norm" else 2.0,
        modalities=modalities,
    )


@st.composite
def group_specs(draw: st.DrawFn, choosable: int, top_k: int) -> GroupSpec:
    counts = [n for n in (1, 2, 3, 4) if choosable % n == 0]
    count = draw(st.sampled_from(counts))
    size = choosable // count
    kept = draw(st.integers(-(-top_k // size), count))
    score = draw(st.sampled_from(["max", "top2_sum"] if size > 1 else ["max"]))
    return GroupSpec(count=count, kept=kept, score=score, fill=draw(st.sampled_from(["-inf", "zero"])))


@st.composite
def shared_specs(draw: st.DrawFn, *, router: bool) -> SharedSpec:
    gated = draw(st.booleans())
    gate = "router" if router else draw(st.sampled_from(["none", "sigmoid"]))
    return SharedSpec(
        width=draw(st.sampled_from(SIZES)),
        count=draw(st.integers(1, 3)),
        gate=gate,
        activation=draw(activations(gated)),
        gated=gated,
        bias=gate != "router" and draw(st.booleans()),
    )


@st.composite
def specs(draw: st.DrawFn) -> MoESpec:
    """Every feature of a spec, together as far as they combine."""
    focus = draw(st.sampled_from(FOCI))  # what a free draw would rarely give
    hidden = draw(st.sampled_from(SIZES))
    num_experts = draw(st.sampled_from([6, 4, 8] if focus in ("sets", "sparsemixer") else [6, 4, 3, 8, 2, 5, 7, 1]))
    zero_experts = 0 if focus in ("sets", "input") else draw(st.sampled_from([0, 0, 0, 1, 2]))
    most = num_experts // 2 if focus == "sets" else min(4, num_experts)
    top_k = 2 if focus == "sparsemixer" else draw(st.sampled_from([k for k in (2, 3, 1, 4) if k <= most]))
    routing = draw(routings(num_experts, num_experts + zero_experts, top_k, hidden, focus))
    gated = draw(st.booleans())
    latent = draw(maybe(st.sampled_from(SIZES)))
    input_transform = None if latent is None else draw(transforms(hidden, latent))
    width = hidden if latent is None else latent
    bias, row_norm = focus != "input" and draw(st.booleans()), None
    if focus not in ("sets", "input"):
        row_norm = draw(maybe(norms(width, st.just(1e-3))))
    if focus == "input":
        routing = dataclasses.replace(routing, weights_on="input")
    size: Any = draw(st.sampled_from(SIZES))
    if routing.modalities > 1 and draw(st.booleans()):
        size = tuple(draw(st.sampled_from(SIZES)) for _ in range(routing.modalities))
    on_output = focus != "router" and draw(st.booleans())
    shared = draw(shared_specs(router=True) if focus == "router" else maybe(shared_specs(router=False)))
    return MoESpec(
        hidden_size=hidden,
        num_experts=num_experts,
        top_k=top_k,
        routing=routing,
        experts=ExpertsSpec(
            intermediate_size=size, activation=draw(activations(gated)), gated=gated, bias=bias, row_norm=row_norm
        ),
        apply_routed_scale_to_output=on_output,
        routed_scaling_factor=draw(st.sampled_from([1.0, 2.5, 0.5])),
        shared=shared,
        input_transform=input_transform,
        output_transform=draw(transforms(width, hidden) if width != hidden else maybe(transforms(width, hidden))),
        final_transform=draw(maybe(transforms(hidden, hidden))),
        zero_experts=zero_experts,
        join="sum" if shared is None else draw(st.sampled_from(["sum", "average"])),
        output_bias=draw(st.booleans()),
    )


# ---- numbers


@dataclass(frozen=True)
class Storage:
    """How the experts' tensors lie in memory. pad: extra hidden features, filled with what must not be read."""

    gate_up: GateUp = "concat"
    strides: str = "contiguous"
    pad: int = 0


STORAGES = st.builds(
    Storage,
    gate_up=st.sampled_from(["concat", "interleaved"]),
    strides=st.sampled_from(["contiguous", "transposed", "sliced"]),
    pad=st.sampled_from([0, 0, 4, 8]),
)


def make_weights(
    spec: MoESpec, seed: int, dtype: torch.dtype = torch.float32, storage: Storage = Storage(), vocab: int = VOCAB
) -> LayerWeights:
    """Weights of a size that keeps every value near 1, rounded to `dtype` where a checkpoint would be."""
    generator = torch.Generator().manual_seed(seed)
    named: dict[str, Any] = {}
    sets: list[dict[str, Tensor]] = [{} for _ in range(spec.routing.modalities)]
    for name, shape in spec.weight_shapes(vocab_size=vocab).items():
        tensor = _numbers(name, shape, spec, generator)
        short, _, index = name.partition(".")
        if short in ("w13", "w2", "b13", "b2", "row_norm"):
            sets[int(index or 0)][short] = _stored(short, tensor.to(dtype), storage, generator)
        else:
            exact = not tensor.is_floating_point() or short in ("selection_bias", "per_expert_scale", "global_scale")
            named[name] = tensor if exact else tensor.to(dtype)
    gate_up: GateUp = storage.gate_up if spec.experts.gated else "none"
    named["experts"] = tuple(ExpertWeights.of(s, gate_up) for s in sets)
    for name, transform in spec.transforms().items():
        for i, op in enumerate(transform.ops):
            if isinstance(op, Custom):
                named[f"{name}.{i}"] = custom_function(op)
    return LayerWeights.of(spec, named)


def _numbers(name: str, shape: tuple[int, ...], spec: MoESpec, generator: torch.Generator) -> Tensor:
    if name == "hash_table":
        rows = torch.rand(shape[0], spec.num_experts + spec.zero_experts, generator=generator)
        return rows.argsort(-1)[:, : shape[1]]
    normal = torch.randn(shape, generator=generator)
    if name in ("per_expert_scale", "global_scale") or name.startswith("row_norm") or (len(shape) == 1 and "weight" in name):
        return 1 + 0.2 * normal.clamp(-3, 3)
    if name == "gate":
        return normal * 1.5 / shape[-1] ** 0.5
    if len(shape) == 1 or name.startswith(("b13", "b2")):
        return 0.3 * normal
    return normal * 1.2 / shape[-1] ** 0.5


def _stored(name: str, tensor: Tensor, storage: Storage, generator: torch.Generator) -> Tensor:
    dim = {"w13": 2, "w2": 1, "b2": 1, "row_norm": 0}.get(name)
    if storage.pad and dim is not None:
        shape = list(tensor.shape)
        shape[dim] = storage.pad
        # Padded outputs must be cut off unread. Padded inputs are multiplied by zeros, so they may hold any finite number.
        junk = torch.randn(shape, generator=generator) * 100 if name == "w13" else torch.full(shape, float("nan"))
        tensor = torch.cat([tensor, junk.to(tensor.dtype)], dim)
    if tensor.ndim != 3 or storage.strides == "contiguous":
        return tensor
    if storage.strides == "transposed":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    big = torch.full((tensor.shape[0], tensor.shape[1] + 3, tensor.shape[2] + 8), float("nan"), dtype=tensor.dtype)
    big[:, 1 : tensor.shape[1] + 1, : tensor.shape[2]] = tensor
    return big[:, 1 : tensor.shape[1] + 1, : tensor.shape[2]]


@dataclass(frozen=True)
class Tokens:
    """One rank's tokens and what its router needs beside them."""

    x: Tensor
    inputs: dict[str, Any] = field(default_factory=dict)

    def take(self, start: int, stop: int) -> Tokens:
        inputs = {}
        for name, value in self.inputs.items():
            if isinstance(value, TopK):
                shared = None if value.shared_weights is None else value.shared_weights[start:stop]
                cut = {"ids": value.ids[start:stop], "weights": value.weights[start:stop], "shared_weights": shared}
                inputs[name] = dataclasses.replace(value, **cut)
            else:
                inputs[name] = value[start:stop]
        return Tokens(self.x[start:stop], inputs)


def make_tokens(spec: MoESpec, seed: int, count: int, dtype: torch.dtype = torch.float32, vocab: int = VOCAB) -> Tokens:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, spec.hidden_size, generator=generator).to(dtype)
    inputs: dict[str, Any] = {}
    if spec.routing.choose == "hash":
        inputs["input_ids"] = torch.randint(vocab, (count,), generator=generator)
    if spec.routing.modalities > 1:
        inputs["token_types"] = torch.randint(spec.routing.modalities, (count,), generator=generator)
    if spec.routing.score == "external":
        keys = torch.rand(count, spec.num_experts + spec.zero_experts, generator=generator)
        ids = keys.argsort(-1)[:, : spec.top_k]
        ids = torch.where(torch.rand(ids.shape, generator=generator) < 0.15, -1, ids)
        w = torch.rand(ids.shape, generator=generator)
        inputs["topk"] = TopK(ids, torch.where(ids < 0, float("nan"), w))
    return Tokens(x, inputs)


def replay(spec: MoESpec, choices: list[Choice]) -> TopK:
    """The oracle's routing as a caller would pass it, so that ties cannot matter."""
    ids = torch.tensor([c.ids for c in choices], dtype=torch.int64).reshape(len(choices), spec.top_k)
    w = torch.tensor([c.weights for c in choices], dtype=torch.float32).reshape(len(choices), spec.top_k)
    shared = None
    if spec.shared is not None and spec.shared.gate == "router":
        shared = torch.tensor([c.shared_weights for c in choices]).reshape(len(choices), spec.shared.count)
    return TopK(ids, w, shared_weights=shared)


def replayed(spec: MoESpec, weights: LayerWeights, tokens: Tokens) -> Tokens:
    """The same tokens with the oracle's routing passed in."""
    if "topk" in tokens.inputs:
        return tokens
    return Tokens(tokens.x, {"topk": replay(spec, reference_route(spec, weights, tokens.x, **tokens.inputs))})


SEEDS = st.integers(0, 2**31 - 1)


# ---- layouts


@st.composite
def layouts(draw: st.DrawFn, num_experts: int, *, world: int = 4, least: int = 2) -> Layout:
    """Every mix of dp, ep and tp with at least `least` and at most `world` ranks."""
    shapes = [
        (dp, ep, tp)
        for dp in (1, 2)
        for ep in (1, 2, 3, 4, 8)
        for tp in (1, 2, 3, 4, 8)
        if least <= dp * ep * tp <= world and (ep * tp > 1 or dp > 1)
    ]
    dp, ep, tp = draw(st.sampled_from(shapes))
    tokens = draw(st.sampled_from(["replicated", "sharded"]))
    alone = ep * tp == 1
    shared = draw(
        st.sampled_from(["auto", "sharded", "replicated"] if tokens == "replicated" or alone else ["auto", "replicated"])
    )
    placement = draw(st.sampled_from([None, "linear", "round_robin", "explicit"]))
    redundant = 0
    if placement == "explicit":
        owners = draw(st.lists(st.integers(0, ep - 1), min_size=num_experts, max_size=num_experts))
        rows: list[list[int]] = [[e for e, owner in enumerate(owners) if owner == r] for r in range(ep)]
        for copy in draw(st.lists(st.integers(0, num_experts - 1), max_size=2)):
            rows[copy % ep].append(copy)
        placement = tuple(tuple(row) for row in rows)
    else:
        redundant = draw(st.sampled_from([0, 0, 1, 3]))
    return Layout(dp=dp, ep=ep, tp=tp, tokens=tokens, shared=shared, placement=placement, redundant=redundant, timeout=60.0)


@st.composite
def options_for(draw: st.DrawFn, layout: Layout) -> Options:
    spread = layout.tokens == "sharded" and bool(layout.split_axes)
    dispatch = draw(st.sampled_from(["auto", "allgather"] + ["alltoall"] * (layout.ep > 1))) if spread else "auto"
    outputs = ["replicate", "shard"] if spread else ["replicate", "partial", "shard"]
    return Options(
        output=draw(st.sampled_from(outputs)),
        dispatch=dispatch,
        backend=draw(st.sampled_from(["auto", "auto", "eager"])),
        reduce_dtype=draw(st.sampled_from([None, "float32"])),
    )


def token_counts(layout: Layout, rows: list[int]) -> list[int]:
    """Tokens per rank: one number per rank where tokens are sharded, one per copy otherwise."""
    per_copy = layout.ep * layout.tp
    return [rows[r % len(rows)] if layout.tokens == "sharded" else rows[r // per_copy % len(rows)] for r in range(layout.world)]


@st.composite
def problems(draw: st.DrawFn, world: int, least: int = 2):
    """A layer, a layout of `least` to `world` ranks, options, a seed, how weights are stored, and tokens of the ranks."""
    spec = draw(specs())
    layout = draw(layouts(spec.num_experts, world=world, least=least))
    rows = draw(st.lists(st.integers(0, 5), min_size=1, max_size=layout.world))
    return spec, layout, draw(options_for(layout)), draw(SEEDS), draw(STORAGES), rows
