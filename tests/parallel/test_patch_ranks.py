"""`patch` of a model that every rank holds whole: each keeps its part, in place, and the model goes on saying the same."""

from __future__ import annotations

import pytest
import torch
from tests.parallel.models import answer, mixed_blocks, patch_and_run, patch_twice, wrong_layouts
from tests.parallel.pool import on_ranks

import moerunner
from moerunner import Layout, SpecError, UnsupportedError
from moerunner.verify.tiny import tiny_model

CASES = {
    "mixtral-tp2": ("mixtral", {}, Layout(tp=2)),
    "deepseek_v3-ep2": ("deepseek_v3", {"n_routed_experts": 6}, Layout(ep=2)),
    "gpt_oss-tp2-odd": ("gpt_oss", {"intermediate_size": 25}, Layout(tp=2)),
    "nemotron_h-copies": ("nemotron_h", {}, Layout(ep=2, redundant=3)),
    "ernie4_5_vl_moe_text-ep2": ("ernie4_5_vl_moe_text", {"moe_num_experts": 5, "moe_k": 2}, Layout(ep=2)),
    "longcat_flash-tp2": ("longcat_flash", {}, Layout(tp=2)),
    "dbrx-round-robin": ("dbrx", {}, Layout(ep=2, placement="round_robin")),
    "llama4_text-tp2": ("llama4_text", {"intermediate_size": 35}, Layout(tp=2)),
    "switch_transformers-tp2": ("switch_transformers", {}, Layout(tp=2)),
}
ON_FOUR = {
    "qwen3_moe-ep2-tp2": ("qwen3_moe", {"num_local_experts": 7, "moe_intermediate_size": 27}, Layout(ep=2, tp=2)),
    "ernie4_5_vl_moe_text-ep2-tp2": ("ernie4_5_vl_moe_text", {"moe_intermediate_size": [18, 10]}, Layout(ep=2, tp=2)),
    "gpt_oss-ep2-tp2": ("gpt_oss", {"intermediate_size": 26}, Layout(ep=2, tp=2, placement="round_robin")),
    "dbrx-ep2-tp2": ("dbrx", {}, Layout(ep=2, tp=2, redundant=1)),
}
SLOW = pytest.mark.slow


@pytest.mark.parametrize("case", ["qwen3_moe-ep2-tp2", *CASES, *(pytest.param(c, marks=SLOW) for c in list(ON_FOUR)[1:])])
@pytest.mark.rotating(3)
def test_every_rank_says_what_one_rank_says(case):
    family, changes, layout = (CASES | ON_FOUR)[case]
    model = tiny_model(family, **changes)
    moerunner.patch(model)
    generates = model.can_generate() and not model.config.is_encoder_decoder
    logits, said = answer(model, generates=generates)
    whole = {name: tensor.numel() for name, tensor in model.state_dict().items()}
    for found in on_ranks(layout.world, patch_and_run, family, changes, layout, generates):
        assert abs(found["logits"] - logits).max() / abs(logits).max() <= 1e-5
        assert found["said"] == said
        assert all([name for name, _ in issued] == ["all_reduce"] for issued in found["collectives"].values())
        assert found["same parameters"]
        assert found["memory"] <= 1.01 * found["kept"], "the rest is still there"
        smaller = [name for name, shape in found["shapes"].items() if torch.Size(shape).numel() < whole[name]]
        assert smaller
        assert all("expert" in name or "mixer" in name for name in smaller)


def test_patching_twice_cuts_once():
    for before, after, told in on_ranks(2, patch_twice, Layout(ep=2)):
        assert before == after
        assert told == [True]


def test_the_report_names_the_layout():
    for rank, found in enumerate(on_ranks(2, patch_and_run, "mixtral", {}, Layout(ep=2))):
        assert found["report"].splitlines()[-1] == f"rank {rank} of 2: dp 0 of 1, ep {rank} of 2, tp 0 of 1"


def test_a_block_that_cannot_be_split_stays_whole_on_every_rank_and_is_named():
    for report, error in on_ranks(2, mixed_blocks, Layout(ep=2)):
        assert {reason for _, reason in report["skipped"]} == {
            "it keeps every expert in a module of its own; such experts cannot be spread over ranks. "
            "A layout with ep=1 splits their width over tp"
        }
        assert not report["replaced"]
        assert error == 0


def test_what_is_wrong_is_told_before_anything_is_changed():
    for told in on_ranks(2, wrong_layouts):
        assert told["placement"] == ["SpecError", True]
        assert told["tokens"] == ["UnsupportedError", True]
        assert told["world"] == ["DistributedError", True]
        assert told["patched for one"] == ["UnsupportedError", True]


def test_sharded_tokens_are_refused_without_processes_too():
    model = tiny_model("mixtral")
    with pytest.raises(UnsupportedError, match="cannot be sharded"):
        moerunner.patch(model, Layout(ep=2, tokens="sharded"))
    with pytest.raises(moerunner.DistributedError, match="torchrun"):
        moerunner.patch(model, Layout(ep=2))
    with pytest.raises(SpecError, match=r"Layout\.ep"):
        moerunner.patch(model, Layout(ep=0))
    assert not moerunner.models.runners(model)
