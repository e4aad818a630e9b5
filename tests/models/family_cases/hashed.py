"""Families with layers that look up a token's experts in a table by its id."""

from typing import Any

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v4-clamped": ("deepseek_v4", {"swiglu_limit": 0.25, "num_experts_per_tok": 3}),
    "deepseek_v4-sigmoid-biases": (
        "deepseek_v4",
        {"scoring_func": "sigmoid", "mlp_bias": True, "n_routed_experts": 7, "moe_intermediate_size": 24, "swiglu_limit": 10.0},
    ),
    "deepseek_v4-every-layer-by-table-gelu": (
        "deepseek_v4",
        {"mlp_layer_types": ["hash_moe"] * 3, "hidden_act": "gelu", "routed_scaling_factor": 1.0},
    ),
    "deepseek_v4-no-layer-by-table": ("deepseek_v4", {"mlp_layer_types": ["moe"] * 3, "num_experts_per_tok": 1}),
}
