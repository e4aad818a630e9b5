"""Families whose experts are given their choice."""

from typing import Any

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma4_text-top2": ("gemma4_text", {}),
    "gemma4_text-top3-silu": ("gemma4_text", {"num_experts": 7, "top_k_experts": 3, "hidden_activation": "silu"}),
    "diffusion_gemma_text-top2": ("diffusion_gemma_text", {}),
    "diffusion_gemma_text-top3-odd": (
        "diffusion_gemma_text",
        {"num_experts": 7, "top_k_experts": 3, "moe_intermediate_size": 24},
    ),
    "zaya-some-skip": ("zaya", {"num_experts": 4}),
    "switch_transformers-room-for-all": ("switch_transformers", {}),
    "switch_transformers-some-dropped": ("switch_transformers", {"expert_capacity": 2, "num_experts": 5, "d_ff": 24}),
    "switch_transformers-biased-gelu": (
        "switch_transformers",
        {"router_bias": True, "dense_act_fn": "gelu", "num_sparse_decoder_layers": 2, "router_dtype": "bfloat16"},
    ),
    "zaya-odd-gelu": ("zaya", {"num_experts": 7, "moe_intermediate_size": 24, "hidden_act": "gelu"}),
}
