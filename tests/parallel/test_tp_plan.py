"""`load(..., attention="tp_plan")`: what lies outside of the MoE blocks by Transformers' own plan, on the layout's ranks."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file
from tests.parallel.models import answer, load_and_run, split_model
from tests.parallel.pool import on_ranks
from tests.parallel.test_torchrun import torchrun

import moerunner
from moerunner import Layout, UnsupportedError
from moerunner.models.attention import spread
from moerunner.models.families import TABLE
from moerunner.models.registry import transformers_knows
from moerunner.parallel.comm import simulate
from moerunner.verify.tiny import tiny_model

pytest.importorskip("transformers.distributed.tensor_parallel", reason="this release splits models otherwise")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the ranks here are gloo's")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A family's tiny model in a folder, and what one rank makes of it."""
    done = {}

    def of(family, **changes):
        key = (family, *changes.items())
        if key not in done:
            folder = tmp_path_factory.mktemp(family)
            tiny_model(family, **changes).save_pretrained(folder)
            done[key] = folder, answer(moerunner.load(folder))
        return done[key]

    return of


def run(saved, family, layout, **changes):
    folder, (logits, said) = saved(family, **changes)
    found = on_ranks(layout.world, load_and_run, folder, layout, True, "tp_plan")
    for rank in found:
        assert abs(rank["logits"] - logits).max() / abs(logits).max() <= 1e-5
        assert rank["said"] == said
        assert all([name for name, _ in issued] == ["all_reduce"] for issued in rank["collectives"].values())
        assert f"{len(rank['split'])} modules outside of the blocks are split by Transformers' tp_plan" in rank["report"]
    return folder, found


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(ep=2)], ids=["tp2", "ep2"])
def test_every_rank_says_what_one_rank_says_and_reads_its_part_of_the_heads(saved, layout):
    folder, found = run(saved, "qwen3_moe", layout)
    stored = load_file(folder / "model.safetensors")
    by_rows = ("o_proj", "down_proj")  # cut along their rows, runs of which are read together
    for rank in found:
        assert sum("self_attn" in name and name.endswith("_proj") for name in rank["split"]) == 3 * 4
        assert "lm_head" in rank["split"]
        for name, tensor in stored.items():
            module = name.rpartition(".")[0]
            half = module in rank["split"] and "_norm" not in name and not module.endswith(by_rows)
            if ".experts." not in name:
                assert rank["read"][name] == tensor.nbytes // (2 if half else 1), name
    replicated = on_ranks(2, load_and_run, folder, layout, False)
    split = [name for name in stored if name.rpartition(".")[0] in found[0]["split"] and "_norm" not in name]
    saving = sum(stored[name].nbytes for name in split) // 2
    assert saving > 0
    assert [rank["kept"] for rank in found] == [rank["kept"] - saving for rank in replicated]


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(ep=2)], ids=["tp2", "ep2"])
def test_dense_layers_are_split_and_blocks_are_left_to_the_runner(saved, layout):
    """Dense layers and MoE blocks have the same names in DeepSeek-V3's plan."""
    _, found = run(saved, "deepseek_v3", layout)
    assert {name for name in found[0]["split"] if "mlp" in name} == {
        f"model.layers.0.mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")
    }


@pytest.mark.slow
@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(ep=2)], ids=["tp2", "ep2"])
@pytest.mark.parametrize("family", [family.name for family in TABLE])
def test_every_family_is_split_right_or_refused(tmp_path, family, layout):
    if not transformers_knows(family):
        pytest.skip("this release does not have it")
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    try:
        logits, said = answer(moerunner.load(tmp_path), generates=model.can_generate())
        found = on_ranks(2, load_and_run, tmp_path, layout, model.can_generate(), "tp_plan")
    except UnsupportedError as error:
        if not re.search("is not a language model in Transformers|has no tp_plan for what lies outside", str(error)):
            raise
        pytest.skip(str(error))
    for rank in found:
        assert rank["split"]
        assert abs(rank["logits"] - logits).max() / abs(logits).max() <= 1e-5
        assert rank["said"] == said


@pytest.mark.slow
def test_four_ranks_share_the_heads(saved):
    run(saved, "qwen3_moe", Layout(ep=2, tp=2), num_key_value_heads=4)


@pytest.mark.slow
def test_copies_of_the_model_split_it_each_for_itself(saved):
    folder, (logits, said) = saved("mixtral")
    found = on_ranks(4, load_and_run, folder, Layout(dp=2, ep=2), True, "tp_plan")
    for rank in found[:2]:
        assert abs(rank["logits"] - logits).max() / abs(logits).max() <= 1e-5
        assert rank["said"] == said
    other, _ = answer(moerunner.load(folder), 1)
    assert all(abs(rank["logits"] - other).max() / abs(other).max() <= 1e-5 for rank in found[2:])


@pytest.mark.parametrize("changes", [{"vocab_size": 257}, {"tie_word_embeddings": True}], ids=["odd", "tied"])
def test_a_head_that_cannot_be_split_stays_whole(saved, changes):
    _, found = run(saved, "mixtral", Layout(ep=2), **changes)
    assert all("lm_head" not in rank["split"] for rank in found)
    assert len(found[0]["split"]) == 3 * 4


def test_what_such_a_model_cannot_do_it_says(saved, tmp_path):
    folder, _ = saved("mixtral")
    for told in on_ranks(2, split_model, folder, tmp_path, Layout(ep=2)):
        assert "what it could save is no checkpoint" in told["save"]
        assert "only plain tensors can be given new weights" in told["load_weights"]
        assert told["moved"] <= 1e-5, "its experts move like those of any other"
        assert told["alone"] == told["ranks"]
        for name in ("alone", "ranks"):  # a rank that changed the loop by itself would leave the others waiting
            assert told[f"{name}, note"] == "Transformers' own loop: the model is on several ranks"
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_split_is_refused(saved):
    folder, _ = saved("mixtral")
    with pytest.raises(UnsupportedError, match="cannot be 'sharded'"):
        moerunner.load(folder, attention="sharded")
    with pytest.raises(UnsupportedError, match="there is one rank"):
        moerunner.load(folder, attention="tp_plan")
    with pytest.raises(UnsupportedError, match="only copies of the model"):
        on_ranks(2, load_and_run, folder, Layout(dp=2), False, "tp_plan")
    with pytest.raises(UnsupportedError, match="num_key_value_heads is 1, which 2 ranks cannot share"):
        on_ranks(2, load_and_run, saved("mixtral", num_key_value_heads=1)[0], Layout(ep=2), False, "tp_plan")


def test_a_family_without_a_plan_is_refused():
    model = tiny_model("mixtral")
    model.tp_plan = {name: style for name, style in model.tp_plan.items() if ".experts" in name}

    def main(bound):
        with pytest.raises(UnsupportedError, match="MixtralForCausalLM has no tp_plan for what lies outside of its MoE blocks"):
            spread(model, bound, "cpu")

    simulate(Layout(ep=2), main)


@pytest.mark.slow
@pytest.mark.parametrize("size", ["--tp", "--ep"])
def test_verify_compares_a_model_split_so(saved, size):
    folder, _ = saved("mixtral")
    done = torchrun(2, "-m", "moerunner", "verify", folder, size, 2, "--attention", "tp_plan", "--tokens", 24, "--json")
    assert done.returncode == 0, done.stderr
    data = json.loads(done.stdout)
    assert data["ok"] is True
    assert data["logits"]["max"] <= 1e-5
