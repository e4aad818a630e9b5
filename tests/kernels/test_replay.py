"""Launches of few tokens are recorded once and replayed: on a CPU, when that is done; on a GPU, that the numbers stay."""

from __future__ import annotations

import copy
import dataclasses
import threading

import pytest
import torch
import torch.nn.functional as F
from tests.support.strategies import make_weights

from moerunner import ExpertsSpec, LayerWeights, Layout, MoERunner, MoESpec, Options, RoutingSpec, SharedSpec, TransformSpec
from moerunner.execute import Verbs
from moerunner.kernels import replay as subject
from moerunner.kernels.replay import FEW_TOKENS, MOST_TOKENS, Replays
from moerunner.parallel.comm import comm_of
from moerunner.parallel.pairs import SlotMap
from moerunner.plan import resolve
from moerunner.spec import Custom

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
SPEC = MoESpec(
    hidden_size=64,
    num_experts=8,
    top_k=2,
    routing=RoutingSpec(score="softmax", renormalise="sum"),
    experts=ExpertsSpec(intermediate_size=32),
    shared=SharedSpec(width=32),
    apply_routed_scale_to_output=False,
)


class Recorder:
    """In place of a GPU: what was run token by token, what was recorded, and what was replayed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.runs, self.records, self.replayed, self.error = 0, 0, 0, ""
        monkeypatch.setattr(subject, "_plain", lambda x: True)
        monkeypatch.setattr(subject, "_recorded", self._recorded)
        monkeypatch.setattr(subject, "Stage", lambda device, stream: self)
        monkeypatch.setattr(Replays, "refused", False)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self)
        self.cuda_stream = 7

    def run(self, x: torch.Tensor, *, alone: bool = False) -> torch.Tensor:
        self.runs += 1
        return x * self.w.w2.sum()

    def _recorded(self, run, x_TH, stage):
        self.records += 1
        if self.error:
            raise RuntimeError(self.error)
        seen = float(self.w.w2.sum())  # as a graph reads what lay there

        def replay(x):
            self.replayed += 1
            return x * seen

        return replay, x_TH * seen

    @property
    def counts(self) -> tuple[int, int, int]:
        return self.runs, self.records, self.replayed


@pytest.fixture
def gpu_like(monkeypatch):
    found = Recorder(monkeypatch)
    found.weights = make_weights(SPEC, 0)
    found.w = found.weights.experts[0]
    return found


def call(replays: Replays, like: Recorder, tokens: int = 3, plan: object = "plan") -> None:
    x = torch.randn(tokens, 64)
    assert torch.equal(replays(like.run, x, like.weights, plan), x * like.weights.experts[0].w2.sum())


def test_the_second_call_records_and_later_ones_replay(gpu_like):
    replays = Replays()
    for expected in ((1, 0, 0), (1, 1, 0), (1, 1, 1), (1, 1, 2)):
        call(replays, gpu_like)
        assert gpu_like.counts == expected


def test_sizes_plans_and_streams_have_graphs_of_their_own(gpu_like):
    replays = Replays()
    for _ in range(3):
        call(replays, gpu_like)
        call(replays, gpu_like, tokens=4)
        call(replays, gpu_like, plan="other")
    assert gpu_like.counts == (3, 3, 3)
    gpu_like.cuda_stream = 8
    call(replays, gpu_like)
    assert gpu_like.counts == (4, 3, 3)


def test_weights_that_moved_are_seen(gpu_like):
    replays = Replays()
    for _ in range(3):
        call(replays, gpu_like)
    gpu_like.weights = make_weights(SPEC, 1)
    gpu_like.w = gpu_like.weights.experts[0]
    for expected in ((2, 1, 1), (2, 2, 1), (2, 2, 2)):
        call(replays, gpu_like)
        assert gpu_like.counts == expected


def test_weights_that_lie_elsewhere_each_time_are_never_recorded(gpu_like):
    replays = Replays()
    kept = []
    for seed in range(5):
        kept.append(gpu_like.weights)
        gpu_like.weights = make_weights(SPEC, seed)
        gpu_like.w = gpu_like.weights.experts[0]
        call(replays, gpu_like)
    assert gpu_like.counts == (5, 0, 0)


@pytest.mark.parametrize("tokens", [0, MOST_TOKENS + 1])
def test_no_tokens_and_too_many_are_run_plainly(gpu_like, tokens):
    replays = Replays()
    for _ in range(3):
        call(replays, gpu_like, tokens)
    assert gpu_like.counts == (3, 0, 0)


def test_no_more_graphs_than_the_limit_of_few_tokens_and_of_many(gpu_like, monkeypatch):
    monkeypatch.setattr(subject, "_MOST_GRAPHS", {FEW_TOKENS: 2, MOST_TOKENS: 1})
    replays = Replays()
    for _ in range(3):
        for tokens in (1, 2, FEW_TOKENS):
            call(replays, gpu_like, tokens)
    assert gpu_like.counts == (5, 2, 2)
    for _ in range(3):
        for tokens in (FEW_TOKENS + 1, MOST_TOKENS):
            call(replays, gpu_like, tokens)
    assert gpu_like.counts == (9, 3, 3)


def test_after_a_recording_that_failed_nothing_is_recorded(gpu_like):
    gpu_like.error = "operation not permitted\nmore"
    replays, others = Replays(), Replays()
    call(replays, gpu_like)
    with pytest.warns(UserWarning, match="not recorded as CUDA graphs, since one failed: operation not permitted$"):
        call(replays, gpu_like)
    for _ in range(3):
        call(replays, gpu_like)
        call(others, gpu_like)
    assert gpu_like.counts == (8, 1, 0)


def test_gradients_are_not_recorded(gpu_like):
    replays = Replays()
    for _ in range(3):
        x = torch.randn(3, 64, requires_grad=True)
        assert replays(gpu_like.run, x, gpu_like.weights, "plan").requires_grad
    assert gpu_like.counts == (3, 0, 0)
    with torch.no_grad():
        for _ in range(3):
            replays(gpu_like.run, x, gpu_like.weights, "plan")
    assert gpu_like.counts == (4, 1, 1)


class Spread(torch.Tensor):
    """A tensor whose numbers lie elsewhere, such as a DTensor."""


def test_weights_that_do_not_tell_where_they_lie(gpu_like):
    entries = dict(gpu_like.w.tensors)
    entries["w2"] = dataclasses.replace(entries["w2"], tensor=gpu_like.w.w2.as_subclass(Spread))
    gpu_like.weights = LayerWeights((dataclasses.replace(gpu_like.w, tensors=entries),), gpu_like.weights.tensors)
    replays = Replays()
    for _ in range(3):
        call(replays, gpu_like)
    assert gpu_like.counts == (3, 0, 0)


def verbs(spec: MoESpec = SPEC, options: Options | None = None) -> Verbs:
    plan = resolve(spec, Layout(), make_weights(spec, 0).meta(), "cuda", options or Options(grad=False))
    return Verbs(plan, comm_of(None), SlotMap(Layout(), spec.num_experts))


def test_which_layers_are_recorded():
    pytest.importorskip("triton", reason="Triton is not installed")
    assert verbs().replayable
    assert not verbs(options=Options(grad=False, graphs=False)).replayable
    assert not verbs(options=Options(grad=True)).replayable
    assert not verbs(options=Options(grad=False, backend="eager")).replayable  # it asks the GPU how many tokens there are
    drawn = dataclasses.replace(SPEC, routing=dataclasses.replace(SPEC.routing, simulate="uniform"))
    assert not verbs(drawn).replayable
    own = dataclasses.replace(SPEC, input_transform=TransformSpec(ops=(Custom(in_features=64, out_features=64, linear=False),)))
    assert not verbs(own).replayable


# On a GPU


def layers(spec: MoESpec = SPEC, dtype: torch.dtype = torch.bfloat16, **options: bool) -> tuple[MoERunner, MoERunner]:
    """One layer twice: with graphs and without."""
    weights = {n: t.to("cuda", dtype) for n, t in tensors(make_weights(spec, 0)).items()}
    return MoERunner(spec, weights, options=Options(**options)), MoERunner(
        spec, weights, options=Options(graphs=False, **options)
    )


def tensors(w: LayerWeights) -> dict[str, torch.Tensor]:
    return {**{n: e.tensor for n, e in w.experts[0].tensors.items()}, **w.tensors}


@gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("inference", [False, True])
def test_replays_give_the_same_bits(dtype, inference):
    graphs, plain = layers(dtype=dtype)
    with torch.inference_mode(inference), torch.no_grad():
        for tokens in (1, 2, 8, 33, 64, 65, 0, 1, 1000, MOST_TOKENS, MOST_TOKENS + 1):
            for _ in range(4):
                x = torch.randn(tokens, 64, device="cuda", dtype=dtype)
                before = x.clone()
                y = graphs(x)
                assert torch.equal(y, plain(x))
                assert torch.equal(x, before)
    with torch.no_grad():  # what was made under inference_mode serves outside it
        x = torch.randn(2, 64, device="cuda", dtype=dtype)
        assert torch.equal(graphs(x), plain(x))
    assert all(any(seen.replay for seen in known.values()) for known in graphs._replays._seen.values())


@gpu
def test_a_result_is_not_overwritten_by_the_next():
    graphs, plain = layers()
    with torch.no_grad():
        xs = [torch.randn(4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(6)]
        ys = [graphs(x) for x in xs]
        assert all(torch.equal(y, plain(x)) for x, y in zip(xs, ys, strict=True))


@gpu
def test_weights_changed_in_place_or_put_elsewhere():
    graphs, plain = layers()
    x = torch.randn(4, 64, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        for _ in range(3):
            graphs(x)
        graphs.w2.mul_(2)  # the tensor that both hold
        assert torch.equal(graphs(x), plain(x))
        for one in (graphs, plain):
            one.w2 = one.w2.clone() * 3
        for _ in range(3):
            assert torch.equal(graphs(x), plain(x))


@gpu
def test_gradients_autocast_and_outer_graphs_are_left_alone():
    graphs, plain = layers()
    x = torch.randn(4, 64, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        for _ in range(3):
            graphs(x)
        outer = torch.cuda.CUDAGraph()
        with torch.cuda.graph(outer):
            y = graphs(x)
        x.normal_()
        outer.replay()
        assert torch.equal(y, plain(x))
    held = x.clone().requires_grad_()
    graphs(held).sum().backward()
    assert held.grad is not None
    assert held.grad.abs().sum() > 0


@gpu
def test_threads_on_one_stream_and_on_their_own():
    graphs, plain = layers()
    wrong: list[object] = []

    def work(index: int) -> None:
        try:
            run(index)
        except Exception as error:  # noqa: BLE001 - it must not end with the thread
            wrong.append(error)

    def run(index: int) -> None:
        stream = torch.cuda.Stream() if index % 2 else torch.cuda.default_stream()
        with torch.no_grad(), torch.cuda.stream(stream):
            for step in range(200):
                x = torch.randn(1 + step // 20, 64, device="cuda", dtype=torch.bfloat16)
                if not torch.equal(graphs(x), plain(x)):
                    wrong.append(index)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


@gpu
def test_compiles_as_one_graph_after_it_was_recorded_too():
    graphs, plain = layers()
    with torch.no_grad():
        compiled = torch.compile(graphs, fullgraph=True)
        for tokens in (3, 3, 3, 70, 64):
            x = torch.randn(tokens, 64, device="cuda", dtype=torch.bfloat16)
            y = compiled(x), graphs(x)
            assert all(torch.equal(one, plain(x)) for one in y)


@gpu
def test_under_forward_differentiation_nothing_is_recorded():
    graphs, _ = layers()
    with torch.no_grad():
        x = torch.randn(3, 64, device="cuda", dtype=torch.bfloat16)
        for _ in range(3):
            graphs(x)
        seen = {size: len(known) for size, known in graphs._replays._seen.items()}
        assert any(seen.values())
        with torch.autograd.forward_ad.dual_level():
            graphs(torch.randn(5, 64, device="cuda", dtype=torch.bfloat16))
        assert {size: len(known) for size, known in graphs._replays._seen.items()} == seen


@gpu
def test_the_memory_that_graphs_use_is_theirs():
    graphs, plain = layers()
    for tokens in (48, 3000):
        keeps_to_its_memory(graphs, plain, torch.randn(tokens, 64, device="cuda", dtype=torch.bfloat16))


def keeps_to_its_memory(graphs: MoERunner, plain: MoERunner, x: torch.Tensor) -> None:
    with torch.no_grad():
        for _ in range(3):
            graphs(x)
        torch.cuda.empty_cache()
        others = [torch.zeros(size, device="cuda") for size in (64, 4096, 2**18, 2**22) for _ in range(64)]
        for _ in range(5):
            assert torch.equal(graphs(x), plain(x))
            torch.cuda.empty_cache()
        assert not any(other.any() for other in others)


@gpu
def test_many_layers_share_what_they_need():
    pairs = [layers() for _ in range(12)]
    x = torch.randn(8, 64, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        for _ in range(4):
            y, expected = x, x
            for graphs, plain in pairs:
                y, expected = F.normalize(graphs(y), dim=-1), F.normalize(plain(expected), dim=-1)
            assert torch.equal(y, expected)
    assert len(subject._stages) == 1
    again = copy.deepcopy(pairs[0][0])
    with torch.no_grad():
        assert torch.equal(again(x), pairs[0][1](x))
    del pairs, again, graphs
    assert not subject._stages
