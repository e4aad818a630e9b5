"""What is timed is right, floors are those of the bytes and operations, and every implementation says why it does not run."""

import csv
import json
import sys

import pytest
import torch

from moerunner.bench import LAYERS, SHAPES, Peaks, Shape, floor_seconds, measure, measure_layer, peers
from moerunner.bench import experts as bench
from moerunner.experts import eager
from moerunner.values import TopK

PEAKS = Peaks(4.3e12, 790e12)
TINY = Shape(8, 2, 32, 16)


@pytest.mark.parametrize(
    ("name", "tokens", "microseconds"),
    [
        ("qwen3-30b", 1, 17.6),
        ("qwen3-30b", 2048, 285),
        ("qwen3-next", 8, 109),
        ("mixtral-8x7b", 2048, 1827),
        ("olmoe", 8192, 1044),
    ],
)
def test_the_floor_is_the_larger_of_bytes_and_operations(name, tokens, microseconds):
    """Worked out by hand for 4.3 TB/s and 790 TFLOP/s; memory-bound and compute-bound cells."""
    assert floor_seconds(SHAPES[name], tokens, PEAKS) * 1e6 == pytest.approx(microseconds, rel=5e-3)


def test_rows_that_are_stored_count_twice():
    shape, tokens = SHAPES["qwen3-30b"], 512
    more = floor_seconds(shape, tokens, PEAKS, stored=True) - floor_seconds(shape, tokens, PEAKS)
    assert more == pytest.approx(4 * tokens * shape.top_k * shape.inter / PEAKS.bytes_per_second)


def test_routing_is_as_skewed_as_it_says():
    """Bounds are ten standard deviations away."""
    shape, tokens = Shape(16, 2, 8, 8), 4000
    generator = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    share = {}
    for way in bench.ROUTINGS:
        ids = bench.draw_ids(tokens, shape, way, generator)
        assert ids.shape == (tokens, 2)
        assert (ids[:, 0] != ids[:, 1]).all()
        share[way] = torch.bincount(ids.flatten(), minlength=16).double() / tokens
    assert (share["uniform"] - 2 / 16).abs().max() < 0.06
    assert abs(share["half"][0] - 0.5) < 0.08
    assert share["zipf"][0] > 0.4
    assert share["zipf"][0] > 2 * share["zipf"][3] > 2 * share["zipf"][12]


@pytest.mark.parametrize("shape", [TINY, Shape(8, 2, 32, 16, kind="relu2", gated=False)], ids=["gated", "plain"])
def test_every_implementation_is_held_against_float64(shape):
    absent: dict[str, str] = {}
    cells = list(measure("tiny", shape, [1, 5], peaks=PEAKS, dtype=torch.float32, device="cpu", absent=absent))
    assert [m.tokens for cell in cells for m in cell[:1]] == [1, 5]
    timed = {m.implementation: m for m in cells[1]}
    assert {"eager", "grouped_mm"} <= set(timed)
    assert all(m.eager > 0 and m.error <= 2 * m.yardstick + 1e-6 for m in timed.values() if m.ours)
    assert all(m.eager > 0 or m.problem for m in timed.values())
    assert absent["triton"] == "runs on cuda, not on cpu"
    assert {"vllm", "sglang", "flashinfer", "scattermoe"} <= set(absent) | set(timed)


def test_transformers_own_implementations_run():
    pytest.importorskip("transformers")
    able, absent = peers.implementations(TINY, torch.float32, "cpu")
    for name in ("eager", "batched_mm", "grouped_mm"):
        assert f"transformers.{name}" in able, absent


def test_what_is_wrong_or_fails_is_not_timed(monkeypatch):
    def wrong(x, topk, weights):
        return eager.run(x, topk, weights, peers.ExpertsCall(activation=TINY.activation)) * 1.01

    def fails(x, topk, weights):
        raise RuntimeError("no such kernel")

    def unwritten(x, topk, weights):
        return torch.full_like(x, torch.nan)

    able = {f.__name__: peers.Implementation(f, ours=True) for f in (wrong, fails, unwritten)}
    monkeypatch.setattr(bench, "implementations", lambda *_: (able, {}))
    (cell,) = measure("tiny", TINY, [3], peaks=PEAKS, dtype=torch.float32, device="cpu")
    problems = {m.implementation: m.problem for m in cell}
    assert all(m.seconds is None and m.ratio is None for m in cell)
    assert problems["fails"] == "RuntimeError: no such kernel"
    assert problems["wrong"].startswith("wrong: error 1.")
    assert problems["unwritten"].startswith("wrong: error inf")


def test_the_yardstick_is_plain_pytorch_in_the_dtype():
    weights = bench.make_weights(TINY, 1, torch.bfloat16, "cpu")
    inputs, _ = bench.draw_inputs(TINY, 40, "uniform", weights, torch.Generator().manual_seed(0))
    judge = bench.Judge.of(TINY, inputs[0])
    assert 1e-4 < judge.yardstick < 3e-2
    x, topk, w = inputs[0]
    exact = eager.run(
        x.double(), TopK(topk.ids, topk.weights.double()), _double(w), peers.ExpertsCall(activation=TINY.activation)
    )
    assert judge.error(exact) < 1e-6


def _double(w):
    return type(w).of({"w13": w.w13.double(), "w2": w.w2.double()})


@pytest.mark.parametrize("name", LAYERS)
def test_whole_layers(name, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setitem(SHAPES, name, Shape(16, 4, 64, 32))
    (cell,) = measure_layer(
        name, [5], peaks=PEAKS, dtype=torch.float32, device="cpu", only=["moerunner", "transformers.grouped_mm"]
    )
    assert [m.implementation for m in cell] == ["moerunner", "transformers.grouped_mm"]
    assert all(m.problem == "" and m.eager > 0 for m in cell), cell


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(SHAPES, "small", TINY)
    monkeypatch.setattr("moerunner.bench.shapes.GPU_SHAPES", ["small"])  # where there is a GPU, too


@pytest.mark.usefixtures("tiny")
def test_the_command(cli, tmp_path):
    save = tmp_path / "r.json"
    peaks = ["--bandwidth", "100", "--tflops", "1"]
    outcome = cli("bench", "--tokens", "1,1k", *peaks, "--only", "eager,vllm", "--save", save, "--routing", "uniform,half")
    assert outcome.code == 0, outcome.err
    assert "eager" in outcome.out
    assert "small, half routing, launched from Python" in outcome.out
    found = json.loads(save.read_text())
    assert [(m["routing"], m["tokens"]) for m in found["results"]] == [
        ("uniform", 1),
        ("uniform", 1000),
        ("half", 1),
        ("half", 1000),
    ]
    assert torch.__version__.startswith(found["environment"]["versions"]["torch"])
    assert found["peaks"] == {"bytes_per_second": 1e11, "flops": 1e12, "measured": False}
    assert "vllm" in found["absent"] or any(m["implementation"] == "vllm" for m in found["results"])
    assert all(m["ratio"] == pytest.approx(m["eager"] / m["floor"]) for m in found["results"])


@pytest.mark.usefixtures("tiny")
def test_the_command_stops_in_time_and_says_what_it_left_out(cli):
    outcome = cli("bench", "--tokens", "1", "--bandwidth", "1", "--tflops", "1", "--seconds", "0", "--json")
    assert outcome.code == 0
    assert json.loads(outcome.out)["left_out"] == ["small, uniform routing, 1 tokens"]


@pytest.mark.usefixtures("tiny")
def test_the_command_fails_if_one_of_ours_is_wrong(cli, monkeypatch):
    monkeypatch.setattr(eager, "run", lambda x, topk, weights, call: torch.zeros_like(x))
    outcome = cli("bench", "--tokens", "2", "--bandwidth", "1", "--tflops", "1", "--only", "eager")
    assert outcome.code == 1
    assert "wrong" in outcome.out


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU tells when it has no memory")
@pytest.mark.usefixtures("tiny")
def test_what_would_copy_more_than_the_machine_may_have_is_not_tried(cli, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(bench, "_MOST_COPIED", 4 * 2 * 3 * 32 * 16 * 4)  # 4 tokens, 2 experts of 3 * 32 * 16 numbers each
    found = json.loads(cli("bench", "--tokens", "4,5", "--bandwidth", "1", "--tflops", "1", "--json").out)
    batched = {row["tokens"]: row["problem"] for row in found["results"] if row["implementation"] == "transformers.batched_mm"}
    assert batched[4] == ""
    assert batched[5].startswith("not tried: it would copy")


@pytest.mark.parametrize("wrong", [("--shapes", "qwen"), ("--routing", "even"), ("--tokens", "0"), ("--only", "nobody")])
@pytest.mark.usefixtures("tiny")
def test_the_command_refuses(cli, wrong):
    outcome = cli("bench", "--bandwidth", "1", "--tflops", "1", *wrong)
    assert outcome.code == 2
    assert "Traceback" not in outcome.err


@pytest.mark.usefixtures("tiny")
def test_the_picture_and_its_numbers(cli, tmp_path):
    pytest.importorskip("matplotlib")
    plot = tmp_path / "picture.png"
    outcome = cli("bench", "--tokens", "1,4", "--bandwidth", "1", "--tflops", "1", "--only", "eager,grouped_mm", "--plot", plot)
    assert outcome.code == 0, outcome.err
    assert plot.read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader(plot.with_suffix(".csv").open()))
    assert [(r["implementation"], r["tokens"]) for r in rows] == [(n, t) for t in "14" for n in ("eager", "grouped_mm")]
    assert all(float(r["eager"]) > 0 for r in rows)


@pytest.mark.parametrize(
    ("option", "file", "code", "words"),
    [
        ("--plot", "p.gif", 2, [".png"]),
        ("--plot", "nowhere/p.png", 2, ["nowhere", "does not exist"]),
        ("--save", "nowhere/r.json", 2, ["nowhere", "does not exist"]),
        ("--save", "", 2, ["cannot be written"]),
        ("--plot", "p.png", 3, ["matplotlib is not installed", "moerunner[plot]"]),
    ],
)
def test_a_file_that_cannot_be_written_is_told_before_anything_is_measured(
    cli, tmp_path, monkeypatch, option, file, code, words
):
    monkeypatch.setattr("moerunner.bench.measure_peaks", lambda *_: pytest.fail("measured"))
    if code == 3:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    outcome = cli("bench", option, tmp_path / file)
    assert outcome.code == code
    assert all(word in outcome.err for word in words), outcome.err
    assert len(outcome.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_not_there(cli, tmp_path):
    peaks = ("--bandwidth", "1", "--tflops", "1")
    outcome = cli("bench", "--model", "qwen3-30b", *peaks)
    assert (outcome.code, outcome.out) == (2, "")
    assert "qwen3-30b-a3b" in outcome.err
    outcome = cli("bench", "--model", tmp_path, *peaks)
    assert (outcome.code, outcome.out) == (2, "")
    assert "empty folder" in outcome.err


def test_the_picture_of_a_whole_model(cli, saved, tmp_path):
    pytest.importorskip("matplotlib")
    sizes = ("--batches", "1,2", "--prompts", "8", "--bandwidth", "1", "--tflops", "1", "--only", "grouped_mm,patched")
    outcome = cli("bench", "--model", saved, *sizes, "--plot", tmp_path / "p.svg", "--save", tmp_path / "p.json")
    assert outcome.code == 0, outcome.err
    assert "<svg" in (tmp_path / "p.svg").read_text()
    rows = list(csv.DictReader((tmp_path / "p.csv").open()))
    assert [(r["step"], r["implementation"]) for r in rows].count(("decode", "patched")) == 2
    assert all(float(r["python"]) > 0 and float(r["moe"]) for r in rows)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["p.csv", "p.json", "p.svg"]
