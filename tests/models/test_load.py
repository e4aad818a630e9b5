"""`load` and `load_weights`: the model that Transformers would load, to the last bit, or one error that says what is wrong."""

from __future__ import annotations

import filecmp
import io
import json
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import ONE_PER_FAMILY, build, prompt, relative

from moerunner import CheckpointError, SpecError, UnsupportedError
from moerunner.models import load, load_weights, names, unpatch
from moerunner.models.load import load_weights as the_same

EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
ONE_FILE = "model.safetensors"
BIASES = ("e_score_correction_bias", "expert_bias")

_SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
OTHERS = {  # families with other names, conversions, buffers and dtypes in their files than the four above
    "afmoe": {"num_dense_layers": 1, "moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24, "moe_layer_start_index": 1, "head_dim": 8},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "num_key_value_heads": 2},
    "granitemoeshared": {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 24},
    "llama": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "minimax_m2": {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "rotary_dim": 4},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 24, "num_key_value_heads": 2},
}


def make(name):
    """A model of one of the four families by its case, or of another by its model_type."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if name not in OTHERS:
        return build(name)
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **_SMALL, **OTHERS[name], pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for tensor_name, tensor in model.state_dict().items():
        if "bias" in tensor_name:
            tensor.copy_(torch.randn(tensor.shape))
    return model.eval()


def same_bits(a, b):
    return (
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))
    )


def assert_same(model, wanted, *, biases=True):
    """Every parameter and buffer, those that are not saved too."""
    for kind in ("named_parameters", "named_buffers"):
        mine, theirs = dict(getattr(model, kind)()), dict(getattr(wanted, kind)())
        assert mine.keys() == theirs.keys()
        for name, tensor in theirs.items():
            if biases or not name.endswith(BIASES):
                assert same_bits(mine[name].detach(), tensor.detach()), name
            assert mine[name].requires_grad == tensor.requires_grad


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


@pytest.fixture
def sharded(saved, tmp_path):
    saved[0].save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*"))) > 1
    return tmp_path


def edit_config(folder, **changes):
    file = folder / "config.json"
    data = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in data.items() if v is not ...}))


def edit_tensors(folder, change):
    tensors = load_file(folder / ONE_FILE)
    change(tensors)
    save_file(tensors, folder / ONE_FILE, metadata={"format": "pt"})


# What is loaded


@pytest.mark.parametrize(("dtype", "shards"), [(None, True), (torch.bfloat16, False), (torch.float16, True)], ids=str)
@pytest.mark.parametrize("name", [*ONE_PER_FAMILY, *OTHERS])
@pytest.mark.rotating(3)
def test_the_model_is_the_one_that_transformers_loads(name, dtype, shards, tmp_path):
    from transformers import AutoModelForCausalLM

    model = make(name)
    model.generation_config.temperature = 0.7
    model.generation_config.do_sample = True
    model.save_pretrained(tmp_path, max_shard_size="30KB" if shards else "1GB")
    wanted = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    loaded = load(tmp_path, dtype=dtype)
    assert type(loaded) is type(wanted)
    assert_same(loaded, wanted, biases=False)
    assert loaded.generation_config.to_dict() == wanted.generation_config.to_dict()
    assert loaded.config.to_dict() == wanted.config.to_dict()
    assert not loaded.training
    saved = model.state_dict()
    for tensor_name, tensor in loaded.state_dict().items():
        if tensor_name.endswith(BIASES):
            assert same_bits(tensor, saved[tensor_name].float())


@pytest.mark.parametrize("name", [*ONE_PER_FAMILY, *OTHERS])
def test_a_loaded_model_saves_the_same_files_as_one_that_transformers_loaded(name, tmp_path):
    from transformers import AutoModelForCausalLM

    make(name).save_pretrained(tmp_path / "from", max_shard_size="100KB")
    load(tmp_path / "from").save_pretrained(tmp_path / "mine", max_shard_size="100KB")
    AutoModelForCausalLM.from_pretrained(tmp_path / "from").save_pretrained(tmp_path / "theirs", max_shard_size="100KB")
    names = sorted(file.name for file in (tmp_path / "theirs").iterdir())
    assert filecmp.cmpfiles(tmp_path / "mine", tmp_path / "theirs", names, shallow=False) == (names, [], [])
    written, read = tensors_of(tmp_path / "mine"), tensors_of(tmp_path / "from")
    assert written.keys() == read.keys()
    assert all(same_bits(written[key], read[key]) for key in read)


@pytest.mark.parametrize("case", ONE_PER_FAMILY)
def test_a_loaded_model_is_patched(case, tmp_path):
    model = build(case)
    model.save_pretrained(tmp_path)
    loaded = load(str(tmp_path))
    assert loaded.moerunner_report.replaced
    assert not loaded.moerunner_report.skipped
    with torch.no_grad():
        assert relative(loaded(prompt()).logits, model(prompt()).logits) <= 1e-5


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_correction_bias_stays_in_float32(saved, dtype):
    model, folder = saved
    loaded = load(folder, dtype=dtype, device="cpu")
    assert loaded.dtype == (dtype or torch.float32)
    gate, wanted = loaded.model.layers[1].mlp.gate, model.model.layers[1].mlp.gate
    assert gate.weight.dtype == loaded.dtype
    assert gate.e_score_correction_bias.dtype == (dtype if dtype is torch.float64 else torch.float32)
    assert torch.equal(gate.e_score_correction_bias.float(), wanted.e_score_correction_bias)


def test_a_bias_that_transformers_rounds_is_kept(tmp_path):
    model = make("minimax_m2")
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path, dtype=torch.bfloat16)
    name = "model.layers.0.mlp.e_score_correction_bias"
    assert same_bits(loaded.state_dict()[name], model.state_dict()[name])
    with torch.no_grad():
        assert loaded(prompt() % 64).logits.isfinite().all()


def test_a_checkpoint_keeps_its_own_dtype(folder):
    edit_tensors(folder, lambda ts: ts.update({k: t.bfloat16() for k, t in ts.items() if "correction" not in k}))
    edit_config(folder, dtype="bfloat16")
    assert load(folder).dtype == torch.bfloat16
    edit_config(folder, dtype=...)
    assert load(folder).dtype == torch.bfloat16


def test_the_dtype_of_the_files_does_not_have_to_be_that_of_the_model(saved, folder):
    edit_tensors(folder, lambda ts: ts.update({k: t.double() for k, t in ts.items()}))
    assert_same(load(folder, dtype=torch.float32), load(saved[1]))


@pytest.mark.parametrize("name", ["deepseek_v3-groups", "granitemoeshared", "mixtral-top2"])
def test_conversions_that_only_transformers_knows_give_the_same(name, tmp_path, monkeypatch):
    model = make(name)
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    wanted = load(tmp_path)
    monkeypatch.setattr(names, "_VERBS", {})
    loaded = load(tmp_path)
    assert_same(loaded, wanted)
    with torch.no_grad():
        for tensor in loaded.state_dict().values():
            tensor.fill_(3)
    load_weights(loaded, SOURCES["backwards"](tmp_path, None))
    assert_same(loaded, wanted)


def test_no_number_is_left_as_the_allocator_gave_it(sharded):
    """In deterministic mode PyTorch fills new memory with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        loaded = load(sharded)
    finally:
        torch.use_deterministic_algorithms(False)
    for tensor in (*loaded.parameters(), *loaded.buffers()):
        assert not tensor.isnan().any()


def test_embeddings_are_tied_when_the_file_has_one_and_apart_when_it_has_two(tmp_path):
    make("llama").save_pretrained(tmp_path)
    tied = load(tmp_path)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    edit_tensors(tmp_path, lambda ts: ts.update({"lm_head.weight": ts["model.embed_tokens.weight"].clone()}))
    tied = load(tmp_path)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    edit_tensors(tmp_path, lambda ts: ts.update({"lm_head.weight": ts["lm_head.weight"] + 1}))
    apart = load(tmp_path)
    assert torch.equal(apart.lm_head.weight, apart.model.embed_tokens.weight + 1)


def test_tensors_that_the_model_declares_superfluous_are_not_read(saved, folder):
    more = {"model.layers.61.mlp.gate.weight": torch.ones(3), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}
    edit_tensors(folder, lambda ts: ts.update(more))
    assert_same(load(folder), load(saved[1]))


def test_a_family_without_an_entry_loads_and_is_reported(tmp_path):
    model = make("olmoe")
    model.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert not loaded.moerunner_report.replaced or not loaded.moerunner_report.skipped
    with torch.no_grad():
        assert relative(loaded(prompt() % 64).logits, model(prompt() % 64).logits) <= 1e-5


def test_a_dense_model_loads_and_says_that_there_is_nothing_to_patch(tmp_path):
    make("llama").save_pretrained(tmp_path)
    assert "no mixture-of-experts" in str(load(tmp_path).moerunner_report)


# Other weights for a model that is there


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """The folder of a model with the same config and other weights."""
    folder = tmp_path_factory.mktemp("other")
    model = build("deepseek_v3-groups")
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(tensor.flip(0) * 1.5)
    model.save_pretrained(folder, max_shard_size="60KB")
    return folder


def tensors_of(folder):
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def through_one_buffer(tensors):
    """As a trainer sends them: each tensor is overwritten as soon as the next is asked for."""
    for name, tensor in tensors.items():
        sent = tensor.clone()
        yield name, sent
        sent.fill_(7)


SOURCES = {
    "folder": lambda folder, fresh: folder,
    "text": lambda folder, fresh: str(folder),
    "names-of-files": lambda folder, fresh: through_one_buffer(tensors_of(folder)),
    "backwards": lambda folder, fresh: through_one_buffer(dict(reversed(tensors_of(folder).items()))),
    "own-names": lambda folder, fresh: through_one_buffer(fresh.state_dict()),
}


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("patched", [True, False], ids=["patched", "not-patched"])
@pytest.mark.rotating(3)
def test_new_weights_give_exactly_a_fresh_load(saved, other, dtype, patched, source):
    live, fresh = load(saved[1], dtype=dtype), load(other, dtype=dtype)
    if not patched:
        unpatch(live)
        unpatch(fresh)
    with torch.no_grad():
        before = live(prompt()).logits
        addresses = {name: tensor.data_ptr() for name, tensor in live.state_dict().items()}
        load_weights(live, source(other, fresh))
        assert_same(live, fresh)
        assert addresses == {name: tensor.data_ptr() for name, tensor in live.state_dict().items()}
        after = live(prompt()).logits
        assert torch.equal(after, fresh(prompt()).logits)
        assert not torch.equal(after, before)
        load_weights(live, source(other, fresh))
        assert_same(live, fresh)
        load_weights(live, saved[1])
        assert torch.equal(live(prompt()).logits, before)


@pytest.mark.parametrize("name", OTHERS)
def test_new_weights_for_other_families(name, tmp_path):
    make(name).save_pretrained(tmp_path, max_shard_size="100KB")
    live, fresh = load(tmp_path), load(tmp_path)
    for source in SOURCES.values():
        with torch.no_grad():
            for tensor in live.state_dict().values():
                tensor.fill_(3)
        load_weights(live, source(tmp_path, fresh))
        assert_same(live, fresh)


def test_new_weights_for_a_model_of_transformers_own(saved, other):
    from transformers import AutoModelForCausalLM

    live = AutoModelForCausalLM.from_pretrained(saved[1])
    load_weights(live, other)
    assert_same(live, AutoModelForCausalLM.from_pretrained(other))


def changed(change):
    def stream(folder):
        tensors = tensors_of(folder)
        change(tensors)
        return iter(tensors.items())

    return stream


def twice(folder):
    tensors = tensors_of(folder)
    return iter([*tensors.items(), (EXPERT, tensors[EXPERT])])


WRONG = {
    "missing": (changed(lambda ts: ts.pop(EXPERT)), f"1 missing: {EXPERT}"),
    "nothing": (changed(dict.clear), "missing: .* more"),
    "extra": (changed(lambda ts: ts.update({"model.other": torch.ones(1)})), r"1 not in the model: model\.other"),
    "doubled": (twice, f"there twice: {EXPERT}"),
    "misshapen": (changed(lambda ts: ts.update({EXPERT: ts[EXPERT].T})), rf"1 misshapen: {EXPERT} \(is \[32, 24\]"),
    "integers": (changed(lambda ts: ts.update({EXPERT: ts[EXPERT].int()})), f"{EXPERT} is stored as int32"),
}


@pytest.mark.parametrize(("source", "what"), WRONG.values(), ids=WRONG)
def test_weights_that_do_not_fit_are_listed(saved, other, source, what):
    live = load(saved[1])
    with pytest.raises(CheckpointError, match=what):
        load_weights(live, source(other))
    load_weights(live, saved[1])
    assert_same(live, load(saved[1]))


def test_a_damaged_folder_leaves_the_model_as_it_was(saved, folder):
    live = load(saved[1])
    edit_tensors(folder, lambda ts: [ts.pop(EXPERT), ts.update({k: t + 1 for k, t in ts.items()})])
    with pytest.raises(CheckpointError, match=EXPERT):
        load_weights(live, folder)
    assert_same(live, load(saved[1]))


def test_tied_tensors_that_differ_cannot_both_be_had(tmp_path):
    make("llama").save_pretrained(tmp_path)
    live = load(tmp_path)
    both = {**tensors_of(tmp_path), "lm_head.weight": live.lm_head.weight.detach().clone()}
    load_weights(live, iter(both.items()))
    both["lm_head.weight"] += 1
    with pytest.raises(CheckpointError, match="one tensor in the model, and differ"):
        load_weights(live, iter(both.items()))


def test_a_model_without_data_takes_no_weights(saved):
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(saved[0].config)
    with pytest.raises(UnsupportedError, match="without data"):
        load_weights(model, saved[1])


def test_load_weights_has_one_address_more():
    assert the_same is load_weights


# What is refused


def test_a_folder_that_does_not_exist(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere: does not exist"):
        load(tmp_path / "nowhere")


def test_a_file_in_place_of_a_folder(folder):
    with pytest.raises(CheckpointError, match=r"model.safetensors: is not a folder"):
        load(folder / ONE_FILE)


def test_an_empty_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"is an empty folder"):
        load(tmp_path)


def test_a_path_that_cannot_be_one():
    with pytest.raises(CheckpointError):
        load("a\0b")


@pytest.mark.parametrize("name", ["config.json", ONE_FILE])
def test_a_file_that_is_not_there(folder, name):
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=r"config.json: is missing|holds no weights"):
        load(folder)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize(
    "text", ["{", "", "[]", "null", b"\xff\xfe", '{"a":' * 10**5], ids=["cut", "empty", "list", "null", "binary", "deep"]
)
def test_json_that_is_none(folder, text, file):
    (folder / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError, match=file.replace(".", r"\.")):
        load(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "wide"},
        {"hidden_size": -32},
        {"num_attention_heads": 0},
        {"hidden_act": "frob"},
        {"num_hidden_layers": 10**9},
        {"vocab_size": 2**62},
        {"rope_parameters": {"rope_theta": -1.0, "rope_type": "default"}},
        {"rope_parameters": {"rope_type": "frob"}},
        {"dtype": "float99"},
    ],
    ids=str,
)
def test_a_config_that_describes_no_model(folder, change):
    edit_config(folder, **change)
    with pytest.raises(CheckpointError, match=r"config\.json|do not fit the model"):
        load(folder)


@pytest.mark.parametrize(
    ("reason", "kind", "what"),
    [
        (ImportError("no module named scipy"), UnsupportedError, r"config\.json: asks for a package .* scipy"),
        (
            ZeroDivisionError("a\nb"),
            CheckpointError,
            r"config\.json: describes no model that can be made: ZeroDivisionError: a b",
        ),
        (torch.OutOfMemoryError("full"), torch.OutOfMemoryError, "full"),
    ],
)
def test_whatever_transformers_raises_for_a_config_is_told_in_one_line(folder, monkeypatch, reason, kind, what):
    from transformers import AutoModelForCausalLM

    def fail(*args, **kwargs):
        raise reason

    monkeypatch.setattr(AutoModelForCausalLM, "from_config", fail)
    with pytest.raises(kind, match=what):
        load(folder)


def test_a_config_with_an_impossible_layer(folder):
    edit_config(folder, num_experts_per_tok=0)
    with pytest.raises(SpecError, match=r"MoESpec\.top_k"):
        load(folder)


def test_a_config_without_model_type(folder):
    edit_config(folder, model_type=...)
    with pytest.raises(CheckpointError, match=r"config\.json: names no model_type"):
        load(folder)


def test_a_model_type_that_transformers_does_not_have(folder):
    edit_config(folder, model_type="frobnicator")
    with pytest.raises(UnsupportedError, match="'frobnicator'"):
        load(folder)


def test_a_model_that_is_no_language_model(folder):
    edit_config(folder, model_type="vit")
    with pytest.raises(UnsupportedError, match="'vit' is not a language model"):
        load(folder)


def test_an_unknown_key_that_may_matter_is_an_error_before_weights_are_read(folder):
    edit_config(folder, expert_output_multiplier=2.0)
    edit_tensors(folder, lambda ts: ts.update({"lm_head.weight": ts["lm_head.weight"] * torch.nan}))
    with pytest.raises(SpecError, match="expert_output_multiplier"):
        load(folder)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_a_truncated_file(folder, share):
    file = folder / ONE_FILE
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is damaged"):
        load(folder)


FAULTS = {
    "missing": (lambda ts: ts.pop("model.layers.1.mlp.gate.weight"), r"1 missing: model\.layers\.1\.mlp\.gate\.weight"),
    "missing-expert": (lambda ts: ts.pop(EXPERT), f"1 missing: {EXPERT}"),
    "extra": (lambda ts: ts.update({"model.frob": torch.ones(1)}), r"1 not in the model: model\.frob"),
    "extra-layer": (
        lambda ts: ts.update({"model.layers.9.mlp.experts.0.up_proj.weight": torch.ones(24, 32)}),
        r"1 not in the model: model\.layers\.9\.mlp\.experts",
    ),
    "misshapen": (
        lambda ts: ts.update({"lm_head.weight": torch.zeros(7, 32)}),
        r"1 misshapen: lm_head\.weight \(is \[7, 32\], the config asks for \[96, 32\]\)",
    ),
    "misshapen-expert": (lambda ts: ts.update({EXPERT: ts[EXPERT].T.contiguous()}), rf"1 misshapen: {EXPERT} \(is \[32, 24\]"),
    "doubled": (
        lambda ts: ts.update({"layers.0.mlp.down_proj.weight": ts["model.layers.0.mlp.down_proj.weight"].clone()}),
        r"2 there twice: .*layers\.0\.mlp\.down_proj\.weight",
    ),
    "stacked-and-single": (
        lambda ts: ts.update({"model.layers.1.mlp.experts.down_proj": torch.zeros(16, 32, 24)}),
        r"there twice: .*experts\.down_proj",
    ),
    "integers": (lambda ts: ts.update({EXPERT: ts[EXPERT].to(torch.int32)}), f"{EXPERT} is stored as int32, the model has"),
}


@pytest.mark.parametrize(("change", "what"), FAULTS.values(), ids=FAULTS)
def test_tensors_that_do_not_fit_are_listed(folder, change, what):
    edit_tensors(folder, change)
    with pytest.raises(CheckpointError, match=what):
        load(folder)


def test_all_faults_are_told_at_once_and_all_names_kept(folder):
    def change(tensors):
        for expert in range(16):
            tensors.pop(f"model.layers.1.mlp.experts.{expert}.up_proj.weight")
        tensors["frob"] = torch.ones(1)

    edit_tensors(folder, change)
    with pytest.raises(CheckpointError, match=r"16 missing: .* and 8 more; 1 not in the model: frob") as caught:
        load(folder)
    assert len(caught.value.tensors["missing"]) == 16
    assert caught.value.tensors["extra"] == ["frob"]


def test_float8_without_a_quantisation_config_is_not_taken_for_weights(folder):
    edit_tensors(folder, lambda ts: ts.update({EXPERT: ts[EXPERT].to(torch.float8_e4m3fn)}))
    with pytest.raises(UnsupportedError, match=f"{EXPERT} is stored as float8_e4m3fn, a quantised format"):
        load(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.complex64, "bfloat16"], ids=str)
def test_a_dtype_that_holds_no_weights(saved, dtype):
    with pytest.raises(UnsupportedError, match="weights cannot be held in"):
        load(saved[1], dtype=dtype)


@pytest.mark.parametrize("device", ["frob", "cuda:99", "meta"])
def test_a_device_that_is_not_there(saved, device):
    with pytest.raises(UnsupportedError, match="device"):
        load(saved[1], device=device)


# How it is loaded


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_counts_bytes_on_a_terminal_and_is_silent_elsewhere(saved, monkeypatch, capsys):
    load(saved[1])
    assert capsys.readouterr().err == ""
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    load(saved[1])
    text = screen.getvalue()
    assert "Loading weights" in text
    assert "KiB" in text


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_large_tensor_is_read_in_parts_that_threads_share(dtype, saved, monkeypatch):
    tensorfile, fill = (sys.modules[f"moerunner.models.{name}"] for name in ("tensorfile", "fill"))
    expected, sizes, read = load(saved[1], dtype=dtype), [], tensorfile.Reader.read
    monkeypatch.setattr(fill, "_MOST", 1000)
    monkeypatch.setattr(
        tensorfile.Reader, "read", lambda self, t, at, into: sizes.append(into.nbytes) or read(self, t, at, into)
    )
    assert_same(load(saved[1], dtype=dtype), expected)
    assert max(sizes) <= 1000
    assert max(p.nbytes for p in expected.parameters()) > 4000


def test_ctrl_c_ends_the_load_and_its_threads(saved, monkeypatch):
    fill = sys.modules["moerunner.models.fill"]
    before = threading.active_count()

    def interrupted(workers):
        raise KeyboardInterrupt

    monkeypatch.setattr(fill, "as_completed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(saved[1])
    assert threading.active_count() == before


_PEAK = """
    import sys, torch
    from pathlib import Path
    from moerunner.models import load, load_weights

    def memory(key):
        text = Path("/proc/self/status").read_text()
        return 1024 * next(int(line.split()[1]) for line in text.splitlines() if line.startswith(key))

    small, large, live = sys.argv[1:]
    load(small)  # what is imported on the way counts no more
    model = load(large) if live == "live" else None
    start = memory("VmRSS")
    load_weights(model, large) if model else load(large)
    print((memory("VmHWM") - start) / (Path(large) / "model.safetensors").stat().st_size)
"""


def peak(folder, layers, width, *, live=False):
    """The highest memory while loading, beyond what was in use before, in units of the checkpoint; in a process of its own."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 64, "num_experts": 8, "num_experts_per_tok": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    for name, layer_count, size in (("small", 1, 32), ("large", layers, width)):
        inner = {"hidden_size": size, "intermediate_size": size, "moe_intermediate_size": size, "head_dim": 16}
        config = AutoConfig.for_model("qwen3_moe", num_hidden_layers=layer_count, **sizes, **inner)
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / name)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    arguments = [str(folder / "small"), str(folder / "large"), "live" if live else "fresh"]
    command = [sys.executable, "-c", textwrap.dedent(_PEAK), *arguments]
    return float(subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_while_loading_is_the_model_and_little_more(tmp_path):
    assert 0.9 < peak(tmp_path, 4, 512) < 1.2  # 50 MB


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_memory_while_loading_a_larger_model(tmp_path):
    assert 0.9 < peak(tmp_path, 12, 700) < 1.05  # 280 MB


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_new_weights_take_no_memory(tmp_path):
    assert peak(tmp_path, 12, 700, live=True) < 0.05
