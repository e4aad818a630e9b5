"""Gradients over simulated ranks equal those of one rank, with the collectives that the plan names."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.running import rank_tokens
from tests.support.strategies import (
    SEEDS,
    STORAGES,
    Storage,
    Tokens,
    layouts,
    make_weights,
    options_for,
    replayed,
    specs,
    token_counts,
)
from torch import Tensor

from moerunner import (
    ExpertsSpec,
    LayerWeights,
    Layout,
    MoERunner,
    MoESpec,
    Options,
    RMSNorm,
    RoutingSpec,
    SharedSpec,
)
from moerunner.experts import eager, registry
from moerunner.parallel.comm import simulate

Gradients = dict[str, Tensor]
EXPERTS = ("w13", "w2", "b13", "b2")
SHARED = {f"shared_{n}" for n in ("w13", "gate_proj", "up_proj", "w2", "b13", "gate_proj_bias", "up_proj_bias")}


def leaves(weights: LayerWeights) -> tuple[LayerWeights, dict[str, Tensor]]:
    """The weights in float64 as leaves that require a gradient."""
    found: dict[str, Tensor] = {}

    def leaf(name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        found[name] = tensor.detach().to(torch.float64, copy=True).requires_grad_()
        return found[name]

    return weights.map(leaf), found


def backward(runner: MoERunner, tokens: Tokens, given: dict[str, Tensor], out: Tensor) -> Gradients:
    """Gradients of x, of weights that were passed, and of every tensor, for this gradient of the output."""
    x, inputs = tokens.x.double().requires_grad_(), dict(tokens.inputs)
    wanted = {"x": x, **given}
    if "topk" in inputs:
        top = inputs["topk"]
        shared = None if top.shared_weights is None else top.shared_weights.double().requires_grad_()
        inputs["topk"] = type(top)(top.ids, top.weights.double().requires_grad_(), top.space, top.scaled, shared)
        wanted["topk"] = inputs["topk"].weights
        wanted |= {} if shared is None else {"shared_weights": shared}
    y = runner(x, **inputs)
    y.backward(out.view(y.shape))
    return {n: torch.zeros_like(t) if t.grad is None else t.grad for n, t in wanted.items()}


def whole(spec: MoESpec, weights: LayerWeights, tokens: Tokens, out: Tensor) -> Gradients:
    own, given = leaves(weights)
    return backward(MoERunner(spec, lambda: own, options=Options(backend="eager")), tokens, given, out)


def check(
    spec: MoESpec, layout: Layout, options: Options, seed: int, storage: Storage, rows: list[int], *, replay: bool
) -> None:
    weights = make_weights(spec, seed, torch.float32, dataclasses.replace(storage, pad=0))  # what is junk there has a gradient
    tokens = rank_tokens(spec, layout, seed + 1, token_counts(layout, rows), torch.float32)
    if replay:
        tokens = [replayed(spec, weights, t) for t in tokens]
    per_copy = layout.ep * layout.tp
    of = [r if layout.tokens == "sharded" else r // per_copy * per_copy for r in range(layout.world)]
    options = options.replace(backend="eager", reduce_dtype=None)

    def output_gradient(rank: int) -> Tensor:
        """[T, H], of all tokens that the rank holds; the same on ranks that hold the same."""
        generator = torch.Generator().manual_seed(seed + of[rank])
        return torch.randn(tokens[rank].x.shape, generator=generator, dtype=torch.float64).reshape(-1, spec.hidden_size)

    def own_gradient(rank: int) -> Tensor:
        g = output_gradient(rank)
        if options.output == "shard" and layout.tokens == "replicated":
            return g.split(layout.token_counts(g.shape[0]))[rank % per_copy]
        return g

    def main(bound: Any) -> tuple[Gradients, list[Any], Any]:
        own, given = leaves(weights)
        runner = MoERunner(spec, own, bound if layout.world > 1 else None, options)
        comm, rank = runner._comm, bound.comm.rank
        with torch.enable_grad():
            got = backward(runner, tokens[rank], given, own_gradient(rank))
        plan = next(v.plan for (_, _, grad), v in runner._verbs.items() if grad)
        assert tuple(comm.counted) == plan.counts
        return got, list(comm.log), plan

    answers = simulate(layout, main)
    for _, issued, plan in answers:
        assert tuple(issued) == (*plan.collectives, *plan.backward_collectives)
    alone = [whole(spec, weights, t, output_gradient(r)) for r, t in enumerate(tokens)]
    for copy in range(layout.dp):
        ranks = range(copy * per_copy, (copy + 1) * per_copy)
        compare(layout, [answers[r][0] for r in ranks], [alone[r] for r in ranks])


def compare(layout: Layout, got: list[Gradients], alone: list[Gradients]) -> None:
    replicated = layout.tokens == "replicated"
    for name in alone[0]:
        if name in ("x", "topk", "shared_weights"):
            for ours, theirs in zip(got, alone, strict=True):
                near(name, ours[name], theirs[name])
            continue
        truth = alone[0][name] if replicated else torch.stack([a[name] for a in alone]).sum(0)
        first = name.split("_")[0]
        if first in EXPERTS or (layout.shards_shared and name in SHARED):
            # Each rank's leaf is the whole tensor, of which it reads its cut: together they have all of it, and what is not cut
            # over tp as often as there are ranks of tp.
            near(name, torch.stack([g[name] for g in got]).sum(0) / (layout.tp if first == "b2" else 1), truth)
            if first in EXPERTS and not layout.redundant and not isinstance(layout.placement, tuple):
                for g in got:
                    near(name, g[name][g[name] != 0], truth[g[name] != 0])
        elif replicated:
            for g in got:
                near(name, g[name], truth)
        else:
            near(name, torch.stack([g[name] for g in got]).sum(0), truth)


def near(name: str, got: Tensor, wanted: Tensor) -> None:
    """float64, summed in another order. A small gradient is what is left of large ones that cancel."""
    assert got.shape == wanted.shape
    if wanted.numel():
        most = max(float(wanted.abs().max()), 1e-4)
        assert float((got - wanted).abs().max()) <= 1e-9 * most, (name, got, wanted)


@st.composite
def problems(draw: st.DrawFn, world: int):
    spec = draw(specs())
    layout = draw(layouts(spec.num_experts, world=world))
    rows = draw(st.lists(st.integers(0, 5), min_size=1, max_size=layout.world))
    return spec, layout, draw(options_for(layout)), draw(SEEDS), draw(STORAGES), rows


@settings(max_examples=30)
@given(problems(4), st.booleans())
def test_every_layout_has_the_gradients_of_one_rank(problem, replay):
    check(*problem, replay=replay)


@pytest.mark.slow
@settings(max_examples=600)
@given(problems(8), st.booleans())
def test_every_layout_has_the_gradients_of_one_rank_long(problem, replay):
    check(*problem, replay=replay)


BASE = MoESpec(
    hidden_size=16,
    num_experts=6,
    top_k=2,
    routing=RoutingSpec(score="sigmoid", renormalise="sum"),
    experts=ExpertsSpec(intermediate_size=12, bias=True),
    shared=SharedSpec(width=10, bias=True, gate="sigmoid"),
    apply_routed_scale_to_output=True,
    routed_scaling_factor=2.5,
    output_bias=True,
)
NORMED = dataclasses.replace(BASE, experts=ExpertsSpec(intermediate_size=12, bias=True, row_norm=RMSNorm(features=16)))
LAYOUTS = [
    (Layout(tp=2), Options()),
    (Layout(ep=2), Options(output="shard")),
    (Layout(ep=2, tp=2), Options(output="partial")),
    (Layout(ep=2, tp=2, tokens="sharded"), Options(dispatch="alltoall")),
    (Layout(ep=2, tp=2, tokens="sharded"), Options(dispatch="allgather")),
    (Layout(ep=3, tokens="sharded"), Options(dispatch="alltoall")),
]


@pytest.mark.parametrize("spec", [BASE, NORMED], ids=["base", "row norm"])
@pytest.mark.parametrize(("layout", "options"), LAYOUTS)
def test_layouts_with_the_gradients_of_one_rank(layout, options, spec):
    check(spec, layout, options, 1, Storage(), [3, 0, 4, 1], replay=False)


class Unconnected:
    """A kernel that returns plain zeros where it has nothing to do: autograd sees no way from its result to the tokens."""

    INFO = dataclasses.replace(eager.INFO, name="unconnected", priority={})

    @staticmethod
    def run(x: Tensor, topk: Any, weights: Any, call: Any) -> Tensor:
        if (topk.ids >= 0).any():
            return eager.run(x, topk, weights, call)
        shape = x.shape if call.output == "summed" else (*topk.ids.shape, x.shape[1])
        return torch.zeros(shape, dtype=x.dtype)


@pytest.mark.parametrize(("layout", "options"), LAYOUTS)
def test_a_rank_whose_experts_have_nothing_to_do_joins_every_collective_of_the_backward(layout, options):
    layout = dataclasses.replace(layout, timeout=10.0)
    weights = make_weights(BASE, 0)
    registry.register(Unconnected)

    def main(bound: Any) -> Any:
        from moerunner import TopK

        x = torch.randn(3, 16, generator=torch.Generator().manual_seed(2)).requires_grad_()
        chosen = TopK(torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2), space="logical")  # all of them on the first rank
        chosen.ids[:, 1] = 1
        runner = MoERunner(BASE, weights, bound, options.replace(backend="unconnected", grad=True))
        with torch.enable_grad():
            runner(x, topk=chosen).sum().backward()
        assert tuple(bound.comm.log) == (*runner.plan.collectives, *runner.plan.backward_collectives)
        return x.grad

    try:
        assert all(torch.isfinite(g).all() for g in simulate(layout, main))
    finally:
        registry.unregister("unconnected")


@pytest.mark.parametrize(("dtype", "sums"), [(torch.float32, 1), (torch.bfloat16, 2), (torch.float16, 1), (torch.float64, 1)])
def test_what_is_added_up_shares_a_collective_with_all_of_its_dtype(dtype, sums):
    """Tokens' gradients travel as partial sums do, the routing's and the parameters' in the dtype of the routing."""
    weights = make_weights(BASE, 0, dtype)

    def main(bound: Any) -> Any:
        x = torch.randn(3, 16, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
        runner = MoERunner(BASE, weights, bound, Options(backend="eager", grad=True))
        with torch.enable_grad():
            runner(x).float().sum().backward()
        assert tuple(bound.comm.log) == (*runner.plan.collectives, *runner.plan.backward_collectives)
        return len(runner.plan.backward_collectives)

    assert simulate(Layout(tp=2), main) == [sums] * 2
    for dispatch in ("allgather", "alltoall"):
        plan = simulate(
            Layout(ep=2, tp=2, tokens="sharded"),
            lambda bound, d=dispatch: MoERunner(BASE, weights, bound, Options(backend="eager", grad=True, dispatch=d)).plan,
        )[0]
        assert [kind for kind, _ in plan.backward_collectives].count("reduce_scatter") == sums


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(ep=2), Layout(ep=2, redundant=2)])
def test_parameters_are_cut_into_parameters_of_the_rank(layout):
    given = {n: torch.nn.Parameter(torch.randn(s)) for n, s in BASE.weight_shapes().items()}
    given["w2"].requires_grad_(False)

    def main(bound: Any) -> None:
        runner = MoERunner(BASE, given, bound)
        assert {n for n, _ in runner.named_parameters()} == {n.replace(".", "_") for n in given}
        assert all(p.is_leaf for p in runner.parameters())
        assert not runner.w2.requires_grad
        for _ in range(2):
            with torch.enable_grad():
                runner(torch.ones(2, 16)).sum().backward()
        assert runner.w13.grad.shape == runner.w13.shape

    simulate(layout, main)
    assert given["w13"].grad is None
