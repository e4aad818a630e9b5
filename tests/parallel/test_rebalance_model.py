"""A whole model over ranks whose experts move while it runs: it says what it said, from the tensors of a fresh load."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from tests.parallel.models import answer, rebalanced_model
from tests.parallel.pool import on_ranks

import moerunner
from moerunner import Layout, SpecError, UnsupportedError
from moerunner.models import runners
from moerunner.parallel.balance import imbalance, placement, rank_loads
from moerunner.parallel.comm import simulate
from moerunner.verify.tiny import tiny_inputs, tiny_model

FAMILIES = {
    "mixtral": {},
    "deepseek_v3": {"moe_intermediate_size": 25},
    "gpt_oss": {},
    "dbrx": {},
    "longcat_flash": {},
    "ernie4_5_vl_moe": {},
    "nemotron_h": {},
}


def far(one, other):
    return float(abs(one - other).max() / abs(other).max())


@pytest.fixture
def model():
    return tiny_model("mixtral")


@pytest.mark.parametrize(
    "layout",
    [Layout(ep=2), Layout(ep=2, redundant=3), Layout(ep=2, placement="round_robin")],
    ids=["linear", "copies", "round-robin"],
)
@pytest.mark.rotating(3)
@pytest.mark.parametrize("family", FAMILIES)
def test_moved_experts_are_those_of_a_model_that_was_cut_so(family, layout):
    whole = tiny_model(family, **FAMILIES[family])
    if layout.redundant and family == "ernie4_5_vl_moe":
        layout = dataclasses.replace(layout, redundant=1)

    def main(bound):
        model = copy.deepcopy(whole)
        moerunner.patch(model, bound)
        before, _ = answer(model, generates=False)
        parameters = dict(model.named_parameters())
        spec = next(iter(runners(model).values())).spec
        loads = [(7 * e) % 5 for e in range(spec.num_experts)]
        moved = moerunner.rebalance(model, redundant=2, loads=dict.fromkeys(runners(model), loads))
        assert [one.name for one in moved] == list(runners(model))
        assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
        after, _ = answer(model, generates=False)
        rows = moved[0].placement
        assert rows == placement(loads, 2, redundant=2, sets=spec.routing.modalities)
        assert all(runner.plan.layout.placement == rows for runner in runners(model).values())
        fresh, there = copy.deepcopy(whole), dataclasses.replace(layout, placement=rows, redundant=0)
        again = dataclasses.replace(bound, layout=there, comm=next(iter(runners(model).values()))._comm)
        moerunner.patch(fresh, again)
        wanted, _ = answer(fresh, generates=False)
        named = fresh.state_dict()
        differ = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, named[name])]
        return before, after, wanted, differ, answer(copy.deepcopy(model), generates=False)[0]

    for before, after, wanted, differ, twin in simulate(layout, main):
        assert differ == []
        assert (after == wanted).all(), "the bits of a model that was cut so from the start"
        assert (after == twin).all()
        assert far(after, before) <= 1e-5


@pytest.mark.parametrize(
    ("family", "layout"),
    [("gpt_oss", Layout(ep=2)), pytest.param("deepseek_v3", Layout(ep=2, tp=2), marks=pytest.mark.slow)],
    ids=["ep2", "ep2-tp2"],
)
def test_what_was_counted_moves_experts_between_processes(tmp_path, family, layout):
    tiny_model(family).save_pretrained(tmp_path)
    logits, said = answer(moerunner.load(tmp_path))
    ranks = on_ranks(layout.world, rebalanced_model, tmp_path, layout)
    for rank in ranks:
        assert far(rank["before"], logits) <= 1e-5
        assert far(rank["after"], logits) <= 1e-5
        assert rank["said"] == said
        assert all([name for name, _ in issued] == ["all_reduce"] for issued in rank["collectives"].values())
        assert rank["moved"] == ranks[0]["moved"]
        assert rank["differ after load_weights"] == []
        assert "was counted" in rank["nothing counted"]
        assert not any(rank["counts afterwards"])
        for one in rank["moved"]:
            assert one.before == pytest.approx(imbalance(rank_loads(one.loads, layout.slots(len(one.loads)))))
            assert one.after == pytest.approx(imbalance(rank_loads(one.loads, one.placement)))
            assert one.after <= one.before + 1e-9
            assert sum(one.loads) == rank["tokens"] * rank["top_k"], "each token counts once, whoever holds it"


def test_copies_of_the_model_count_together_and_move_alike(model):
    """Each copy reads a text of its own."""

    def main(bound):
        mine = copy.deepcopy(model)
        moerunner.patch(mine, bound)
        moerunner.count_loads(mine)
        before, _ = answer(mine, bound.comm.coordinates["dp"], generates=False)
        moved = moerunner.rebalance(mine, redundant=2)
        after, _ = answer(mine, bound.comm.coordinates["dp"], generates=False)
        return far(after, before), moved

    found = simulate(Layout(dp=2, ep=2), main)
    assert max(error for error, _ in found) <= 1e-5
    assert all(moved == found[0][1] for _, moved in found)
    moerunner.patch(model)
    counters = moerunner.count_loads(model)
    answer(model, 0, generates=False), answer(model, 1, generates=False)
    assert {one.name: one.loads for one in found[0][1]} == {name: c.counts.tolist() for name, c in counters.items()}


def test_gradients_go_on_to_the_moved_experts(model):
    model.requires_grad_(True)

    def main(bound):
        mine = copy.deepcopy(model)
        moerunner.patch(mine, bound)
        rows = {name: [0, 0, 5, 0, 1, 1, 0, 9] for name in runners(mine)}
        inputs = tiny_inputs(mine, torch.arange(8).reshape(1, 8))
        mine(**inputs)[0].square().sum().backward()
        moerunner.rebalance(mine, loads=rows)
        own = [p for name, p in mine.named_parameters() if "experts" in name]
        assert all(p.grad is None for p in own)
        mine(**inputs)[0].square().sum().backward()
        return all(p.grad is not None and p.grad.shape == p.shape for p in own)

    assert simulate(Layout(ep=2), main) == [True, True]


def test_what_cannot_move_says_why(model):
    with pytest.raises(UnsupportedError, match="no patched block"):
        moerunner.rebalance(model)
    moerunner.patch(model)
    with pytest.raises(UnsupportedError, match=r"every rank has all experts. Load or patch the model with Layout\(ep="):
        moerunner.rebalance(model)
    with pytest.raises(UnsupportedError, match="another module"):
        next(iter(runners(model).values())).rebalance((tuple(range(8)),))
    moerunner.unpatch(model)

    def main(bound):
        mine = copy.deepcopy(model)
        moerunner.patch(mine, bound)
        names, before = list(runners(mine)), answer(mine, generates=False)[0]
        for words, facts in {
            "loads are not counted": {},
            "no patched block 'elsewhere'": {"loads": {"elsewhere": [1] * 8}},
            "3 loads for 8 experts": {"loads": {names[0]: [1, 2, 3]}},
            "At most 8 copies": {"loads": {names[0]: [1] * 8}, "redundant": 9},
            "finite": {"loads": {names[0]: [1.0, float("nan")] * 4}},
        }.items():
            with pytest.raises(SpecError, match=words):
                moerunner.rebalance(mine, **facts)
        return bool((answer(mine, generates=False)[0] == before).all())

    assert simulate(Layout(ep=2), main) == [True, True]


def test_experts_that_two_blocks_share_do_not_move(model):
    first, second = [m for m in model.modules() if type(m).__name__ == "MixtralSparseMoeBlock"][:2]
    second.experts = first.experts

    def main(bound):
        mine = copy.deepcopy(model)
        moerunner.patch(mine, bound)
        with pytest.raises(UnsupportedError, match="share their experts"):
            moerunner.rebalance(mine, loads={})

    simulate(Layout(ep=2), main)
