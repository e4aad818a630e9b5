"""Transformers' static cache, as one CUDA graph can hold it."""

from __future__ import annotations

from typing import Any

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
        if type(layer) is StaticSlidingWindowLayer:
            cache.layers[i] = StaticLayer(max_cache_len=places)
        elif type(layer) is not StaticLayer:
            raise Unfit(f"its cache has a {type(layer).__name__}")
    return cache
