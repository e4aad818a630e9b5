"""What each rank of a layout is expected to hold and do equals what its runner holds and is given."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from moerunner import Layout, SpecError, load, rebalance, unpatch
from moerunner.loads import measure
from moerunner.models import patch
from moerunner.models.expected import Trace, layer_loads, layout_of, loads_of, ranks_of, read_trace, zipf
from moerunner.models.inspection import inspect
from moerunner.parallel.comm import simulate
from moerunner.verify import tiny_model

LAYOUTS = [
    Layout(ep=2),
    Layout(ep=4, tp=2),
    Layout(dp=2, ep=3),
    Layout(ep=3, redundant=4),
    Layout(ep=2, placement="round_robin"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("mixtral")
    tiny_model("mixtral").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def measured(folder):
    ids = torch.randint(3, 200, (1, 40), generator=torch.Generator().manual_seed(1))
    return measure(load(folder), ids)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_load_of_a_rank_is_what_its_experts_were_given(folder, measured, layout):
    """Each choice goes to one rank of a copy; copies of an expert take turns, which evens out over many tokens only."""
    found = inspect(folder, layout=layout)
    layers = layer_loads(found, {layer.name: layer.load for layer in measured.layers})
    assert [layer.name for layer in layers] == [layer.name for layer in measured.layers]
    for layer, seen in zip(layers, measured.layers, strict=True):
        copies = [sum(e in row for row in layout.slots(8)) for e in range(8)]
        given = [sum(seen.load[e] / copies[e] for e in row if e >= 0) for row in layout.slots(8)]
        mean = sum(seen.load) / layout.ep
        assert layer.per_ep == pytest.approx([n / mean for n in given])
        assert sum(layer.per_ep) == pytest.approx(layout.ep)
        assert layer.busiest == max(layer.per_ep)
        assert layer.placed <= layer.busiest + 1e-9
    for rank in ranks_of(found, layers):
        at = layout.coordinates(rank.rank)
        assert {axis: getattr(rank, axis) for axis in at} == at
        own = [layer.per_ep[at["ep"]] for layer in layers]
        assert (rank.load, rank.most) == (pytest.approx(sum(own) / len(own)), max(own))


@pytest.mark.parametrize("layout", [Layout(ep=2), Layout(ep=2, tp=2, redundant=3)], ids=str)
def test_the_memory_of_a_rank_is_what_a_patched_model_takes_there(folder, layout):
    whole = load(folder)
    unpatch(whole)

    def held(bound):
        model = copy.deepcopy(whole)
        patch(model, bound)
        return sum(t.nbytes for t in {id(t): t for t in model.state_dict(keep_vars=True).values()}.values())

    found = inspect(folder, layout=layout)
    ranks = ranks_of(found, layer_loads(found, loads_of(found)))
    assert [rank.size for rank in ranks] == simulate(layout, held)


def test_what_it_says_of_experts_placed_by_load_is_what_rebalance_gives(folder, measured):
    loads = {layer.name: layer.load for layer in measured.layers}
    layers = layer_loads(inspect(folder, layout=Layout(ep=2, redundant=2)), loads)

    plain = tiny_model("mixtral")

    def main(bound):
        model = copy.deepcopy(plain)
        patch(model, bound)
        return [one.after for one in rebalance(model, redundant=2, loads=loads)]

    for after in simulate(Layout(ep=2), main):
        assert after == pytest.approx([layer.placed for layer in layers])


def test_without_loads_all_experts_count_alike(folder):
    found = inspect(folder, layout=Layout(ep=3))
    assert loads_of(found) == {f"model.layers.{i}.mlp": [1.0] * 8 for i in range(3)}
    assert loads_of(found, skew=1.0) == {f"model.layers.{i}.mlp": zipf(8, 1.0) for i in range(3)}
    assert [layer.per_ep for layer in layer_loads(found, loads_of(found))] == [pytest.approx([9 / 8, 9 / 8, 6 / 8])] * 3


def test_a_model_without_such_layers_has_no_loads(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    found = inspect(tmp_path, layout=Layout(ep=2))
    assert ranks_of(found, layer_loads(found, loads_of(found))) == []


def test_rows_of_a_trace_belong_to_layers_by_name_or_in_order(folder, measured, tmp_path):
    found, names = inspect(folder), [f"model.layers.{i}.mlp" for i in range(3)]
    rows = [[1.0] * 7 + [n] for n in (2, 3, 4)]
    assert loads_of(found, trace=Trace(rows, [])) == dict(zip(names, rows, strict=True))
    assert loads_of(found, trace=Trace(rows[:1], [])) == dict.fromkeys(names, rows[0])
    assert loads_of(found, trace=Trace(rows[::-1], names[::-1])) == dict(zip(names, rows, strict=True))
    file = tmp_path / "loads.json"
    file.write_text(json.dumps({"ok": True, **measured.to_dict()}))
    assert loads_of(found, trace=read_trace(file)) == {layer.name: layer.load for layer in measured.layers}
    for trace, words in (
        (Trace(rows[:2], []), "loads of 2 layers, the model has 3"),
        (Trace(rows, ["a", "b", "c"]), r"no loads of model.layers.0.mlp. It has those of a, b, c"),
        (Trace([[1.0] * 6], []), "loads of 6 experts, model.layers.0.mlp has 8"),
    ):
        with pytest.raises(SpecError, match=words):
            loads_of(found, trace=trace)


def test_a_layout_as_text():
    assert layout_of("ep=4, tp=2,redundant=8,tokens=sharded,placement=round_robin,node=8,timeout=2.5") == Layout(
        ep=4, tp=2, redundant=8, tokens="sharded", placement="round_robin", node=8, timeout=2.5
    )
    for text, words in {
        "ep": "is not NAME=VALUE",
        "ep=two": "must be a number",
        "np=2": "there are dp, ep",
        "ep=2,ep=2": "once",
    }.items():
        with pytest.raises(SpecError, match=words):
            layout_of(text)
    with pytest.raises(SpecError, match=r"Layout\.ep"):
        layout_of("ep=0")
