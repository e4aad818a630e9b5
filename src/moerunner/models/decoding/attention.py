"""Attention of one token over a static cache: no copy of keys and values, and one mask for all layers.

Under a mask, and a static cache always has one, older releases of Transformers repeat the keys and values of each group of
heads in memory. Heads of a group read the same keys: seen as queries of one head they need no copy, and later releases do so
too. PyTorch turns a mask of truths into numbers to add at each call, in three launches; here the first layer does it for all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from moerunner.models.decoding.swap import swapped

_added: Any = WeakIdKeyDictionary()  # what is added to scores for each mask that is alive, by dtype


@contextmanager
def without_copies() -> Iterator[None]:
    """Inside, this thread's scaled-dot-product attention copies nothing for a single token, and no mask for each layer."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    with swapped([(ALL_ATTENTION_FUNCTIONS, "sdpa")], lambda own: partial(attend, own)):
        yield


def attend(
    own: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """In place of Transformers' function, `own`, with its arguments and its result.

    query: [B, heads, T, D]. key, value: [B, groups, L, D]. Gives [B, T, heads, D].
    """
    from transformers.integrations import sdpa_attention

    same = {"dropout": dropout, "scaling": scaling, **kwargs}
    if attention_mask is None or kwargs.get("position_bias") is not None:
        return own(module, query, key, value, attention_mask, **same)
    if attention_mask.dtype == torch.bool:
        attention_mask = _to_add(attention_mask, query.dtype)
    heads, groups = query.shape[1], key.shape[1]
    repeats = heads != groups and not hasattr(sdpa_attention, "pack_gqa")
    if not repeats or query.shape[2] != 1 or attention_mask.shape[1] != 1:
        return own(module, query, key, value, attention_mask, **same)
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
