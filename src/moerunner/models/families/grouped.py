"""Families with DeepSeek-V3's routing: sigmoid scores, a correction bias, experts in groups."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moerunner.models.entry import Family, Keys, Router, activation, groups, hf, renormalised
from moerunner.models.families.common import (
    CORRECTED,
    HOLDS_GROUPS,
    HOLDS_NORM,
    NOT_READ,
    PLACEMENT,
    plain_shared,
)
from moerunner.spec import (
    ActivationSpec,
    ExpertsSpec,
    Linear,
    MoESpec,
    RMSNorm,
    RoutingSpec,
    SharedSpec,
    TransformSpec,
)


def _routing(c: Keys, experts: str, **how: Any) -> RoutingSpec:
    """experts: the key of their number. how: what is done with the groups otherwise than in DeepSeek-V3."""
    return RoutingSpec(
        score="sigmoid",
        selection_bias=True,
        groups=groups(c("n_group"), c("topk_group"), experts=c(experts), top_k=c("num_experts_per_tok"), **how),
        **renormalised(c("norm_topk_prob"), eps=1e-20),
    )


def _grouped_sigmoid(c: Keys, experts: str, shared: SharedSpec | None, *, apply_routed_scale_to_output: bool) -> MoESpec:
    """The layer of DeepSeek-V3. experts: the key of their number."""
    return MoESpec(
        hidden_size=c("hidden_size"),
        num_experts=c(experts),
        top_k=c("num_experts_per_tok"),
        routing=_routing(c, experts),
        experts=ExpertsSpec(intermediate_size=c("moe_intermediate_size"), activation=activation(c("hidden_act"))),
        shared=shared,
        routed_scaling_factor=c("routed_scaling_factor"),
        apply_routed_scale_to_output=apply_routed_scale_to_output,
    )


def _deepseek_v3(c: Keys) -> MoESpec:
    shared = plain_shared(c, "n_shared_experts")
    return _grouped_sigmoid(c, "n_routed_experts", shared, apply_routed_scale_to_output=False)


def _exaone_moe(c: Keys) -> MoESpec:
    shared = plain_shared(c, "num_shared_experts")
    return _grouped_sigmoid(c, "num_experts", shared, apply_routed_scale_to_output=False)


def _mimo_v2_flash(c: Keys) -> MoESpec:
    return _grouped_sigmoid(c, "n_routed_experts", None, apply_routed_scale_to_output=False)


def _beam(c: Keys) -> MoESpec:
    return _grouped_sigmoid(c, "num_experts", None, apply_routed_scale_to_output=True)


def _axk1(c: Keys) -> MoESpec:
    """The sum is normed, where other families have a norm behind the block."""
    norm = RMSNorm(features=c("hidden_size"), eps=c("rms_norm_eps"))
    return replace(_deepseek_v3(c), final_transform=TransformSpec((norm,)), apply_routed_scale_to_output=False)


def _axk2(c: Keys) -> MoESpec:
    """An expert of a group that lost has key 0, and is still chosen before one whose key is negative."""
    return replace(_deepseek_v3(c), routing=_routing(c, "n_routed_experts", fill="zero"), apply_routed_scale_to_output=False)


def _dots3_note_text(c: Keys) -> MoESpec:
    act, width = activation(c("hidden_act")), c("shared_experts_intermediate_size")
    shared = SharedSpec(width=width, count=c("n_shared_experts"), activation=act)
    return _grouped_sigmoid(c, "n_routed_experts", shared, apply_routed_scale_to_output=False)


def _hy_v4(c: Keys) -> MoESpec:
    """The routed experts are always silu, with clamps; the shared ones follow the config, without."""
    act = ActivationSpec(kind="silu", limit=c("swiglu_limit"))
    spec = _deepseek_v3(c)
    return replace(spec, experts=replace(spec.experts, activation=act), apply_routed_scale_to_output=False)


def _glm5_next_text(c: Keys) -> MoESpec:
    """As `_hy_v4`, with the clamps in the shared experts too."""
    spec, act = _hy_v4(c), replace(activation(c("hidden_act")), limit=c("swiglu_limit"))
    shared = spec.shared and replace(spec.shared, activation=act)
    return replace(spec, shared=shared, apply_routed_scale_to_output=False)


def _nemotron_h(c: Keys) -> MoESpec:
    """Experts without a gate that work at a latent width, where there is one; router and shared experts at the full width."""
    hidden, latent, bias = c("hidden_size"), c("moe_latent_size"), c("mlp_bias")
    act, width = activation(c("mlp_hidden_act")), c("moe_shared_expert_intermediate_size") or c("intermediate_size")
    down = up = None
    if latent is not None:
        down = TransformSpec((Linear(in_features=hidden, out_features=latent, bias=bias),))
        up = TransformSpec((Linear(in_features=latent, out_features=hidden, bias=bias),))
    return MoESpec(
        hidden_size=hidden,
        num_experts=c("n_routed_experts"),
        top_k=c("num_experts_per_tok"),
        routing=_routing(c, "n_routed_experts"),
        experts=ExpertsSpec(intermediate_size=c("moe_intermediate_size"), activation=act, gated=False),
        shared=SharedSpec(width=width, activation=act, gated=False, bias=bias),
        input_transform=down,
        output_transform=up,
        routed_scaling_factor=c("routed_scaling_factor"),
        apply_routed_scale_to_output=False,
    )


_IGNORED = {"topk_method": NOT_READ, "moe_layer_freq": PLACEMENT}
_KIMI_IGNORED = _IGNORED | dict.fromkeys(("moe_router_activation_func", "use_grouped_topk"), NOT_READ)
_HOLDS_LIMIT = HOLDS_GROUPS | {"experts.swiglu_limit": "swiglu_limit"}
_UNSHARED = {name: path for name, path in CORRECTED.items() if not name.startswith("shared")}

_DEEPSEEK_V3 = Family(
    name="deepseek_v3",
    aliases=("kimi_k25",),
    blocks=hf("deepseek_v3", "DeepseekV3MoE"),
    spec=_deepseek_v3,
    weights=CORRECTED,
    holds=HOLDS_GROUPS,
    ignored=_IGNORED,
)
_KIMI_LINEAR = _DEEPSEEK_V3.like("kimi_linear", "KimiLinearMoE", spec=_exaone_moe, ignored=_KIMI_IGNORED)
_HY_V4 = _DEEPSEEK_V3.like("hy_v4", "HYV4MoE", spec=_hy_v4, holds=_HOLDS_LIMIT)

TABLE = (
    _DEEPSEEK_V3,
    _DEEPSEEK_V3.like("deepseek_v32", "DeepseekV32MoE"),
    _DEEPSEEK_V3.like("glm4_moe", "Glm4MoeMoE"),
    _DEEPSEEK_V3.like("glm4_moe_lite", "Glm4MoeLiteMoE"),
    _DEEPSEEK_V3.like("glm4v_moe_text", "Glm4vMoeTextMoE", package="glm4v_moe", aliases=("glm4v_moe",)),
    _DEEPSEEK_V3.like("glm_moe_dsa", "GlmMoeDsaMoE"),
    _DEEPSEEK_V3.like("dots1", "Dots1MoE"),
    _DEEPSEEK_V3.like("solar_open", "SolarOpenMoE"),
    _DEEPSEEK_V3.like("axk2", "AXK2MoE", spec=_axk2),
    _DEEPSEEK_V3.like("dots3_note_text", "Dots3NoteTextMoE", package="dots3_note", spec=_dots3_note_text),
    _DEEPSEEK_V3.like("exaone_moe", "ExaoneMoeSparseMoEBlock", spec=_exaone_moe),
    _KIMI_LINEAR,
    _KIMI_LINEAR.like(
        "bailing_hybrid",
        "BailingHybridMoE",
        ignored=_KIMI_IGNORED
        | {"layer_group_size": "which layers have which attention", "mtp_loss_scaling_factor": "training loss"}
        | dict.fromkeys(("moe_router_enable_expert_bias", "router_dtype"), NOT_READ),
    ),
    _HY_V4,
    _HY_V4.like(
        "glm5_next_text",
        "Glm5NextTextMoE",
        package="glm5_next",
        aliases=("glm5_next",),
        spec=_glm5_next_text,
        holds=_HOLDS_LIMIT | {"shared_experts.swiglu_limit": "swiglu_limit"},
    ),
    _DEEPSEEK_V3.like(
        "axk1",
        "AXK1MoE",
        spec=_axk1,
        weights=CORRECTED | {"final_transform.0.weight": "post_mlp_layernorm.weight"},
        holds=HOLDS_GROUPS | {"post_mlp_layernorm.variance_epsilon": "rms_norm_eps"},
    ),
    _DEEPSEEK_V3.like(
        "mimo_v2_flash",
        "MiMoV2FlashMoE",
        spec=_mimo_v2_flash,
        weights=_UNSHARED,
        ignored=_IGNORED | {"attention_value_scale": "attention", "n_shared_experts": NOT_READ},
    ),
    _DEEPSEEK_V3.like(
        "beam",
        "BeamMoE",
        spec=_beam,
        weights=_UNSHARED,
        router=Router(flat=True),
        holds=HOLDS_NORM
        | {"gate.num_group": "n_group", "gate.topk_group": "topk_group", "routed_scaling_factor": "routed_scaling_factor"},
    ),
    _DEEPSEEK_V3.like(
        "nemotron_h",
        "NemotronHMoE",
        aliases=("nemotron_h_omni", "nemo_speechlm"),
        spec=_nemotron_h,
        weights=_UNSHARED
        | {
            "w13": "experts.up_proj",
            "shared_w13": "shared_experts.up_proj.weight",
            "shared_b13": "shared_experts.up_proj.bias",
            "shared_w2": "shared_experts.down_proj.weight",
            "shared_b2": "shared_experts.down_proj.bias",
            "input_transform.0.weight": "fc1_latent_proj.weight",
            "input_transform.0.bias": "fc1_latent_proj.bias",
            "output_transform.0.weight": "fc2_latent_proj.weight",
            "output_transform.0.bias": "fc2_latent_proj.bias",
        },
        ignored=_IGNORED
        | dict.fromkeys(("n_groups", "time_step_limit"), "state space layers")
        | {
            "n_shared_experts": NOT_READ,
            "moe_shared_expert_overlap": "when the shared experts run",
            "rescale_prenorm_residual": "how weights are drawn",
        },
    ),
)
