"""What the operators that route in one launch share: their arguments, of which one says nothing but numbers, and their results.

An operator takes logits, or few tokens and the gate, and a rule as numbers; `kernels/route.py` has one in Triton and
`kernels/cpu/route.py` one in C++. Both give what `ops/route.py` gives in float32.

Shape suffixes: T tokens, K chosen, S router-weighted shared experts, L = experts + S logits, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moerunner.errors import SpecError
from moerunner.spec import MoESpec
from moerunner.values import TopK

SCORES = ("softmax", "sigmoid", "sqrtsoftplus", "softmax_topk", "sigmoid_topk", "sparsemixer")
RENORMALISE = ("none", "sum", "max_sum", "p_norm")

Operator = Callable[..., tuple[Tensor, Tensor, Tensor]]


def route(operator: Operator, *args: Any, scale: bool = False, **rest: Any) -> TopK:
    """`ops.route.route` by an operator; see `arguments`."""
    return topk_of(*operator(*arguments(*args, scale=scale, **rest)), scale=scale)


def topk_of(ids: Tensor, weights: Tensor, shared: Tensor, *, scale: bool) -> TopK:
    """What an operator gave. scale: the routed scaling factor is in the weights."""
    return TopK(ids, weights, scaled=scale, shared_weights=shared if shared.shape[1] else None)


def arguments(
    logits: Tensor,
    spec: MoESpec,
    *,
    gate: Tensor | None = None,
    gate_bias: Tensor | None = None,
    selection_bias: Tensor | None = None,
    per_expert_scale: Tensor | None = None,
    global_scale: Tensor | None = None,
    hash_table: Tensor | None = None,
    input_ids: Tensor | None = None,
    token_types: Tensor | None = None,
    num_tokens: int | None = None,
    device: torch.device | None = None,
    scale: bool = False,
) -> tuple[Any, ...]:
    """An operator's, of those of `ops.route.route`: float32 logits (or narrower ones), or few tokens and gate [L, H] in place.

    num_tokens, device: of simulated routing, which this is not.
    """
    r = spec.routing
    g = r.groups
    if r.choose == "hash" and (hash_table is None or input_ids is None):
        raise SpecError("needs the tokens' ids", where="routing by hash table", next_step="Pass input_ids to the runner")
    if r.modalities > 1 and token_types is None:
        raise SpecError("needs the tokens' types", where="modality routing", next_step="Pass token_types to the runner")
    return (
        logits, gate, gate_bias, selection_bias, per_expert_scale, global_scale, hash_table if r.choose == "hash" else None,
        input_ids, token_types, spec.num_experts + spec.zero_experts, spec.top_k, SCORES.index(r.score),
        r.choose == "logit" or r.score == "sparsemixer", r.logit_scale, r.logit_softcap,
        g.count if g else 1, g.kept if g else 1, g is not None and g.score == "top2_sum",
        0.0 if g is not None and g.fill == "zero" else float("-inf"),
        RENORMALISE.index(r.renormalise), r.eps, r.p, r.jitter, r.modalities, spec.routed_scaling_factor if scale else 1.0,
        r.logits_dtype == "model",
    )  # fmt: skip


def empty(x: Tensor, gate: Tensor | None, experts: int, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Room for ids [T, K] int64, weights [T, K] and weights of shared experts [T, S], both float32."""
    tokens, device = x.shape[0], x.device
    shared = (x.shape[1] if gate is None else gate.shape[0]) - experts
    ids = torch.empty(tokens, top_k, dtype=torch.int64, device=device)
    weights = torch.empty(tokens, top_k, dtype=torch.float32, device=device)
    return ids, weights, torch.empty(tokens, shared, dtype=torch.float32, device=device)


def fake(x: Tensor, gate: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Results without data of an operator that is called with these arguments."""
    return empty(x, gate, rest[7], rest[8])
