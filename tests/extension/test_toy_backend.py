"""An expert backend is one file: this one. It declares what it can do, and what it does not declare is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from typing import ClassVar

import pytest
import torch
from tests.support.numerics import relative_error
from torch import Tensor

from moerunner import (
    ActivationSpec,
    ExpertsSpec,
    ExpertWeights,
    LayerWeights,
    Layout,
    MoERunner,
    MoESpec,
    Options,
    RoutingSpec,
    SharedSpec,
    TopK,
    UnsupportedError,
    fused_experts,
)
from moerunner.experts import available, registry
from moerunner.experts.base import BackendInfo, ExpertsCall
from moerunner.ops.activation import activate
from moerunner.ops.reference import reference
from moerunner.parallel import BoundLayout
from moerunner.parallel.comm import simulate


class AllExperts:
    """Every expert on every token, then the chosen ones; wasteful, and right."""

    INFO = BackendInfo(
        name="all_experts",
        dtypes={"cpu": frozenset({"float32"})},
        activations=frozenset({"silu"}),
        gate_up=frozenset({"concat"}),
        id_minus_one=True,
        deterministic=True,
        batch_invariant=True,
    )

    @staticmethod
    def run(x_TH: Tensor, topk: TopK, weights: ExpertWeights, call: ExpertsCall) -> Tensor:
        h_ETI = activate(torch.einsum("th,eih->eti", x_TH, weights.w13), call.activation, gate_up="concat")
        y_ETH = torch.einsum("eti,ehi->eth", h_ETI, weights.w2)
        rows_TKH = y_ETH[topk.ids.clamp(min=0), torch.arange(x_TH.shape[0])[:, None]]
        weighted = torch.where((topk.ids >= 0)[..., None], rows_TKH * topk.weights[..., None], 0)
        return weighted.sum(1)


def spec_of(**experts: object) -> MoESpec:
    return MoESpec(
        hidden_size=24,
        num_experts=5,
        top_k=2,
        routing=RoutingSpec(score="softmax", renormalise="sum"),
        experts=ExpertsSpec(intermediate_size=8, **experts),  # type: ignore[arg-type]
        shared=SharedSpec(width=8),
        routed_scaling_factor=2.5,
        apply_routed_scale_to_output=True,
    )


def weights_of(spec: MoESpec) -> dict[str, Tensor]:
    return {name: torch.randn(shape) * 0.3 for name, shape in spec.weight_shapes().items()}


@pytest.fixture
def toy() -> Iterator[type[AllExperts]]:
    registry.register(AllExperts)
    yield AllExperts
    registry.unregister("all_experts")


@pytest.mark.usefixtures("toy")
def test_it_runs_a_layer() -> None:
    spec = spec_of()
    weights, x = weights_of(spec), torch.randn(7, 24)
    expected = reference(spec, LayerWeights.of(spec, weights), x)
    runner = MoERunner(spec, weights, options=Options(backend="all_experts", batch_invariant=True))
    assert runner.plan.backend == "all_experts"
    assert relative_error(runner(x), expected) <= 2e-6
    for y in simulate(Layout(ep=2), lambda bound: MoERunner(spec, weights, bound, Options(backend="all_experts"))(x)):
        assert relative_error(y, expected) <= 2e-6
    alone = torch.cat([runner(row) for row in x.split(1)])
    assert relative_error(alone, expected) <= 2e-6


@pytest.mark.usefixtures("toy")
def test_it_runs_as_a_function() -> None:
    weights, x = weights_of(spec_of()), torch.randn(3, 24)
    ids, given = torch.tensor([[0, 4], [-1, 2], [3, 3]]), torch.rand(3, 2)
    ours = fused_experts(x, weights["w13"], weights["w2"], given, ids, backend="all_experts")
    theirs = fused_experts(x, weights["w13"], weights["w2"], given, ids, backend="eager")
    assert relative_error(ours, theirs) <= 2e-6


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize(
    ("experts", "options", "reason"),
    [
        ({"bias": True}, {}, "has no bias"),
        ({"activation": ActivationSpec(limit=3.0)}, {}, "limit"),
        ({"activation": ActivationSpec(kind="gelu")}, {}, "gelu"),
        ({"gated": False}, {}, "gate_up='none'"),
        ({}, {"grad": True}, "has no backward"),
        ({}, {"capturable": True}, "is not capturable"),
    ],
)
def test_what_it_does_not_declare_is_refused(experts: dict, options: dict, reason: str) -> None:
    spec = spec_of(**experts)
    weights = weights_of(spec)
    if not spec.experts.gated:
        experts_weights = ExpertWeights.of({n: weights.pop(n) for n in ("w13", "w2")}, "none")
        weights["experts"] = experts_weights  # type: ignore[assignment]
    with pytest.raises(UnsupportedError, match=reason):
        MoERunner(spec, weights, options=Options(backend="all_experts", **options))


@pytest.mark.usefixtures("toy")
def test_it_is_listed_with_the_others() -> None:
    assert ("all_experts", True) in [row[:2] for row in available("cpu")]
    assert ("all_experts", False) in [row[:2] for row in available("cuda")]
    with pytest.raises(UnsupportedError, match="exists"):
        registry.register(AllExperts)


class Scaling(AllExperts):
    """The same kernel with the factor inside; it notes what it is told."""

    INFO = dataclasses.replace(AllExperts.INFO, name="scaling", applies_scale=True)
    told: ClassVar[list[float]] = []

    @staticmethod
    def run(x_TH: Tensor, topk: TopK, weights: ExpertWeights, call: ExpertsCall) -> Tensor:
        Scaling.told.append(call.scale)
        return AllExperts.run(x_TH, topk, weights, call) * call.scale


@pytest.mark.parametrize("on_output", [True, False])
@pytest.mark.parametrize("layout", [Layout(), Layout(tp=2), Layout(ep=2, tokens="sharded")])
def test_a_factor_inside_the_kernel_is_applied_once(on_output: bool, layout: Layout) -> None:
    spec = dataclasses.replace(spec_of(), apply_routed_scale_to_output=on_output)
    weights, x = weights_of(spec), torch.randn(5, 24)
    expected = reference(spec, LayerWeights.of(spec, weights), x)
    Scaling.told.clear()
    registry.register(Scaling)

    def main(bound: BoundLayout) -> tuple[Tensor, list[str]]:
        options = Options(backend="scaling", dispatch="auto" if layout.tokens == "replicated" else "allgather")
        runner = MoERunner(spec, weights, bound if layout.world > 1 else None, options)
        return runner(x), [step.verb for step in runner.plan.steps if step.scales or step.verb == "scale"]

    try:
        answers = simulate(layout, main)
    finally:
        registry.unregister("scaling")
    for y, owners in answers:
        assert relative_error(y, expected) <= 2e-6
        assert owners == (["experts"] if on_output else ["route"])
    assert set(Scaling.told) == {2.5 if on_output else 1.0}


@pytest.mark.usefixtures("toy")
def test_a_kernel_that_says_nothing_is_not_told() -> None:
    seen = []

    class Curious(AllExperts):
        INFO = dataclasses.replace(AllExperts.INFO, name="curious")

        @staticmethod
        def run(x_TH: Tensor, topk: TopK, weights: ExpertWeights, call: ExpertsCall) -> Tensor:
            seen.append(call)
            return AllExperts.run(x_TH, topk, weights, call)

    registry.register(Curious)
    try:
        runner = MoERunner(spec_of(), weights_of(spec_of()), options=Options(backend="curious"))
        runner(torch.randn(2, 24))
    finally:
        registry.unregister("curious")
    assert [call.scale for call in seen] == [1.0]
    assert [step.verb for step in runner.plan.steps if step.verb == "scale"] == ["scale"]


def test_an_installed_package_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("all_experts", f"{__name__}:AllExperts", "moerunner.backends")
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == "moerunner.backends" else [])
    registry._entry_points.cache_clear()
    try:
        assert registry.get("all_experts") is AllExperts
        assert "all_experts" in registry.names()
    finally:
        monkeypatch.undo()
        registry._entry_points.cache_clear()
