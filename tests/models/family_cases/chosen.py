"""Families that weigh by the chosen logits."""

from typing import Any

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "granitemoe-top3": ("granitemoe", {"num_experts_per_tok": 3, "logits_scaling": 2.0}),
    "granitemoe-top1-odd": ("granitemoe", {"num_local_experts": 5, "num_experts_per_tok": 1, "intermediate_size": 24}),
    "granitemoe_swa-shared-outside": ("granitemoe_swa", {"num_experts_per_tok": 4, "shared_intermediate_size": 24}),
    "granitemoe_swa-gelu": (
        "granitemoe_swa",
        {"shared_intermediate_size": 0, "hidden_act": "gelu", "residual_multiplier": 0.5},
    ),
    "granitemoeshared-shared-outside": ("granitemoeshared", {"num_local_experts": 7, "num_experts_per_tok": 3}),
    "granitemoeshared-alone": ("granitemoeshared", {"shared_intermediate_size": 0, "intermediate_size": 24}),
    "granitemoehybrid-top2": ("granitemoehybrid", {}),
    "granitemoehybrid-every-expert": ("granitemoehybrid", {"num_local_experts": 3, "num_experts_per_tok": 3}),
    "aria_text-two-shared": ("aria_text", {"moe_num_shared_experts": 2, "moe_topk": 3}),
    "aria_text-shared-gelu-biased": ("aria_text", {"moe_num_shared_experts": 1, "mlp_bias": True, "hidden_act": "gelu"}),
    "aria_text-alone": ("aria_text", {"moe_num_shared_experts": 0, "moe_num_experts": 5, "intermediate_size": 24}),
    "aria_text-bias-alone": ("aria_text", {"moe_num_shared_experts": 0, "mlp_bias": True}),
    "cohere2_moe-softmax": ("cohere2_moe", {"expert_selection_fn": "softmax", "num_shared_experts": 0}),
    "cohere2_moe-softmax-average": ("cohere2_moe", {"expert_selection_fn": "softmax", "num_shared_experts": 2}),
    "cohere2_moe-sigmoid-renormalised-sum": (
        "cohere2_moe",
        {"num_experts_per_tok": 3, "shared_expert_combination_strategy": "sum", "norm_topk_prob": True},
    ),
    "cohere2_moe-sigmoid-as-they-are": (
        "cohere2_moe",
        {"num_experts": 7, "norm_topk_prob": False, "num_shared_experts": 1, "hidden_act": "relu"},
    ),
    "gpt_oss-clamped": ("gpt_oss", {"num_experts_per_tok": 4, "swiglu_limit": 0.25}),
    "gpt_oss-far-limit": (
        "gpt_oss",
        {"num_local_experts": 5, "swiglu_limit": 7.0, "swiglu_alpha": 1.2, "intermediate_size": 24},
    ),
    "gpt_oss-as-released": ("gpt_oss", {"num_experts_per_tok": 3}),
    "openai_privacy_filter-clamped": ("openai_privacy_filter", {"num_experts_per_tok": 4, "swiglu_limit": 0.25}),
    "openai_privacy_filter-top5": (
        "openai_privacy_filter",
        {"num_local_experts": 7, "num_experts_per_tok": 5, "swiglu_alpha": 1.0, "intermediate_size": 24},
    ),
    "openai_privacy_filter-as-released": ("openai_privacy_filter", {"num_experts_per_tok": 3}),
    "jetmoe-top2": ("jetmoe", {}),
    "jetmoe-top3-gelu": ("jetmoe", {"num_local_experts": 7, "num_experts_per_tok": 3, "activation_function": "gelu"}),
    "kolibri1-as-they-are": ("kolibri1", {"norm_topk_prob": False, "num_experts_per_tok": 3}),
    "kolibri1-renormalised": ("kolibri1", {"norm_topk_prob": True, "num_local_experts": 7, "moe_intermediate_size": 24}),
    "kolibri1-alone": ("kolibri1", {"shared_expert_intermediate_size": 0, "num_experts_per_tok": 3, "hidden_act": "gelu"}),
    "llama4_text-top1": ("llama4_text", {"num_experts_per_tok": 1}),
    "llama4_text-top3-every-layer": (
        "llama4_text",
        {"num_experts_per_tok": 3, "num_local_experts": 5, "interleave_moe_layer_step": 1, "hidden_act": "gelu"},
    ),
}
