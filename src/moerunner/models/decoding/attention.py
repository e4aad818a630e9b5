"""Attention of one token over a static cache: no copy of keys and values, and one mask for all layers.

Under a mask, and a static cache always has one, older releases of Transformers repeat the keys and values of each group of
heads in memory. Heads of a group read the same keys: seen as queries of one head they need no copy, and later releases do so
too. PyTorch turns a mask of truths into numbers to add at each call, in three launches; here the first layer does it for all.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

NAME = "moerunner_sdpa"
_added: Any = WeakIdKeyDictionary()  # what is added to scores for each mask that is alive, by dtype


@contextmanager
def without_copies(model: nn.Module) -> Iterator[None]:
    """Inside, the model's scaled-dot-product attention copies nothing for a single token."""
    configs = _configs(model)
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
    from transformers.integrations import sdpa_attention

    if attention_mask is not None and attention_mask.dtype == torch.bool:
        attention_mask = _to_add(attention_mask, query.dtype)
    heads, groups = query.shape[1], key.shape[1]
    packs = hasattr(sdpa_attention, "pack_gqa") or kwargs.get("position_bias") is not None
    if packs or query.shape[2] != 1 or heads == groups or attention_mask is None or attention_mask.shape[1] != 1:
        own = sdpa_attention.sdpa_attention_forward
        return own(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    out = nn.functional.scaled_dot_product_attention(
        query.reshape(query.shape[0], groups, heads // groups, query.shape[-1]),
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=dropout,
        scale=scaling,
    )
    return out.reshape(out.shape[0], 1, heads, value.shape[-1]), None


def _to_add(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What PyTorch makes of a mask of truths, made once for as long as the mask lives: the layers of a step share it."""
    made = _added.setdefault(mask, {})
    if dtype not in made:
        made[dtype] = torch.zeros_like(mask, dtype=dtype).masked_fill_(mask.logical_not(), float("-inf"))
    return made[dtype]


def _configs(model: nn.Module) -> dict[int, Any]:
    found = {id(config): config for module in model.modules() if (config := getattr(module, "config", None)) is not None}
    return {key: config for key, config in found.items() if getattr(config, "_attn_implementation", "") == "sdpa"}


def _register() -> None:
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
