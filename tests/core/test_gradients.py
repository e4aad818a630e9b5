"""Gradients of the torch backends: against finite differences in float64, and against plain autograd in float32."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tests.support.numerics import relative_error
from tests.support.plain import plain_layer, plain_route
from tests.support.running import CPU_BACKENDS
from tests.support.strategies import SEEDS, Storage, make_tokens, make_weights, replayed, specs

from moerunner import (
    ActivationSpec,
    ExpertsSpec,
    GroupSpec,
    LayerWeights,
    Linear,
    MoERunner,
    MoESpec,
    Options,
    RMSNorm,
    RoutingSpec,
    SharedSpec,
    TopK,
    TransformSpec,
    UnsupportedError,
    fused_experts,
)
from moerunner.experts import eager, grouped_mm, registry
from moerunner.ops.reference import reference_route

NORM = TransformSpec((Linear(in_features=8, out_features=8), RMSNorm(features=8)))


def layer(**changes: Any) -> MoESpec:
    base: dict[str, Any] = {
        "hidden_size": 8,
        "num_experts": 4,
        "top_k": 2,
        "routing": RoutingSpec(score="sigmoid", renormalise="sum", eps=1e-20),
        "experts": ExpertsSpec(intermediate_size=4),
        "routed_scaling_factor": 1.5,
        "apply_routed_scale_to_output": True,
    }
    return MoESpec(**{**base, **changes})


SPECS = {
    "plain": layer(),
    "softmax, factor in weights": layer(routing=RoutingSpec(), apply_routed_scale_to_output=False),
    "chosen logits": layer(routing=RoutingSpec(score="softmax_topk", choose="logit", logit_bias=True)),
    "grouped, biased": layer(routing=RoutingSpec(score="sigmoid", selection_bias=True, groups=GroupSpec(count=2, kept=1))),
    "gated shared": layer(shared=SharedSpec(width=4, gate="sigmoid")),
    "weights on input": layer(routing=RoutingSpec(score="sigmoid_topk", choose="logit", weights_on="input")),
    "biases, oai": layer(experts=ExpertsSpec(intermediate_size=4, bias=True, activation=ActivationSpec(kind="swigluoai"))),
    "row norm": layer(experts=ExpertsSpec(intermediate_size=4, row_norm=RMSNorm(features=8))),
    "zero experts": layer(zero_experts=2, top_k=3),
    "transforms": layer(output_transform=NORM, final_transform=NORM, shared=SharedSpec(width=4)),
    "not gated": layer(experts=ExpertsSpec(intermediate_size=4, gated=False, activation=ActivationSpec(kind="gelu_tanh"))),
}


@pytest.mark.parametrize("name", SPECS)
def test_finite_differences(name: str) -> None:
    spec = SPECS[name]
    weights = {n: (torch.randn(s, dtype=torch.float64) * 0.5).requires_grad_() for n, s in spec.weight_shapes().items()}
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    names = list(weights)

    def run(x: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
        return MoERunner(spec, dict(zip(names, given, strict=True)), options=Options(backend="eager"))(x)

    assert torch.autograd.gradcheck(run, (x, *weights.values()), fast_mode=True)


def plain(x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    rows = []
    for t in range(x.shape[0]):
        total = torch.zeros_like(x[t])
        for k in range(ids.shape[1]):
            if ids[t, k] >= 0:
                gate, up = (w13[ids[t, k]] @ x[t]).chunk(2)
                total = total + weights[t, k] * (w2[ids[t, k]] @ (F.silu(gate) * up))
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("backend", ["eager", "grouped_mm"])
@pytest.mark.parametrize("empty", [False, True], ids=["every slot", "empty slots"])
def test_experts_against_autograd(backend: str, empty: bool) -> None:
    x, w13, w2 = torch.randn(7, 16), torch.randn(5, 16, 16) * 0.3, torch.randn(5, 16, 8) * 0.3
    weights, ids = torch.rand(7, 3), torch.stack([torch.randperm(5)[:3] for _ in range(7)])
    if empty:
        ids[0], ids[3, 1], ids[6, 2] = -1, -1, -1
        weights = torch.where(ids < 0, torch.nan, weights)
    given = [t.requires_grad_() for t in (x, w13, w2, weights)]
    out = torch.randn(7, 16)
    got = torch.autograd.grad(fused_experts(x, w13, w2, weights, ids, backend=backend), given, out)
    expected = torch.autograd.grad(plain(*[t.double() for t in given], ids), given, out.double())
    for ours, theirs in zip(got, expected, strict=True):
        assert torch.isfinite(ours).all()
        assert relative_error(ours, theirs) <= 3e-6


@pytest.mark.parametrize("backend", ["eager", "grouped_mm"])
def test_no_token_still_has_a_gradient(backend: str) -> None:
    w13, w2 = (torch.randn(s, requires_grad=True) for s in ((4, 16, 8), (4, 8, 8)))
    x, ids = torch.randn(2, 8, requires_grad=True), torch.full((2, 2), -1)
    y = fused_experts(x, w13, w2, torch.ones(2, 2), ids, backend=backend)
    assert torch.equal(y, torch.zeros(2, 8))
    if y.requires_grad:
        y.sum().backward()
        assert x.grad is None or torch.equal(x.grad, torch.zeros_like(x))


def test_a_backend_without_backward_is_refused_under_grad() -> None:
    class Forward:
        INFO = dataclasses.replace(eager.INFO, name="forward_only", backward=False, priority={"cpu": 99}, few_tokens={})
        run = staticmethod(eager.run)

    registry.register(Forward)
    try:
        spec = SPECS["plain"]
        weights = {n: torch.randn(s) for n, s in spec.weight_shapes().items()}
        x = torch.randn(2, 8)
        runner = MoERunner(spec, weights)
        assert runner.plan.backend == "forward_only"
        x.requires_grad_()
        runner(x).sum().backward()  # "auto" takes one that has a backward
        assert x.grad is not None
        named = MoERunner(spec, weights, options=Options(backend="forward_only"))
        with pytest.raises(UnsupportedError, match="has no backward"):
            named(x)
        with torch.no_grad():
            named(x)
    finally:
        registry.unregister("forward_only")


def test_the_router_learns_through_the_weights_it_gives() -> None:
    spec = SPECS["grouped, biased"]
    weights = {n: torch.nn.Parameter(torch.randn(s)) for n, s in spec.weight_shapes().items()}
    runner = MoERunner(spec, weights)
    runner(torch.randn(5, 8)).sum().backward()
    gate, bias = weights["gate"].grad, weights["selection_bias"].grad
    assert gate is not None
    assert gate.abs().max() > 0
    assert bias is None or not bias.abs().any()  # the correction bias chooses and is not trained


def test_replayed_weights_get_a_gradient() -> None:
    spec = SPECS["plain"]
    runner = MoERunner(spec, {n: torch.randn(s) for n, s in spec.weight_shapes().items()})
    given = torch.rand(3, 2, requires_grad=True)
    runner(torch.randn(3, 8), topk=TopK(torch.tensor([[0, 1], [2, 3], [1, -1]]), given)).sum().backward()
    assert given.grad is not None
    assert given.grad[:2].abs().min() > 0
    assert given.grad[2, 1] == 0


# ---- every weight of any layer


def leaves(weights: LayerWeights, dtype: torch.dtype) -> tuple[LayerWeights, list[torch.Tensor]]:
    """The weights in this dtype as leaves that require a gradient, and these leaves."""
    found: list[torch.Tensor] = []

    def leaf(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor
        found.append(tensor.detach().to(dtype, copy=True).as_strided(tensor.shape, tensor.stride()).requires_grad_())
        return found[-1]

    return weights.map(leaf), found


def gradients(y: torch.Tensor, given: list[torch.Tensor], out: torch.Tensor) -> list[torch.Tensor]:
    got = torch.autograd.grad(y, given, out.to(y.dtype), allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(given, got, strict=True)]


@settings(max_examples=60)
@given(specs(), SEEDS, st.sampled_from(["concat", "interleaved"]), st.sampled_from(CPU_BACKENDS))
def test_every_weight_of_any_layer_against_plain_autograd(spec: MoESpec, seed: int, gate_up: Any, backend: str) -> None:
    base = make_weights(spec, seed, storage=Storage(gate_up=gate_up))
    tokens = make_tokens(spec, seed + 1, 6)
    routed = replayed(spec, base, tokens).inputs["topk"]
    assume(all(c.margin > 1e-3 for c in reference_route(spec, base, tokens.x, **tokens.inputs)))
    try:
        MoERunner(spec, base, options=Options(backend=backend, grad=True))
    except UnsupportedError:
        return
    out = torch.randn(6, spec.hidden_size, generator=torch.Generator().manual_seed(seed))

    def ours() -> list[torch.Tensor]:
        weights, given = leaves(base, torch.float32)
        x = tokens.x.clone().requires_grad_()
        runner = MoERunner(spec, lambda: weights, options=Options(backend=backend))
        return gradients(runner(x, **tokens.inputs), [x, *given], out)

    def by_hand(dtype: torch.dtype) -> list[torch.Tensor]:
        weights, given = leaves(base, dtype)
        x = tokens.x.to(dtype).requires_grad_()
        if "topk" in tokens.inputs:
            ids, w, shared = routed.ids, torch.where(routed.ids < 0, 0, routed.weights).to(dtype), None
        else:
            ids, w, shared = plain_route(spec, weights, x, **tokens.inputs, dtype=dtype)
        return gradients(plain_layer(spec, weights, x, ids, w, shared), [x, *given], out)

    exact, narrow = by_hand(torch.float64), by_hand(torch.float32)
    for got, wanted, yard in zip(ours(), exact, narrow, strict=True):
        allowed = max(5e-6, 2 * relative_error(yard, wanted) + 1e-6)
        if wanted.numel() == 1:  # a sum that may cancel, by luck in one dtype and not in the other
            allowed *= max(1.0, float(exact[0].abs().max() / wanted.abs().clamp(min=1e-30)))
        if float(wanted.abs().max()) > 1e-6 * float(exact[0].abs().max()):
            assert relative_error(got, wanted) <= allowed
        else:
            assert float(got.abs().max()) <= 1e-5 * float(exact[0].abs().max())


class Poisoned(torch.autograd.Function):
    """`grouped_mm` with NaN in every row that it leaves undefined, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, offs: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight, offs)
        y = F.grouped_mm(x, weight, offs=offs).clone()
        y[int(offs[-1]) :] = torch.nan
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        x, weight, offs = ctx.saved_tensors
        with torch.enable_grad():
            x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
            gx, gw = torch.autograd.grad(F.grouped_mm(x, weight, offs=offs), (x, weight), grads[0])
        gx = gx.clone()
        gx[int(offs[-1]) :] = torch.nan
        return gx, gw, None


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", ["plain", "zero experts", "weights on input"])
def test_undefined_rows_of_the_grouped_product_reach_no_gradient(monkeypatch: Any, name: str, bias: bool) -> None:
    """Rows behind the last expert's end: slots with id -1, and slots of zero experts, whose weights the router made."""
    bias = bias and name != "weights on input"
    spec = dataclasses.replace(SPECS[name], experts=ExpertsSpec(intermediate_size=4, bias=bias))
    weights, tokens = make_weights(spec, 1), make_tokens(spec, 2, 6)
    ids, w = torch.tensor([[0, -1], [-1, -1], [1, 2]] * 2), torch.rand(6, 2)
    top = TopK(ids, torch.where(ids < 0, torch.nan, w))

    def run() -> list[torch.Tensor]:
        own, given = leaves(weights, torch.float32)
        x = tokens.x.clone().requires_grad_()
        runner = MoERunner(spec, lambda: own, options=Options(backend="grouped_mm"))
        chosen = TopK(top.ids, top.weights.clone().requires_grad_())
        total = runner(x).sum() + runner(x, topk=chosen).sum()
        return [total, *gradients(total, [x, chosen.weights, *given], torch.ones(()))]

    clean = run()
    assert torch.isfinite(torch.cat([t.flatten() for t in clean])).all()
    monkeypatch.setattr(grouped_mm, "grouped_mm", lambda x, weight, offs: Poisoned.apply(x, weight, offs))
    for got, wanted in zip(run(), clean, strict=True):
        assert torch.isfinite(got).all()
        assert torch.equal(got, wanted)
