"""Transformers' common model tests on a small model of every family of the table; `upstream_tests.py` runs them.

Their source distribution has the tests that all models share, and not the small models that they run on: those are ours.
"""

import importlib
import inspect
import unittest
from typing import Any

import torch
from tests.test_modeling_common import GenerationTesterMixin, ModelTesterMixin
from tests.test_training_mixin import TrainingTesterMixin
from transformers import CONFIG_MAPPING, PreTrainedModel

from moerunner.errors import UnsupportedError
from moerunner.models.families import TABLE
from moerunner.verify.tiny import tiny_config, tiny_inputs


def classes_of(config: Any) -> list[Any]:
    """The public models of a config that take the same inputs: the bare one first, then those with heads."""
    module = importlib.import_module(type(config).__module__.replace(".configuration_", ".modeling_"))
    public = [c for name, c in vars(module).items() if name in module.__all__ and not name.endswith("PreTrainedModel")]
    models = [c for c in public if issubclass(c, PreTrainedModel) and c.config_class is type(config)]
    on_both_sides = any(map(_takes_tokens_twice, models))  # an encoder and a decoder
    return [c for c in models if _takes_tokens_twice(c) == on_both_sides]


def _takes_tokens_twice(model: Any) -> bool:
    return "decoder_input_ids" in inspect.signature(model.forward).parameters


class ModelTester:
    """What the common tests ask of a model's own test file."""

    batch_size, seq_length, is_training = 3, 8, True

    def __init__(self, family: str) -> None:
        self.family = family
        config = self.get_config()
        self.hidden_size, self.num_attention_heads = config.hidden_size, config.num_attention_heads
        self.num_hidden_layers = config.num_hidden_layers
        heads = [c for c in classes_of(config) if c.__name__.endswith("ForCausalLM")]
        self.causal_lm_class = heads[0] if heads else None

    def get_config(self) -> Any:
        config = tiny_config(self.family)
        if hasattr(config, "max_position_embeddings"):
            config.max_position_embeddings = 512  # some tests run that many tokens and half as many again
        return config

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        config = self.get_config()
        model = classes_of(config)[0]
        if getattr(model, "main_input_name", "") == "pixel_values":
            patches = torch.randn(16, 3 * config.patch_size**2)
            return config, {"pixel_values": patches, "grid_thw": torch.tensor([[1, 4, 4]])}
        ids = torch.randint(3, config.vocab_size, (self.batch_size, self.seq_length))
        return config, tiny_inputs(model, ids) | {"attention_mask": torch.ones_like(ids)}


def tests_of(family: str, classes: list[Any]) -> type[unittest.TestCase]:
    generates = any(c.can_generate() for c in classes)
    mixins = (GenerationTesterMixin,) if generates else ()

    def prepare(self: Any) -> None:
        self.model_tester = ModelTester(family)

    body = {
        "all_model_classes": classes,
        "model_tester": None,
        "setUp": prepare,
        "test_num_layers_is_small": None,  # it wants two; ours have three, so that sparse layers follow a dense one
        "test_all_params_have_gradient": False,  # an expert that no token chose has none
        "is_encoder_decoder": getattr(tiny_config(family), "is_encoder_decoder", False),
    }
    return type(f"Test_{family}", (ModelTesterMixin, TrainingTesterMixin, *mixins, unittest.TestCase), body)


for entry in TABLE:
    if entry.name not in CONFIG_MAPPING:
        continue  # another release's
    try:
        found = classes_of(tiny_config(entry.name))
    except UnsupportedError:
        continue
    if found:
        globals()[f"Test_{entry.name}"] = tests_of(entry.name, found)
