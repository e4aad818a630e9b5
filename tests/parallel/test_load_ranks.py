"""`load` on several ranks: each reads and keeps its part, and the model is the one that one rank has."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tests.parallel.models import answer, load_and_run, load_in, load_new_weights, memory_of_loading, refusals_of_a_part
from tests.parallel.pool import on_ranks

import moerunner
from moerunner import Layout, UnsupportedError
from moerunner.verify.tiny import tiny_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of tiny models by family and changes, with what one rank makes of them."""
    made = {}

    def get(family, seed=0, **changes):
        key = (family, seed, json.dumps(changes))
        if key not in made:
            folder = tmp_path_factory.mktemp(family)
            tiny_model(family, seed=seed, **changes).save_pretrained(folder)
            made[key] = folder, answer(moerunner.load(folder))
        return made[key]

    return get


def assert_same(found, expected):
    """Every rank says what one rank says, with one reduction per block."""
    for rank in found:
        error = abs(rank["logits"] - expected[0]).max() / abs(expected[0]).max()
        assert error <= 1e-5
        assert rank["said"] == expected[1]
        assert all([name for name, _ in issued] == ["all_reduce"] for issued in rank["collectives"].values())


CASES = {
    "mixtral-ep2": ("mixtral", {}, Layout(ep=2)),
    "deepseek_v3-tp2": ("deepseek_v3", {}, Layout(tp=2)),
    "qwen3_moe-odd-ep2": ("qwen3_moe", {"num_local_experts": 7}, Layout(ep=2)),
    "gpt_oss-copies": ("gpt_oss", {}, Layout(ep=2, redundant=3)),
    "gpt_oss-tp2-odd": ("gpt_oss", {"intermediate_size": 25}, Layout(tp=2)),
    "nemotron_h-round-robin": ("nemotron_h", {}, Layout(ep=2, placement="round_robin", shared="replicated")),
    "longcat_flash-placed": ("longcat_flash", {}, Layout(ep=2, placement=((7, 1, 2), (0, 6, 5, 4, 3, 1)))),
    "dbrx-tp2": ("dbrx", {}, Layout(tp=2)),
}
ON_FOUR = {
    "deepseek_v3-ep2-tp2": (
        "deepseek_v3",
        {"moe_intermediate_size": 25, "n_routed_experts": 6, "n_group": 2},
        Layout(ep=2, tp=2),
    ),
    "gpt_oss-ep2-tp2": ("gpt_oss", {"num_local_experts": 5}, Layout(ep=2, tp=2)),
    "longcat_flash-ep4": ("longcat_flash", {"n_routed_experts": 6}, Layout(ep=4, redundant=1)),
    "nemotron_h-tp4": ("nemotron_h", {"moe_intermediate_size": 30}, Layout(tp=4)),
}


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in ON_FOUR)])
@pytest.mark.rotating(3)
def test_every_rank_says_what_one_rank_says(case, folders):
    family, changes, layout = (CASES | ON_FOUR)[case]
    folder, expected = folders(family, **changes)
    found = on_ranks(layout.world, load_and_run, folder, layout)
    assert_same(found, expected)
    for rank in found:
        assert "rank " in rank["report"]


@pytest.mark.slow
def test_copies_of_the_model_have_inputs_of_their_own(folders):
    folder, _ = folders("qwen3_moe")
    model = moerunner.load(folder)
    found = on_ranks(4, load_and_run, folder, Layout(dp=2, ep=2))
    assert_same(found[:2], answer(model, 0))
    assert_same(found[2:], answer(model, 1))
    assert found[0]["said"] != found[2]["said"]


def test_what_no_expert_of_the_rank_needs_is_not_read(folders):
    folder, _ = folders("deepseek_v3")
    stored = load_file(folder / "model.safetensors")
    layout = Layout(ep=2, shared="replicated", placement=((0, 2, 5, 7), (1, 3, 4, 6)))
    for rank, found in enumerate(on_ranks(2, load_and_run, folder, layout)):
        for name, tensor in stored.items():
            expert = int(name.split(".experts.")[1].split(".")[0]) if ".experts." in name else None
            mine = expert is None or expert in layout.placement[rank]
            assert found["read"].get(name, 0) == (tensor.nbytes if mine else 0), name
        assert sum(found["read"].values()) == found["kept"]  # each byte once, and nothing is held beside


def test_of_one_tensor_with_all_experts_only_rows_of_the_rank_are_read(folders):
    folder, _ = folders("gpt_oss")
    stored = load_file(folder / "model.safetensors")
    for found in on_ranks(2, load_and_run, folder, Layout(ep=2)):
        for name, tensor in stored.items():
            assert found["read"][name] == tensor.nbytes // (2 if ".experts." in name else 1), name
        assert sum(found["read"].values()) == found["kept"]


def test_a_copy_is_read_once(folders):
    folder, _ = folders("mixtral")
    stored = load_file(folder / "model.safetensors")
    layout = Layout(ep=2, placement=((0, 1, 0, 2), (3, 4, 5, 6, 7)))
    (first, _) = on_ranks(2, load_and_run, folder, layout)
    assert {name: count for name, count in first["read"].items() if count != stored[name].nbytes} == {}
    assert first["kept"] > sum(first["read"].values())  # the copy, and a slot that holds zeros


def test_parameters_have_the_shapes_of_the_part(folders):
    folder, _ = folders("deepseek_v3", n_routed_experts=6, moe_intermediate_size=25)
    config = json.loads((folder / "config.json").read_text())
    for found in on_ranks(4, load_and_run, folder, Layout(ep=2, tp=2)):
        shapes = {name.split("layers.1.")[1]: s for name, s in found["shapes"].items() if "layers.1.mlp" in name}
        hidden = config["hidden_size"]
        assert shapes["mlp.experts.gate_up_proj"] == (3, 2 * 13, hidden)
        assert shapes["mlp.experts.down_proj"] == (3, hidden, 13)
        assert shapes["mlp.shared_experts.up_proj.weight"] == (13, hidden)  # 50 over four ranks
        assert shapes["mlp.shared_experts.down_proj.weight"] == (hidden, 13)
        assert shapes["mlp.gate.weight"] == (6, hidden)


@pytest.mark.parametrize(
    ("family", "changes", "layout"),
    [
        ("deepseek_v3", {"moe_intermediate_size": 25}, Layout(ep=2, redundant=1)),
        ("gpt_oss", {}, Layout(tp=2)),
        ("qwen3_moe", {"num_local_experts": 7}, Layout(ep=2)),
    ],
    ids=["deepseek_v3-copies", "gpt_oss-tp2", "qwen3_moe-odd"],
)
def test_other_weights_for_a_live_model_are_those_of_a_fresh_load(folders, family, changes, layout):
    old, new = folders(family, **changes)[0], folders(family, seed=1, **changes)[0]
    for told in on_ranks(2, load_new_weights, old, new, layout):
        assert told == {"a folder": [], "names of files": [], "names of the model": [], "gone": True, "missing": True}


def test_a_rank_that_keeps_nothing_of_a_tensor_still_misses_it(folders, tmp_path):
    folder, _ = folders("mixtral")
    shutil.copytree(folder, tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    tensors = load_file(file)
    gone = next(name for name in tensors if ".experts.7." in name)
    from safetensors.torch import save_file

    save_file({name: tensor for name, tensor in tensors.items() if name != gone}, file, metadata={"format": "pt"})
    with pytest.raises(moerunner.CheckpointError, match="1 missing") as caught:
        on_ranks(2, load_and_run, tmp_path / "model", Layout(ep=2))
    assert "ranks that failed: [0, 1]" in caught.value.__notes__[0]


@pytest.mark.slow
def test_a_part_is_neither_saved_nor_unpatched_nor_pickled(folders, tmp_path):
    folder, _ = folders("mixtral")
    for told in on_ranks(2, refusals_of_a_part, folder, Layout(ep=2), tmp_path):
        assert "this rank holds a part of the experts" in told["save"]
        assert "this rank holds a part of its experts" in told["unpatch"]
        assert "cannot be pickled" in told["pickle"]
        assert "has hooks" in told["hook"]
        assert "cannot run, as this rank holds a part" in told["hook"]
        assert "is patched for Layout(dp=1, ep=2" in told["another layout"]
        assert told["again"] == [True, True, True]
        assert told["copy"] == 0
    assert not list(tmp_path.iterdir())


def test_sharded_tokens_are_refused(folders):
    with pytest.raises(UnsupportedError, match=r"attention on every rank.*so they cannot be sharded"):
        moerunner.load(folders("mixtral")[0], layout=Layout(ep=2, tokens="sharded"))


def test_without_processes_it_says_how_to_start_them(folders):
    with pytest.raises(moerunner.DistributedError, match="torchrun --nproc-per-node 2"):
        moerunner.load(folders("mixtral")[0], layout=Layout(ep=2))


def test_a_layout_that_the_experts_cannot_have_is_refused(folders):
    folder, _ = folders("mixtral")
    with pytest.raises(moerunner.SpecError, match=r"experts without a place: \[7\]"):
        on_ranks(2, load_and_run, folder, Layout(ep=2, placement=((0, 1, 2), (3, 4, 5, 6))))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision_a_part_has_the_bits_of_the_whole(folders, dtype):
    folder, _ = folders("gpt_oss")
    whole = moerunner.load(folder, dtype=dtype).state_dict()
    for rank, part in enumerate(on_ranks(2, load_in, folder, dtype, Layout(ep=2))):
        for name, tensor in part.items():
            wanted = whole[name].chunk(2)[rank] if ".experts." in name else whole[name]
            assert torch.equal(torch.from_numpy(tensor), wanted.view(torch.int16)), name


@pytest.mark.slow
@pytest.mark.parametrize("layout", [Layout(ep=2), Layout(tp=2)], ids=["ep2", "tp2"])
def test_loading_takes_no_more_memory_than_what_the_rank_keeps(folders, layout, tmp_path):
    wide = {"hidden_size": 256, "moe_intermediate_size": 512, "num_local_experts": 64}
    tiny_model("qwen3_moe", **wide).save_pretrained(tmp_path)
    for most, kept in on_ranks(2, memory_of_loading, tmp_path, folders("qwen3_moe")[0], layout):
        assert kept > 50 * 2**20
        assert most <= kept + 12 * 2**20
