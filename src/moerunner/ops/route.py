"""From logits to expert ids and weights, for every formula of `RoutingSpec`.

All arithmetic is float32 (float64 for float64 logits). Ties go to the lowest expert id on every device. NaN counts as the
lowest key, so a bad row still gets distinct ids; its weights are NaN and it stays visibly bad.
Shape suffixes: T tokens, E experts that can be chosen (zero experts too), K chosen, S router-weighted shared experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moerunner.errors import SpecError
from moerunner.ops.precision import Product, linear, wide
from moerunner.spec import GroupSpec, MoESpec, RoutingSpec
from moerunner.values import TopK

_NEG = float("-inf")
_UNIT_SUM = 4096
"""Features of one sum of the matrix unit, which cuts off where others round: 7168 are 1.5e-6 off (H200), float32 0.2e-6."""
_FEW = 1 << 14  # keys up to which one stable sort is cheaper than ten small steps


def gate_logits(x_TH: Tensor, weight: Tensor, bias: Tensor | None, routing: RoutingSpec, product: Product = linear) -> Tensor:
    """The gate's product, [T, num_logits] in float32 (float64 for float64 tokens), or in the tokens' if the model has it so."""
    if routing.logits_dtype == "model":
        return product(x_TH, weight, bias)
    if not torch.is_autocast_enabled(x_TH.device.type):
        return _wide_logits(x_TH, weight, bias, product)
    with torch.autocast(x_TH.device.type, enabled=False):  # which expert wins must not depend on the caller's autocast
        return _wide_logits(x_TH, weight, bias, product)


def _wide_logits(x_TH: Tensor, weight: Tensor, bias: Tensor | None, product: Product) -> Tensor:
    if product is linear and _sums_are_wide(x_TH, weight, bias):
        pieces = zip(x_TH.split(_UNIT_SUM, dim=1), weight.split(_UNIT_SUM, dim=1), strict=True)
        parts = [torch.mm(x, w.T, out_dtype=torch.float32) for x, w in pieces]
        return sum(parts[1:] if bias is None else [*parts[1:], bias.float()], start=parts[0])
    x = wide(x_TH)
    return product(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _sums_are_wide(x_TH: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the matrix unit gives what a product in float32 would: it multiplies 16-bit numbers exactly, and sums in float32.

    PyTorch has it on GPUs, without a backward.
    """
    half = x_TH.dtype in (torch.bfloat16, torch.float16) and weight.dtype == x_TH.dtype
    if x_TH.dtype == torch.float16 and torch.backends.cuda.matmul.allow_fp16_accumulation:
        return False
    wanted = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x_TH, weight, bias))
    return x_TH.is_cuda and half and not wanted


def stable_topk(key_TE: Tensor, k: int) -> Tensor:
    """ids [T, k] of the largest keys, largest first, equal keys by ascending id; NaN is below everything.

    `torch.topk` leaves the order of equal values open and differs between devices. Few keys are sorted stably. Many: floats
    sort like their bits once negative numbers are flipped, so that key and id fit one int64 that has no equals.
    """
    key = torch.nan_to_num(key_TE, nan=_NEG, posinf=-_NEG, neginf=_NEG)
    if key.numel() <= _FEW or key.dtype == torch.float64:
        return key.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    key = key + 0.0  # makes -0.0 equal 0.0
    bits = key.float().contiguous().view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(torch.int64)
    count = key.shape[-1]
    ties = torch.arange(count - 1, -1, -1, device=key.device)
    best = (ordered * (1 << 32) + ties).topk(k, dim=-1).values
    return (count - 1) - (best & 0xFFFFFFFF)


def route(
    logits: Tensor | None,
    spec: MoESpec,
    *,
    selection_bias: Tensor | None = None,
    per_expert_scale: Tensor | None = None,
    global_scale: Tensor | None = None,
    hash_table: Tensor | None = None,
    input_ids: Tensor | None = None,
    token_types: Tensor | None = None,
    num_tokens: int | None = None,
    device: torch.device | None = None,
    scale: bool = False,
) -> TopK:
    """Ids and weights of the chosen experts.

    Args:
        logits: [T, spec.num_logits]; None only for simulated routing, which needs num_tokens and device.
        selection_bias, per_expert_scale: [E]; global_scale: [1]; hash_table: [vocab, K] int64.
        input_ids: [T], read by `choose="hash"`. token_types: [T], the modality set of each token.
        scale: multiply the weights by the routed scaling factor.
    """
    r = spec.routing
    if r.simulate is not None:
        top = _simulate(spec, num_tokens or 0, device)
        return _finish(top[0], top[1], None, spec, per_expert_scale, global_scale, scale)
    if logits is None:
        raise SpecError("needs logits", where=f"routing with score={r.score!r}", next_step="Pass router_logits or topk")
    z = wide(logits)
    if r.logit_scale != 1.0:
        z = z * r.logit_scale
    if r.logit_softcap is not None:
        z = r.logit_softcap * torch.tanh(z / r.logit_softcap)
    choosable = spec.num_experts + spec.zero_experts
    z_TE, shared_TS = z[:, :choosable], z[:, choosable:]
    if r.score == "sparsemixer":
        ids, weights = _sparsemixer(z_TE, r.jitter)
        return _finish(ids, weights, None, spec, per_expert_scale, global_scale, scale)
    own_TE = _own_set(z_TE, r.modalities, token_types) if r.modalities > 1 else None
    if own_TE is not None:
        z_TE = torch.where(own_TE, z_TE, _NEG)
    score = _scores(z_TE, r)
    if r.choose == "hash":
        ids = _by_table(hash_table, input_ids)
    else:
        key = z_TE if score is None or r.choose == "logit" else score
        if selection_bias is not None:
            key = key + selection_bias.to(key.dtype).reshape(-1)
        if own_TE is not None:
            key = torch.where(own_TE, key, _NEG)
        if r.groups is not None:
            key = _keep_groups(key, r.groups)
        ids = stable_topk(key, spec.top_k)
    if score is not None:
        weights = score.gather(1, ids)
    else:
        chosen = z_TE.gather(1, ids)
        weights = chosen.softmax(-1) if r.score == "softmax_topk" else chosen.sigmoid()
    shared = shared_TS.sigmoid() if shared_TS.shape[1] else None
    weights, shared = _renormalise(weights, shared, r)
    return _finish(ids, weights, shared, spec, per_expert_scale, global_scale, scale)


def _scores(z_TE: Tensor, r: RoutingSpec) -> Tensor | None:
    if r.score == "softmax":
        return z_TE.softmax(-1)
    if r.score == "sigmoid":
        return z_TE.sigmoid()
    return F.softplus(z_TE).sqrt() if r.score == "sqrtsoftplus" else None


def _keep_groups(key_TE: Tensor, groups: GroupSpec) -> Tensor:
    key_TGM = key_TE.unflatten(1, (groups.count, -1))
    clean = torch.nan_to_num(key_TGM, nan=_NEG, posinf=-_NEG, neginf=_NEG)
    best = clean.amax(-1) if groups.score == "max" else clean.topk(2, dim=-1).values.sum(-1)
    kept = torch.zeros_like(best, dtype=torch.bool).scatter_(1, stable_topk(best, groups.kept), True)
    return torch.where(kept.unsqueeze(-1), key_TGM, _NEG if groups.fill == "-inf" else 0.0).flatten(1)


def _renormalise(weights: Tensor, shared: Tensor | None, r: RoutingSpec) -> tuple[Tensor, Tensor | None]:
    if r.renormalise == "none":
        return weights, shared
    together = weights if shared is None else torch.cat([weights, shared], -1)
    if r.renormalise == "p_norm":
        together = together / together.norm(p=r.p, dim=-1, keepdim=True)
    else:
        total = together.sum(-1, keepdim=True)
        together = together / (total + r.eps if r.renormalise == "sum" else total.clamp(min=r.eps))
    return together[:, : weights.shape[1]], None if shared is None else together[:, weights.shape[1] :]


def _sparsemixer(z_TE: Tensor, jitter: float) -> tuple[Tensor, Tensor]:
    """Twice: the best expert, weighted by a softmax over the logits that lie close to it; then the same without it."""

    ids = stable_topk(z_TE, 2)

    def weigh(left: Tensor, chosen: Tensor) -> Tensor:
        top = left.gather(1, chosen)
        far = (top - z_TE) / z_TE.abs().clamp(min=top) > 2 * jitter
        return left.masked_fill(far, _NEG).softmax(-1).gather(1, chosen)

    first, second = ids.split(1, dim=1)
    return ids, torch.cat([weigh(z_TE, first), weigh(z_TE.scatter(1, first, _NEG), second)], 1)


def _by_table(table: Tensor | None, input_ids: Tensor | None) -> Tensor:
    if table is None or input_ids is None:
        raise SpecError("needs the tokens' ids", where="routing by hash table", next_step="Pass input_ids to the runner")
    return table[input_ids.reshape(-1)].to(torch.int64)


def _own_set(z_TE: Tensor, sets: int, token_types: Tensor | None) -> Tensor:
    if token_types is None:
        raise SpecError("needs the tokens' types", where="modality routing", next_step="Pass token_types to the runner")
    owner = torch.arange(z_TE.shape[1], device=z_TE.device) // (z_TE.shape[1] // sets)
    return owner == token_types.reshape(-1, 1)


def _simulate(spec: MoESpec, tokens: int, device: torch.device | None) -> tuple[Tensor, Tensor]:
    experts, k = spec.num_experts + spec.zero_experts, spec.top_k
    slots = torch.arange(tokens * k, device=device).reshape(tokens, k)
    if spec.routing.simulate == "balanced":
        ids = slots % experts
    elif spec.routing.simulate == "uniform":
        ids = stable_topk(torch.rand(tokens, experts, device=device), k)
    else:  # normal: one popularity per expert, the same for every token
        popularity = torch.randn(experts, device=device)
        ids = stable_topk(popularity - torch.rand(tokens, experts, device=device).log().neg().log(), k)
    return ids, torch.full((tokens, k), 1.0 / k, device=device)


def _finish(
    ids: Tensor,
    weights: Tensor,
    shared: Tensor | None,
    spec: MoESpec,
    per_expert_scale: Tensor | None,
    global_scale: Tensor | None,
    scale: bool,
) -> TopK:
    factor = spec.routed_scaling_factor if scale else 1.0
    if per_expert_scale is not None:
        weights = weights * per_expert_scale.to(weights.dtype)[ids]
    if global_scale is not None:
        weights = weights * global_scale.to(weights.dtype)
        shared = None if shared is None else shared * global_scale.to(shared.dtype)
    if factor != 1.0:
        weights = weights * factor
        shared = None if shared is None else shared * factor
    return TopK(ids, weights, scaled=scale, shared_weights=shared)
