"""Families that score every expert by a softmax over all logits."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from moerunner.errors import UnsupportedError
from moerunner.models.entry import Family, Keys, Router, activation, groups, hf, renormalised
from moerunner.models.families.common import (
    AT_ROUTER,
    EXPERTS,
    GATED_SHARED,
    HOLDS_GROUPS,
    HOLDS_NORM,
    NOT_READ,
    PLACEMENT,
    SHARED,
    SHARED_BIASES,
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


def _softmax(
    c: Keys, width: str, shared: SharedSpec | None = None, *, renormalise: bool, apply_routed_scale_to_output: bool
) -> MoESpec:
    """Softmax of logits in the model's dtype, as in OLMoE and Qwen. width: the key of the experts' intermediate size."""
    return MoESpec(
        hidden_size=c("hidden_size"),
        num_experts=c("num_experts"),
        top_k=c("num_experts_per_tok"),
        routing=RoutingSpec(score="softmax", logits_dtype="model", **renormalised(renormalise)),
        experts=ExpertsSpec(intermediate_size=c(width), activation=activation(c("hidden_act"))),
        shared=shared,
        apply_routed_scale_to_output=apply_routed_scale_to_output,
    )


def _gated_shared(c: Keys) -> SharedSpec | None:
    """One shared expert behind a gate; at width 0 it adds 0."""
    width = c("shared_expert_intermediate_size")
    return SharedSpec(width=width, gate="sigmoid", activation=activation(c("hidden_act"))) if width else None


def _olmoe(c: Keys) -> MoESpec:
    return _softmax(c, "intermediate_size", renormalise=c("norm_topk_prob"), apply_routed_scale_to_output=False)


def _qwen3_moe(c: Keys) -> MoESpec:
    return _softmax(c, "moe_intermediate_size", renormalise=c("norm_topk_prob"), apply_routed_scale_to_output=False)


def _qwen3_vl_moe(c: Keys) -> MoESpec:
    return _softmax(c, "moe_intermediate_size", renormalise=True, apply_routed_scale_to_output=False)


def _qwen2_moe(c: Keys) -> MoESpec:
    norm = c("norm_topk_prob")
    return _softmax(c, "moe_intermediate_size", _gated_shared(c), renormalise=norm, apply_routed_scale_to_output=False)


def _qwen3_5_moe(c: Keys) -> MoESpec:
    return _softmax(c, "moe_intermediate_size", _gated_shared(c), renormalise=True, apply_routed_scale_to_output=False)


def _jamba(c: Keys) -> MoESpec:
    return _softmax(c, "intermediate_size", renormalise=False, apply_routed_scale_to_output=False)


def _deepseek_v2(c: Keys) -> MoESpec:
    """Without shared experts, a bias of theirs is still added."""
    count, kept, method, bias = c("n_group"), c("topk_group"), c("topk_method"), c("mlp_bias")
    experts, top_k = c("n_routed_experts"), c("num_experts_per_tok")
    if method not in ("greedy", "group_limited_greedy"):
        raise UnsupportedError(f"topk_method {method!r} is not defined by this family's own code")
    limits = None
    if method == "group_limited_greedy":
        limits = groups(count, kept, experts=experts, top_k=top_k, weighs_lost=False, score="max", fill="zero")
    shared = plain_shared(c, "n_shared_experts", bias=bias)
    return MoESpec(
        hidden_size=c("hidden_size"),
        num_experts=experts,
        top_k=top_k,
        routing=RoutingSpec(score="softmax", groups=limits),
        experts=ExpertsSpec(intermediate_size=c("moe_intermediate_size"), activation=activation(c("hidden_act"))),
        shared=shared,
        output_bias=bias and shared is None,
        routed_scaling_factor=c("routed_scaling_factor"),
        apply_routed_scale_to_output=False,
    )


def _grouped_softmax(
    c: Keys, logits_dtype: Literal["model", "float32"], *, renormalise: bool, apply_routed_scale_to_output: bool
) -> MoESpec:
    """DeepSeek-V3's groups of experts, with a softmax in place of sigmoid and correction bias."""
    experts, top_k = c("n_routed_experts"), c("num_experts_per_tok")
    return MoESpec(
        hidden_size=c("hidden_size"),
        num_experts=experts,
        top_k=top_k,
        routing=RoutingSpec(
            score="softmax",
            logits_dtype=logits_dtype,
            groups=groups(c("n_group"), c("topk_group"), experts=experts, top_k=top_k, fill="zero"),
            **renormalised(renormalise, eps=1e-20),
        ),
        experts=ExpertsSpec(intermediate_size=c("moe_intermediate_size"), activation=activation(c("hidden_act"))),
        shared=plain_shared(c, "n_shared_experts"),
        routed_scaling_factor=c("routed_scaling_factor"),
        apply_routed_scale_to_output=apply_routed_scale_to_output,
    )


def _mistral4(c: Keys) -> MoESpec:
    return _grouped_softmax(c, "model", renormalise=c("norm_topk_prob"), apply_routed_scale_to_output=False)


def _mistral_large4(c: Keys) -> MoESpec:
    return _grouped_softmax(c, "float32", renormalise=True, apply_routed_scale_to_output=False)


def _hunyuan_v1_moe(c: Keys) -> MoESpec:
    act, width = activation(c("hidden_act")), c("intermediate_size")
    return MoESpec(
        hidden_size=c("hidden_size"),
        num_experts=c.here("num_experts"),
        top_k=c.here("moe_topk"),
        routing=RoutingSpec(score="softmax", renormalise="sum"),
        experts=ExpertsSpec(intermediate_size=width, activation=act),
        shared=SharedSpec(width=width, activation=act),
        apply_routed_scale_to_output=False,
    )


_HOLDS_TOP_K = {"gate.top_k": "num_experts_per_tok"}
_HOLDS_GROUPS = {path: key for path, key in HOLDS_GROUPS.items() if key != "norm_topk_prob"}
_RENORMALISES = {"norm_topk_prob": "Transformers always renormalises in this family"}

_MIXTRAL = Family(
    name="mixtral",
    blocks=hf("mixtral", "MixtralSparseMoeBlock"),
    spec=_mixtral,
    weights=EXPERTS,
    router=Router(flat=True),
    holds=_HOLDS_TOP_K,
    training={"jitter_noise": "it adds noise to its input"},
    ignored={"router_jitter_noise": "noise in training only: see training"},
)


def _chosen_by_softmax(answer: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """From the gate's product alone."""
    weights, ids = answer.softmax(-1, dtype=torch.float32).topk(k, dim=-1)
    return weights.to(answer.dtype), ids


_QWEN3_MOE = Family(
    name="qwen3_moe",
    blocks=hf("qwen3_moe", "Qwen3MoeSparseMoeBlock"),
    spec=_qwen3_moe,
    weights=EXPERTS,
    router=Router(flat=True),
    holds=HOLDS_NORM,
)
_QWEN2_MOE = _QWEN3_MOE.like("qwen2_moe", "Qwen2MoeSparseMoeBlock", spec=_qwen2_moe, weights=EXPERTS | GATED_SHARED)
_DEEPSEEK_V2 = Family(
    name="deepseek_v2",
    blocks=hf("deepseek_v2", "DeepseekV2Moe"),
    spec=_deepseek_v2,
    weights=EXPERTS | SHARED | SHARED_BIASES | {"output_bias": SHARED_BIASES["shared_b2"]},
    holds=_HOLDS_GROUPS | {"gate.topk_method": "topk_method"},
    ignored={"norm_topk_prob": "Transformers never renormalises in this family", "moe_layer_freq": PLACEMENT},
)
_MISTRAL4 = Family(
    name="mistral4",
    blocks=hf("mistral4", "Mistral4MoE"),
    spec=_mistral4,
    weights=EXPERTS | SHARED,
    holds=HOLDS_GROUPS,
)
_JAMBA_5_20 = {  # the router is a linear layer
    "router": Router("router", flat=True, choice=_chosen_by_softmax),
    "holds": {"top_k": "num_experts_per_tok"},
}

TABLE = (
    _MIXTRAL,
    _MIXTRAL.like("minimax", "MiniMaxSparseMoeBlock", ignored={**_MIXTRAL.ignored, "shared_moe_mode": NOT_READ}),
    _QWEN3_MOE,
    _QWEN3_MOE.like("qwen3_omni_moe_text", "Qwen3OmniMoeThinkerTextSparseMoeBlock", package="qwen3_omni_moe"),
    _QWEN3_MOE.like("mellum", "MellumSparseMoeBlock"),
    _QWEN3_MOE.like("olmoe", "OlmoeSparseMoeBlock", spec=_olmoe),
    _QWEN3_MOE.like("flex_olmo", "FlexOlmoSparseMoeBlock", spec=_olmoe),
    _QWEN3_MOE.like(
        "qwen3_vl_moe_text",
        "Qwen3VLMoeTextSparseMoeBlock",
        package="qwen3_vl_moe",
        aliases=("qwen3_vl_moe",),
        spec=_qwen3_vl_moe,
        holds=_HOLDS_TOP_K,
        ignored=_RENORMALISES,
    ),
    _QWEN2_MOE,
    _QWEN2_MOE.like("qwen3_next", "Qwen3NextSparseMoeBlock"),
    _QWEN2_MOE.like("qwen3_omni_moe_talker_text", "Qwen3OmniMoeTalkerTextSparseMoeBlock", package="qwen3_omni_moe"),
    _QWEN2_MOE.like("qwen4_exp_text", "Qwen4ExpTextSparseMoeBlock", package="qwen4_exp", aliases=("qwen4_exp",)),
    _QWEN2_MOE.like(
        "qwen3_5_moe_text",
        "Qwen3_5MoeSparseMoeBlock",
        package="qwen3_5_moe",
        aliases=("qwen3_5_moe",),
        spec=_qwen3_5_moe,
        holds=_HOLDS_TOP_K,
        ignored=_RENORMALISES,
    ),
    _QWEN3_MOE.like(
        "jamba",
        "JambaSparseMoeBlock",
        spec=_jamba,
        weights=AT_ROUTER,
        router=Router("router", flat=True),
        holds={"router.top_k": "num_experts_per_tok"},
        ignored=dict.fromkeys(("expert_layer_period", "expert_layer_offset"), PLACEMENT),
        older={"4fb4b385": _JAMBA_5_20},
    ),
    _DEEPSEEK_V2,
    _DEEPSEEK_V2.like("deepseek_ocr2_text", "DeepseekOcr2TextMoe", package="deepseek_ocr2", aliases=("deepseek_ocr2",)),
    _DEEPSEEK_V2.like("unlimited_ocr_text", "UnlimitedOcrTextMoe", package="unlimited_ocr", aliases=("unlimited_ocr",)),
    _MISTRAL4,
    _MISTRAL4.like(
        "mistral_large4_text",
        "MistralLarge4TextMoE",
        package="mistral_large4",
        aliases=("mistral_large4",),
        spec=_mistral_large4,
        holds=_HOLDS_GROUPS,
        ignored=_RENORMALISES,
    ),
    Family(
        name="hunyuan_v1_moe",
        blocks=hf("hunyuan_v1_moe", "HunYuanMoEV1Moe"),
        spec=_hunyuan_v1_moe,
        weights=EXPERTS
        | {"gate": "gate.wg.weight"}
        | {name: path.replace("shared_experts", "shared_mlp") for name, path in SHARED.items()},
        router=Router(flat=True),
        holds={"gate.top_k": lambda c: c.here("moe_topk")},
        ignored=dict.fromkeys(
            (
                "group_limited_greedy",
                "moe_drop_tokens",
                "moe_intermediate_size",
                "moe_layer_num_skipped",
                "moe_random_routing_dropped_token",
                "n_group",
                "norm_topk_prob",
                "num_shared_expert",
                "routed_scaling_factor",
                "topk_group",
                "use_mixed_mlp_moe",
            ),
            NOT_READ,
        ),
    ),
)
