"""Families with something that no other family has, and what the parity suite does not ask of them."""

import pytest
import torch
from tiny import relative

from moerunner.errors import UnsupportedError
from moerunner.models import patch, registry
from moerunner.models.block import forward_of
from moerunner.models.families.tiny import TINY
from moerunner.models.reference import fingerprint
from moerunner.verify.tiny import tiny_config, tiny_inputs, tiny_model


def read(family, config, layer=None):
    entry = registry.of_model_type(family)
    assert entry is not None
    return entry.read(config, layer)


def patched(family, **changes):
    """A model, its patched blocks, and tokens for them."""
    model = tiny_model(family, **changes)
    assert not patch(model).skipped
    found = [module for module in model.modules() if forward_of(module) is not None]
    return model, found, torch.randn(2, 20, 64)


def same_as_transformers(block, *args):
    """First results of the patched block and of its class, float32."""
    with torch.no_grad():
        ours, theirs = block(*args), type(block).forward(block, *args)
    assert type(ours) is type(theirs)
    if not isinstance(ours, tuple):
        return relative(ours, theirs) <= 2e-6
    return all(relative(one, other) <= 2e-6 for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("jitter", [0.0, 1e-4, 0.01, 0.1, 0.3, 1.0])
def test_phimoe_keeps_the_logits_that_are_close(jitter):
    _, blocks, x = patched("phimoe", router_jitter_noise=jitter)
    assert all(same_as_transformers(block, x) for block in blocks)


@pytest.mark.parametrize("asked", [1, 3])
def test_phimoe_chooses_two_whatever_is_asked_for(asked):
    _, blocks, x = patched("phimoe", num_experts_per_tok=asked)
    assert all(same_as_transformers(block, x) for block in blocks)


@pytest.mark.parametrize("types", [None, 0, 1, 2, "mixed"], ids=str)
def test_ernie_vl_has_experts_for_each_type_of_token(types):
    _, blocks, x = patched("ernie4_5_vl_moe_text")
    given = torch.randint(0, 3, (2, 20)) if types == "mixed" else None if types is None else torch.full((2, 20), types)
    for block in blocks:
        assert same_as_transformers(block, x, given)
        assert block(x, given)[1].shape == (40, 8)


@pytest.mark.parametrize("capacity", [1, 3, 20])
def test_switch_drops_what_an_expert_has_no_room_for_in_each_sequence(capacity):
    _, blocks, x = patched("switch_transformers", expert_capacity=capacity)
    older = registry.of_model_type("switch_transformers").older
    for block in blocks:
        assert same_as_transformers(block, x)
        if fingerprint(type(block)) in older:
            pytest.skip("this Transformers counts the room within each token")
        dropped = (block(x) == 0).all(-1)
        assert dropped.any() == (capacity < 20)
        assert dropped.sum() >= 2 * max(0, 20 - capacity * 8)


def test_longcat_keeps_the_rows_of_idle_experts_out_of_it():
    _, blocks, x = patched("longcat_flash", zero_expert_num=3)
    for block in blocks:
        assert block.experts.gate_up_proj.shape[0] == 11
        with torch.no_grad():
            block.experts.gate_up_proj[8:] = torch.nan
        assert block(x).isfinite().all()
        assert same_as_transformers(block, x)


def test_a_hook_on_a_router_that_gives_logits_changes_what_is_chosen():
    _, blocks, x = patched("dbrx")
    for block in blocks:
        before = block(x)
        block.router.register_forward_hook(lambda _, args, logits: -logits)
        assert relative(block(x), before) > 1e-2
        assert same_as_transformers(block, x)


def test_a_hook_that_only_looks_at_a_router_changes_nothing():
    seen = []
    _, (block, *_), x = patched("dbrx")
    before = block(x)
    block.router.register_forward_hook(lambda _, args, logits: seen.append(logits.shape))
    assert relative(block(x), before) <= 2e-6
    assert seen == [(40, 8)]


@pytest.mark.parametrize(
    ("family", "changes", "what"),
    [
        ("phimoe", {}, "at random"),
        ("minimax", {"router_jitter_noise": 0.1}, "noise"),
        ("dbrx", {"ffn_config": {**TINY["dbrx"]["ffn_config"], "moe_jitter_eps": 0.1}}, "noise"),
        ("switch_transformers", {"router_jitter_noise": 0.1, "dropout_rate": 0.0}, "noise"),
        ("switch_transformers", {"router_jitter_noise": 0.0, "dropout_rate": 0.1}, "drop"),
    ],
)
def test_what_a_block_does_in_training_alone_is_refused_there(family, changes, what):
    model, _, _ = patched(family, **changes)
    model.train()
    with pytest.raises(UnsupportedError, match=what):
        model(**tiny_inputs(model, torch.randint(3, 90, (1, 6))))


def test_switch_trains_where_it_drops_nothing_and_adds_no_noise():
    model, _, _ = patched("switch_transformers", router_jitter_noise=0.0, dropout_rate=0.0)
    model.train()
    model(**tiny_inputs(model, torch.randint(3, 90, (1, 6)))).logits.square().mean().backward()
    assert model.encoder.block[1].layer[-1].mlp.router.classifier.weight.grad.any()


def test_hunyuan_has_a_top_k_for_each_layer():
    config = tiny_config("hunyuan_v1_moe", moe_topk=[1, 3, 2])
    assert [read("hunyuan_v1_moe", config, layer).top_k for layer in range(3)] == [1, 3, 2]
    model = tiny_model("hunyuan_v1_moe", moe_topk=[1, 3, 2])
    model.config.moe_topk = [1, 2, 2]
    report = patch(model)
    assert [entry.name for entry in report.replaced] == ["model.layers.0.mlp", "model.layers.2.mlp"]
    assert "built with gate.top_k = 3" in report.skipped[0].reason


@pytest.mark.parametrize(
    ("family", "key", "values"),
    [
        ("dbrx", "ffn_config.moe_top_k", (2, 3)),
        ("mistral4", "n_group", (2, 1)),
        ("longcat_flash", "routed_scaling_factor", (1.7, 2.0)),
        ("ernie4_5_vl_moe_text", "moe_norm_min", (1e-12, 0.5)),
        ("phimoe", "router_jitter_noise", (0.01, 0.2)),
        ("deepseek_ocr2_text", "topk_method", ("greedy", "group_limited_greedy")),
    ],
)
def test_a_config_that_changed_since_the_block_was_built_is_refused(family, key, values):
    model = tiny_model(family)
    outer, _, name = key.rpartition(".")
    config = getattr(model.config, outer) if outer else model.config
    assert getattr(config, name) == values[0]
    setattr(config, name, values[1])
    report = patch(model)
    assert not report.replaced
    assert all(f"says {key} = {values[1]!r}" in entry.reason for entry in report.skipped)


def test_deepseek_v2_knows_two_ways_to_choose():
    with pytest.raises(UnsupportedError, match="'noaux_tc'"):
        read("deepseek_v2", tiny_config("deepseek_v2", topk_method="noaux_tc"))


PUBLISHED = {
    "hunyuan_v1_moe": {
        "group_limited_greedy": False,
        "moe_drop_tokens": False,
        "moe_intermediate_size": [3072] * 3,
        "moe_layer_num_skipped": 0,
        "moe_random_routing_dropped_token": False,
        "moe_topk": [8] * 3,
        "n_group": None,
        "norm_topk_prob": True,
        "num_experts": 64,
        "num_shared_expert": [1] * 3,
        "routed_scaling_factor": 1.0,
        "topk_group": None,
        "use_mixed_mlp_moe": True,
    },
    "longcat_flash": {
        "mla_scale_kv_lora": True,
        "mla_scale_q_lora": True,
        "router_bias": False,
        "router_dtype": "float32",
        "zero_expert_type": "identity",
    },
    "ernie4_5_moe": {"moe_capacity": [64, 64, 64], "moe_gate": "topk", "moe_use_aux_free": True, "use_bias": False},
    "minimax": {"shared_intermediate_size": 0, "shared_moe_mode": "sigmoid"},
    "qwen3_vl_moe_text": {"norm_topk_prob": True},
    "deepseek_ocr2_text": {"moe_layer_freq": 1, "norm_topk_prob": False, "scoring_func": "softmax", "num_experts_per_tok": 6},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_keys_of_published_configs_are_all_known(name):
    from transformers import CONFIG_MAPPING

    assert read(name, CONFIG_MAPPING[name](**PUBLISHED[name]), 1).num_experts > 1
