"""A model that Transformers spread over ranks by its own TP or EP plan is patched as it is: same logits, fewer collectives."""

from __future__ import annotations

import pytest
import torch
from tests.parallel import plans
from tests.parallel.pool import on_ranks

from moerunner.verify.tiny import tiny_model

pytest.importorskip("transformers.distributed", reason="this release has no DistributedConfig").DistributedConfig  # noqa: B018
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="Transformers would take the GPUs, the ranks here are gloo's")

TP, EP = {"tp_size": 2}, {"tp_size": 2, "ep_size": 2}
SHARED = ("deepseek_v3", "glm4_moe", "qwen3_next")  # whose plans split the shared experts too: Transformers reduces twice
IDS = (torch.arange(22).reshape(2, 11) * 7) % 200 + 5


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A family's tiny model in a folder, and its logits in one process."""
    done = {}

    def of(family, **changes):
        key = (family, *changes.items())
        if key not in done:
            model = tiny_model(family, **changes)
            folder = str(tmp_path_factory.mktemp(family))
            model.save_pretrained(folder)
            with torch.no_grad():
                done[key] = folder, model(input_ids=IDS).logits
        return done[key]

    return of


def far(logits, expected):
    return float((logits - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("sizes", [TP, EP], ids=["tp", "ep"])
@pytest.mark.parametrize("family", [*SHARED, "mixtral", "qwen3_moe"])
def test_it_gives_the_same_with_one_all_reduce_for_each_block(saved, family, sizes):
    folder, expected = saved(family)
    for answer in on_ranks(2, plans.before_and_after, folder, sizes, IDS):
        assert (answer["skipped"], answer["copied"]) == ([], 0)
        assert len(answer["issued"]) >= 2
        assert max(far(answer[when], expected) for when in ("before", "after")) <= 1e-5
        assert far(answer["after"], answer["before"]) <= 1e-5
        assert torch.equal(answer["again"], answer["before"])
        two = 2 if family in SHARED else 1
        assert all(issued == {"allreduce": two} for issued in answer["issued before"])
        assert all(issued == {"allreduce": 1} for issued in answer["issued"])
        assert (
            answer["logs"] == answer["planned"] == [(("all_reduce", ("ep" if sizes is EP else "tp",)),)] * len(answer["logs"])
        )
        (layout,) = answer["layouts"]
        assert layout == ((2, 1) if sizes is EP else (1, 2)) + ("sharded" if family in SHARED else "replicated",)


def test_shared_experts_that_the_plan_leaves_whole_count_once(saved):
    folder, expected = saved("qwen2_moe")
    for answer in on_ranks(2, plans.before_and_after, folder, TP, IDS):
        assert answer["layouts"] == {(1, 2, "replicated")}
        assert far(answer["after"], expected) <= 1e-5


def test_identity_experts_count_once(saved):
    folder, expected = saved("longcat_flash")
    for answer in on_ranks(2, plans.before_and_after, folder, TP, IDS):
        assert (answer["skipped"], answer["layouts"]) == ([], {(1, 2, "replicated")})
        assert all(issued == {"allreduce": 1} for issued in answer["issued"])
        assert far(answer["after"], expected) <= 1e-5


def test_biases_of_experts_over_ranks(saved):
    folder, expected = saved("gpt_oss")
    for answer in on_ranks(2, plans.before_and_after, folder, EP, IDS):
        assert answer["layouts"] == {(2, 1, "replicated")}
        assert far(answer["after"], expected) <= 1e-5


@pytest.mark.parametrize("sizes", [TP, EP], ids=["tp", "ep"])
def test_router_logits_are_recorded_as_before(saved, sizes):
    folder, _ = saved("mixtral")
    assert on_ranks(2, plans.router_logits, folder, sizes, IDS) == [[True] * 3] * 2


def test_what_no_layout_stands_for_is_left_as_it_is_with_the_reason(saved):
    folder, _ = saved("deepseek_v3")
    for reasons in on_ranks(2, plans.refusals, folder, TP):
        assert (
            "experts.gate_up_proj, [8, 64, 64], is Shard(dim=1) over tp of 2, which is not"
            in reasons["rows of gate and up mixed"]
        )
        assert "experts.down_proj, [8, 64, 32], is whole on every rank, which" in reasons["half of the experts spread"]
        assert "gate.weight, [8, 64], is Shard(dim=0) over tp of 2, which" in reasons["router spread"]
        assert "experts.down_proj, [8, 64, 32], is Shard(dim=0) over fsdp of 2, which" in reasons["gathered for each call"]
        assert "over dp of 1 x tp of 2, which is not one axis" in reasons["over two axes"]
        assert "experts has hooks" in reasons["a hook on the experts"]
        assert "Transformers has spread it over ranks already" in reasons["another layout"]
        assert reasons["nothing"] == ""
    for reasons in on_ranks(2, plans.refusals, folder, EP):
        assert "tokens of their own" in reasons["ranks with tokens of their own"]


def test_a_tensor_that_is_gathered_later_makes_the_block_run_its_own_forward(saved):
    folder, expected = saved("deepseek_v3")
    for logits, warned in on_ranks(2, plans.gathered_later, folder, TP, IDS):
        assert "shared_experts" in warned or "no longer spread" in warned
        assert far(logits, expected) <= 1e-5


@pytest.mark.slow
def test_groups_that_are_a_part_of_all_ranks(saved):
    """Two copies of the model, over ranks 0 and 2 and ranks 1 and 3."""
    folder, expected = saved("deepseek_v3")
    for logits, issued in on_ranks(4, plans.in_two_copies, folder, IDS):
        assert far(logits, expected) <= 1e-5
        assert issued == [{"allreduce": 1}] * 2
