"""Families inside multimodal models: the same blocks one level deeper, beside towers that have no experts."""

import copy
from typing import Any

import pytest
import torch

from moerunner.models import patch
from moerunner.models.prepare import sites
from moerunner.verify.tiny import tiny_config, tiny_inputs

slow = pytest.mark.slow

# A wrapper and the model_type of its text tower.
FAST = [
    ("aria", "aria_text"),
    ("gemma4", "gemma4_text"),
    ("glm4v_moe", "glm4v_moe_text"),
    ("kimi_k25", "deepseek_v3"),
    ("llama4", "llama4_text"),
    ("internvl", "qwen3_moe"),
]
LONG = [
    ("cohere2_vision", "cohere2_moe"),
    ("deepseek_ocr2", "deepseek_ocr2_text"),
    ("diffusion_gemma", "diffusion_gemma_text"),
    ("dots3_note", "dots3_note_text"),
    ("ernie4_5_vl_moe", "ernie4_5_vl_moe_text"),
    ("glm5_next", "glm5_next_text"),
    ("inkling_mm_model", "inkling_text"),
    ("inkling2", "inkling2_text"),
    ("internvl", "gpt_oss"),
    ("lfm2_vl", "lfm2_moe"),
    ("llava", "mixtral"),
    ("minimax_m3_vl", "minimax_m3_vl_text"),
    ("mistral3", "mistral4"),
    ("mistral_large4", "mistral_large4_text"),
    ("muse_spark", "muse_spark_text"),
    ("nemo_speechlm", "nemotron_h"),
    ("nemotron_h_omni", "nemotron_h"),
    ("qwen3_5_moe", "qwen3_5_moe_text"),
    ("qwen3_omni_moe_thinker", "qwen3_omni_moe_text"),
    ("qwen3_vl_moe", "qwen3_vl_moe_text"),
    ("qwen4_exp", "qwen4_exp_text"),
    ("step3p7", "step3p5"),
    ("unlimited_ocr", "unlimited_ocr_text"),
]

# Set wherever a tower's config has the key: what `tiny_config` does not know of because no text model has it.
_TOWER: dict[str, Any] = {
    "depth": 1,
    "n_layers": 1,
    "encoder_layers": 1,
    "num_hidden_layers": 1,
    "mlp_layer_types": ["sparse"],
    "num_heads": 4,
    "encoder_attention_heads": 4,
    "d_model": 64,
    "out_hidden_size": 64,
    "text_hidden_size": 64,
    "encoder_ffn_dim": 64,
    "projection_intermediate_size": 64,
}
# What a wrapper's towers, or the wrapper itself, need beside that, so that their parts fit each other.
_FIT: dict[str, dict[str, Any]] = {
    "dots3_note": {"audio_config": {"adapter_input_size": 64, "adapter_out_dim": 64}},
    "inkling_mm_model": {"vision_config": {"patch_size": 4, "n_layers": 4}},
    "muse_spark": {"audio_config": {"patch_sizes": [16], "hidden_sizes": [64], "depths": [1]}},
    "nemo_speechlm": {
        "audio_config": {"diarization_config": {"head_config": {"audio_hidden_size": 64}}},
        "word_timestamp_config": {"blank_token_id": 0},
    },
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
}


def build(wrapper: str, text: str) -> Any:
    from transformers import CONFIG_MAPPING, AutoModelForMultimodalLM

    fit, kind = _FIT.get(wrapper, {}), CONFIG_MAPPING[wrapper]
    config = kind(**{**fit, **_towers(kind(), fit), "text_config": tiny_config(text)})
    model = AutoModelForMultimodalLM.from_config(config)
    draw = torch.Generator().manual_seed(len(wrapper))
    for tensor in model.state_dict().values():
        if tensor.ndim > 1 and tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape, generator=draw) / tensor.shape[-1] ** 0.5)
    return model.eval()


def _towers(config: Any, changes: dict[str, Any]) -> dict[str, Any]:
    """Small configs for all that is not text, of the kinds that the wrapper has by default."""
    parts = {name: getattr(config, name, None) for name in config.sub_configs or {} if name != "text_config"}
    return {
        name: _tower(part, changes.get(name, {}))
        for name, part in parts.items()
        if part is not None and part.model_type  # what has none is a table of settings
    }


def _tower(config: Any, changes: dict[str, Any]) -> Any:
    has = config.to_dict()
    sizes = {key: value for key, value in _TOWER.items() if key in has}
    return tiny_config(config.model_type, **{**sizes, **changes, **_towers(config, changes)})


def logits(model: Any) -> torch.Tensor:
    ids = torch.randint(32, 100, (2, 12), generator=torch.Generator().manual_seed(3))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        return model(**tiny_inputs(model, ids)).logits


@pytest.mark.parametrize(("wrapper", "text"), [*FAST, *(pytest.param(*case, marks=slow) for case in LONG)])
def test_every_block_of_a_wrapper_is_replaced_and_gives_the_same(wrapper, text):
    model = build(wrapper, text)
    expected = logits(model)
    found = [site.name for site in sites(model)]
    report = patch(model)
    assert not report.skipped
    assert [block.name for block in report.replaced] == found
    families = {block.family for block in report.replaced}
    assert text in families
    assert not [name for name in families if name.endswith("(experts only)")]
    error = (logits(model) - expected).abs().max() / expected.abs().max()
    assert error <= 1e-5
    assert torch.equal(logits(copy.deepcopy(model)), logits(model))
