"""Families that score every expert by a softmax over all logits."""

from __future__ import annotations

from moerunner.errors import UnsupportedError
from moerunner.models.entry import Family, Keys, Router, View, activation, groups, hf, renormalised
from moerunner.models.families.common import (
    AT_ROUTER,
    EXPERTS,
    GATED_SHARED,
    HOLDS_NORM,
    PLACEMENT,
    SHARED,
    plain_shared,
)
from moerunner.spec import ExpertsSpec, MoESpec, RoutingSpec, SharedSpec


def _mixtral(c: Keys) -> MoESpec:
    return MoESpec(
        hidden_size=c("hidden_size"),
        num_experts=c("num_local_experts"),
        top_k=c("num_experts_per_tok"),
        routing=RoutingSpec(score="softmax", logits_dtype="model", renormalise="sum"),
        experts=ExpertsSpec(intermediate_size=c("intermediate_size"), activation=activation(c("hidden_act"))),
        apply_routed_scale_to_output=False,
    )


def _softmax(c: Keys, width: str, shared: SharedSpec | None = None, *, apply_routed_scale_to_output: bool) -> MoESpec:
    """Softmax of logits in the model's dtype, as in OLMoE and Qwen. width: the key of the experts' intermediate size."""
    return MoESpec(
        hidden_size=c("hidden_size"),
        num_experts=c("num_experts"),
        top_k=c("num_experts_per_tok"),
        routing=RoutingSpec(score="softmax", logits_dtype="model", **renormalised(c("norm_topk_prob"))),
        experts=ExpertsSpec(intermediate_size=c(width), activation=activation(c("hidden_act"))),
        shared=shared,
        apply_routed_scale_to_output=apply_routed_scale_to_output,
    )


def _olmoe(c: Keys) -> MoESpec:
    return _softmax(c, "intermediate_size", apply_routed_scale_to_output=False)


def _qwen3_moe(c: Keys) -> MoESpec:
    return _softmax(c, "moe_intermediate_size", apply_routed_scale_to_output=False)


def _qwen2_moe(c: Keys) -> MoESpec:
    width = c("shared_expert_intermediate_size")
    shared = SharedSpec(width=width, gate="sigmoid", activation=activation(c("hidden_act")))
    return _softmax(c, "moe_intermediate_size", shared, apply_routed_scale_to_output=False)


def _deepseek_v2(c: Keys) -> MoESpec:
    limits = groups(c("n_group"), c("topk_group"), score="max", fill="zero")
    method = c("topk_method")
    if method not in ("greedy", "group_limited_greedy"):
        raise UnsupportedError(f"topk_method {method!r} is not defined by this family's own code")
    if c("mlp_bias"):
        raise UnsupportedError("shared experts whose gate and up projections have a bias are not offered")
    return MoESpec(
        hidden_size=c("hidden_size"),
        num_experts=c("n_routed_experts"),
        top_k=c("num_experts_per_tok"),
        routing=RoutingSpec(score="softmax", groups=limits if method == "group_limited_greedy" else None),
        experts=ExpertsSpec(intermediate_size=c("moe_intermediate_size"), activation=activation(c("hidden_act"))),
        shared=plain_shared(c, "n_shared_experts"),
        routed_scaling_factor=c("routed_scaling_factor"),
        apply_routed_scale_to_output=False,
    )


def _ernie4_5_moe(c: Keys) -> MoESpec:
    if c("use_bias"):
        raise UnsupportedError("shared experts whose gate and up projections have a bias are not offered")
    return MoESpec(
        hidden_size=c("hidden_size"),
        num_experts=c("moe_num_experts"),
        top_k=c("moe_k"),
        routing=RoutingSpec(score="softmax", selection_bias=True, renormalise="max_sum", eps=c("moe_norm_min")),
        experts=ExpertsSpec(intermediate_size=c("moe_intermediate_size"), activation=activation(c("hidden_act"))),
        shared=plain_shared(c, "moe_num_shared_experts") if c("moe_num_shared_experts") else None,
        apply_routed_scale_to_output=False,
    )


def _jamba(c: Keys) -> MoESpec:
    return MoESpec(
        hidden_size=c("hidden_size"),
        num_experts=c("num_experts"),
        top_k=c("num_experts_per_tok"),
        routing=RoutingSpec(score="softmax", logits_dtype="model"),
        experts=ExpertsSpec(intermediate_size=c("intermediate_size"), activation=activation(c("hidden_act"))),
        apply_routed_scale_to_output=False,
    )


TABLE = (
    Family(
        name="mixtral",
        blocks=hf("mixtral", "MixtralSparseMoeBlock"),
        spec=_mixtral,
        weights=EXPERTS,
        router=Router(flat=True),
        holds={"gate.top_k": "num_experts_per_tok"},
        training={"jitter_noise": "it adds noise to its input"},
        ignored={"router_jitter_noise": "noise in training only: see training"},
    ),
    Family(
        name="qwen3_moe",
        blocks=hf("qwen3_moe", "Qwen3MoeSparseMoeBlock"),
        spec=_qwen3_moe,
        weights=EXPERTS,
        router=Router(flat=True),
        holds=HOLDS_NORM,
    ),
    Family(
        name="olmoe",
        blocks=hf("olmoe", "OlmoeSparseMoeBlock"),
        spec=_olmoe,
        weights=EXPERTS,
        router=Router(flat=True),
        holds=HOLDS_NORM,
    ),
    Family(
        name="flex_olmo",
        blocks=hf("flex_olmo", "FlexOlmoSparseMoeBlock"),
        spec=_olmoe,
        weights=EXPERTS,
        router=Router(flat=True),
        holds=HOLDS_NORM,
    ),
    Family(
        name="qwen2_moe",
        blocks=hf("qwen2_moe", "Qwen2MoeSparseMoeBlock"),
        spec=_qwen2_moe,
        weights=EXPERTS | GATED_SHARED,
        router=Router(flat=True),
        holds=HOLDS_NORM,
    ),
    Family(
        name="qwen3_next",
        blocks=hf("qwen3_next", "Qwen3NextSparseMoeBlock"),
        spec=_qwen2_moe,
        weights=EXPERTS | GATED_SHARED,
        router=Router(flat=True),
        holds=HOLDS_NORM,
    ),
    Family(
        name="deepseek_v2",
        blocks=hf("deepseek_v2", "DeepseekV2Moe"),
        spec=_deepseek_v2,
        weights=EXPERTS | SHARED,
        holds={
            "gate.top_k": "num_experts_per_tok",
            "gate.routed_scaling_factor": "routed_scaling_factor",
            "gate.topk_method": "topk_method",
            "gate.num_group": "n_group",
            "gate.topk_group": "topk_group",
        },
        ignored={"norm_topk_prob": "Transformers never renormalises in this family", "moe_layer_freq": PLACEMENT},
    ),
    Family(
        name="ernie4_5_moe",
        blocks=hf("ernie4_5_moe", "Ernie4_5_MoeSparseMoeBlock"),
        spec=_ernie4_5_moe,
        weights=EXPERTS | SHARED | {"selection_bias": View("gate.moe_statics.e_score_correction_bias", "reshaped")},
        router=Router(flat=True),
        holds={"gate.top_k": "moe_k", "gate.norm_min": "moe_norm_min"},
        ignored=dict.fromkeys(("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"), PLACEMENT),
    ),
    Family(
        name="jamba",
        blocks=hf("jamba", "JambaSparseMoeBlock"),
        spec=_jamba,
        weights=AT_ROUTER,
        router=Router("router", flat=True),
        holds={"router.top_k": "num_experts_per_tok"},
        ignored=dict.fromkeys(("expert_layer_period", "expert_layer_offset"), PLACEMENT),
    ),
)
