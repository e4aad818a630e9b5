"""Families with DeepSeek-V3's routing."""

from typing import Any

_ODD = {"moe_intermediate_size": 24, "num_experts_per_tok": 3}
_GROUPS = {"n_routed_experts": 12, "n_group": 3, "topk_group": 2, "num_experts_per_tok": 5}
_ONE_GROUP = {"n_group": 1, "topk_group": 1}
_KIMI_ONE_GROUP = {"num_expert_group": 1, "topk_group": 1}
_AS_THEY_ARE = {"norm_topk_prob": False, "routed_scaling_factor": 1.0}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v3-three-groups": ("deepseek_v3", {**_GROUPS, "n_shared_experts": 1}),
    "deepseek_v3-one-group-as-they-are": ("deepseek_v3", {**_ONE_GROUP, **_AS_THEY_ARE, **_ODD, "n_routed_experts": 7}),
    "deepseek_v3-alone-gelu": ("deepseek_v3", {"n_shared_experts": 0, "hidden_act": "gelu"}),
    "deepseek_v3-every-expert": (
        "deepseek_v3",
        {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 8},
    ),
    "deepseek_v32-two-groups": ("deepseek_v32", {}),
    "deepseek_v32-one-group-as-they-are": ("deepseek_v32", {**_ONE_GROUP, **_AS_THEY_ARE, **_ODD, "n_shared_experts": 1}),
    "glm4_moe-three-groups": ("glm4_moe", {**_GROUPS, "n_shared_experts": 1}),
    "glm4_moe-one-group-as-they-are": ("glm4_moe", {**_ONE_GROUP, **_AS_THEY_ARE, **_ODD}),
    "glm4_moe_lite-three-groups": ("glm4_moe_lite", _GROUPS),
    "glm4_moe_lite-one-group-alone": ("glm4_moe_lite", {**_ONE_GROUP, **_ODD, "n_shared_experts": 0}),
    "glm4v_moe_text-three-groups": ("glm4v_moe_text", _GROUPS),
    "glm4v_moe_text-one-group-as-they-are": ("glm4v_moe_text", {**_ONE_GROUP, **_AS_THEY_ARE, **_ODD}),
    "glm_moe_dsa-three-groups": ("glm_moe_dsa", {**_GROUPS, "hidden_act": "gelu_pytorch_tanh"}),
    "glm_moe_dsa-one-group-as-they-are": ("glm_moe_dsa", {**_ONE_GROUP, **_AS_THEY_ARE, **_ODD, "n_shared_experts": 1}),
    "dots1-three-groups": ("dots1", {**_GROUPS, "norm_topk_prob": True}),
    "dots1-one-group-as-they-are": ("dots1", {**_ONE_GROUP, **_AS_THEY_ARE, **_ODD}),
    "solar_open-three-groups": ("solar_open", _GROUPS),
    "solar_open-one-group-alone": ("solar_open", {**_ONE_GROUP, **_ODD, "n_shared_experts": 0}),
    "exaone_moe-two-groups": ("exaone_moe", {"num_experts_per_tok": 4, "num_shared_experts": 1}),
    "exaone_moe-one-group-as-they-are": ("exaone_moe", {**_ONE_GROUP, **_AS_THEY_ARE, **_ODD, "num_experts": 7}),
    "kimi_linear-two-groups": ("kimi_linear", {"num_experts_per_token": 4}),
    "kimi_linear-one-group-as-they-are": (
        "kimi_linear",
        {**_KIMI_ONE_GROUP, "moe_renormalize": False, "moe_intermediate_size": 24, "num_shared_experts": 1},
    ),
    "bailing_hybrid-two-groups": ("bailing_hybrid", {"num_experts_per_token": 3}),
    "bailing_hybrid-one-group-as-they-are": (
        "bailing_hybrid",
        {**_KIMI_ONE_GROUP, "moe_renormalize": False, "moe_intermediate_size": 24, "num_shared_experts": 0},
    ),
    "axk2-ungrouped": ("axk2", {**_ODD, "n_routed_experts": 7}),
    "axk2-filled-with-zeros": ("axk2", {**_GROUPS, "n_group": 4, "topk_group": 1, "num_experts_per_tok": 3}),
    "axk2-every-group-kept-as-they-are": ("axk2", {**_AS_THEY_ARE, "n_group": 2, "topk_group": 2}),
    "dots3_note_text-three-groups": ("dots3_note_text", {**_GROUPS, "shared_experts_intermediate_size": 20}),
    "dots3_note_text-one-group-as-they-are": ("dots3_note_text", {**_AS_THEY_ARE, **_ODD, "n_shared_experts": 1}),
    "hy_v4-clamped": ("hy_v4", {**_GROUPS, "swiglu_limit": 0.25}),
    "hy_v4-shared-gelu": ("hy_v4", {**_ONE_GROUP, **_AS_THEY_ARE, **_ODD, "hidden_act": "gelu", "swiglu_limit": 10.0}),
    "glm5_next_text-clamped": ("glm5_next_text", {**_GROUPS, "swiglu_limit": 0.25}),
    "glm5_next_text-shared-gelu": (
        "glm5_next_text",
        {**_AS_THEY_ARE, **_ODD, "hidden_act": "gelu", "swiglu_limit": 0.5, "n_shared_experts": 1},
    ),
    "glm5_next_text-alone": ("glm5_next_text", {"n_shared_experts": 0, "swiglu_limit": 0.25}),
    "axk1-three-groups": ("axk1", {**_GROUPS, "rms_norm_eps": 1e-3}),
    "axk1-one-group-alone": ("axk1", {**_ONE_GROUP, **_AS_THEY_ARE, **_ODD, "n_shared_experts": 0}),
    "mimo_v2_flash-three-groups": ("mimo_v2_flash", _GROUPS),
    "mimo_v2_flash-one-group-as-they-are": ("mimo_v2_flash", {**_ONE_GROUP, **_AS_THEY_ARE, **_ODD, "n_routed_experts": 7}),
    "beam-two-groups": ("beam", {"num_experts_per_tok": 3}),
    "beam-one-group-as-they-are": ("beam", {**_ONE_GROUP, **_ODD, "norm_topk_prob": False, "hidden_act": "gelu"}),
    "nemotron_h-latent": ("nemotron_h", {**_GROUPS, "moe_shared_expert_intermediate_size": 20}),
    "nemotron_h-latent-biases": ("nemotron_h", {**_ONE_GROUP, **_ODD, "mlp_bias": True, "moe_latent_size": 40}),
    "nemotron_h-full-width-silu": (
        "nemotron_h",
        {**_ONE_GROUP, **_AS_THEY_ARE, "moe_latent_size": None, "mlp_hidden_act": "silu", "mlp_bias": True},
    ),
    "nemotron_h-shared-as-wide-as-dense": ("nemotron_h", {"moe_shared_expert_intermediate_size": 0, "intermediate_size": 72}),
}
