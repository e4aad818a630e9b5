"""Transformers' static cache, as one CUDA graph can hold it."""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

MULTIPLE = 8  # places of a cache: what the kernels of attention want of a mask's rows


class Unfit(Exception):
    """Why the model must run in Transformers' own loop."""


def static_cache(model: Any, places: int) -> Any:
    """Transformers' static cache for a model, in which layers with a sliding window keep every place: the mask is the window.

    Such a layer counts its tokens in Python and shifts its rows once it is full, which one graph cannot hold.

    Raises:
        Unfit: a layer of the model keeps something else than keys and values of all tokens.
    """
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer

    config = model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        raise Unfit("it has an encoder")
    if not model._supports_default_dynamic_cache():
        raise Unfit("its cache is of its own kind")
    places = -(-places // MULTIPLE) * MULTIPLE
    try:
        cache = StaticCache(config, max_cache_len=places)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise Unfit(f"Transformers makes no static cache for it ({type(error).__name__}: {error})") from error
    for i, layer in enumerate(cache.layers):
        if type(layer) not in (StaticLayer, StaticSlidingWindowLayer):
            raise Unfit(f"its cache has a {type(layer).__name__}")
        cache.layers[i] = layer_class()(max_cache_len=places)
    return cache


@functools.cache
def layer_class() -> type:
    """Transformers' static layer, whose update takes one launch on a GPU; it is five otherwise."""
    from transformers.cache_utils import StaticLayer

    compiled = importlib.util.find_spec("triton") is not None

    class OneLaunchLayer(StaticLayer):
        def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
            # Made where it belongs: Transformers would copy it there, for which the host waits for all that the GPU still does.
            self.cumulative_length = torch.zeros_like(self.cumulative_length, device=key_states.device)
            super().lazy_initialization(key_states, value_states)
            self.done = torch.zeros((), dtype=torch.int32, device=self.device)

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            keys, values = self.keys, self.values
            assert keys is not None
            assert values is not None
            if not (compiled and _fits(keys, key_states) and _fits(values, value_states)):
                return super().update(key_states, value_states, *args, **kwargs)
            from moerunner.kernels.append import append

            append(keys, values, key_states, value_states, self.cumulative_length, self.done)
            return keys, values

    return OneLaunchLayer


def _fits(own: Tensor, new: Tensor) -> bool:
    """Whether the kernel can put new rows into a layer's tensor; else Transformers' code does, or says why not."""
    shapes = [(t.shape[:2], t.shape[3:], t.dtype, t.device) for t in (own, new)]
    return _on_gpu(new) and shapes[0] == shapes[1] and not new.requires_grad


def _on_gpu(tensor: Tensor) -> bool:
    return tensor.is_cuda
