"""Counting where tokens go: against a count of one's own, over windows, and what is said about it."""

import math

import pytest
import torch

pytest.importorskip("transformers")

from moerunner import SpecError, UnsupportedError
from moerunner.loads import LayerLoads, measure
from moerunner.loads.plot import draw, short
from moerunner.models import patch, runners
from moerunner.runner import MoERunner
from moerunner.verify import tiny_model


@pytest.fixture(scope="module")
def model():
    made = tiny_model("qwen3_moe").eval()
    patch(made)
    return made


def chosen(model, ids, monkeypatch):
    """The ids and weights that each runner's own `route` gives on the same tokens, by layer."""
    found = {name: [] for name in runners(model)}
    names = {id(runner): name for name, runner in runners(model).items()}
    right = MoERunner.forward

    def forward(self, x, **inputs):
        found[names[id(self)]].append(self.route(x, **inputs))
        return right(self, x, **inputs)

    with monkeypatch.context() as spy, torch.no_grad():
        spy.setattr(MoERunner, "forward", forward)
        model(input_ids=ids, use_cache=False)
    return found


def test_counts_are_those_of_the_router(model, monkeypatch):
    ids = torch.randint(model.config.vocab_size, (1, 40))
    found = measure(model, ids)
    assert [layer.name for layer in found.layers] == list(runners(model))
    for layer, (top,) in zip(found.layers, chosen(model, ids, monkeypatch).values(), strict=True):
        experts = len(layer.load)
        sets = [set(row) for row in top.ids.tolist()]
        assert layer.tokens == 40
        assert layer.load == [sum(e in s for s in sets) for e in range(experts)]
        assert layer.pairs == [[sum({i, j} <= s for s in sets) for j in range(experts)] for i in range(experts)]
        weights = torch.zeros(experts).index_add_(0, top.ids.flatten(), top.weights.flatten())
        assert layer.weights == pytest.approx(weights.tolist(), rel=1e-5, abs=1e-6)


def test_a_long_text_is_read_in_windows(model, monkeypatch):
    ids = torch.randint(model.config.vocab_size, (1, 75))
    told = []
    monkeypatch.setattr(model.config, "max_position_embeddings", 30)
    found = measure(model, ids, told=told.append)
    assert told == [30, 60, 75]
    each = [measure(model, piece) for piece in ids.split(30, dim=1)]
    for layer, *parts in zip(found.layers, *(one.layers for one in each), strict=True):
        assert layer.load == [sum(n) for n in zip(*(part.load for part in parts), strict=True)]


def test_what_was_counted_before_is_left_alone(model):
    (runner, *_) = runners(model).values()
    runner.loads = before = object()
    try:
        measure(model, torch.tensor([[1, 2]]))
        assert runner.loads is before
    finally:
        runner.loads = None


def test_what_cannot_be_measured(model):
    with pytest.raises(SpecError, match="no tokens"):
        measure(model, torch.empty(1, 0, dtype=torch.int64))
    with pytest.raises(UnsupportedError, match="no patched MoE block"):
        measure(tiny_model("llama"), torch.tensor([[1]]))


def test_what_is_said_of_a_layer():
    layer = LayerLoads("a", 8, [8, 4, 4, 0], [[8, 4, 4, 0], [4, 4, 0, 0], [4, 0, 4, 0], [0, 0, 0, 0]], [1.0] * 4)
    assert layer.imbalance == 2
    assert layer.idle == 1
    assert layer.effective == pytest.approx(math.exp(0.5 * math.log(2) + 0.5 * math.log(4)))
    assert layer.lift(0, 1) == 1
    assert layer.lift(1, 2) == 0
    assert layer.bonds() == [(0, 1, 1.0), (0, 2, 1.0)]
    even = LayerLoads("b", 4, [2, 2], [[2, 0], [0, 2]], [1.0] * 2)
    assert (even.imbalance, even.effective, even.bonds()) == (1, pytest.approx(2), [])


def test_names_are_short_in_a_picture():
    assert short(["m.layers.1.mlp", "m.layers.2.mlp"]) == (["1", "2"], "m.layers.*.mlp")
    assert short(["m.layers.1.mlp"]) == (["m.layers.1.mlp"], "")
    assert short(["m.1.mlp", "mtp"]) == (["m.1.mlp", "mtp"], "")


def test_a_picture_of_layers_that_differ(model):
    """Different numbers of experts, one layer without any token, names of different depth."""
    pytest.importorskip("matplotlib")
    found = measure(model, torch.randint(model.config.vocab_size, (1, 20)))
    odd = LayerLoads("mtp", 0, [0, 0], [[0, 0], [0, 0]], [0.0, 0.0])
    assert draw(type(found)("m", "s", 20, [*found.layers, odd])).startswith(b"\x89PNG")
