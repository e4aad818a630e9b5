"""The same layer as people write it by hand in PyTorch: one dtype throughout, no care taken. The yardstick for rounding errors.

Shape suffixes: T tokens, K chosen experts, E experts, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moerunner import ActivationSpec, Custom, LayerWeights, Linear, MoESpec, RMSNorm


def plain_route(
    spec: MoESpec,
    weights: LayerWeights,
    x: Tensor,
    *,
    input_ids: Tensor | None = None,
    token_types: Tensor | None = None,
    logits: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """ids, weights without the routed scaling factor, and weights of router-weighted shared experts; differentiable."""
    r, t = spec.routing, {n: v.to(dtype) if v.is_floating_point() else v for n, v in weights.tensors.items()}
    if logits is None:
        seen = x.to(dtype)
        if r.input_transform is not None:
            seen = _transform("gate_transform", spec, weights, seen)
        logits = F.linear(seen, t["gate"], t.get("gate_bias"))
    z = logits.to(dtype) * r.logit_scale
    if r.logit_softcap is not None:
        z = torch.tanh(z / r.logit_softcap) * r.logit_softcap
    total = spec.num_experts + spec.zero_experts
    z, z_shared = z[:, :total], z[:, total:]
    if r.modalities > 1:
        assert token_types is not None
        mine = torch.arange(total) // (total // r.modalities) == token_types.reshape(-1, 1)
        z = z.masked_fill(~mine, -math.inf)
    if r.score == "sparsemixer":
        ids, w = _sparsemixer(z, r.jitter)
        shared = None
    else:
        score = {
            "softmax": lambda: z.softmax(-1),
            "sigmoid": z.sigmoid,
            "sigmoid_topk": z.sigmoid,
            "sqrtsoftplus": lambda: F.softplus(z).sqrt(),
            "softmax_topk": lambda: z,
        }[r.score]()
        if r.choose == "hash":
            assert input_ids is not None
            ids = t["hash_table"][input_ids.reshape(-1)]
        else:
            key = z if r.choose == "logit" else score
            if r.selection_bias:
                key = key + t["selection_bias"]
            if r.modalities > 1:
                key = key.masked_fill(~mine, -math.inf)
            if r.groups is not None:
                per_group = key.unflatten(-1, (r.groups.count, -1))
                best = per_group.amax(-1) if r.groups.score == "max" else per_group.topk(2).values.sum(-1)
                kept = torch.zeros_like(best, dtype=torch.bool).scatter(-1, best.topk(r.groups.kept).indices, True)
                empty = -math.inf if r.groups.fill == "-inf" else 0.0
                key = per_group.masked_fill(~kept.unsqueeze(-1), empty).flatten(-2)
            ids = key.topk(spec.top_k).indices
        w = score.gather(-1, ids)
        if r.score == "softmax_topk":
            w = w.softmax(-1)
        shared = z_shared.sigmoid() if z_shared.shape[-1] else None
        both = w if shared is None else torch.cat([w, shared], -1)
        if r.renormalise == "p_norm":
            both = both / both.abs().pow(r.p).sum(-1, keepdim=True).pow(1 / r.p)
        elif r.renormalise == "sum":
            both = both / (both.sum(-1, keepdim=True) + r.eps)
        elif r.renormalise == "max_sum":
            both = both / both.sum(-1, keepdim=True).clamp(min=r.eps)
        w, shared = both[:, : spec.top_k], None if shared is None else both[:, spec.top_k :]
    if r.per_expert_scale:
        w = w * t["per_expert_scale"][ids]
    if r.global_scale:
        w = w * t["global_scale"]
        shared = None if shared is None else shared * t["global_scale"]
    return ids, w, shared


def _sparsemixer(z: Tensor, jitter: float) -> tuple[Tensor, Tensor]:
    ids, weights, left = [], [], z
    for _ in range(2):
        top, chosen = left.max(-1, keepdim=True)
        far = ((top - z) / z.abs().clamp(min=top)) > 2 * jitter
        weights.append(left.masked_fill(far, -math.inf).softmax(-1).gather(-1, chosen))
        ids.append(chosen)
        left = left.scatter(-1, chosen, -math.inf)
    return torch.cat(ids, -1), torch.cat(weights, -1)


def plain_layer(
    spec: MoESpec,
    weights: LayerWeights,
    x: Tensor,
    ids: Tensor,
    w: Tensor,
    shared_w: Tensor | None = None,
) -> Tensor:
    """The layer with this routing (weights without the factor), everything in x's dtype; differentiable."""
    t: Mapping[str, Tensor] = {n: v.to(x.dtype) if v.is_floating_point() else v for n, v in weights.tensors.items()}
    factor, width = spec.routed_scaling_factor, spec.routed_hidden_size
    on_output = spec.apply_routed_scale_to_output
    w = w.to(x.dtype) if on_output else (w * factor).to(x.dtype)
    seen = x if spec.input_transform is None else _transform("input_transform", spec, weights, x)
    routed = torch.zeros(x.shape[0], width, dtype=x.dtype)
    size = spec.num_experts // spec.routing.modalities
    for e in range(spec.num_experts):
        tokens, slots = torch.where(ids == e)
        experts, local = weights.experts[e // size], e % size
        get = {n: _row(experts.get(n), local, x.dtype) for n in ("w13", "w2", "b13", "b2")}
        x_e = seen[tokens]
        if spec.routing.weights_on == "input":
            x_e = x_e * w[tokens, slots, None]
        h = F.linear(x_e, get["w13"][:, :width], get["b13"])
        y = F.linear(
            plain_activation(h, spec.experts.activation, experts.gate_up),
            get["w2"][:width],
            None if get["b2"] is None else get["b2"][:width],
        )
        if spec.experts.row_norm is not None:
            norm = experts.get("row_norm")
            y = _rms(y, None if norm is None else norm[:width], spec.experts.row_norm)
        if spec.routing.weights_on == "output":
            y = y * w[tokens, slots, None]
        routed = routed.index_add(0, tokens, y)
    if on_output:
        routed = routed * factor
    if spec.output_transform is not None:
        routed = _transform("output_transform", spec, weights, routed)
    if spec.zero_experts:
        share = torch.where(ids >= spec.num_experts, w, 0).sum(-1, keepdim=True)
        routed = routed + x * (share * factor if on_output else share)
    out = routed + _shared(spec, t, x, shared_w)
    if spec.join == "average":
        out = out / 2
    if spec.output_bias:
        out = out + t["output_bias"]
    return out if spec.final_transform is None else _transform("final_transform", spec, weights, out)


def _row(tensor: Tensor | None, e: int, dtype: torch.dtype) -> Any:
    return None if tensor is None else tensor[e].to(dtype)


def _shared(spec: MoESpec, t: Mapping[str, Tensor], x: Tensor, shared_w: Tensor | None) -> Tensor:
    s = spec.shared
    if s is None:
        return torch.zeros_like(x)
    gate_up = "concat" if s.gated else "none"
    if s.gate == "router":
        assert shared_w is not None
        parts = [
            F.linear(plain_activation(F.linear(x, t["shared_w13"][j]), s.activation, gate_up), t["shared_w2"][j])
            * (shared_w[:, j, None] * spec.routed_scaling_factor).to(x.dtype)
            for j in range(s.count)
        ]
        return torch.stack(parts).sum(0)
    h = plain_activation(F.linear(x, t["shared_w13"], t.get("shared_b13")), s.activation, gate_up)
    y = F.linear(h, t["shared_w2"], t.get("shared_b2"))
    return y * torch.sigmoid(F.linear(x, t["shared_gate"])) if s.gate == "sigmoid" else y


def plain_activation(h: Tensor, a: ActivationSpec, gate_up: str) -> Tensor:
    u: Tensor | None
    if gate_up == "none":
        g, u = h, None
    elif gate_up == "interleaved":
        g, u = h[..., ::2], h[..., 1::2]
    else:
        g, u = h.tensor_split(2, dim=-1)
    alpha, beta, limit = a.alpha, a.beta, a.limit
    if a.kind == "swigluoai":
        alpha = 1.702 if alpha is None else alpha
        beta = 1.0 if beta is None else beta
        limit = 7.0 if limit is None else limit
    if limit is not None and not a.clamp_after:
        g = g.clamp(max=limit)
    if a.kind in ("silu", "swigluoai"):
        head = g if a.gate_softcap is None else a.gate_softcap * torch.tanh(g / a.gate_softcap)
        y = head * torch.sigmoid(g * (1.0 if alpha is None else alpha))
    elif a.kind in ("gelu", "gelu_tanh"):
        y = F.gelu(g, approximate="none" if a.kind == "gelu" else "tanh")
    else:
        y = F.relu(g) if a.kind == "relu" else F.relu(g) ** 2
    if limit is not None and a.clamp_after:
        y = y.clamp(max=limit)
    if u is None:
        return y
    if limit is not None:
        u = u.clamp(-limit, limit)
    if a.up_softcap is not None:
        u = a.up_softcap * torch.tanh(u / a.up_softcap)
    return y * (u + beta) if beta else y * u


def _rms(x: Tensor, weight: Tensor | None, norm: RMSNorm) -> Tensor:
    if weight is not None:
        weight = (1.0 if norm.centred else 0.0) + weight.to(x.dtype)
    h = x * weight if weight is not None and norm.weight_first else x
    h = h if h.dtype == torch.float64 else h.float()
    h = (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + norm.eps)).to(x.dtype)
    return h if weight is None or norm.weight_first else h * weight


def _transform(name: str, spec: MoESpec, weights: LayerWeights, x: Tensor) -> Tensor:
    for i, op in enumerate(spec.transforms()[name].ops):
        weight, bias = (weights.tensors.get(f"{name}.{i}.{part}") for part in ("weight", "bias"))
        if isinstance(op, Custom):
            x = weights.functions[f"{name}.{i}"](x)
        elif isinstance(op, Linear):
            assert weight is not None
            x = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        else:
            x = _rms(x, weight, op)
    return x
