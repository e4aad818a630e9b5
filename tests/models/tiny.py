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

        hooks += [block.register_forward_hook(keep_block), block.gate.register_forward_hook(keep_router)]
    with torch.no_grad():
        logits = model(ids).logits
    for hook in hooks:
        hook.remove()
    return logits, seen


def relative(y: Tensor, ref: Tensor) -> float:
    y, ref = y.detach().double(), ref.detach().double()
    return float((y - ref).abs().max() / ref.abs().max())
