"""Whatever is wrong with the input: one line that says what and what next, the right exit code, no traceback."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"


def refused(outcome, code, *words):
    assert outcome.code == code, outcome
    assert "Traceback" not in outcome.err
    assert outcome.out == ""
    lines = outcome.err.strip().splitlines()
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("moerunner: ")
    for word in words:
        assert word in lines[0]


def change_weights(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def reading(verb, cli):
    more = {"generate": ["abc"], "serve": ["--port", 0]}.get(verb, [])
    return lambda path: cli(verb, path, *more)


@pytest.fixture(params=["verify", "generate", "inspect", "serve", "route"])
def on(request, cli):
    """Each verb that reads a folder."""
    return reading(request.param, cli)


@pytest.fixture(params=["verify", "generate", "serve", "route"])
def loading(request, cli):
    """Each verb that needs the weights."""
    return reading(request.param, cli)


def test_a_path_that_does_not_exist(on, tmp_path):
    refused(on(tmp_path / "nothing"), 2, "nothing", "does not exist", "config.json")


def test_a_file_in_place_of_a_folder(on, folder):
    refused(on(folder / "config.json"), 2, "is not a folder")


def test_an_empty_folder(on, tmp_path):
    refused(on(tmp_path), 2, str(tmp_path), "config.json")


def test_a_config_that_is_not_json(on, folder):
    (folder / "config.json").write_text("{broken")
    refused(on(folder), 2, "config.json", "is not JSON")


def test_a_config_with_impossible_values(on, folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": 99}))
    refused(on(folder), 2, "99")


@pytest.mark.parametrize("text", ["[]", '"deepseek_v3"', "3", "null", "{}"])
def test_a_config_that_is_no_object_or_an_empty_one(on, folder, text):
    (folder / "config.json").write_text(text)
    refused(on(folder), 2, "config.json", "model_type")


def test_a_folder_without_weights(loading, folder):
    (folder / WEIGHTS).unlink()
    refused(loading(folder), 2, "holds no weights", "safetensors")


def test_quantised_weights(loading, folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    refused(loading(folder), 3, "quantised (fp8)")


def test_a_truncated_file(on, folder):
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    refused(on(folder), 2, WEIGHTS)


def test_a_missing_tensor_is_named(on, folder):
    change_weights(folder, lambda tensors: tensors.pop("model.layers.1.mlp.gate.weight"))
    refused(on(folder), 2, "model.layers.1.mlp.gate.weight")


def test_a_missing_expert_is_named(on, folder):
    change_weights(folder, lambda tensors: tensors.pop("model.layers.2.mlp.experts.5.up_proj.weight"))
    refused(on(folder), 2, "model.layers.2.mlp.experts")


def test_a_tensor_of_the_wrong_shape_is_named(on, folder):
    def cut(tensors):
        tensors["model.layers.1.mlp.gate.weight"] = tensors["model.layers.1.mlp.gate.weight"][:-1].clone()

    change_weights(folder, cut)
    refused(on(folder), 2, "model.layers.1.mlp.gate.weight")


def test_a_model_without_moe_blocks_cannot_be_verified(cli, tmp_path):
    from moerunner.verify import tiny_model

    tiny_model("llama").save_pretrained(tmp_path / "llama")
    refused(cli("verify", tmp_path / "llama"), 3, "LlamaForCausalLM", "no MoE block")


def test_a_model_of_which_moerunner_would_run_nothing_is_not_generated_with(cli, tmp_path, monkeypatch):
    from moerunner import models
    from moerunner.verify import tiny_model

    tiny_model("llama").save_pretrained(tmp_path / "llama")
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("weights were loaded"))
    refused(cli("generate", tmp_path / "llama", "abc"), 3, "llama", "no MoE block", "--allow-unpatched")


@pytest.mark.parametrize("verb", ["serve", "route"])
def test_nor_is_it_served_or_measured(cli, tmp_path, verb):
    from moerunner.verify import tiny_model

    tiny_model("llama").save_pretrained(tmp_path / "llama")
    refused(reading(verb, cli)(tmp_path / "llama"), 3, "llama", "no MoE block")


def test_a_model_type_that_transformers_does_not_know(on, folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "no_such_model"}))
    refused(on(folder), 3, "no_such_model")


def test_a_family_that_does_not_exist(cli):
    refused(cli("verify", "--family", "no_such_family"), 3, "no_such_family")


def test_a_family_without_moe_blocks(cli):
    refused(cli("verify", "--family", "llama"), 3, "LlamaForCausalLM")


def test_a_weight_that_is_not_finite_is_a_mismatch(cli, folder):
    def spoil(tensors):
        tensors["model.layers.1.mlp.shared_experts.up_proj.weight"][0, 0] = torch.nan

    change_weights(folder, spoil)
    outcome = cli("verify", folder)
    assert outcome.code == 1
    assert "model.layers.1.mlp.shared_experts.up_proj.weight: 1 of" in outcome.out


@pytest.mark.parametrize("key", ["model", "decoder", "post_processor"])
def test_a_damaged_tokenizer(cli, folder, key):
    file = folder / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: 1}))
    for verb in (["generate", folder, "abc"], ["verify", folder]):
        refused(cli(*verb), 2, str(folder), "has a tokenizer that cannot be read")


@pytest.mark.parametrize(
    ("key", "value"), [("eos_token_id", "x"), ("eos_token_id", [1.5]), ("output_hidden_states", -0.5), ("use_cache", "no")]
)
def test_settings_for_generation_that_are_of_another_kind(loading, folder, key, value):
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    refused(loading(folder), 2, "generation_config.json", f"{key} = {value!r}")


@pytest.mark.parametrize("value", [4, False, {"a": 1}])
def test_a_dtype_that_is_none(on, folder, value):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"dtype": value}))
    refused(on(folder), 2, "config.json", f"dtype {value!r}")


@pytest.mark.parametrize("value", [1, {"format": -1}])
def test_notes_in_a_header_that_are_no_text(on, folder, value):
    data = (folder / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:end]) | {"__metadata__": value}).encode()
    (folder / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + data[end:])
    refused(on(folder), 2, WEIGHTS, "__metadata__")


def test_a_folder_without_a_tokenizer(cli, folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    refused(cli("generate", folder, "abc"), 2, "tokenizer.json")
    outcome = cli("verify", folder, "--tokens", 16)
    assert outcome.code == 0, "verify draws tokens instead"
    assert "random tokens, seed 0" in outcome.out


def test_a_folder_without_a_tokenizer_of_a_model_for_which_transformers_makes_one_up(cli, tmp_path, monkeypatch):
    from moerunner import models
    from moerunner.verify import tiny_model

    tiny_model("qwen2_moe").save_pretrained(tmp_path)
    outcome = cli("verify", tmp_path, "--tokens", 16)
    assert outcome.code == 0
    assert "random tokens, seed 0" in outcome.out
    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("weights were loaded"))
    refused(cli("generate", tmp_path, "abc"), 2, "tokenizer.json")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--max-new-tokens", "1k"], ["1000", "512"]),
        (["--top-p", "0.5"], ["top_p"]),
        (["--top-k", "5"], ["top_k"]),
        (["--set", "no_such_thing=1"], ["no_such_thing"]),
        (["--prompts", "/no/such/file"], ["/no/such/file", "--prompts"]),
        (["--prompts", "/"], ["cannot be read", "--prompts"]),
        (["--prompts", "BYTES"], ["BYTES", "UTF-8", "byte 1"]),
    ],
)
def test_generate_with_options_that_cannot_work(cli, saved, args, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "BYTES").write_bytes(b"a\xff")
    refused(cli("generate", saved, "abc", *args), 2, *words)


def test_a_port_in_use_is_told_before_anything_is_loaded(cli, saved, monkeypatch):
    from moerunner import models

    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("weights were loaded"))
    with socket.create_server(("127.0.0.1", 0)) as other:
        refused(cli("serve", saved, "--port", other.getsockname()[1]), 2, "in use", "--port")


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--host", "203.0.113.7"], ["203.0.113.7", "cannot listen"]),
        (["--host", "no such host"], ["no such host", "cannot listen"]),
        (["--api-key", ""], ["--api-key"]),
        (["--api-key", "clé"], ["--api-key"]),
        (["--chat-template", "nowhere.jinja"], ["nowhere.jinja", "No such file"]),
        (["--chat-template", "BROKEN"], ["BROKEN", "is no chat template"]),
    ],
)
def test_serve_with_options_that_cannot_work(cli, saved, tmp_path, monkeypatch, args, words):
    from moerunner import models

    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("weights were loaded"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "BROKEN").write_text("{% for %}")
    refused(cli("serve", saved, "--port", 0, *args), 2, *words)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--text", "nowhere.txt"], ["nowhere.txt", "No such file", "--text"]),
        (["--text", "."], ["directory"]),
        (["--text", "bytes"], ["bytes", "UTF-8", "byte 1"]),
        (["--text", "empty"], ["empty", "no tokens"]),
        (["--plot", "loads.gif"], ["loads.gif", ".png"]),
        (["--plot", "nowhere/loads.png"], ["nowhere", "does not exist"]),
        (["--plot", "folder.png"], ["folder.png", "cannot be written"]),
    ],
)
def test_route_with_files_that_cannot_be_read_or_written(cli, saved, tmp_path, monkeypatch, args, words):
    from moerunner import models

    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("weights were loaded"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bytes").write_bytes(b"a\xff")
    (tmp_path / "empty").touch()
    (tmp_path / "folder.png").mkdir()
    refused(cli("route", saved, *args), 2, *words)
    assert {file.name for file in tmp_path.iterdir()} == {"bytes", "empty", "folder.png"}


def test_a_picture_that_fails_leaves_nothing(cli, saved, tmp_path, monkeypatch):
    from moerunner.cli import files

    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.Path, "replace", fails)
    outcome = cli("route", saved, "--tokens", 32, "--plot", tmp_path / "loads.png")
    assert outcome.code == 4
    assert "No space left" in outcome.err
    assert list(tmp_path.iterdir()) == []


def test_an_empty_prompt(cli, saved):
    refused(cli("generate", saved, ""), 2, "prompt")


def test_a_device_that_is_not_here(cli):
    refused(cli("verify", "--family", "mixtral", "--device", "cuda:77"), 3, "cuda:77", "moerunner env")
    refused(cli("verify", "--family", "mixtral", "--device", "abacus"), 3, "abacus")
    refused(cli("inspect", "anywhere", "--device", "abacus"), 3, "abacus")


@pytest.mark.parametrize(
    "args",
    [
        ["verify"],
        ["verify", "somewhere", "--family", "mixtral"],
        ["verify", "--family", "mixtral", "--dtype", "int8"],
        ["verify", "--family", "mixtral", "--tokens", "0"],
        ["verify", "--family", "mixtral", "--tokens", "1.5"],
        ["verify", "--family", "mixtral", "--tokens", ""],
        ["verify", "--family", "mixtral", "--tokens", "many"],
        ["verify", "--no-such-option"],
        ["generate"],
        ["generate", "somewhere"],
        ["generate", "somewhere", "text", "--temperature", "-1"],
        ["generate", "somewhere", "text", "--temperature", "hot"],
        ["generate", "somewhere", "text", "--set", "top_k"],
        ["generate", "somewhere", "text", "--prefill-chunk", "0"],
        ["inspect"],
        ["inspect", "somewhere", "--ep", "0"],
        ["inspect", "somewhere", "--tp", "two"],
        ["inspect", "somewhere", "--dp", "0"],
        ["inspect", "somewhere", "--layout", "ep=2", "--tp", "2"],
        ["inspect", "somewhere", "--skew", "-1"],
        ["inspect", "somewhere", "--skew", "1", "--trace", "loads.json"],
        ["inspect", "somewhere", "--dtype", "int8"],
        ["families", "somewhere"],
        ["serve"],
        ["serve", "somewhere", "--port", "70000"],
        ["serve", "somewhere", "--port", "http"],
        ["serve", "somewhere", "--max-running", "0"],
        ["serve", "somewhere", "--context", "1"],
        ["route"],
        ["route", "somewhere", "--tokens", "none"],
        ["no_such_verb"],
    ],
)
def test_wrong_usage(cli, args):
    outcome = cli(*args)
    assert outcome.code == 2
    assert outcome.out == ""
    assert "Traceback" not in outcome.err
    assert "--help" in outcome.err


def test_debug_shows_the_traceback(cli, tmp_path):
    outcome = cli("verify", tmp_path / "nothing", "--debug")
    assert outcome.code == 2
    assert "Traceback" in outcome.err
    assert outcome.err.strip().splitlines()[-1].startswith("moerunner: ")


def test_an_error_with_json_is_json(cli, tmp_path):
    outcome = cli("verify", tmp_path / "nothing", "--json")
    assert outcome.code == 2
    data = json.loads(outcome.out)
    assert data["ok"] is False
    assert data["error"]["kind"] == "CheckpointError"
    assert "does not exist" in data["error"]["message"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
@pytest.mark.parametrize("json_too", [[], ["--json"]], ids=["text", "json"])
def test_output_to_a_full_disk(json_too):
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "moerunner", "env", *json_too]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 4
    assert done.stderr.startswith("moerunner: OSError: [Errno 28]")
    assert len(done.stderr.splitlines()) == 1
