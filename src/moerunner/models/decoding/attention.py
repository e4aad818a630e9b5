"""Attention of one token over a static cache, for a Transformers that copies keys and values once for every query head.

Under a mask, and a static cache always has one, older releases repeat the keys and values of each group of heads in memory.
Heads of a group read the same keys: seen as queries of one head they need no copy. Later releases do so themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

NAME = "moerunner_sdpa"


@contextmanager
def without_copies(model: nn.Module) -> Iterator[None]:
    """Inside, the model's scaled-dot-product attention copies nothing for a single token."""
    from transformers.integrations import sdpa_attention

    configs = {} if hasattr(sdpa_attention, "pack_gqa") else _configs(model)
    if configs:
        _register()
    try:
        for config in configs.values():
            config._attn_implementation_internal = NAME
        yield
    finally:
        for config in configs.values():
            config._attn_implementation_internal = "sdpa"


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """In place of Transformers' `sdpa_attention_forward`, with its arguments and its result.

    query: [B, heads, T, D]. key, value: [B, groups, L, D]. Gives [B, T, heads, D].
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    heads, groups = query.shape[1], key.shape[1]
    shared = attention_mask is not None and attention_mask.shape[1] == 1 and kwargs.get("position_bias") is None
    if query.shape[2] != 1 or heads == groups or not shared:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    out = nn.functional.scaled_dot_product_attention(
        query.reshape(query.shape[0], groups, heads // groups, query.shape[-1]),
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=dropout,
        scale=scaling,
    )
    return out.reshape(out.shape[0], 1, heads, value.shape[-1]), None


def _configs(model: nn.Module) -> dict[int, Any]:
    found = {id(config): config for module in model.modules() if (config := getattr(module, "config", None)) is not None}
    return {key: config for key, config in found.items() if getattr(config, "_attn_implementation", "") == "sdpa"}


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
