"""Families with the routing of `sigmoid` whose experts are not plain SwiGLU: clamps, soft-caps, norms, a latent width, shared
experts that the router weighs.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from moerunner.errors import UnsupportedError
from moerunner.models.entry import Family, Keys, Router, activation, hf
from moerunner.models.families.common import CORRECTED, EXPERTS, NOT_READ, SHARED_BIASES
from moerunner.models.families.sigmoid import HOLDS_TOP_K, layer, routing, wide_shared
from moerunner.spec import ActivationSpec, Linear, MoESpec, RMSNorm, SharedSpec, TransformSpec

_CORRECTED = EXPERTS | {"selection_bias": "gate.e_score_correction_bias"}
_HOLDS_OAI = {
    f"{module}.{attribute}": attribute
    for module in ("experts", "shared_experts")
    for attribute in ("swiglu_alpha", "swiglu_limit")
}


def _inkling_text(c: Keys) -> MoESpec:
    """The shared experts have logits of their own, and share one sum with the chosen."""
    act, count = activation(c("hidden_act")), c("n_shared_experts")
    if not count:
        raise UnsupportedError("n_shared_experts is 0, which this family's own router does not know either")
    return layer(
        c,
        "n_routed_experts",
        routing(global_scale=True),
        act,
        shared=SharedSpec(width=c("moe_intermediate_size"), count=count, gate="router", activation=act),
        factor="route_scale",
        apply_routed_scale_to_output=False,
    )


def _inkling2_text(c: Keys) -> MoESpec:
    score = c("scoring_func")
    if score not in ("sigmoid", "sqrtsoftplus"):
        raise UnsupportedError(f"scoring_func {score!r} is not offered", next_step="Known: sigmoid, sqrtsoftplus")
    act = ActivationSpec(kind="silu", gate_softcap=c("mlp_gate_softcap"), up_softcap=c("mlp_up_softcap"))
    rule = routing(score=score, eps=1e-20)
    return layer(c, "n_routed_experts", rule, act, factor="route_scale", apply_routed_scale_to_output=False)


def _minimax_m3_vl_text(c: Keys) -> MoESpec:
    """OpenAI's gate in routed and shared experts, whatever hidden_act says."""
    act = ActivationSpec(kind="swigluoai", alpha=c("swiglu_alpha"), limit=c("swiglu_limit"))
    return layer(
        c,
        "num_local_experts",
        routing(logits_dtype="model"),
        act,
        width="intermediate_size",
        shared=wide_shared(c, "shared_intermediate_size", act),
        factor="routed_scaling_factor",
        apply_routed_scale_to_output=True,
    )


def _muse_spark_text(c: Keys) -> MoESpec:
    """Experts at a latent width, with a norm before all of them and one behind each."""
    hidden, latent = c("hidden_size"), c("moe_hidden_size")
    down = Linear(in_features=hidden, out_features=latent)
    before = RMSNorm(features=latent, eps=c("rms_norm_eps"), centred=True)
    behind = RMSNorm(features=latent, eps=c("post_norm_eps"), centred=True, weight_first=True)
    spec = layer(
        c,
        "num_local_experts",
        routing(eps=1e-15, logit_scale=c("output_multiplier")),
        activation(c("hidden_act")),
        input_transform=TransformSpec((down, before)),
        output_transform=TransformSpec((Linear(in_features=latent, out_features=hidden),)),
        factor="routed_scaling_factor",
        apply_routed_scale_to_output=False,
    )
    return replace(spec, experts=replace(spec.experts, row_norm=behind))


def _step3p5(c: Keys) -> MoESpec:
    """Clamps behind the activation, in some layers, of routed and shared experts apart."""
    act = activation(c("hidden_act"))
    shared_act = _clamped(act, _limit(c, "swiglu_limits_shared"))
    return layer(
        c,
        "n_routed_experts",
        routing(logits_dtype="model"),
        _clamped(act, _limit(c, "swiglu_limits")),
        shared=SharedSpec(width=c("share_expert_dim"), activation=shared_act, bias=c("mlp_bias")),
        factor="moe_router_scaling_factor",
        apply_routed_scale_to_output=True,
    )


def _limit(c: Keys, name: str) -> float:
    """This layer's limit, of a list that may not be there; 0 and None are no limit."""
    return (c.here(name) if c(name) else None) or math.inf


def _clamped(act: ActivationSpec, limit: float) -> ActivationSpec:
    return act if limit == math.inf else replace(act, limit=limit, clamp_after=True)


def _with_shared(answer: tuple[Any, ...], k: int) -> tuple[Tensor, ...]:
    """Its logits are those of the routed experts; the weights of the shared ones come last."""
    _, weights, ids, shared = answer
    return weights, ids, shared


TABLE = (
    Family(
        name="inkling_text",
        aliases=("inkling_mm_model",),
        blocks=hf("inkling", "InklingMoE"),
        spec=_inkling_text,
        weights=EXPERTS
        | {
            "selection_bias": "gate.e_score_correction_bias",
            "global_scale": "gate.global_scale",
            "shared_gate_proj": "shared_experts.gate_proj",
            "shared_up_proj": "shared_experts.up_proj",
            "shared_w2": "shared_experts.down_proj",
        },
        router=Router(logits=None, choice=_with_shared),
        holds=HOLDS_TOP_K | {"gate.route_scale": "route_scale"},
        ignored={
            **dict.fromkeys(("shared_expert_sink", "rms_norm_eps_moe_gate"), NOT_READ),
            **dict.fromkeys(("log_scaling_alpha", "log_scaling_n_floor"), "attention"),
        },
    ),
    Family(
        name="inkling2_text",
        aliases=("inkling2",),
        blocks=hf("inkling2", "Inkling2SparseMoeBlock"),
        spec=_inkling2_text,
        weights=_CORRECTED,
        router=Router(flat=True),
        holds=HOLDS_TOP_K
        | {
            "gate.routed_scaling_factor": "route_scale",
            "experts.act_fn.gate_softcap.softcap": "mlp_gate_softcap",
            "experts.act_fn.up_softcap.softcap": "mlp_up_softcap",
        },
        ignored=dict.fromkeys(("log_scaling_alpha", "log_scaling_n_floor"), "attention"),
    ),
    Family(
        name="minimax_m3_vl_text",
        aliases=("minimax_m3_vl",),
        blocks=hf("minimax_m3_vl", "MiniMaxM3VLSparseMoeBlock"),
        spec=_minimax_m3_vl_text,
        weights=_CORRECTED
        | {"shared_w13": "shared_experts.gate_up_proj.weight", "shared_w2": "shared_experts.down_proj.weight"},
        router=Router(flat=True),
        holds=HOLDS_TOP_K | _HOLDS_OAI | {"routed_scaling_factor": "routed_scaling_factor"},
        ignored={"index_topk_blocks": "attention", "router_jitter_noise": NOT_READ},
    ),
    Family(
        name="muse_spark_text",
        aliases=("muse_spark",),
        blocks=hf("muse_spark", "MuseSparkMoE"),
        spec=_muse_spark_text,
        weights=_CORRECTED
        | {
            "row_norm": "experts.post_expert_norm.weight",
            "input_transform.0.weight": "pre_expert_proj.weight",
            "input_transform.1.weight": "pre_expert_norm.weight",
            "output_transform.0.weight": "post_expert_proj.weight",
        },
        router=Router(logits=None),  # they are scaled already
        holds=HOLDS_TOP_K
        | {
            "gate.output_multiplier": "output_multiplier",
            "gate.routed_scaling_factor": "routed_scaling_factor",
            "pre_expert_norm.eps": "rms_norm_eps",
            "experts.post_expert_norm.eps": "post_norm_eps",
        },
        ignored={"qk_scale_factor": "attention"},
    ),
    Family(
        name="step3p5",
        aliases=("step3p7",),
        blocks=hf("step3p7", "Step3p7SparseMoeBlock"),
        spec=_step3p5,
        weights=CORRECTED | SHARED_BIASES,
        router=Router(flat=True),
        holds=HOLDS_TOP_K
        | {
            "routed_scaling_factor": "moe_router_scaling_factor",
            "experts.limit": partial(_limit, name="swiglu_limits"),
            "shared_experts.limit": partial(_limit, name="swiglu_limits_shared"),
        },
        ignored={"query_pre_attn_scalar": "attention"},
    ),
)
