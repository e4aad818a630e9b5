"""scripts/accuracy.py on small models: right ones pass, and an error in the runner does not go unexplained."""

import dataclasses
import importlib
import json
from pathlib import Path

import pytest
import torch

from moerunner import MoERunner
from moerunner.models.block import forward_of
from moerunner.models.families import TABLE

SCRIPTS = Path(__file__).parents[1] / "scripts"
SMALL = {"vocab_size": 4096}


@pytest.fixture
def accuracy(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    module = importlib.import_module("accuracy")
    monkeypatch.setattr(module, "MODULES", module.MODULES[:3])
    return module


@pytest.fixture
def problems(accuracy):
    """What the float32 part finds wrong with a small model."""

    def of(family):
        model = accuracy.build(family, SMALL, 0)
        with torch.no_grad():
            return accuracy.float32(model, accuracy.forwards_of(model), accuracy.text(48))[1]

    return of


def test_a_family_end_to_end_and_its_page(accuracy, tmp_path):
    found = accuracy.measure("olmoe", SMALL, accuracy.Settings(length=48, prompt=12, new_tokens=6), least=0)
    assert not [p for p in found["problems"] if not p.startswith("bf16: ")]  # so few tokens make no average
    assert found["float32"]["routings"] == 3 * 3 * 48
    assert found["float32"]["grouped_mm"]["positions"] == found["float32"]["positions"] == 3 * 48
    assert found["generation"]["identical"] == 3
    assert found["bfloat16"]["perplexity"]["moerunner"] == pytest.approx(found["bfloat16"]["perplexity"]["eager"], rel=1e-2)
    record = {
        "families": {"olmoe": {**found, "ok": True, "problems": []}, "mixtral": {**found, "ok": False, "problems": ["x"]}}
    }
    accuracy.write_page(json.loads(json.dumps(record)), tmp_path / "docs" / "accuracy.md")
    page = (tmp_path / "docs" / "accuracy.md").read_text()
    assert "1 of 2 families have a disagreement that is not explained: mixtral" in page
    assert "- mixtral: x" in page


def test_a_small_error_of_the_runner_is_not_explained(problems, monkeypatch):
    forward = MoERunner.forward
    monkeypatch.setattr(MoERunner, "forward", lambda self, x, **given: forward(self, x, **given) * (1 + 1e-3))
    assert any(p.startswith("logits: ") for p in problems("olmoe"))


@pytest.mark.parametrize("family", ["olmoe", "gemma4", "phimoe"])
def test_a_choice_that_is_not_a_tie_is_not_explained(family, accuracy, problems, monkeypatch):
    def other(layer, topk, forward, note=accuracy.note):
        ids = topk.ids.clone()
        if forward_of(forward.source.block):  # in the run with moerunner
            ids[5] = (ids[5] + 1) % forward.runner.spec.num_experts
        note(layer, dataclasses.replace(topk, ids=ids), forward)

    if family == "gemma4":
        monkeypatch.setitem(SMALL, "vocab_size_per_layer_input", 4096)
    monkeypatch.setattr(accuracy, "note", other)
    assert any("routings differ by more than the measured error" in p for p in problems(family))


def test_every_family_has_sizes_and_an_entry(accuracy):
    known = {name for family in TABLE for name in (family.name, *family.aliases)}
    assert set(accuracy.FAMILIES) <= known
    assert len(accuracy.FAMILIES) == 17


def test_a_family_that_breaks_down_is_a_problem_of_its_own(accuracy, monkeypatch):
    monkeypatch.setattr(accuracy, "sizes", lambda family: {"hidden_size": -1})
    threads = torch.get_num_threads()
    found = accuracy.attempt("olmoe", accuracy.Settings())
    torch.set_num_threads(threads)
    assert not found["ok"]
    assert found["problems"]
