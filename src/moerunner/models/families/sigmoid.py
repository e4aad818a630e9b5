"""Families that score every expert by a sigmoid of its own logit, without groups."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moerunner.errors import UnsupportedError
from moerunner.models.entry import Family, Keys, Router, activation, hf, renormalised
from moerunner.models.families.common import (
    CORRECTED,
    EXPERTS,
    HOLDS_NORM,
    ONE_SHARED,
    SHARED,
    SHARED_BIASES,
    plain_shared,
)
from moerunner.spec import ActivationSpec, ExpertsSpec, MoESpec, RoutingSpec, SharedSpec

HOLDS_TOP_K = {"gate.top_k": "num_experts_per_tok"}
_BIAS_ON_BLOCK = {"selection_bias": "e_score_correction_bias"}
_TAKES_BIAS = ("x", ".e_score_correction_bias")


def routing(**how: Any) -> RoutingSpec:
    """Sigmoid, a correction bias, weights divided by their sum; how: what is otherwise."""
    return RoutingSpec(**{"score": "sigmoid", "selection_bias": True, "renormalise": "sum", **how})


def layer(
    c: Keys,
    experts: str,
    rule: RoutingSpec,
    act: ActivationSpec,
    *,
    width: str = "moe_intermediate_size",
    factor: str | None = None,
    apply_routed_scale_to_output: bool,
    **more: Any,
) -> MoESpec:
    """experts, width, factor: the keys of their number, of their intermediate size, and of the routed scaling factor."""
    return MoESpec(
        hidden_size=c("hidden_size"),
        num_experts=c(experts),
        top_k=c("num_experts_per_tok"),
        routing=rule,
        experts=ExpertsSpec(intermediate_size=c(width), activation=act),
        routed_scaling_factor=c(factor) if factor else 1.0,
        apply_routed_scale_to_output=apply_routed_scale_to_output,
        **more,
    )


def wide_shared(c: Keys, width: str, act: ActivationSpec) -> SharedSpec | None:
    """One shared expert with a width of its own; of width 0, it adds 0."""
    return SharedSpec(width=c(width), activation=act) if c(width) else None


def _afmoe(c: Keys) -> MoESpec:
    return layer(
        c,
        "num_experts",
        routing(eps=1e-20, logits_dtype="model"),
        activation(c("hidden_act")),
        shared=plain_shared(c, "num_shared_experts"),
        factor="route_scale",
        apply_routed_scale_to_output=False,
    )


def _flint(c: Keys) -> MoESpec:
    act = activation(c("hidden_act"))
    norm = {"renormalise": "none", **renormalised(c("norm_topk_prob"))}
    return layer(
        c,
        "num_experts",
        routing(selection_bias=False, **norm),
        act,
        shared=wide_shared(c, "shared_expert_intermediate_size", act),
        apply_routed_scale_to_output=False,
    )


def _dots3_note_vision_encoder(c: Keys) -> MoESpec:
    rule, act = routing(eps=1e-20), activation(c("hidden_act"))
    return layer(c, "num_local_experts", rule, act, factor="router_scaling_factor", apply_routed_scale_to_output=False)


def _hy_v3(c: Keys) -> MoESpec:
    """Where the config asks for no shared experts, there is one as wide as a dense layer."""
    act, count = activation(c("hidden_act")), c("num_shared_experts")
    width = c("moe_intermediate_size") if count else c("intermediate_size")
    shared = SharedSpec(width=width, count=count or 1, activation=act, bias=c("mlp_bias"))
    return replace(_dots3_note_vision_encoder(c), shared=shared, apply_routed_scale_to_output=False)


def _laguna(c: Keys) -> MoESpec:
    if c("moe_apply_router_weight_on_input"):
        raise UnsupportedError("moe_apply_router_weight_on_input is not defined by this family's own code")
    act, softcap = activation(c("hidden_act")), c("moe_router_logit_softcapping")
    return layer(
        c,
        "num_experts",
        routing(logits_dtype="model", logit_softcap=softcap if softcap > 0 else None),
        act,
        shared=wide_shared(c, "shared_expert_intermediate_size", act),
        factor="moe_routed_scaling_factor",
        apply_routed_scale_to_output=True,
    )


def _lfm2_moe(c: Keys) -> MoESpec:
    norm = {"renormalise": "none", **renormalised(c("norm_topk_prob"), eps=1e-6)}
    return layer(
        c,
        "num_experts",
        routing(logits_dtype="model", selection_bias=c("use_expert_bias"), **norm),
        ActivationSpec(kind="silu"),
        factor="routed_scaling_factor",
        apply_routed_scale_to_output=False,
    )


def _minimax_m2(c: Keys) -> MoESpec:
    rule, act = routing(logits_dtype="model"), activation(c("hidden_act"))
    return layer(c, "num_local_experts", rule, act, width="intermediate_size", apply_routed_scale_to_output=False)


TABLE = (
    Family(
        name="afmoe",
        blocks=hf("afmoe", "AfmoeSparseMoeBlock"),
        spec=_afmoe,
        weights=EXPERTS | SHARED | {"gate": "router.gate.weight", "selection_bias": "expert_bias"},
        router=Router("router", takes=("x", ".expert_bias")),
        holds={"router.top_k": "num_experts_per_tok", "router.route_scale": "route_scale"},
    ),
    Family(
        name="flint",
        blocks=hf("flint", "FlintSparseMoeBlock"),
        spec=_flint,
        weights=EXPERTS | ONE_SHARED,
        router=Router(flat=True),
        holds=HOLDS_NORM,
    ),
    Family(
        name="hy_v3",
        blocks=hf("hy_v3", "HYV3MoE"),
        spec=_hy_v3,
        weights=EXPERTS | SHARED | SHARED_BIASES | _BIAS_ON_BLOCK,
        router=Router(flat=True, takes=_TAKES_BIAS),
        holds=HOLDS_TOP_K | {"gate.router_scaling_factor": "router_scaling_factor"},
        ignored={"enable_moe_fp32_combine": "routed and shared experts are always added in float32"},
    ),
    Family(
        name="dots3_note_vision_encoder",
        blocks=hf("dots3_note", "Dots3NoteVisionMoE"),
        spec=_dots3_note_vision_encoder,
        weights=EXPERTS | _BIAS_ON_BLOCK,
        router=Router(takes=_TAKES_BIAS),
        holds=HOLDS_TOP_K | {"gate.router_scaling_factor": "router_scaling_factor"},
    ),
    Family(
        name="laguna",
        blocks=hf("laguna", "LagunaSparseMoeBlock"),
        spec=_laguna,
        weights=CORRECTED,
        router=Router(flat=True, logits=None),  # they are soft-capped already
        holds=HOLDS_TOP_K
        | {
            "gate.router_logit_softcapping": "moe_router_logit_softcapping",
            "routed_scaling_factor": "moe_routed_scaling_factor",
        },
    ),
    Family(
        name="lfm2_moe",
        blocks=hf("lfm2_moe", "Lfm2MoeSparseMoeBlock"),
        spec=_lfm2_moe,
        weights=EXPERTS | {"selection_bias": "expert_bias"},
        router=Router(flat=True, takes=("x", ".expert_bias")),
        holds=HOLDS_NORM | {"gate.routed_scaling_factor": "routed_scaling_factor", "gate.use_expert_bias": "use_expert_bias"},
    ),
    Family(
        name="minimax_m2",
        blocks=hf("minimax_m2", "MiniMaxM2SparseMoeBlock"),
        spec=_minimax_m2,
        weights=EXPERTS | _BIAS_ON_BLOCK,
        router=Router(flat=True, takes=_TAKES_BIAS),
        holds=HOLDS_TOP_K,
        training={"jitter_noise": "it adds noise to its input"},
        ignored={"router_jitter_noise": "noise in training only: see training"},
    ),
)
