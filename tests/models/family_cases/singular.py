"""Families with something that no other family has."""

from typing import Any

_FFN = {"hidden_size": 64, "ffn_hidden_size": 32, "moe_num_experts": 8, "moe_top_k": 2, "ffn_act_fn": {"name": "silu"}}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "ernie4_5_moe-shared": ("ernie4_5_moe", {"moe_k": 3, "moe_num_shared_experts": 2}),
    "ernie4_5_moe-shared-biased": (
        "ernie4_5_moe",
        {"use_bias": True, "moe_num_shared_experts": 1, "moe_num_experts": 7, "hidden_act": "gelu"},
    ),
    "ernie4_5_moe-alone-floor": (
        "ernie4_5_moe",
        {"moe_num_shared_experts": 0, "moe_norm_min": 0.5, "use_bias": True, "moe_intermediate_size": 24},
    ),
    "ernie4_5_moe-no-floor": ("ernie4_5_moe", {"moe_norm_min": 0.0, "moe_k": 1}),
    "ernie4_5_vl_moe_text-two-widths": ("ernie4_5_vl_moe_text", {}),
    "ernie4_5_vl_moe_text-biased-odd": (
        "ernie4_5_vl_moe_text",
        {"use_bias": True, "moe_num_experts": 5, "moe_k": 3, "moe_intermediate_size": [24, 40], "moe_num_shared_experts": 1},
    ),
    "ernie4_5_vl_moe_text-alone-floor": (
        "ernie4_5_vl_moe_text",
        {"moe_num_shared_experts": 0, "moe_norm_min": 0.5, "moe_intermediate_size": [16, 32], "hidden_act": "gelu"},
    ),
    "longcat_flash-half-idle": ("longcat_flash", {"zero_expert_num": 8, "moe_topk": 4}),
    "longcat_flash-all-work": ("longcat_flash", {"zero_expert_num": 0, "routed_scaling_factor": 1.0, "moe_topk": 2}),
    "longcat_flash-odd-biased-gelu": (
        "longcat_flash",
        {
            "n_routed_experts": 5,
            "zero_expert_num": 2,
            "expert_ffn_hidden_size": 20,
            "router_bias": True,
            "hidden_act": "gelu",
        },
    ),
    "phimoe-none-is-near": ("phimoe", {"router_jitter_noise": 1e-4}),
    "phimoe-none-is-far": (
        "phimoe",
        {"router_jitter_noise": 1.0, "num_local_experts": 7, "intermediate_size": 24, "hidden_act": "gelu"},
    ),
    "phimoe-no-noise": ("phimoe", {"router_jitter_noise": 0.0, "num_local_experts": 3}),
    "phimoe-three-asked-for": ("phimoe", {"router_jitter_noise": 1e-4, "num_experts_per_tok": 3, "num_local_experts": 4}),
    "dbrx-sum": ("dbrx", {"ffn_config": {**_FFN, "moe_normalize_expert_weights": 1.0}}),
    "dbrx-euclidean": (
        "dbrx",
        {"ffn_config": {**_FFN, "moe_num_experts": 7, "moe_top_k": 3, "moe_normalize_expert_weights": 2.0}},
    ),
    "dbrx-as-they-are": (
        "dbrx",
        {
            "ffn_config": {
                **_FFN,
                "moe_top_k": 4,
                "ffn_hidden_size": 20,
                "moe_normalize_expert_weights": None,
                "moe_jitter_eps": 0.1,
                "ffn_act_fn": {"name": "gelu"},
            }
        },
    ),
}
