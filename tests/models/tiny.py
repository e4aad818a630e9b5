"""Tiny random models of the families, in configurations that matter, and what their blocks get and give."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moerunner.models.prepare import sites

VOCAB, TOKENS = 96, 24

_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LATENT_ATTENTION = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "moe_intermediate_size": 24,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
}

_GATED_SHARED = {
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 20,
}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "head_dim": 8,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
_GROUPED = {
    "moe_intermediate_size": 24,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}
_ONE_GROUP = {**_GROUPED, "n_group": 1, "topk_group": 1, "norm_topk_prob": False}
_AS_DEEPSEEK = {"n_routed_experts": 16, "n_shared_experts": 2}
_AS_EXAONE = {"num_experts": 16, "num_shared_experts": 2}
_KIMI = {
    **{k: v for k, v in _LATENT_ATTENTION.items() if k not in ("n_routed_experts", "first_k_dense_replace")},
    **_AS_EXAONE,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "linear_head_dim": 8,
    "linear_num_heads": 4,
}
_ERNIE = {"moe_num_experts": 16, "moe_k": 4, "moe_intermediate_size": 24, "moe_layer_end_index": -1}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral-top2": ("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2}),
    "mixtral-top1-gelu": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 1, "hidden_act": "gelu"}),
    "qwen3_moe-renormalised": (
        "qwen3_moe",
        {"num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 24, "norm_topk_prob": True},
    ),
    "qwen3_moe-dense-between": (
        "qwen3_moe",
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "norm_topk_prob": False,
            "num_hidden_layers": 4,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [0],
        },
    ),
    "deepseek_v2-greedy": (
        "deepseek_v2",
        {**_LATENT_ATTENTION, "topk_method": "greedy", "n_group": 4, "topk_group": 1, "n_shared_experts": 1},
    ),
    "deepseek_v2-groups": (
        "deepseek_v2",
        {
            **_LATENT_ATTENTION,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "n_shared_experts": 2,
            "routed_scaling_factor": 2.5,
            "norm_topk_prob": True,
        },
    ),
    "deepseek_v3-groups": (
        "deepseek_v3",
        {**_LATENT_ATTENTION, "n_group": 4, "topk_group": 2, "n_shared_experts": 1, "routed_scaling_factor": 2.5},
    ),
    "deepseek_v3-one-group": (
        "deepseek_v3",
        {
            **_LATENT_ATTENTION,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 2,
            "routed_scaling_factor": 1.0,
            "norm_topk_prob": False,
        },
    ),
}
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "olmoe-as-they-are": ("olmoe", {"num_experts": 16, "num_experts_per_tok": 4, "norm_topk_prob": False}),
    "olmoe-renormalised": ("olmoe", {"num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": True}),
    "qwen2_moe-as-they-are": ("qwen2_moe", {**_GATED_SHARED, "norm_topk_prob": False}),
    "qwen2_moe-renormalised": ("qwen2_moe", {**_GATED_SHARED, "norm_topk_prob": True, "hidden_act": "gelu"}),
    "qwen3_next-renormalised": ("qwen3_next", {**_GATED_SHARED, **_LINEAR, "norm_topk_prob": True}),
    "qwen3_next-as-they-are": ("qwen3_next", {**_GATED_SHARED, **_LINEAR, "norm_topk_prob": False}),
    "glm4_moe-groups": ("glm4_moe", {**_GROUPED, **_AS_DEEPSEEK, "head_dim": 8}),
    "glm4_moe-one-group": ("glm4_moe", {**_ONE_GROUP, **_AS_DEEPSEEK, "n_shared_experts": 1, "head_dim": 8}),
    "glm4_moe_lite-groups": ("glm4_moe_lite", {**_LATENT_ATTENTION, **_GROUPED, **_AS_DEEPSEEK}),
    "glm4_moe_lite-one-group": ("glm4_moe_lite", {**_LATENT_ATTENTION, **_ONE_GROUP, **_AS_DEEPSEEK}),
    "exaone_moe-groups": ("exaone_moe", {**_GROUPED, **_AS_EXAONE}),
    "exaone_moe-one-group": ("exaone_moe", {**_ONE_GROUP, **_AS_EXAONE, "num_shared_experts": 1}),
    "kimi_linear-groups": ("kimi_linear", {**_KIMI, **_GROUPED}),
    "kimi_linear-one-group": ("kimi_linear", {**_KIMI, **_ONE_GROUP, "num_shared_experts": 1}),
    "ernie4_5_moe-shared": ("ernie4_5_moe", {**_ERNIE, "moe_num_shared_experts": 2}),
    "ernie4_5_moe-alone": ("ernie4_5_moe", {**_ERNIE, "moe_num_shared_experts": 0, "moe_norm_min": 0.5}),
    "flex_olmo-as-they-are": ("flex_olmo", {"num_experts": 7, "num_experts_per_tok": 5, "norm_topk_prob": False}),
    "flex_olmo-renormalised": ("flex_olmo", {"num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True}),
    "jamba-every-second": (
        "jamba",
        {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 4,
        },
    ),
    "granitemoe-top3": ("granitemoe", {"num_local_experts": 8, "num_experts_per_tok": 3, "logits_scaling": 2.0}),
    "granitemoe-top1": ("granitemoe", {"num_local_experts": 4, "num_experts_per_tok": 1}),
    "dots1-groups": ("dots1", {**_GROUPED, **_AS_DEEPSEEK, "first_k_dense_replace": 1}),
    "dots1-one-group": ("dots1", {**_ONE_GROUP, **_AS_DEEPSEEK, "n_shared_experts": 1}),
}
CASES |= MORE
FIRST = {family: case for case, (family, _) in reversed(MORE.items())}
SLOW = [case for case, (family, _) in MORE.items() if FIRST[family] != case]

ONE_PER_FAMILY = ["mixtral-top2", "qwen3_moe-dense-between", "deepseek_v2-groups", "deepseek_v3-groups"]


def build(case: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model in eval mode with every weight drawn anew: as Transformers makes them, routers tie and biases are zero."""
    from transformers import AutoConfig, AutoModelForCausalLM

    family, own = CASES[case]
    config = AutoConfig.for_model(family, **{**_SIZES, **own, **changes})
    model = AutoModelForCausalLM.from_config(config)
    draw = torch.Generator().manual_seed(len(case))
    for name, tensor in model.state_dict().items():
        if tensor.ndim > 1:
            tensor.copy_(torch.randn(tensor.shape, generator=draw) * 2 / tensor.shape[-1] ** 0.5)
        elif "bias" in name:
            tensor.copy_(torch.randn(tensor.shape, generator=draw) * 0.2)
        else:
            tensor.copy_(1 + torch.randn(tensor.shape, generator=draw) * 0.2)
    return model.to(dtype).eval()


def prompt(rows: int = 2, tokens: int = TOKENS) -> Tensor:
    return torch.randint(3, VOCAB, (rows, tokens), generator=torch.Generator().manual_seed(7))


def blocks(model: nn.Module) -> dict[str, nn.Module]:
    return {site.name: site.block for site in sites(model) if site.family}


@dataclass
class Seen:
    """What went through one block while it was Transformers' own."""

    x: Tensor = field(default_factory=lambda: torch.empty(0))
    y: Tensor = field(default_factory=lambda: torch.empty(0))
    routed: tuple[Tensor, ...] = ()


def run_and_watch(model: Any, ids: Tensor) -> tuple[Tensor, dict[str, Seen]]:
    """The logits, and for each block its input, its output and what its router returned."""
    seen: dict[str, Seen] = {}
    hooks = []
    for name, block in blocks(model).items():
        mine = seen[name] = Seen()

        def keep_block(_: nn.Module, args: tuple[Tensor], y: Tensor, mine: Seen = mine) -> None:
            mine.x, mine.y = args[0].detach().clone(), y.detach().clone()

        def keep_router(_: nn.Module, args: Any, answer: tuple[Tensor, ...], mine: Seen = mine) -> None:
            mine.routed = tuple(t.detach().clone() for t in answer)

        router = block.gate if hasattr(block, "gate") else block.router
        hooks += [block.register_forward_hook(keep_block), router.register_forward_hook(keep_router)]
    with torch.no_grad():
        logits = model(ids).logits
    for hook in hooks:
        hook.remove()
    return logits, seen


def relative(y: Tensor, ref: Tensor) -> float:
    y, ref = y.detach().double(), ref.detach().double()
    return float((y - ref).abs().max() / ref.abs().max().clamp(min=torch.finfo(torch.float64).tiny))
