"""Tables of measured tiles: what is kept, what is read, and that measuring never makes a choice worse."""

import itertools
import json

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
from moerunner.bench import Shape, tune
from moerunner.bench.experts import make_weights
from moerunner.kernels import tables, tiles
from moerunner.kernels.tiles import Few, Grouped, Product, Specialised, Transposed

OTHER = Grouped(16, Product(32, 32, 4, 2), Product(32, 32, 4, 2))
SHAPE = dict(experts=8, top_k=2, hidden=64, inter=32, gated=True, dtype=torch.bfloat16)


def chosen(tokens):
    return tables.choose(tokens, 2, 8, 64, 32, gated=True, dtype=torch.bfloat16, device=torch.device("cuda"))


@pytest.fixture
def gpu(tmp_path, monkeypatch):
    """As if there were a GPU with tables in this folder."""
    monkeypatch.setattr(tables, "INTERPRETING", False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Some GPU")
    monkeypatch.setattr(tables, "cache_file", lambda device: tmp_path / "cache.json")
    monkeypatch.setattr(tables, "shipped_file", lambda gpu: tmp_path / "shipped.json")
    tables.forget()
    yield tmp_path
    tables.forget()


@pytest.mark.parametrize(
    "one",
    [OTHER, Few(Product(2, 64, 4, 1), Product(8, 32, 4, 1), prefetch=True, each=Product(4, 16, 1, 1)), Specialised(128, True)],
)
def test_tiles_survive_json(one):
    assert tiles.from_dict(json.loads(json.dumps(tiles.to_dict(one)))) == one


def entry(one):
    return {"tiles": tiles.to_dict(one), "seconds": 1e-6, "analytic_seconds": 2e-6}


def test_every_choice_on_a_gpu_reads_the_real_files(monkeypatch, tmp_path):
    """Nothing is replaced but the name of the device: what cannot be known of it must not stop a layer."""
    monkeypatch.setattr(tables, "INTERPRETING", False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "No such GPU")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    tables.forget()
    assert chosen(64) == tiles.choose(64, 2, 8, 64, 32, itemsize=2)
    tables.forget()


def test_a_measurement_serves_nearby_numbers_of_tokens_only(gpu):
    before = [chosen(n) for n in (1, 60, 64, 90, 100, 8192)]
    tables.write(gpu / "cache.json", {}, {tables.key(**SHAPE): {"64": entry(OTHER)}})
    after = [chosen(n) for n in (1, 60, 64, 90, 100, 8192)]
    assert after == [before[0], OTHER, OTHER, OTHER, *before[4:]]


def test_another_shape_is_not_touched(gpu):
    tables.write(gpu / "cache.json", {}, {tables.key(**SHAPE | {"hidden": 128}): {"64": entry(OTHER)}})
    assert chosen(64) != OTHER


def test_the_users_table_comes_before_the_shipped_one(gpu):
    other = Grouped(32, OTHER.up, OTHER.down)
    tables.write(gpu / "shipped.json", {}, {tables.key(**SHAPE): {"64": entry(other)}})
    assert chosen(64) == other
    tables.write(gpu / "cache.json", {}, {tables.key(**SHAPE): {"64": entry(OTHER)}})
    assert chosen(64) == OTHER


def test_writing_keeps_other_shapes(gpu):
    second = tables.key(**SHAPE | {"experts": 16})
    tables.write(gpu / "cache.json", {}, {tables.key(**SHAPE): {"64": entry(OTHER)}})
    tables.write(gpu / "cache.json", {}, {second: {"8": entry(OTHER)}})
    assert set(tables.read(gpu / "cache.json")) == {tables.key(**SHAPE), second}
    assert [f.name for f in gpu.iterdir()] == ["cache.json"], "no draft is left"


@pytest.mark.parametrize("text", ["", "[]", '{"shapes": 3}', '{"shapes": {"a": {"1": {"tiles": {"kind": "few"}}}}}', "\xff"])
def test_a_damaged_table_is_as_none(gpu, text):
    usual = chosen(64)
    tables.forget()
    (gpu / "cache.json").write_text(text)
    assert chosen(64) == usual
    tables.write(gpu / "cache.json", {}, {tables.key(**SHAPE): {"64": entry(OTHER)}})
    assert chosen(64) == OTHER


def test_the_cache_is_of_this_device_and_these_versions(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA H200 / 1")
    monkeypatch.setattr(tables, "_DRIVER", tmp_path / "version")
    device, versions = torch.device("cuda", 0), f"NVIDIA-H200-1-triton{tables.triton.__version__}"
    assert tables.cache_file(device).name == f"{versions}-driverunknown.json", "a system that does not tell is no error"
    (tmp_path / "version").write_text("580.95.05\n")
    assert tables.cache_file(device) == tmp_path / "moerunner" / "tiles" / f"{versions}-driver580.95.05.json"


@pytest.mark.parametrize("able", [False, True])
@pytest.mark.parametrize("tokens", [1, 8, 64, 512, 8192])
def test_the_search_measures_few_tiles_once_and_finds_the_best_product(tokens, able):
    start = tiles.choose(tokens, 8, 128, 2048, 768, itemsize=2, specialised=able)
    asked = []

    def clock(one):
        asked.append(one)
        if isinstance(one, Specialised | Transposed):
            return tune.Timed(one, 1e3)
        return tune.Timed(one, 1e-6 * (one.up.block_n + one.down.warps + 0.1 * getattr(one, "block_m", 0)))

    timed = tune._search(start, clock, able)
    assert len(asked) == len(set(asked)) == len(timed) <= 16
    assert timed[0].tiles == start
    assert {one for one in asked if isinstance(one, Specialised | Transposed)} == (
        set(tiles.specialised(start)) if able else set()
    )
    own = [t for t in timed if not isinstance(t.tiles, Specialised | Transposed)]
    assert min(t.tiles.up.block_n for t in own) == min(own, key=lambda t: t.seconds).tiles.up.block_n


def test_the_usual_choice_stays_unless_another_is_clearly_faster():
    def tuned(*seconds):
        return tune.Tuned(8, tuple(tune.Timed(n, s) for n, s in enumerate(seconds)))

    assert tuned(1.0, 0.98).best.tiles == 0
    assert tuned(1.0, 0.9, 0.95).best.tiles == 1
    assert tuned(1.0, None).best.tiles == 0
    assert tuned(None, 0.5).best.tiles == 1, "the usual choice cannot run"


def test_what_is_wrong_is_not_timed(monkeypatch):
    """On a machine without a GPU the kernels are interpreted, and times are made up."""
    shape, device = Shape(4, 2, 32, 16), "cuda" if torch.cuda.is_available() else "cpu"
    honest, seconds = tune.run_with, itertools.count(1)

    def run_with(one, *rest):
        return honest(one, *rest) * (2 if one == OTHER else 1)

    monkeypatch.setattr(tune, "run_with", run_with)
    monkeypatch.setattr(tune, "capture", lambda calls: None)
    monkeypatch.setattr(tune, "replay_seconds", lambda graphs, replays: {"": float(next(seconds))})
    monkeypatch.setattr(tune, "make_weights", lambda shape, copies, *rest: make_weights(shape, 1, *rest))
    monkeypatch.setattr(tiles, "alternatives", lambda one: iter(()))
    monkeypatch.setattr(tiles, "neighbours", lambda one: [OTHER])
    (found,) = tune.tune(shape, [3], dtype=torch.float32, device=device)
    assert found.best is found.analytic
    assert found.timed[1].tiles == OTHER
    assert found.timed[1].seconds is None
    assert found.timed[1].problem.startswith("wrong: error 1.0")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_command_needs_a_gpu(cli):
    outcome = cli("tune", "qwen3-30b", "--json")
    assert outcome.code == 3
    assert json.loads(outcome.out)["ok"] is False
    for wrong in (["nope"], ["8,9,64,32"], ["8,2,64"], ["8,2,64,32", "--activation", "tanh"]):
        assert cli("tune", *wrong).code == 2
