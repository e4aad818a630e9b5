"""The benchmark of whole models: every row is there with its shares, the model comes back as it was, the floor is right."""

import json

import pytest
import torch

transformers = pytest.importorskip("transformers")

import moerunner  # noqa: E402
from moerunner.bench import model as bench  # noqa: E402
from moerunner.bench.shapes import Peaks  # noqa: E402
from moerunner.errors import SpecError  # noqa: E402
from moerunner.models import runners  # noqa: E402
from moerunner.verify import tiny_model  # noqa: E402

SMALL = {
    "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2, "vocab_size": 256,
}  # fmt: skip

PEAKS = Peaks(2e10, 1e11)


@pytest.fixture
def config():
    return transformers.AutoConfig.for_model("qwen3_moe", **SMALL)


def test_every_row_is_measured(config):
    how = {"batches": (1, 3), "prompts": (24,), "dtype": torch.float32, "device": "cpu", "context": 8, "peaks": PEAKS}
    found = bench.measure(config, layers=2, implementations=("grouped_mm", "generate"), **how)
    json.dumps(found)
    assert (found["layers"], found["model"]) == (2, "qwen3_moe")
    assert config.num_hidden_layers == 4, "the caller's config was changed"
    assert [(row["batch"], row["implementation"]) for row in found["decode"]] == [
        (batch, name) for batch in (1, 3) for name in ("grouped_mm", "generate")
    ]
    for row in found["decode"] + found["prefill"]:
        assert row["python"] > 0
        share = row["share"]
        assert sum(share.values()) == pytest.approx(row["python"])
        assert {"moe", "attention", "head", "rest"} <= share.keys()
        assert row["floor"] > 0


def test_a_model_comes_back_as_it_was_and_failures_stand_in_their_row(config, monkeypatch):
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    ids, before = torch.arange(6)[None], model.config._experts_implementation
    expected = model(ids).logits

    def breaks(*_):
        raise RuntimeError("out of memory\nand a long tale")

    monkeypatch.setattr(bench, "_decode", breaks)
    found = bench.measure(
        model, batches=(1,), prompts=(8,), dtype=torch.float32, implementations=("grouped_mm", "generate"), peaks=PEAKS
    )
    assert [row["note"] for row in found["decode"]] == ["RuntimeError: out of memory"] * 2
    assert all(row["python"] > 0 for row in found["prefill"])
    assert torch.equal(model(ids).logits, expected)
    assert not runners(model)
    assert model.config._experts_implementation == before


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3", "gpt_oss", "qwen2_moe"])
def test_a_part_is_left_out_and_comes_back(family):
    model = tiny_model(family)
    moerunner.patch(model)
    ids = torch.arange(5, 17)[None]
    whole = model(ids).logits
    for part in ("moe", "attention"):
        with bench.without(model, part):
            assert not torch.allclose(model(ids).logits, whole)
        assert torch.equal(model(ids).logits, whole)
    assert runners(model)


def test_the_floor_is_that_of_bytes_or_of_operations(config):
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    table = model.get_input_embeddings().weight.numel()
    rest = sum(p.numel() for p in model.parameters()) - experts - table
    slow = Peaks(bytes_per_second=1.0, flops=1e30)
    cached = 4 * 2 * 2 * 16 * 10
    assert bench.floor(model, 1, "decode", slow, 10) == pytest.approx(2 * (rest + experts / 4 + cached))
    hit = 1 - (1 - 2 / 8) ** 3
    assert bench.floor(model, 3, "decode", slow, 10) == pytest.approx(2 * (rest + experts * hit + 3 * cached))
    weak = Peaks(bytes_per_second=1e30, flops=1.0)
    products = 2 * 100 * (rest - table + experts / 4) + 2 * table + 4 * 4 * 64 * 100 * 100 / 2
    assert bench.floor(model, 100, "prefill", weak, 10) == pytest.approx(products)


def test_an_unknown_implementation_is_refused(config):
    with pytest.raises(SpecError, match="magic"):
        bench.measure(config, implementations=("magic",))
