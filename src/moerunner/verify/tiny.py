"""A tiny random model of a family, for a verification that needs no download."""

from __future__ import annotations

from typing import Any

import torch

from moerunner.errors import UnsupportedError

# Set wherever a family's config has the key. All head sizes are equal, so that they fit each other in every family.
_SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "max_position_embeddings": 512,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "topk_method": "group_limited_greedy",
    "n_shared_experts": 2,
    "shared_expert_intermediate_size": 48,
    "routed_scaling_factor": 1.7,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def tiny_model(family: str, *, seed: int = 0) -> Any:
    """A float32 model of this `model_type` with about a hundred thousand random weights, in eval mode.

    Families start their routers at zero, where every expert ties with every other: all weights are drawn anew here, the
    correction biases too.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        defaults = AutoConfig.for_model(family)
        config = AutoConfig.for_model(family, **{k: v for k, v in _SIZES.items() if hasattr(defaults, k)})
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except ValueError as error:  # no such model_type, or one without a causal language model
        raise UnsupportedError(
            f"Transformers cannot build a language model of the family {family!r}",
            next_step="Name a model_type, such as mixtral or deepseek_v3",
        ) from error
    draw = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():  # these share memory with the model
        if tensor.ndim > 1:
            tensor.copy_(torch.randn(tensor.shape, generator=draw) / tensor.shape[-1] ** 0.5)
        elif "bias" in name:
            tensor.copy_(torch.randn(tensor.shape, generator=draw) * 0.1)
    return model.eval()
