"""A weight format is one file: this one. It runs everywhere at once, through any backend, with its weights made plain."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from tests.support.numerics import relative_error

from moerunner import (
    ExpertsSpec,
    ExpertWeights,
    LayerWeights,
    Layout,
    MoERunner,
    MoESpec,
    Options,
    RoutingSpec,
    SharedSpec,
    UnsupportedError,
    WeightsError,
    quant,
)
from moerunner.ops.reference import reference
from moerunner.parallel.comm import simulate
from moerunner.values import ExpertTensor

SPEC = MoESpec(
    hidden_size=32,
    num_experts=6,
    top_k=2,
    routing=RoutingSpec(score="softmax", renormalise="sum"),
    experts=ExpertsSpec(intermediate_size=16),
    shared=SharedSpec(width=16),
    routed_scaling_factor=2.5,
    apply_routed_scale_to_output=True,
)


class RowInt8:
    """int8 weights with one float32 scale per row: `w13_scale` [E, 2I, 1] and `w2_scale` [E, H, 1]."""

    NAME = "row_int8"

    def dequantize(self, experts: ExpertWeights, dtype: torch.dtype) -> ExpertWeights:
        plain = {n: (experts.tensors[n].tensor * experts.tensors[f"{n}_scale"].tensor).to(dtype) for n in ("w13", "w2")}
        return ExpertWeights.of(plain, experts.gate_up)

    def quantize(self, w13: torch.Tensor, w2: torch.Tensor) -> ExpertWeights:
        entries = {}
        for name, weight, tp_dim, role in (("w13", w13, 1, "gate_up"), ("w2", w2, 2, "down")):
            scale = weight.abs().amax(-1, keepdim=True) / 127
            entries[name] = ExpertTensor((weight / scale).round().to(torch.int8), 0, tp_dim, role)
            entries[f"{name}_scale"] = ExpertTensor(scale, 0, 1 if name == "w13" else None, role)
        return ExpertWeights(entries, "concat", self.NAME)


TOY = RowInt8()


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    quant.register(TOY)
    yield
    quant.unregister(TOY.NAME)


def layer() -> tuple[dict, LayerWeights]:
    """The weights with int8 experts, and the plain ones that they stand for."""
    tensors = {name: torch.randn(shape) * 0.3 for name, shape in SPEC.weight_shapes().items()}
    experts = TOY.quantize(tensors.pop("w13"), tensors.pop("w2"))
    plain = LayerWeights.of(SPEC, {**tensors, "experts": TOY.dequantize(experts, torch.float32)})
    return {**tensors, "experts": experts}, plain


@pytest.mark.parametrize("backend", ["auto", "eager", "grouped_mm"])
def test_a_format_runs_on_every_backend(backend: str) -> None:
    weights, plain = layer()
    runner = MoERunner(SPEC, weights, options=Options(dtype=torch.float32, backend=backend))
    x = torch.randn(9, 32)
    assert relative_error(runner(x), reference(SPEC, plain, x)) <= 2e-6
    assert "dequantised from 'row_int8'" in runner.explain()
    assert runner.w13.dtype == torch.int8


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(ep=3), Layout(ep=2, tp=3)])
def test_a_format_is_cut_with_its_scales(layout: Layout) -> None:
    weights, plain = layer()
    x = torch.randn(5, 32)
    expected = reference(SPEC, plain, x)
    for y in simulate(layout, lambda bound: MoERunner(SPEC, weights, bound, Options(dtype="float32"))(x)):
        assert relative_error(y, expected) <= 2e-6


def test_a_backend_that_lists_the_format_reads_it_itself() -> None:
    from moerunner.experts import eager, registry

    class Reader:
        INFO = dataclasses.replace(
            eager.INFO, name="reader", formats=frozenset({TOY.NAME}), priority={"cpu": 99}, few_tokens={}
        )

        @staticmethod
        def run(x, topk, weights, call):
            assert weights.format == TOY.NAME
            return eager.run(x, topk, TOY.dequantize(weights, x.dtype), call)

    registry.register(Reader)
    try:
        weights, plain = layer()
        runner = MoERunner(SPEC, weights, options=Options(dtype="float32"))
        x = torch.randn(4, 32)
        assert runner.plan.backend == "reader"
        assert "dequantised" not in runner.explain()
        assert relative_error(runner(x), reference(SPEC, plain, x)) <= 2e-6
    finally:
        registry.unregister("reader")


def test_tokens_of_every_dtype_meet_weights_of_theirs() -> None:
    weights, plain = layer()
    source = LayerWeights.of(SPEC, weights)
    for dtype, limit in ((torch.float64, 1e-6), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)):
        others = {n: t.to(dtype) for n, t in source.tensors.items()}
        runner = MoERunner(SPEC, {**others, "experts": weights["experts"]}, options=Options(dtype=dtype))
        x = torch.randn(9, 32).to(dtype)
        y = runner(x)
        assert y.dtype == dtype
        assert relative_error(y, reference(SPEC, plain, x, topk=runner.route(x))) <= limit
    with pytest.raises(WeightsError, match=r"tokens are torch.int32, Options\.dtype is float32"):
        MoERunner(SPEC, weights, options=Options(dtype="float32"))(torch.zeros(1, 32, dtype=torch.int32))


def test_changed_codes_are_seen_at_the_next_call() -> None:
    weights, _ = layer()
    runner, x = MoERunner(SPEC, weights, options=Options(dtype="float32")), torch.randn(3, 32)
    before = runner(x)
    runner.w2_scale.mul_(2)
    after = runner(x)
    plain = LayerWeights.of(SPEC, {**weights, "experts": TOY.dequantize(weights["experts"], torch.float32)})
    assert relative_error(after, reference(SPEC, plain, x)) <= 2e-6
    assert not torch.equal(before, after)


def test_what_is_missing_is_said() -> None:
    weights, _ = layer()
    with pytest.raises(WeightsError, match="reads plain weights, these are in the format 'row_int8'"):
        reference(SPEC, LayerWeights.of(SPEC, weights), torch.zeros(1, 32))
    bare = dataclasses.replace(weights["experts"], tensors={"codes": weights["experts"].tensors["w13"]})
    with pytest.raises(WeightsError, match="w13 is missing; w2 is missing"):
        MoERunner(SPEC, {**weights, "experts": bare}, options=Options(dtype="float32"))
    with pytest.raises(WeightsError, match=r"row_int8.*dtype"):
        MoERunner(SPEC, weights)
    with pytest.raises(UnsupportedError, match="exists"):
        quant.register(RowInt8())
    quant.unregister(TOY.NAME)
    with pytest.raises(UnsupportedError, match="no format is called 'row_int8'"):
        MoERunner(SPEC, weights, options=Options(dtype="float32"))
    quant.register(TOY)
