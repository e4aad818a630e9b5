"""`moerunner plan`: every layout of so many ranks, from the plans that runners would have."""

import dataclasses
import json
import shutil

import pytest
import torch
from tests.cli.test_cli_bad_input import refused

from moerunner import Layout, SpecError
from moerunner.models.expected import zipf
from moerunner.models.inspection import inspect
from moerunner.parallel.balance import imbalance
from moerunner.planner import Machine, estimates, look_up, reason

MACHINE = Machine(nvlink=1e9, net=1e8, hbm=1e10, flops=1e12, memory=1e9, gpus_per_node=4)
SPEEDS = ("--nvlink", 450, "--net", 50, "--hbm", 4800, "--tflops", 900)


@pytest.fixture(scope="module")
def found(saved):
    return inspect(saved)


def test_every_layout_has_so_many_ranks_and_stands_once(found):
    made = estimates(found, 8, MACHINE)
    assert {e.layout.world for e in made} == {8}
    assert len({(e.layout, e.dispatch) for e in made}) == len(made)
    assert {e.layout.tp for e in made} == {1, 2, 4}, "tp stays within a node"
    assert {e.layout.ep for e in made} == {1, 2, 4, 8}
    assert {e.dispatch for e in made} == {"local", "allgather", "alltoall"}
    assert [e.seconds for e in made] == sorted(e.seconds for e in made)


@pytest.mark.parametrize(("ep", "tp"), [(1, 1), (4, 1), (2, 2), (8, 1)])
def test_memory_and_collectives_are_those_of_the_layout(found, saved, ep, tp):
    made = next(
        e for e in estimates(found, 8, MACHINE) if (e.layout.ep, e.layout.tp, e.layout.tokens) == (ep, tp, "replicated")
    )
    looked = inspect(saved, layout=Layout(ep=ep, tp=tp))
    assert made.weights == looked.moe_rank
    plan = looked.kinds[0].plan
    assert made.collectives == tuple(f"{kind} over {'+'.join(axes)}" for kind, axes in plan.collectives)


def test_times_are_those_of_the_roofline(found):
    """Copies alone: all experts are read once, each token multiplies with its own, and nothing travels."""
    alone = next(e for e in estimates(found, 4, MACHINE, tokens=10**6) if e.layout.dp == 4)
    rest = found.kinds[0].memory.router + found.kinds[0].memory.shared
    layers, spec = found.kinds[0].layers, found.kinds[0].spec
    assert alone.read == pytest.approx(layers * (found.kinds[0].memory.routed + rest) / MACHINE.hbm)
    one = 3 * spec.hidden_size * spec.experts.intermediate_size
    others = 3 * spec.hidden_size * spec.shared.width * spec.shared.count + spec.num_experts * spec.hidden_size
    flops = 2 * 10**6 * (spec.top_k * one + others)
    assert alone.compute == pytest.approx(layers * flops / MACHINE.flops)
    assert (alone.nvlink, alone.net, alone.latency) == (0, 0, 0)
    assert alone.seconds == max(alone.read, alone.compute)


def test_what_one_token_reads_is_what_it_chooses(found):
    machine = dataclasses.replace(MACHINE, gpus_per_node=1)
    alone = next(e for e in estimates(found, 1, machine, tokens=1))
    kind = found.kinds[0]
    chosen = kind.memory.routed * kind.spec.top_k / kind.spec.num_experts
    assert alone.read == pytest.approx(kind.layers * (chosen + kind.memory.router + kind.memory.shared) / machine.hbm)


def test_bytes_are_those_of_the_plan_on_the_links_they_take(found):
    kind, tokens = found.kinds[0], 100
    width = {"float32": 4, "bfloat16": 2}[kind.dtype]

    def times(ranks, **wanted):
        made = estimates(found, ranks, MACHINE, tokens=tokens)
        return next(e for e in made if all(getattr(e.layout, n, getattr(e, n, None)) == v for n, v in wanted.items()))

    row = kind.spec.hidden_size * width
    tp = times(4, tp=4, tokens="replicated")
    assert tp.net == 0
    assert tp.nvlink == pytest.approx(kind.layers * 2 * (4 * tokens) * row * 3 / 4 / MACHINE.nvlink)
    ep = times(8, ep=8, dispatch="alltoall")
    sent = kind.layers * 2 * tokens * kind.spec.top_k * row / 8
    assert ep.nvlink == pytest.approx(sent * 3 / MACHINE.nvlink)
    assert ep.net == pytest.approx(sent * 4 / MACHINE.net)
    ring = times(8, ep=8, dispatch="local")
    assert ring.net == pytest.approx(kind.layers * 2 * (8 * tokens) * row * 7 / 8 / 4 / MACHINE.net)
    assert ring.latency == pytest.approx(kind.layers * MACHINE.latency)


def test_faster_parts_never_make_a_layout_slower(found):
    before = {(e.layout, e.dispatch): e.seconds for e in estimates(found, 8, MACHINE, skew=1.0)}
    for name in ("nvlink", "net", "hbm", "flops"):
        better = dataclasses.replace(MACHINE, **{name: 3 * getattr(MACHINE, name)})
        after = {(e.layout, e.dispatch): e.seconds for e in estimates(found, 8, better, skew=1.0)}
        assert all(after[key] <= before[key] for key in before)
        assert any(after[key] < before[key] for key in before)


def test_a_trace_says_how_even_ranks_are(found):
    loads = [8.0, 8.0, 1, 1, 1, 1, 1, 1]
    made = {e.layout.ep: e for e in estimates(found, 4, MACHINE, trace=[loads]) if e.dispatch == "local"}
    assert made[1].even == made[1].linear == 1
    assert made[4].linear == pytest.approx(imbalance([16, 2, 2, 2]))
    assert made[4].even == pytest.approx(imbalance([9, 9, 2, 2]))
    both = {e.layout.ep: e for e in estimates(found, 4, MACHINE, trace=[loads, [1.0] * 8]) if e.dispatch == "local"}
    assert both[4].linear == pytest.approx((made[4].linear + 1) / 2)
    assert both[4].seconds < made[4].seconds
    with pytest.raises(SpecError, match="loads of 3 experts"):
        estimates(found, 4, MACHINE, trace=[[1.0, 1.0, 1.0]])


def test_a_layout_that_does_not_fit_is_not_the_best_while_another_is(found):
    made = estimates(found, 8, dataclasses.replace(MACHINE, memory=found.size - found.moe / 2))
    assert made[0].fits
    assert not all(e.fits for e in made)
    assert "do not fit" in reason(made[0], made)
    none = estimates(found, 8, dataclasses.replace(MACHINE, memory=1.0))
    assert reason(none[0], none).startswith("no layout fits")


def test_uniform_loads_and_skewed_ones():
    assert zipf(4, 0) == [1, 1, 1, 1]
    assert zipf(3, 1) == [1, 1 / 2, 1 / 3]


def test_for_people_and_for_machines(cli, saved, tmp_path):
    outcome = cli("plan", "--config", saved, "--ranks", "1,4", *SPEEDS)
    assert outcome.code == 0, outcome.err
    assert "4 ranks" in outcome.out
    assert outcome.out.count("best: dp ") == 2
    data = json.loads(cli("plan", "--config", saved / "config.json", "--ranks", "2..8", *SPEEDS, "--json").out)
    copied = shutil.copy(saved / "config.json", tmp_path / "mine.json")
    assert json.loads(cli("plan", "--config", copied, "--ranks", "2..8", *SPEEDS, "--json").out) == data
    assert [answer["ranks"] for answer in data["ranks"]] == [2, 4, 8]
    for answer in data["ranks"]:
        assert answer["best"] == answer["layouts"][0]
        assert answer["best"]["world"] == answer["ranks"]
        assert answer["reason"]


def test_a_family_is_planned_by_its_default_config(cli):
    found = look_up(None, "olmoe")
    assert (found.model_type, found.dtype) == ("olmoe", "bfloat16")
    assert torch.tensor([kind.layers for kind in found.kinds]).sum() == 16


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--ranks", "8"), 2, ["either --config or --family"]),
        (("--ranks", "x", "--family", "olmoe"), 2, ["--ranks", "8..4096"]),
        (("--ranks", "0", "--family", "olmoe"), 2, ["--ranks"]),
        (("--ranks", "8..2", "--family", "olmoe"), 2, ["--ranks"]),
        (("--ranks", "8", "--family", "nothing"), 3, ["nothing", "moerunner families"]),
        (("--ranks", "8", "--config", "/no/such/folder"), 2, ["does not exist"]),
        (("--ranks", "8", "--config", "{folder}/model.safetensors"), 2, ["model.safetensors", "is not JSON"]),
        (("--ranks", "8", "--config", "{folder}", "--trace", "{folder}/config.json"), 2, ["load of at least 0"]),
        (("--ranks", "8", "--config", "{folder}", "--trace", "{folder}/model.safetensors"), 2, ["is not JSON"]),
        (("--ranks", "8", "--config", "{folder}", "--trace", "{folder}/none.json"), 2, ["none.json"]),
        (("--ranks", "8", "--config", "{folder}", "--trace", "{folder}/config.json", "--skew", "1"), 2, ["either --skew"]),
    ],
)
def test_bad_input_is_one_line(cli, saved, arguments, code, words):
    refused(cli("plan", *(a.format(folder=saved) for a in arguments), *SPEEDS), code, *words)
