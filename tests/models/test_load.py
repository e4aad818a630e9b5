"""`moerunner.load`: a patched model from a folder, and every damaged folder named."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import ONE_PER_FAMILY, build, prompt, relative

from moerunner import CheckpointError, Layout, SpecError, UnsupportedError
from moerunner.models import load

EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deepseek")
    model = build("deepseek_v3-groups")
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture
def folder(saved, tmp_path):
    copy = tmp_path / "model"
    copy.mkdir()
    for file in saved[1].iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def edit_config(folder, **changes):
    file = folder / "config.json"
    data = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in data.items() if v is not ...}))


def edit_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("case", ONE_PER_FAMILY)
def test_a_loaded_model_is_patched_and_in_eval_mode(case, tmp_path):
    model = build(case)
    model.save_pretrained(tmp_path)
    loaded = load(str(tmp_path))
    assert not loaded.training
    assert loaded.moerunner_report.replaced
    assert not loaded.moerunner_report.skipped
    with torch.no_grad():
        assert relative(loaded(prompt()).logits, model(prompt()).logits) <= 1e-5


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
def test_the_correction_bias_stays_in_float32(saved, dtype):
    model, folder = saved
    loaded = load(folder, dtype=dtype, device="cpu")
    assert loaded.dtype == (dtype or torch.float32)
    gate, wanted = loaded.model.layers[1].mlp.gate, model.model.layers[1].mlp.gate
    assert gate.weight.dtype == loaded.dtype
    assert torch.equal(gate.e_score_correction_bias, wanted.e_score_correction_bias)


def test_a_checkpoint_keeps_its_own_dtype(saved, tmp_path):
    saved[0].save_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda ts: ts.update({k: t.bfloat16() for k, t in ts.items() if "correction" not in k}))
    edit_config(tmp_path, dtype="bfloat16")
    assert load(tmp_path).dtype == torch.bfloat16


def test_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere: does not exist"):
        load(tmp_path / "nowhere")


def test_a_file_in_place_of_a_folder(folder):
    with pytest.raises(CheckpointError, match=r"model.safetensors: is not a folder"):
        load(folder / "model.safetensors")


def test_an_empty_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"config.json: is missing"):
        load(tmp_path)


def test_a_folder_without_weights(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        load(folder)


@pytest.mark.parametrize("text", ["{", "", "[]", "null", b"\xff\xfe"], ids=["cut", "empty", "list", "null", "binary"])
def test_a_config_that_is_no_json_object(folder, text):
    (folder / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(folder)


@pytest.mark.parametrize("value", ["wide", -32], ids=["text", "negative"])
def test_a_config_that_describes_no_model(folder, value):
    edit_config(folder, hidden_size=value)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load(folder)


def test_a_config_with_an_impossible_layer(folder):
    edit_config(folder, num_experts_per_tok=0)
    with pytest.raises(SpecError, match=r"MoESpec\.top_k"):
        load(folder)


def test_a_config_without_model_type(folder):
    edit_config(folder, model_type=...)
    with pytest.raises(CheckpointError, match=r"config\.json: names no model_type"):
        load(folder)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file(folder, share):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is damaged"):
        load(folder)


def test_one_missing_tensor_is_named(folder):
    edit_tensors(folder, lambda ts: ts.pop("model.layers.1.mlp.gate.weight"))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: has no model\.layers\.1\.mlp\.gate\.weight"):
        load(folder)


def test_one_missing_tensor_of_one_expert_is_named(folder):
    edit_tensors(folder, lambda ts: ts.pop(EXPERT))
    with pytest.raises(CheckpointError, match=f"model.safetensors: has no {EXPERT}"):
        load(folder)


def test_a_tensor_of_another_shape_is_named(folder):
    edit_tensors(folder, lambda ts: ts.update({"lm_head.weight": torch.zeros(7, 32)}))
    with pytest.raises(CheckpointError, match=r"shape .* lm_head\.weight"):
        load(folder)


@pytest.fixture
def sharded(saved, tmp_path):
    saved[0].save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*"))) > 1
    return tmp_path


def test_a_folder_of_shards(saved, sharded):
    with torch.no_grad():
        assert relative(load(sharded)(prompt()).logits, saved[0](prompt()).logits) <= 1e-5


def test_a_missing_shard(sharded):
    shard = min(sharded.glob("model-*"))
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name}: is missing"):
        load(sharded)


@pytest.mark.parametrize("text", ["[]", "{}", "{", '{"weight_map": 3}'])
def test_a_damaged_index(sharded, text):
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        load(sharded)


def test_a_model_type_that_transformers_does_not_have(folder):
    edit_config(folder, model_type="frobnicator")
    with pytest.raises(UnsupportedError, match="'frobnicator'"):
        load(folder)


def test_a_family_without_an_entry_is_refused_before_its_weights_are_read(tmp_path):
    from transformers import OlmoeConfig

    OlmoeConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=2, num_experts=8).save_pretrained(tmp_path)
    save_file({"nothing": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedError, match="OlmoeSparseMoeBlock"):
        load(tmp_path)


def test_a_value_that_is_not_offered_is_refused(tmp_path):
    build("deepseek_v2-greedy", mlp_bias=True).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedError, match="bias"):
        load(tmp_path)


def test_an_unknown_key_that_may_matter_is_an_error(folder):
    edit_config(folder, expert_output_multiplier=2.0)
    with pytest.raises(SpecError, match="expert_output_multiplier"):
        load(folder)


def test_a_dense_model_loads_and_says_that_there_is_nothing_to_patch(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).save_pretrained(tmp_path)
    assert "no mixture-of-experts" in str(load(tmp_path).moerunner_report)


def test_several_ranks_are_refused(saved):
    with pytest.raises(UnsupportedError, match="one rank only"):
        load(saved[1], layout=Layout(ep=2))
