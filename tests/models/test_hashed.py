"""Layers that look their experts up by token id, beside layers that do not."""

import pytest

from moerunner.errors import UnsupportedError
from moerunner.models import patch, registry
from moerunner.models.prepare import sites
from moerunner.verify.tiny import tiny_config, tiny_model


def read(layer=None, **changes):
    family = registry.of_model_type("deepseek_v4")
    assert family is not None
    return family.read(tiny_config("deepseek_v4", **changes), layer)


def test_each_layer_is_of_its_own_kind():
    kinds = [read(layer, mlp_layer_types=["hash_moe", "moe", "hash_moe"]).routing.choose for layer in range(3)]
    assert kinds == ["hash", "score", "hash"]


def test_a_layer_of_unknown_place_is_of_the_kind_that_all_have():
    assert read(mlp_layer_types=["moe"] * 3).routing.choose == "score"
    with pytest.raises(UnsupportedError, match="mlp_layer_types differs between layers"):
        read(mlp_layer_types=["hash_moe", "moe", "moe"])


def test_a_block_alone_is_left_as_it_is_where_layers_differ():
    block = next(site.block for site in sites(tiny_model("deepseek_v4")))
    (skipped,) = patch(block).skipped
    assert "mlp_layer_types differs" in skipped.reason


def test_another_score_is_not_offered():
    with pytest.raises(UnsupportedError, match="'tanh'"):
        read(0, scoring_func="tanh")
