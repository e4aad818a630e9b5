"""The DeepEP pair: refused with its reasons, and right over a stand-in for `deep_ep` on simulated ranks."""

from __future__ import annotations

import re
import sys
import types
from typing import Any

import pytest
import torch
from tests.faults.helpers import make_spec, make_weights, tokens
from torch import Tensor

from moerunner import LayerWeights, Layout, MoERunner, Options, SharedSpec, UnsupportedError, resolve
from moerunner.ops.reference import reference
from moerunner.parallel import deepep
from moerunner.parallel.comm import SimulatedComm, simulate

LAYOUT = Layout(ep=2, tokens="sharded")
FACTS = {"device": "cuda", "dtype": "bfloat16", "travels": "bfloat16", "width": 64, "grad": False}


class Group:
    """What a simulated rank passes for its process group."""

    def __init__(self, comm: SimulatedComm) -> None:
        self.comm = comm

    def rank(self) -> int:
        return self.comm.index(("ep",))

    def size(self) -> int:
        return self.comm.layout.ep

    def all(self, item: Any) -> list[Any]:
        return self.comm._gather_objects(item, ("ep",))


class Config:
    def get_nvl_buffer_size_hint(self, row: int, ranks: int) -> int:
        return row * ranks

    def get_rdma_buffer_size_hint(self, row: int, ranks: int) -> int:
        return 0


class Event:
    """Before it is waited for, nothing that came with it may be read."""

    def __init__(self, arrive: Any) -> None:
        self.current_stream_wait = arrive


class Buffer:
    """The calls of DeepEP's `Buffer` that carry tokens, with what its kernels ask of their arguments."""

    made: list[tuple[int, int]] = []

    def __init__(self, group: Group, num_nvl_bytes: int = 0, num_rdma_bytes: int = 0) -> None:
        self.group = group
        Buffer.made.append((group.rank(), num_nvl_bytes))

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        return Config()

    get_combine_config = get_dispatch_config

    def get_dispatch_layout(self, topk_idx: Tensor, num_experts: int) -> tuple[Any, ...]:
        assert topk_idx.dtype == torch.int64
        ranks, here = self.group.size(), num_experts // self.group.size()
        owner = torch.where(topk_idx >= 0, topk_idx // here, -1)
        in_rank = torch.stack([(owner == r).any(1) for r in range(ranks)], 1)
        per_expert = torch.bincount(topk_idx[topk_idx >= 0], minlength=num_experts).int()
        return in_rank.sum(0).int(), None, per_expert, in_rank, None

    def dispatch(self, x: Tensor, **given: Any) -> tuple[Any, ...]:
        assert x.dtype == torch.bfloat16
        assert x.is_contiguous()
        assert given["topk_weights"].dtype == torch.float32
        assert torch.equal(given["num_tokens_per_rank"], given["is_token_in_rank"].sum(0).int())
        assert given["async_finish"]
        experts = len(given["num_tokens_per_expert"]) // self.group.size()
        rank, every = (
            self.group.rank(),
            self.group.all((x, given["topk_idx"], given["topk_weights"], given["is_token_in_rank"])),
        )
        mine = [mask[:, rank] for *_, mask in every]
        rows = torch.cat([x[m] for (x, *_), m in zip(every, mine, strict=True)])
        ids = torch.cat([ids[m] for (_, ids, *_), m in zip(every, mine, strict=True)]) - rank * experts
        weights = torch.cat([w[m] for (_, _, w, _), m in zip(every, mine, strict=True)])
        ids = torch.where((ids >= 0) & (ids < experts), ids, -1)
        held = torch.full_like(rows, float("nan"))
        return held, ids, weights, [], (mine, given["is_token_in_rank"]), Event(lambda: held.copy_(rows))

    def combine(self, x: Tensor, handle: Any, *, async_finish: bool) -> tuple[Any, ...]:
        assert x.dtype == torch.bfloat16
        assert x.is_contiguous()
        mine, in_rank = handle
        total = torch.zeros(len(in_rank), x.shape[1])
        for rank, (rows, masks) in enumerate(self.group.all((x, mine))):
            counts = [int(m.sum()) for m in masks]
            total[in_rank[:, rank]] += rows.split(counts)[self.group.rank()].float()
        out = torch.full_like(total, float("nan"), dtype=torch.bfloat16)
        return out, None, Event(lambda: out.copy_(total))


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("deep_ep")
    module.Buffer = Buffer  # type: ignore[attr-defined]
    groups: dict[int, Group] = {}
    monkeypatch.setitem(sys.modules, "deep_ep", module)
    monkeypatch.setattr(deepep, "refusal", lambda *_, **__: "")
    monkeypatch.setattr(deepep, "_buffers", {})
    monkeypatch.setattr(SimulatedComm, "process_group", lambda comm, axes: groups.setdefault(comm.rank, Group(comm)))
    Buffer.made.clear()


@pytest.mark.parametrize("layout", [LAYOUT, Layout(ep=4, tokens="sharded"), Layout(ep=2, dp=2, tokens="sharded", redundant=3)])
@pytest.mark.parametrize("counts", [[5, 3, 7, 1], [4, 0, 0, 6]])
def test_every_rank_has_what_one_rank_has(stand_in, layout, counts):
    spec = make_spec(factor=2.5, on_output=True, shared=SharedSpec(width=24), zero_experts=1, experts={"bias": True})
    weights = {n: t if n == "selection_bias" else t.bfloat16() for n, t in make_weights(spec).items()}
    xs = [tokens(n).bfloat16() for n in counts[: layout.world]]

    def main(bound: Any) -> tuple[Tensor, MoERunner, list[Any], list[Any]]:
        runner = MoERunner(spec, weights, bound, Options(dispatch="deepep", backend="eager"))
        runner(xs[bound.comm.rank])
        bound.comm.log.clear()
        return runner(xs[bound.comm.rank]), runner, list(bound.comm.log), list(bound.comm.counted)

    whole = MoERunner(spec, weights, options=Options(backend="eager"))
    with torch.no_grad():
        for x, (y, runner, issued, counted) in zip(xs, simulate(layout, main), strict=True):
            exact = reference(spec, LayerWeights.of(spec, {n: t.double() for n, t in weights.items()}), x)
            assert y.shape == exact.shape
            assert tuple(issued) == runner.plan.collectives == (("all_to_all", ("ep",)),) * 2
            assert counted == []
            if len(x):
                scale = exact.abs().max()
                alone = (whole(x).double() - exact).abs().max() / scale
                # Sums of each rank are rounded to bfloat16 once more than on one rank, for the way home.
                assert (y.double() - exact).abs().max() / scale <= 2 * alone + 2**-8
    assert sorted(rank for rank, _ in Buffer.made) == sorted(list(range(layout.ep)) * layout.dp), "one buffer for each rank"


@pytest.mark.parametrize(
    ("layout", "changes", "told"),
    [
        (LAYOUT, {"device": "cpu"}, "runs on cuda, not on cpu"),
        (LAYOUT, {"dtype": "float16"}, "carries bfloat16, the tokens are float16"),
        (LAYOUT, {"travels": "float32"}, "partial sums float32"),
        (LAYOUT, {"grad": True}, "has no backward"),
        (LAYOUT, {"width": 60}, "a multiple of 8, not 60"),
        (Layout(ep=3, tokens="sharded"), {}, r"ep of 2, 4.*not ep=3"),
        (Layout(ep=2, tp=2, tokens="sharded"), {}, "needs tp=1"),
        (LAYOUT, {}, ""),
    ],
)
def test_what_it_cannot_carry_has_a_reason(monkeypatch, layout, changes, told):
    monkeypatch.setattr(deepep.importlib.util, "find_spec", lambda name: object())
    found = deepep.refusal(layout, **(FACTS | changes))
    assert bool(found) == bool(told)
    assert re.search(told, found)


def test_it_is_refused_where_it_is_not_installed():
    spec = make_spec()
    weights = LayerWeights.of(spec, {n: t.bfloat16() for n, t in make_weights(spec).items()})
    assert "deep_ep" not in sys.modules
    with pytest.raises(UnsupportedError, match=r"'deepep' needs the package deep_ep, which is not installed.*'alltoall'"):
        resolve(spec, LAYOUT, weights.meta(), "cuda", Options(dispatch="deepep", backend="eager"))


@pytest.mark.parametrize("dispatch", ["allgather", "alltoall"])
def test_what_has_the_host_wait_is_in_no_graph(dispatch):
    spec = make_spec()
    meta = LayerWeights.of(spec, make_weights(spec)).meta()
    with pytest.raises(UnsupportedError, match="backend 'eager': is not capturable"):  # nothing else is against it
        resolve(spec, Layout(ep=2), meta, "cpu", Options(capturable=True, backend="eager"))
    with pytest.raises(UnsupportedError, match=f"travel by {dispatch}.*no CUDA graph"):
        resolve(spec, LAYOUT, meta, "cpu", Options(dispatch=dispatch, capturable=True, backend="eager"))
