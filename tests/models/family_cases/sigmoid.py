"""Families that score every expert by its own logit."""

from typing import Any

_ODD = {"moe_intermediate_size": 24, "num_experts_per_tok": 3}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "afmoe-two-shared": ("afmoe", {"num_experts_per_tok": 3}),
    "afmoe-alone-odd": ("afmoe", {**_ODD, "num_experts": 7, "num_shared_experts": 0, "route_scale": 1.0}),
    "afmoe-shared-gelu": ("afmoe", {"num_shared_experts": 1, "hidden_act": "gelu", "route_scale": 2.5}),
    "flint-renormalised": ("flint", {"norm_topk_prob": True, "num_experts_per_tok": 3}),
    "flint-as-they-are": ("flint", {**_ODD, "norm_topk_prob": False, "num_experts": 5, "shared_expert_intermediate_size": 24}),
    "flint-alone-gelu": ("flint", {"shared_expert_intermediate_size": 0, "hidden_act": "gelu"}),
    "hy_v3-two-shared": ("hy_v3", {"num_experts_per_tok": 3}),
    "hy_v3-shared-biases": ("hy_v3", {**_ODD, "num_experts": 7, "num_shared_experts": 1, "mlp_bias": True}),
    "hy_v3-shared-as-wide-as-dense": ("hy_v3", {"num_shared_experts": 0, "router_scaling_factor": 1.0, "hidden_act": "gelu"}),
    "hy_v3-added-in-the-model's-dtype": ("hy_v3", {"enable_moe_fp32_combine": False, "router_scaling_factor": 2.5}),
    "dots3_note_vision_encoder-alike": (
        "dots3_note_vision_encoder",
        {"num_local_experts": 7, "num_experts_per_tok": 3, "router_scaling_factor": 1.5, "moe_intermediate_size": 24},
    ),
    "dots3_note_vision_encoder-more-by-layer": (
        "dots3_note_vision_encoder",
        {"mlp_layer_types": None, "pyramid_num_routed": [-1, 1, 6], "hidden_act": "gelu"},
    ),
    "laguna-soft-capped": ("laguna", {"num_experts_per_tok": 3, "moe_router_logit_softcapping": 0.5}),
    "laguna-odd": (
        "laguna",
        {**_ODD, "num_experts": 7, "moe_router_logit_softcapping": 0.0, "shared_expert_intermediate_size": 24},
    ),
    "laguna-alone-gelu": (
        "laguna",
        {"shared_expert_intermediate_size": 0, "hidden_act": "gelu", "moe_routed_scaling_factor": 1.0},
    ),
    "lfm2_moe-renormalised": ("lfm2_moe", {"norm_topk_prob": True, "num_experts_per_tok": 3}),
    "lfm2_moe-as-they-are": ("lfm2_moe", {**_ODD, "num_experts": 7, "norm_topk_prob": False, "routed_scaling_factor": 1.0}),
    "lfm2_moe-unbiased": ("lfm2_moe", {"use_expert_bias": False, "num_experts_per_tok": 1, "routed_scaling_factor": 2.5}),
    "minimax_m2-top3": ("minimax_m2", {"num_experts_per_tok": 3}),
    "minimax_m2-top1-odd": (
        "minimax_m2",
        {"num_local_experts": 7, "num_experts_per_tok": 1, "intermediate_size": 24, "hidden_act": "gelu"},
    ),
    "inkling_text-two-shared": ("inkling_text", {"num_experts_per_tok": 3}),
    "inkling_text-one-shared-odd": (
        "inkling_text",
        {**_ODD, "n_routed_experts": 7, "n_shared_experts": 1, "route_scale": 1.0, "hidden_act": "gelu"},
    ),
    "inkling2_text-sigmoid": ("inkling2_text", {"num_experts_per_tok": 3}),
    "inkling2_text-sqrtsoftplus": ("inkling2_text", {**_ODD, "n_routed_experts": 7, "scoring_func": "sqrtsoftplus"}),
    "inkling2_text-low-caps": ("inkling2_text", {"mlp_gate_softcap": 0.25, "mlp_up_softcap": 0.5, "route_scale": 1.0}),
    "minimax_m3_vl_text-clamped": ("minimax_m3_vl_text", {"num_experts_per_tok": 3, "swiglu_limit": 0.25}),
    "minimax_m3_vl_text-odd": (
        "minimax_m3_vl_text",
        {
            "num_local_experts": 7,
            "num_experts_per_tok": 3,
            "intermediate_size": 24,
            "shared_intermediate_size": 40,
            "swiglu_alpha": 1.0,
            "swiglu_limit": 7.0,
            "routed_scaling_factor": 1.0,
        },
    ),
    "minimax_m3_vl_text-alone": ("minimax_m3_vl_text", {"shared_intermediate_size": 0}),
    "muse_spark_text-narrow": ("muse_spark_text", {"num_experts_per_tok": 3, "output_multiplier": 0.5}),
    "muse_spark_text-wide": (
        "muse_spark_text",
        {**_ODD, "num_local_experts": 7, "moe_hidden_size": 72, "routed_scaling_factor": 1.0, "rms_norm_eps": 1e-2},
    ),
    "muse_spark_text-gelu": ("muse_spark_text", {"hidden_act": "gelu", "post_norm_eps": 1e-2, "output_multiplier": 2.0}),
    "step3p5-limits-by-layer": ("step3p5", {"num_experts_per_tok": 3, "swiglu_limits_shared": [0.0, 0.25, None]}),
    "step3p5-unlimited": ("step3p5", {**_ODD, "n_routed_experts": 7, "swiglu_limits": None, "swiglu_limits_shared": None}),
    "step3p5-shared-biases": (
        "step3p5",
        {"mlp_bias": True, "share_expert_dim": 24, "swiglu_limits": [0.0, 0.25, 0.5], "moe_router_scaling_factor": 1.0},
    ),
}
