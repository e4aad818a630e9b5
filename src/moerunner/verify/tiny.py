"""A tiny random model of a family, for a verification that needs no download."""

from __future__ import annotations

import importlib
import inspect
import tempfile
from typing import Any

import torch
from torch import Tensor

from moerunner.errors import UnsupportedError
from moerunner.models import reference, registry
from moerunner.models.families.tiny import TINY

# Set wherever a family's config has the key. All head sizes are equal, so that they fit each other in every family.
_SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "max_position_embeddings": 512,
    "sliding_window": 8,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_group": 2,
    "num_expert_group": 2,
    "topk_group": 1,
    "topk_method": "group_limited_greedy",
    "n_shared_experts": 2,
    "num_shared_experts": 2,
    "moe_num_shared_experts": 2,
    "shared_expert_intermediate_size": 48,
    "shared_intermediate_size": 48,
    "routed_scaling_factor": 1.7,
    "swiglu_limit": 0.25,
    "expert_capacity": 24,
    "linear_num_heads": 2,
    "linear_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "index_topk": 4,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_MOST = 10**8  # parameters


def tiny_model(family: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A model of this `model_type` with about a hundred thousand random weights, in eval mode.

    Families start their routers at zero, where every expert ties with every other: all weights are drawn anew here, the
    correction biases too. dtype: as Transformers loads the float32 model in it, whatever it keeps in float32.
    changes: config values in place of the tiny ones.
    """
    config = tiny_config(family, **changes)
    kind = _model_class(type(config))
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in kind(config).parameters())
    if size > _MOST:
        raise UnsupportedError(f"a small model of the family {family!r} would still have {size:,} parameters")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config)
    draw = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():  # these share memory with the model
        if not tensor.is_floating_point():
            _draw_ids(tensor, getattr(config, "num_local_experts", 0) or getattr(config, "num_experts", 0), draw)
        elif tensor.ndim > 1:
            tensor.copy_(torch.randn(tensor.shape, generator=draw) / tensor.shape[-1] ** 0.5)
        elif "bias" in name:
            tensor.copy_(torch.randn(tensor.shape, generator=draw) * 0.1)
        else:  # norms and scales, some of which are not filled when they are made
            start = torch.nan_to_num(tensor, nan=1.0, posinf=1.0, neginf=1.0)
            tensor.copy_(start + 0.05 * (1 + start.abs()) * torch.randn(tensor.shape, generator=draw))
    return model.eval() if dtype == torch.float32 else _loaded_as(dtype, model)


def tiny_config(family: str, **changes: Any) -> Any:
    """The config of `tiny_model`; of a multimodal family, that of its text tower.

    Raises `UnsupportedError` for a model_type that Transformers does not have.
    """
    import transformers
    from transformers import CONFIG_MAPPING

    if not registry.transformers_knows(family):
        known = registry.of_model_type(family)
        seen = reference.releases(known.name) if known is not None else []
        next_step = f"{seen[0]} to {seen[-1]} have it" if seen else "Name one, such as mixtral or deepseek_v3"
        raise UnsupportedError(f"Transformers {transformers.__version__} has no model_type {family!r}", next_step=next_step)
    kind: Any = CONFIG_MAPPING[family]
    try:
        text = kind().get_text_config()
        if type(text) is not kind and text.model_type in CONFIG_MAPPING:
            family, kind = text.model_type, type(text)
        alias = getattr(kind, "attribute_map", {})
        known = {*kind().to_dict(), *inspect.signature(kind.__init__).parameters}
        sizes = {key: value for key, value in _SIZES.items() if key in known and alias.get(key, key) == key}
        sizes |= TINY.get(family, {})
        return kind(**{key: value for key, value in (sizes | changes).items() if value is not None or key not in _SIZES})
    except (ValueError, TypeError) as error:
        raise UnsupportedError(f"Transformers cannot make a small config of the family {family!r}: {error}") from error


def tiny_inputs(model: Any, ids: Tensor) -> dict[str, Any]:
    """What a model is called with to run on these tokens, [1, T]; an encoder-decoder has them on both sides."""
    takes = inspect.signature(model.forward).parameters
    inputs = {"input_ids": ids}
    return inputs | {"decoder_input_ids": ids} if "decoder_input_ids" in takes else inputs


def _loaded_as(dtype: torch.dtype, model: Any) -> Any:
    """A cast would miss what a model computes in its dtype when it is made, and what Transformers keeps in float32."""
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            return type(model).from_pretrained(folder, dtype=dtype).eval()
    finally:
        if bars:
            logging.enable_progress_bar()


def _model_class(config: type) -> Any:
    """The class that makes most of a config: with a head where there is one. It lies beside the config, in Transformers."""
    from transformers import AutoModelForCausalLM, PreTrainedModel

    if not config.__module__.startswith("transformers.") and config in AutoModelForCausalLM._model_mapping:
        return AutoModelForCausalLM._model_mapping[config]
    module = importlib.import_module(config.__module__.replace(".configuration_", ".modeling_"))
    own = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
    models = [c for c in own if issubclass(c, PreTrainedModel) and "forward" in vars(c)]
    name = config.__name__.removesuffix("Config")  # a release may forget to say which config a model has
    fit = [c for c in models if c.config_class is config] or [c for c in models if c.__name__.startswith(name)]
    for ending in ("ForCausalLM", "ForConditionalGeneration", "TextModel", "Model", ""):
        found = next((c for c in fit if c.__name__.endswith(ending)), None)
        if found is not None:
            return found
    raise UnsupportedError(f"Transformers has no model for {config.__name__}")


def _draw_ids(table: Tensor, count: int, draw: torch.Generator) -> None:
    """A table of experts by token: different ones in each row."""
    if table.ndim == 2 and 0 < table.shape[1] <= count:
        table.copy_(torch.rand(table.shape[0], count, generator=draw).argsort(-1)[:, : table.shape[1]])
