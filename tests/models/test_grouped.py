"""What the families with DeepSeek-V3's routing do otherwise than DeepSeek-V3, where random weights do not show it."""

from typing import Any

import pytest
import torch

from moerunner.models import patch, registry
from moerunner.models.prepare import sites
from moerunner.verify.tiny import tiny_config, tiny_model


def test_an_expert_with_a_negative_key_loses_against_those_of_a_group_that_lost():
    """Two groups of two; both keys of the better group are below 0, which is the key of the others then."""
    sizes = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2}
    model = tiny_model("axk2", **sizes)
    block: Any = next(site.block for site in sites(model))
    block.gate.e_score_correction_bias.copy_(torch.tensor([-2.0, -2.0, -4.0, -4.0]))
    x = torch.randn(2, 5, model.config.hidden_size)
    with torch.no_grad():
        assert set(block.gate(x)[2].flatten().tolist()) == {2, 3}
        expected = block(x)
        patch(model)
        torch.testing.assert_close(block(x), expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("deepseek_v3", {"topk_method": "noaux_tc", "moe_layer_freq": 1}),
        ("kimi_linear", {"moe_layer_freq": 1, "moe_router_activation_func": "sigmoid", "use_grouped_topk": True}),
        ("mimo_v2_flash", {"n_shared_experts": None, "topk_method": "noaux_tc"}),
        ("glm_moe_dsa", {"index_topk_freq": 4, "index_topk_pattern": None}),
    ],
)
def test_keys_of_published_checkpoints_are_known(family, changes):
    entry = registry.of_model_type(family)
    assert entry is not None
    assert entry.read(tiny_config(family, **changes)) == entry.read(tiny_config(family))
