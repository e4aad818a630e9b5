"""`inspect` says what `load` would make: the same blocks, sizes and dtypes, without a weight."""

import dataclasses
import json

import pytest
import torch

from moerunner import Layout, MoERunner, load
from moerunner.errors import CheckpointError, SpecError
from moerunner.models import runners
from moerunner.models.inspection import bytes_in_words, inspect, ranges, together
from moerunner.parallel.comm import simulate
from moerunner.verify import tiny_model


def saved(family, path, **changes):
    tiny_model(family).save_pretrained(path)
    if changes:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | changes))
    return path


def tensors(module):
    return {id(t): t for t in module.state_dict(keep_vars=True).values()}.values()


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "deepseek_v3"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_sizes_are_those_of_the_loaded_model(tmp_path, family, dtype):
    folder = saved(family, tmp_path)
    found, model = inspect(folder, dtype=dtype), load(folder, dtype=dtype)
    assert found.size == sum(t.nbytes for t in tensors(model))
    assert found.parameters == sum(t.numel() for t in tensors(model))
    (kind,) = found.kinds
    names = [r.name for r in model.moerunner_report.replaced]
    assert dict.fromkeys(together(names)) == {kind.name: None}
    assert kind.layers == len(names)
    block = model.get_submodule(names[0])
    assert kind.memory.total == sum(t.nbytes for t in tensors(block))
    assert kind.memory.routed == sum(t.nbytes for t in block.experts.parameters())
    assert kind.memory.router == sum(t.nbytes for t in tensors(block.gate))
    assert kind.dtype == found.dtype == str(dtype or torch.float32).removeprefix("torch.")
    assert kind.plan.backend == model.moerunner_report.replaced[0].backend
    assert kind.spec == runners(model)[names[0]].spec
    assert not found.left_alone


def test_weights_at_work_on_a_token(tmp_path):
    found = inspect(saved("mixtral", tmp_path))
    (kind,) = found.kinds
    expert = 3 * kind.spec.hidden_size * kind.spec.experts.intermediate_size
    gate = kind.spec.num_experts * kind.spec.hidden_size
    assert kind.active == gate + 2 * expert
    assert kind.parameters == gate + 8 * expert
    assert found.active == found.parameters - 3 * 6 * expert


@pytest.mark.parametrize("layout", [Layout(ep=2), Layout(tp=4), Layout(ep=3, tp=2)])
def test_a_rank_holds_what_a_runner_of_that_layout_holds(tmp_path, layout):
    folder = saved("deepseek_v3", tmp_path)
    model = load(folder)
    runner = next(iter(runners(model).values()))
    whole = runner.layer_weights()

    def held(bound):
        own = MoERunner(runner.spec, whole, layout=bound)
        return sum(t.nbytes for t in tensors(own)), own.plan.collectives

    ranks = simulate(layout, held)
    (kind,) = inspect(folder, layout=layout).kinds
    assert {kind.rank.total} == {size for size, _ in ranks}
    assert kind.plan.collectives == ranks[0][1]
    assert kind.rank.total < kind.memory.total


def test_layers_that_differ_are_kinds_of_their_own(tmp_path, monkeypatch):
    from moerunner.models import inspection

    folder, right = saved("mixtral", tmp_path), inspection.source_of

    def other_in_the_middle(site):
        source = right(site)
        if site.layer == 1:
            source.spec = dataclasses.replace(source.spec, top_k=1)
        return source

    monkeypatch.setattr(inspection, "source_of", other_in_the_middle)
    found = inspect(folder)
    assert [(k.name, k.layers, k.spec.top_k) for k in found.kinds] == [
        ("model.layers.0,2.mlp", 2, 2),
        ("model.layers.1.mlp", 1, 1),
    ]
    assert found.stacks[0].moe == [0, 1, 2]


def test_a_block_that_is_left_alone_is_named_with_the_reason(tmp_path, monkeypatch):
    from moerunner.models import inspection, registry

    folder = saved("deepseek_v3", tmp_path)
    monkeypatch.setattr(registry, "find", lambda _: None)
    monkeypatch.setattr("moerunner.models.prepare.is_experts_module", lambda _: False)
    found = inspection.inspect(folder)
    assert found.kinds == []
    assert list(found.left_alone) == ["model.layers.1-2.mlp"]
    assert "DeepseekV3MoE" in found.left_alone["model.layers.1-2.mlp"]
    assert found.stacks[0].moe == [1, 2]
    assert found.active == found.parameters
    assert any("count as at work" in note for note in found.notes)


def test_experts_of_an_unknown_family_are_said_to_be_alone(tmp_path, monkeypatch):
    from moerunner.models import registry

    folder = saved("mixtral", tmp_path)
    monkeypatch.setattr(registry, "find", lambda _: None)
    found = inspect(folder)
    (kind,) = found.kinds
    assert kind.experts_only
    assert kind.name == "model.layers.0-2.mlp.experts"
    assert kind.to_dict()["words"]["routing"] == "the model's own router"
    assert any("is not known" in note for note in found.notes)


def test_what_says_the_dtype(tmp_path):
    folder = saved("mixtral", tmp_path, dtype="bfloat16")
    assert (inspect(folder).dtype, inspect(folder).dtype_from) == ("bfloat16", "by the config")
    assert inspect(folder, dtype=torch.float16).dtype_from == "asked for"
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    assert (inspect(folder).dtype, inspect(folder).dtype_from) == ("float32", "by the files")
    (folder / "model.safetensors").unlink()
    assert (inspect(folder).dtype, inspect(folder).dtype_from) == ("float32", "named nowhere")


def test_a_key_that_no_entry_knows_is_refused_as_in_load(tmp_path):
    folder = saved("mixtral", tmp_path, expert_dropout_rate=0.5)
    with pytest.raises(SpecError, match="expert_dropout_rate"):
        inspect(folder)


def test_weights_in_another_format_are_named(tmp_path):
    folder = saved("mixtral", tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    (note,) = inspect(folder).notes
    assert "pytorch_model.bin" in note
    assert inspect(folder).size > 0


def test_files_that_contradict_the_config_are_refused(tmp_path):
    folder = saved("mixtral", tmp_path, num_hidden_layers=4)
    with pytest.raises(CheckpointError, match=r"model\.layers\.3"):
        inspect(folder)


def test_a_wrong_digit_in_the_number_of_layers_does_not_take_hours(tmp_path):
    folder = saved("mixtral", tmp_path, num_hidden_layers=10**9)
    for _ in range(2):
        with pytest.raises(CheckpointError, match="1000000000 layers"):
            inspect(folder)
        (folder / "model.safetensors").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([], ""),
        ([4], "4"),
        ([0, 1], "0-1"),
        ([0, 2], "0,2"),
        ([3, 4, 5, 6], "3-6"),
        ([1, 3, 5, 7], "1-7/2"),
        ([0, 3, 4, 5, 9], "0,3-5,9"),
        ([0, 1, 2, 10, 20, 30], "0-2,10-30/10"),
    ],
)
def test_ranges(numbers, text):
    assert ranges(numbers) == text


def test_names_that_differ_in_their_index_go_together():
    names = ["a.0.mlp", "a.1.mlp", "b.0.mlp", "a.2.moe", "a.2.mlp", "head"]
    assert together(names) == {"a.0-2.mlp": 3, "b.0.mlp": 1, "a.2.moe": 1, "head": 1}
    assert together(["block.1.layer.2.mlp", "block.3.layer.2.mlp", "block.5.layer.2.mlp"]) == {"block.1-5/2.layer.2.mlp": 3}


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (2**40, "1.0 TiB"), (2**50, "1024.0 TiB")],
)
def test_bytes_in_words(count, text):
    assert bytes_in_words(count) == text
