"""The sizes of the models in `accuracy.py`: at least 100 million parameters in 12 layers or more."""

from __future__ import annotations

from typing import Any

from moerunner.verify.tiny import tiny_config

LAYERS = 12

# Set wherever a family's config has the key; in families without a separate width for experts, intermediate_size is theirs.
_SIZES: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "moe_intermediate_size": 384,
    "num_hidden_layers": LAYERS,
    "mlp_layer_types": ["dense"] + ["sparse"] * (LAYERS - 1),
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "kv_lora_rank": 128,
    "q_lora_rank": 192,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 64,
    "max_position_embeddings": 2048,
    "sliding_window": 128,
    "num_experts": 16,
    "num_local_experts": 16,
    "n_routed_experts": 16,
    "moe_num_experts": 16,
    "num_experts_per_tok": 4,
    "num_experts_per_token": 4,
    "moe_k": 4,
    "top_k_experts": 4,
    "n_group": 4,
    "num_expert_group": 4,
    "topk_group": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "shared_expert_intermediate_size": 384,
    "shared_intermediate_size": 512,
    "swiglu_limit": 2.0,
    "linear_num_heads": 8,
    "linear_head_dim": 64,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}
_EXPERTS = {"intermediate_size": 384}
_MLA = {"num_key_value_heads": 8, "head_dim": 32}  # positions are turned in qk_rope_head_dim of each head


def _mixed(one: str, other: str, every: int) -> list[str]:
    """`other` in each `every`-th layer."""
    return [other if (i + 1) % every == 0 else one for i in range(LAYERS)]


_OWN: dict[str, dict[str, Any]] = {
    "deepseek_v3": _MLA,
    "glm4_moe_lite": _MLA,
    "gpt_oss": {**_EXPERTS, "layer_types": _mixed("sliding_attention", "full_attention", 2)},
    "granitemoehybrid": {
        **_EXPERTS,
        "layer_types": _mixed("mamba", "attention", 3),
        "attention_multiplier": 0.125,  # 1 by default, with which attention looks at one token and errors grow
        "mamba_n_heads": 16,
        "mamba_d_head": 64,
        "mamba_d_state": 64,
        "mamba_chunk_size": 64,
    },
    "jamba": {
        "intermediate_size": 768,
        "attn_layer_period": 4,
        "attn_layer_offset": 2,
        "mamba_d_state": 16,
        "mamba_dt_rank": 32,
    },
    "lfm2_moe": {"layer_types": _mixed("conv", "full_attention", 3)},
    "llama4": {
        "intermediate_size": 768,
        "intermediate_size_mlp": 1536,
        "num_experts_per_tok": 1,
        "attention_chunk_size": 128,
    },
    "minimax_m2": _EXPERTS,
    "mixtral": {**_EXPERTS, "num_experts_per_tok": 2},
    "nemotron_h": {
        "layers_block_type": ["mamba", "moe", "attention", "moe"] * 4,
        "n_routed_experts": 32,
        "moe_intermediate_size": 768,
        "moe_latent_size": 256,
        "moe_shared_expert_intermediate_size": 512,
        "mamba_num_heads": 16,
        "mamba_head_dim": 64,
        "ssm_state_size": 64,
        "chunk_size": 64,
    },
    "olmoe": _EXPERTS,
    "phimoe": {**_EXPERTS, "num_experts_per_tok": 2},
    "qwen3_next": {"layer_types": _mixed("linear_attention", "full_attention", 4)},
    "gemma4": {
        "layer_types": _mixed("sliding_attention", "full_attention", 6),
        "global_head_dim": 64,
        "vocab_size_per_layer_input": 4096,
        "hidden_size_per_layer_input": 32,
    },
    "exaone_moe": {"layer_types": _mixed("sliding_attention", "full_attention", 4)},
    "kimi_linear": {**_MLA, "layer_types": _mixed("linear_attention", "full_attention", 4), "q_lora_rank": None},
    "ernie4_5_vl_moe": {
        "moe_intermediate_size": [384, 192],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [12, 12, 8]},
    },
}
FAMILIES = tuple(_OWN)


def sizes(family: str) -> dict[str, Any]:
    """The config keys of a family's model, in place of those of `verify.tiny`."""
    known = tiny_config(family).to_dict()
    return {key: value for key, value in _SIZES.items() if key in known} | _OWN[family]
