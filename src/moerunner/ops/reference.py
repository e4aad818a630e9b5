"""The oracle: one MoE layer in float64, token by token and expert by expert.

Slow and simple on purpose. Nothing here is shared with the code it judges: formulas are written out once more, from
`RoutingSpec`, `ActivationSpec` and `MoESpec`. Vectors are one token's; there are no batches, no sorting, no ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from moerunner.errors import WeightsError
from moerunner.spec import ActivationSpec, Custom, Linear, MoESpec, RMSNorm, TransformSpec
from moerunner.values import LayerWeights, TopK


@dataclass(frozen=True)
class Choice:
    """One token's routing. margin: how far the last chosen key lies above the best one left out (inf where none is).

    With sparsemixer the order of the two and which logits lie near decide on the weights too: then it is the least distance.
    """

    ids: list[int]
    weights: list[float]
    shared_weights: list[float]
    margin: float


def reference(
    spec: MoESpec,
    weights: LayerWeights,
    x: Tensor,
    *,
    topk: TopK | None = None,
    router_logits: Tensor | None = None,
    router_input: Tensor | None = None,
    input_ids: Tensor | None = None,
    token_types: Tensor | None = None,
) -> Tensor:
    """What the layer must return, float64, with the shape of x. The arguments are those of `MoERunner.forward`."""
    for experts in weights.experts:
        if experts.format != "none":
            what = f"reads plain weights, these are in the format {experts.format!r}"
            raise WeightsError(what, where="the oracle", next_step="Dequantise them first")
    tokens = x.reshape(-1, spec.hidden_size).double().cpu()
    choices = reference_route(
        spec,
        weights,
        x,
        router_logits=router_logits,
        router_input=router_input,
        input_ids=input_ids,
        token_types=token_types,
        topk=topk,
    )
    out = [_layer(spec, weights, token, choice) for token, choice in zip(tokens, choices, strict=True)]
    return torch.stack(out).reshape(x.shape) if out else tokens.reshape(x.shape)


def reference_route(
    spec: MoESpec,
    weights: LayerWeights,
    x: Tensor,
    *,
    topk: TopK | None = None,
    router_logits: Tensor | None = None,
    router_input: Tensor | None = None,
    input_ids: Tensor | None = None,
    token_types: Tensor | None = None,
) -> list[Choice]:
    """Each token's experts and weights, without the routed scaling factor."""
    count = x.reshape(-1, spec.hidden_size).shape[0]
    if topk is not None:
        undo = spec.routed_scaling_factor if topk.scaled else 1.0
        none = torch.zeros(count, 0)
        shared = none if topk.shared_weights is None else topk.shared_weights.double() / undo
        rows = zip(topk.ids.tolist(), (topk.weights.double() / undo).tolist(), shared.tolist(), strict=True)
        return [Choice(ids, w, s, math.inf) for ids, w, s in rows]
    if router_logits is None:
        seen = (x if router_input is None else router_input).reshape(-1, spec.hidden_size).double().cpu()
        gate = weights.tensors["gate"].double().cpu()
        if spec.routing.input_transform is not None:
            seen = torch.stack([_transform("gate_transform", spec, weights, row) for row in seen]) if count else seen
        router_logits = seen @ gate.T
        if "gate_bias" in weights.tensors:
            router_logits = router_logits + weights.tensors["gate_bias"].double().cpu()
    logits = router_logits.reshape(count, router_logits.shape[-1]).double().cpu().tolist()
    ids = None if input_ids is None else input_ids.reshape(-1).tolist()
    types = None if token_types is None else token_types.reshape(-1).tolist()
    return [
        _route(spec, weights, logits[t], None if ids is None else ids[t], 0 if types is None else types[t])
        for t in range(count)
    ]


def _route(spec: MoESpec, weights: LayerWeights, logits: list[float], token_id: int | None, kind: int) -> Choice:
    r = spec.routing
    z = [v * r.logit_scale for v in logits]
    if r.logit_softcap is not None:
        z = [r.logit_softcap * math.tanh(v / r.logit_softcap) for v in z]
    total = spec.num_experts + spec.zero_experts
    z, z_shared = z[:total], z[total:]
    size = total // r.modalities
    allowed = range(kind * size, (kind + 1) * size)
    margin = math.inf
    learned = float(weights.tensors["global_scale"].detach()) if r.global_scale else 1.0
    if r.score == "sparsemixer":
        ids, w, edge = _sparsemixer(z, r.jitter)
        return Choice(ids, _times_scales(w, ids, weights, learned), [], min(edge, _gap(z, ids, allowed)))
    score = _scores(z, r.score, allowed)
    if r.choose == "hash":
        assert token_id is not None
        ids = weights.tensors["hash_table"][token_id].tolist()
    else:
        key = list(z) if r.choose == "logit" else list(score)
        if r.selection_bias:
            bias = weights.tensors["selection_bias"].double().reshape(-1).tolist()
            key = [k + b for k, b in zip(key, bias, strict=True)]
        if r.groups is not None:
            key, margin = _grouped(key, r.groups.count, r.groups.kept, r.groups.score, r.groups.fill)
        ids = sorted(allowed, key=lambda e: (-key[e], e))[: spec.top_k]
        margin = min(margin, _gap(key, ids, allowed))
    if r.score == "softmax_topk":
        top = max(z[e] for e in ids)
        exps = [math.exp(z[e] - top) for e in ids]
        w = [v / sum(exps) for v in exps]
    else:
        w = [score[e] for e in ids]
    shared = [_sigmoid(v) for v in z_shared]
    if r.renormalise == "p_norm":
        norm = sum(abs(v) ** r.p for v in w + shared) ** (1 / r.p)
        w, shared = [v / norm for v in w], [v / norm for v in shared]
    elif r.renormalise != "none":
        sum_w = sum(w + shared)
        norm = sum_w + r.eps if r.renormalise == "sum" else max(sum_w, r.eps)
        w = [v / norm if norm else math.nan for v in w]
        shared = [v / norm if norm else math.nan for v in shared]
    return Choice(ids, _times_scales(w, ids, weights, learned), [v * learned for v in shared], margin)


def _times_scales(w: list[float], ids: list[int], weights: LayerWeights, learned: float) -> list[float]:
    scale = weights.tensors.get("per_expert_scale")
    return [v * learned * (1.0 if scale is None else float(scale.double()[e])) for v, e in zip(w, ids, strict=True)]


def _gap(key: list[float], ids: list[int], allowed: range) -> float:
    left = [key[e] for e in allowed if e not in ids]
    return min(key[e] for e in ids) - max(left) if left else math.inf


def _sigmoid(v: float) -> float:
    return 1 / (1 + math.exp(-v)) if v >= 0 else math.exp(v) / (1 + math.exp(v))


def _scores(z: list[float], score: str, allowed: range) -> list[float]:
    if score == "softmax":
        top = max(z[e] for e in allowed)
        exps = {e: math.exp(z[e] - top) for e in allowed}
        total = sum(exps.values())
        return [exps[e] / total if e in exps else 0.0 for e in range(len(z))]
    if score in ("sigmoid", "sigmoid_topk"):
        return [_sigmoid(v) for v in z]
    if score == "sqrtsoftplus":
        return [math.sqrt(max(v, 0.0) + math.log1p(math.exp(-abs(v)))) for v in z]
    return z


def _grouped(key: list[float], count: int, kept: int, how: str, fill: str) -> tuple[list[float], float]:
    size = len(key) // count
    groups = [key[g * size : (g + 1) * size] for g in range(count)]
    best = [max(g) if how == "max" else sum(sorted(g)[-2:]) for g in groups]
    winners = sorted(range(count), key=lambda g: (-best[g], g))[:kept]
    empty = -math.inf if fill == "-inf" else 0.0
    masked = [v if e // size in winners else empty for e, v in enumerate(key)]
    return masked, _gap(best, winners, range(count))


def _sparsemixer(z: list[float], jitter: float) -> tuple[list[int], list[float], float]:
    ids, w, edge = [], [], math.inf
    for _ in range(2):
        left = [e for e in range(len(z)) if e not in ids]
        best = max(left, key=lambda e: (z[e], -e))
        near = [e for e in left if z[e] == z[best] or (z[best] - z[e]) / max(abs(z[e]), z[best]) <= 2 * jitter]
        w.append(1 / sum(math.exp(z[e] - z[best]) for e in near))
        edge = min([edge, *(abs(z[best] - z[e] - 2 * jitter * max(abs(z[e]), z[best])) for e in left if e != best)])
        ids.append(best)
    return ids, w, min(edge, z[ids[0]] - z[ids[1]])


def _layer(spec: MoESpec, weights: LayerWeights, x: Tensor, choice: Choice) -> Tensor:
    seen = x if spec.input_transform is None else _transform("input_transform", spec, weights, x)
    routed = torch.zeros(spec.routed_hidden_size, dtype=torch.float64)
    zero = torch.zeros(spec.hidden_size, dtype=torch.float64)
    for e, w in zip(choice.ids, choice.weights, strict=True):
        if e < 0:
            continue
        if e >= spec.num_experts:
            zero += w * spec.routed_scaling_factor * x
        elif spec.routing.weights_on == "input":
            factor = 1.0 if spec.apply_routed_scale_to_output else spec.routed_scaling_factor
            routed += _expert(spec, weights, e, w * factor * seen) * (spec.routed_scaling_factor / factor)
        else:
            routed += w * spec.routed_scaling_factor * _expert(spec, weights, e, seen)
    if spec.output_transform is not None:
        routed = _transform("output_transform", spec, weights, routed)
    out = routed + zero + _shared(spec, weights, x, choice)
    if spec.join == "average":
        out = out / 2
    if spec.output_bias:
        out = out + weights.tensors["output_bias"].double().cpu()
    return out if spec.final_transform is None else _transform("final_transform", spec, weights, out)


def _expert(spec: MoESpec, weights: LayerWeights, e: int, x: Tensor) -> Tensor:
    size = spec.num_experts // spec.routing.modalities
    experts, e = weights.experts[e // size], e % size
    width = spec.routed_hidden_size
    w13, w2 = experts.w13[e].double().cpu()[:, :width], experts.w2[e].double().cpu()[:width]
    b13, b2 = experts.get("b13"), experts.get("b2")
    y = _mlp(x, w13, w2, _row(b13, e), _row(b2, e, width), spec.experts.activation, experts.gate_up)
    norm = spec.experts.row_norm
    scale = experts.get("row_norm")
    return y if norm is None else _rms(y, None if scale is None else scale[:width], norm)


def _row(bias: Tensor | None, e: int, width: int | None = None) -> Tensor | None:
    return None if bias is None else bias[e].double().cpu()[:width]


def _shared(spec: MoESpec, weights: LayerWeights, x: Tensor, choice: Choice) -> Tensor:
    s = spec.shared
    if s is None:
        return torch.zeros_like(x)
    t = {n: v.double().cpu() for n, v in weights.tensors.items() if n.startswith("shared_")}
    layout = "concat" if s.gated else "none"
    if "shared_gate_proj" in t:
        t["shared_w13"] = torch.cat([t["shared_gate_proj"], t["shared_up_proj"]], dim=-2)
        if "shared_gate_proj_bias" in t:
            t["shared_b13"] = torch.cat([t["shared_gate_proj_bias"], t["shared_up_proj_bias"]])
    if s.gate == "router":
        factor = spec.routed_scaling_factor
        parts = [_mlp(x, t["shared_w13"][j], t["shared_w2"][j], None, None, s.activation, layout) for j in range(s.count)]
        return torch.stack([w * factor * p for w, p in zip(choice.shared_weights, parts, strict=True)]).sum(0)
    y = _mlp(x, t["shared_w13"], t["shared_w2"], t.get("shared_b13"), t.get("shared_b2"), s.activation, layout)
    return y * torch.sigmoid(t["shared_gate"][0] @ x) if s.gate == "sigmoid" else y


def _mlp(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    b13: Tensor | None,
    b2: Tensor | None,
    activation: ActivationSpec,
    gate_up: str,
) -> Tensor:
    h = w13 @ x if b13 is None else w13 @ x + b13
    half = len(h) // 2
    if gate_up == "none":
        g, u = h, None
    elif gate_up == "interleaved":
        g, u = h[0::2], h[1::2]
    else:
        g, u = h[:half], h[half:]
    y = w2 @ gated_activation(g, u, activation)
    return y if b2 is None else y + b2


def gated_activation(g: Tensor, u: Tensor | None, activation: ActivationSpec) -> Tensor:
    """act(g) * (u + beta), element by element in the dtype of g; u is None where nothing gates."""
    a = activation
    oai = a.kind == "swigluoai"
    limit = 7.0 if oai and a.limit is None else a.limit
    alpha = (1.702 if oai else 1.0) if a.alpha is None else a.alpha
    beta = (1.0 if oai else 0.0) if a.beta is None else a.beta
    if limit is not None and not a.clamp_after:
        g = torch.minimum(g, torch.tensor(limit, dtype=g.dtype))
    if a.kind in ("silu", "swigluoai"):
        head = g if a.gate_softcap is None else a.gate_softcap * torch.tanh(g / a.gate_softcap)
        y = head / (1 + torch.exp(-alpha * g))
    elif a.kind == "gelu":
        y = 0.5 * g * (1 + torch.erf(g / math.sqrt(2)))
    elif a.kind == "gelu_tanh":
        y = 0.5 * g * (1 + torch.tanh(math.sqrt(2 / math.pi) * (g + 0.044715 * g**3)))
    else:
        positive = torch.where(g > 0, g, torch.zeros_like(g))
        y = positive if a.kind == "relu" else positive**2
    if limit is not None and a.clamp_after:
        y = torch.minimum(y, torch.tensor(limit, dtype=y.dtype))
    if u is None:
        return y
    if limit is not None:
        u = torch.clamp(u, -limit, limit)
    if a.up_softcap is not None:
        u = a.up_softcap * torch.tanh(u / a.up_softcap)
    return y * (u + beta)


def _rms(x: Tensor, weight: Tensor | None, norm: RMSNorm) -> Tensor:
    factor = torch.ones_like(x) if weight is None else weight.double().cpu() + norm.centred
    scaled = x * factor if norm.weight_first else x
    y = scaled / math.sqrt(float((scaled * scaled).mean()) + norm.eps)
    return y if norm.weight_first else y * factor


def _transform(name: str, spec: MoESpec, weights: LayerWeights, x: Tensor) -> Tensor:
    transform: TransformSpec = spec.transforms()[name]
    for i, op in enumerate(transform.ops):
        if isinstance(op, Custom):
            x = weights.functions[f"{name}.{i}"](x[None])[0].double()
            continue
        weight = weights.tensors.get(f"{name}.{i}.weight")
        if isinstance(op, Linear):
            assert weight is not None
            bias = weights.tensors.get(f"{name}.{i}.bias")
            x = weight.double().cpu() @ x + (0 if bias is None else bias.double().cpu())
        else:
            x = _rms(x, weight, op)
    return x
