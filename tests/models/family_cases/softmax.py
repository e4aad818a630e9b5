"""Families that score every expert by a softmax."""

from typing import Any

_ODD = {"num_experts": 7, "num_experts_per_tok": 3}
_FULL = {"layer_types": ["full_attention"] * 3}  # its linear attention does not run where parameters alone are cast

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral-top2": ("mixtral", {}),
    "mixtral-top1-gelu": (
        "mixtral",
        {"num_local_experts": 5, "num_experts_per_tok": 1, "hidden_act": "gelu", "intermediate_size": 24},
    ),
    "minimax-top3": ("minimax", {**_FULL, "num_experts_per_tok": 3}),
    "minimax-odd-relu": (
        "minimax",
        {**_FULL, "num_local_experts": 7, "num_experts_per_tok": 1, "hidden_act": "relu", "intermediate_size": 24},
    ),
    "qwen3_moe-renormalised": ("qwen3_moe", {"num_experts_per_tok": 4, "norm_topk_prob": True}),
    "qwen3_moe-as-they-are": ("qwen3_moe", {"num_local_experts": 7, "num_experts_per_tok": 3, "norm_topk_prob": False}),
    "qwen3_moe-dense-between": ("qwen3_moe", {"decoder_sparse_step": 2, "moe_intermediate_size": 24, "hidden_act": "gelu"}),
    "qwen3_omni_moe_text-renormalised": ("qwen3_omni_moe_text", {**_ODD, "norm_topk_prob": True}),
    "qwen3_omni_moe_text-as-they-are": ("qwen3_omni_moe_text", {"norm_topk_prob": False, "moe_intermediate_size": 24}),
    "mellum-renormalised": ("mellum", {"num_experts_per_tok": 4, "norm_topk_prob": True}),
    "mellum-as-they-are": (
        "mellum",
        {"num_local_experts": 5, "norm_topk_prob": False, "moe_intermediate_size": 24, "hidden_act": "gelu"},
    ),
    "olmoe-as-they-are": ("olmoe", {"num_experts_per_tok": 4, "norm_topk_prob": False}),
    "olmoe-renormalised": ("olmoe", {**_ODD, "norm_topk_prob": True, "intermediate_size": 24}),
    "flex_olmo-as-they-are": ("flex_olmo", {"num_experts": 7, "num_experts_per_tok": 5, "norm_topk_prob": False}),
    "flex_olmo-renormalised": ("flex_olmo", {"norm_topk_prob": True, "hidden_act": "gelu"}),
    "qwen3_vl_moe_text-top2": ("qwen3_vl_moe_text", {}),
    "qwen3_vl_moe_text-odd": (
        "qwen3_vl_moe_text",
        {"num_local_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 24, "hidden_act": "gelu"},
    ),
    "qwen2_moe-as-they-are": ("qwen2_moe", {**_ODD, "norm_topk_prob": False}),
    "qwen2_moe-renormalised": ("qwen2_moe", {"norm_topk_prob": True, "hidden_act": "gelu"}),
    "qwen3_next-renormalised": ("qwen3_next", {**_ODD, "norm_topk_prob": True}),
    "qwen3_next-as-they-are": ("qwen3_next", {"norm_topk_prob": False, "shared_expert_intermediate_size": 24}),
    "qwen3_next-empty-shared": ("qwen3_next", {"shared_expert_intermediate_size": 0}),
    "qwen3_omni_moe_talker_text-as-they-are": ("qwen3_omni_moe_talker_text", {"norm_topk_prob": False}),
    "qwen3_omni_moe_talker_text-renormalised": (
        "qwen3_omni_moe_talker_text",
        {
            "num_local_experts": 5,
            "num_experts_per_tok": 4,
            "norm_topk_prob": True,
            "shared_expert_intermediate_size": 24,
            "moe_intermediate_size": 24,
        },
    ),
    "qwen4_exp_text-renormalised": ("qwen4_exp_text", {**_ODD, "norm_topk_prob": True}),
    "qwen4_exp_text-as-they-are": ("qwen4_exp_text", {"norm_topk_prob": False, "shared_expert_intermediate_size": 24}),
    "qwen3_5_moe_text-top2": ("qwen3_5_moe_text", {}),
    "qwen3_5_moe_text-odd-gelu": (
        "qwen3_5_moe_text",
        {**_ODD, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "hidden_act": "gelu"},
    ),
    "jamba-every-second": ("jamba", {}),
    "jamba-odd-relu": ("jamba", {**_ODD, "intermediate_size": 24, "hidden_act": "relu"}),
    "deepseek_v2-groups": ("deepseek_v2", {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3, "norm_topk_prob": True}),
    "deepseek_v2-greedy-biased": ("deepseek_v2", {"topk_method": "greedy", "mlp_bias": True, "routed_scaling_factor": 1.0}),
    "deepseek_v2-one-group-one-shared": (
        "deepseek_v2",
        {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "n_routed_experts": 7, "hidden_act": "gelu"},
    ),
    "deepseek_v2-alone": ("deepseek_v2", {"n_shared_experts": 0, "moe_intermediate_size": 24}),
    "deepseek_v2-bias-alone": ("deepseek_v2", {"n_shared_experts": 0, "mlp_bias": True}),
    "deepseek_ocr2_text-greedy": ("deepseek_ocr2_text", {"topk_method": "greedy", "n_group": None, "topk_group": None}),
    "deepseek_ocr2_text-groups-biased": (
        "deepseek_ocr2_text",
        {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "num_experts_per_tok": 4, "mlp_bias": True},
    ),
    "deepseek_ocr2_text-alone-odd": (
        "deepseek_ocr2_text",
        {"n_routed_experts": 7, "n_shared_experts": 0, "moe_intermediate_size": 24, "routed_scaling_factor": 0.5},
    ),
    "unlimited_ocr_text-greedy": ("unlimited_ocr_text", {"topk_method": "greedy", "num_experts_per_tok": 3}),
    "unlimited_ocr_text-groups-biased": (
        "unlimited_ocr_text",
        {
            "topk_method": "group_limited_greedy",
            "n_group": 2,
            "topk_group": 1,
            "n_shared_experts": 1,
            "mlp_bias": True,
            "hidden_act": "gelu",
        },
    ),
    "mistral4-groups": ("mistral4", {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 4, "norm_topk_prob": True}),
    "mistral4-one-group-as-they-are": (
        "mistral4",
        {"n_group": 1, "topk_group": 1, "norm_topk_prob": False, "n_routed_experts": 7, "n_shared_experts": 1},
    ),
    "mistral4-every-expert": ("mistral4", {"n_routed_experts": 6, "n_group": 3, "topk_group": 1, "num_experts_per_tok": 6}),
    "mistral4-alone-gelu": (
        "mistral4",
        {"n_shared_experts": 0, "routed_scaling_factor": 1.0, "moe_intermediate_size": 24, "hidden_act": "gelu"},
    ),
    "mistral_large4_text-groups": ("mistral_large4_text", {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 4}),
    "mistral_large4_text-one-group": (
        "mistral_large4_text",
        {"n_group": 1, "topk_group": 1, "n_routed_experts": 7, "n_shared_experts": 1, "routed_scaling_factor": 1.0},
    ),
    "mistral_large4_text-alone": ("mistral_large4_text", {"n_shared_experts": 0, "moe_intermediate_size": 24}),
    "hunyuan_v1_moe-top3": ("hunyuan_v1_moe", {"moe_topk": 3, "num_experts": 7}),
    "hunyuan_v1_moe-top-k-by-layer": ("hunyuan_v1_moe", {"moe_topk": [1, 3, 2], "intermediate_size": 24, "hidden_act": "gelu"}),
}
