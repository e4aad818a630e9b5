"""Families with DeepSeek-V3's routing: sigmoid scores, a correction bias, experts in groups."""

from __future__ import annotations

from moerunner.models.entry import Family, Keys, activation, groups, hf, renormalised
from moerunner.models.families.common import (
    CORRECTED,
    HOLDS_GROUPS,
    PLACEMENT,
    plain_shared,
)
from moerunner.spec import ExpertsSpec, MoESpec, RoutingSpec


def _grouped_sigmoid(c: Keys, experts: str, shared: str, *, apply_routed_scale_to_output: bool) -> MoESpec:
    """DeepSeek-V3's routing, which many families took over under other keys for the number of routed and shared experts."""
    return MoESpec(
        hidden_size=c("hidden_size"),
        num_experts=c(experts),
        top_k=c("num_experts_per_tok"),
        routing=RoutingSpec(
            score="sigmoid",
            selection_bias=True,
            groups=groups(c("n_group"), c("topk_group")),
            **renormalised(c("norm_topk_prob"), eps=1e-20),
        ),
        experts=ExpertsSpec(intermediate_size=c("moe_intermediate_size"), activation=activation(c("hidden_act"))),
        shared=plain_shared(c, shared),
        routed_scaling_factor=c("routed_scaling_factor"),
        apply_routed_scale_to_output=apply_routed_scale_to_output,
    )


def _deepseek_v3(c: Keys) -> MoESpec:
    return _grouped_sigmoid(c, "n_routed_experts", "n_shared_experts", apply_routed_scale_to_output=False)


def _exaone_moe(c: Keys) -> MoESpec:
    return _grouped_sigmoid(c, "num_experts", "num_shared_experts", apply_routed_scale_to_output=False)


TABLE = (
    Family(
        name="deepseek_v3",
        blocks=hf("deepseek_v3", "DeepseekV3MoE"),
        spec=_deepseek_v3,
        weights=CORRECTED,
        holds=HOLDS_GROUPS,
        ignored={"topk_method": "Transformers knows one method in this family", "moe_layer_freq": PLACEMENT},
    ),
    Family(
        name="glm4_moe",
        blocks=hf("glm4_moe", "Glm4MoeMoE"),
        spec=_deepseek_v3,
        weights=CORRECTED,
        holds=HOLDS_GROUPS,
    ),
    Family(
        name="glm4_moe_lite",
        blocks=hf("glm4_moe_lite", "Glm4MoeLiteMoE"),
        spec=_deepseek_v3,
        weights=CORRECTED,
        holds=HOLDS_GROUPS,
    ),
    Family(
        name="dots1",
        blocks=hf("dots1", "Dots1MoE"),
        spec=_deepseek_v3,
        weights=CORRECTED,
        holds=HOLDS_GROUPS,
    ),
    Family(
        name="exaone_moe",
        blocks=hf("exaone_moe", "ExaoneMoeSparseMoEBlock"),
        spec=_exaone_moe,
        weights=CORRECTED,
        holds=HOLDS_GROUPS,
    ),
    Family(
        name="kimi_linear",
        blocks=hf("kimi_linear", "KimiLinearMoE"),
        spec=_exaone_moe,
        weights=CORRECTED,
        holds=HOLDS_GROUPS,
    ),
)
