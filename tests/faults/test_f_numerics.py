"""Section F of docs/faults.md: overflow, determinism, and what a token's company may change."""

import pytest
import torch
from helpers import (
    BACKENDS,
    HIDDEN,
    INNER,
    LAYOUTS,
    NORM,
    ROUTERS,
    SHARED,
    assert_close,
    check,
    inputs_for,
    make_spec,
    make_weights,
    on_one,
    on_ranks,
    tokens,
    toy_backend,
)

from moerunner import Linear, MoERunner, Options, TransformSpec, UnsupportedError
from moerunner.experts import eager
from moerunner.experts.registry import get
from moerunner.ops.reference import reference
from moerunner.values import LayerWeights, TopK

HALF = torch.float16
TOP = torch.finfo(HALF).max
SMALLER = TransformSpec((Linear(in_features=HIDDEN, out_features=HIDDEN),))


def large_layer(factor, on_output, **changes):
    """A float16 layer whose single rows fit and whose sum over two equal experts, times the factor, does not."""
    spec = make_spec(factor=factor, on_output=on_output, **{"shared": SHARED, "num_experts": 2, **changes})
    weights = make_weights(spec, dtype=HALF)
    x = tokens(dtype=HALF)
    ids = torch.tensor([[0, 1]]).repeat(len(x), 1)
    one = make_spec(num_experts=2)
    plain = {n: weights[n] for n in make_weights(one)}
    plain["w13"][1], plain["w2"][1] = plain["w13"][0], plain["w2"][0]
    alone = reference(one, LayerWeights.of(one, plain), x, topk=TopK(ids[:, :1], torch.ones(len(x), 1)))
    weights["w2"] *= 40000 / alone.abs().max().item()
    return spec, weights, x, TopK(ids, torch.ones(len(x), 2))


def cancelling(spec, weights, x, topk):
    """Gives the shared expert's down weights so that it takes away nearly all of the routed part."""
    weights = dict(weights)
    for half in ("shared_w13", "shared_w2"):
        weights[half] = torch.zeros_like(weights[half])
    inner = weights["w2"].shape[2]
    weights["shared_w13"] = weights["w13"][0].clone()
    weights["shared_w2"] = (weights["w2"][0].float() * -0.75 * 2 * spec.routed_scaling_factor).to(HALF)
    assert weights["shared_w2"].shape == (HIDDEN, inner)
    assert weights["shared_w2"].isfinite().all()
    return weights


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("on_output", [False, True])
def test_F1_a_large_routed_part_and_a_large_shared_part_cancel_in_float16(on_output, backend):
    from moerunner import SharedSpec

    # The shared part itself must fit float16's rows: it has the width of one expert and less weight.
    spec, weights, x, topk = large_layer(1.25, on_output, shared=SharedSpec(width=INNER))
    weights = cancelling(spec, weights, x, topk)
    weights["w2"], weights["shared_w2"] = weights["w2"] / 2, weights["shared_w2"] / 2
    bare = {**weights, "shared_w2": torch.zeros_like(weights["shared_w2"])}
    routed = reference(spec, LayerWeights.of(spec, bare), x, topk=topk) * 2.0
    assert routed.abs().max() > TOP, "the case is not large enough"
    y = check(spec, weights, x, options=Options(backend=backend), topk=topk)
    assert y.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("on_output", [False, True])
@pytest.mark.parametrize("transform", ["linear", "norm"])
@pytest.mark.parametrize("layout", [None, "tp2", "ep2", "sharded tokens, ep2"])
def test_F1_a_sum_that_a_transform_brings_back_into_range(layout, transform, on_output, backend):
    change = {"output_transform": NORM if transform == "norm" else SMALLER, "shared": None}
    spec, weights, x, topk = large_layer(2.5, on_output, **change)
    if transform == "linear":
        weights["output_transform.0.weight"] = weights["output_transform.0.weight"] * 0.01
    bare = make_spec(factor=2.5, num_experts=2)
    routed = reference(bare, LayerWeights.of(bare, {n: weights[n] for n in make_weights(bare)}), x, topk=topk)
    assert routed.abs().max() > TOP, "the case is not large enough"
    y = check(spec, weights, x, layout=LAYOUTS.get(layout), options=Options(backend=backend), topk=topk)
    assert y.isfinite().all()


def test_F1_products_on_a_cpu_do_not_overflow_in_float16():
    spec = make_spec(shared=SHARED, factor=1.0)
    weights, x = make_weights(spec, dtype=HALF), tokens(dtype=HALF) * 300  # gate * up is beyond float16
    weights["w2"], weights["shared_w2"] = weights["w2"] * 1e-2, weights["shared_w2"] * 1e-2
    h = x.float() @ weights["w13"][0].float().T
    assert (torch.nn.functional.silu(h[:, :INNER]) * h[:, INNER:]).abs().max() > TOP
    y = check(spec, weights, x)
    assert y.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_F2_batch_invariance_is_given_or_refused(backend):
    spec = make_spec(factor=2.5, shared=SHARED)
    weights, x = make_weights(spec), tokens(64)
    options = Options(backend=backend, batch_invariant=True)
    if not get(backend).INFO.batch_invariant:
        with pytest.raises(UnsupportedError, match="is not batch invariant"):
            MoERunner(spec, weights, options=options)
        return
    runner = MoERunner(spec, weights, options=options)
    whole = runner(x)
    for rows in (slice(0, 1), slice(3, 8), slice(0, 33)):
        assert torch.equal(runner(x[rows]), whole[rows])


def test_F2_a_kernel_that_declares_it_is_taken():
    spec = make_spec()
    with toy_backend(batch_invariant=True, priority={"cpu": 99}):
        runner = MoERunner(spec, make_weights(spec), options=Options(batch_invariant=True))
        assert runner.plan.backend == "toy"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_F2_no_product_of_the_layer_depends_on_the_batch(dtype):
    """The gate's, the shared experts' and a transform's too, beside experts that run token by token."""

    def by_token(x, topk, weights, call):
        parts = zip(x.split(1), topk.ids.split(1), topk.weights.split(1), strict=True)
        return torch.cat([eager.run(a, TopK(ids, w, space="physical"), weights, call) for a, ids, w in parts])

    spec = make_spec(factor=2.5, shared=SHARED, output_transform=SMALLER)
    weights, x = make_weights(spec, dtype=dtype), tokens(130, dtype=dtype)
    with toy_backend(by_token, batch_invariant=True):
        runner = MoERunner(spec, weights, options=Options(backend="toy", batch_invariant=True))
        whole = runner(x)
        for rows in (slice(0, 1), slice(128, 130), slice(0, 70)):
            assert torch.equal(runner(x[rows]), whole[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", [None, "tp2", "ep2 tp2", "ep2, copies", "sharded tokens, ep2", "sharded tokens, ep4"])
def test_F3_the_same_bits_on_every_run(layout, backend, dtype):
    spec = make_spec(ROUTERS["groups by best two"], factor=2.5, on_output=True, shared=SHARED, top_k=4)
    weights, x = make_weights(spec, dtype=dtype), tokens(13, dtype=dtype)
    run = on_one if layout is None else on_ranks
    runs = [run(spec, weights, x, layout=LAYOUTS.get(layout), options=Options(backend=backend)) for _ in range(3)]
    assert all(torch.equal(y, runs[0]) for y in runs)


@pytest.mark.parametrize("router", ROUTERS)
def test_F3_and_of_every_router(router):
    spec = make_spec(ROUTERS[router], factor=2.5)
    runner = MoERunner(spec, make_weights(spec))
    one, other = (runner.route(tokens(50), **inputs_for(spec, 50)) for _ in range(2))
    assert torch.equal(one.ids, other.ids)
    assert torch.equal(one.weights, other.weights)


def test_F4_a_kernel_that_is_not_repeatable_must_be_asked_for():
    spec = make_spec()
    weights = make_weights(spec)
    with toy_backend(deterministic=False, priority={"cpu": 99}) as options:
        assert MoERunner(spec, weights).plan.backend != "toy"
        with pytest.raises(UnsupportedError, match="is not deterministic"):
            MoERunner(spec, weights, options=Options(backend="toy"))
        assert MoERunner(spec, weights, options=Options(deterministic=False)).plan.backend == "toy"
        check(spec, weights, tokens(), options=options)


@pytest.mark.parametrize("layout", [None, "ep2", "sharded tokens, ep2", "sharded tokens, ep4"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_F5_a_tokens_company_changes_rounding_at_most(backend, layout):
    spec = make_spec(factor=2.5, shared=SHARED)
    weights, x = make_weights(spec), tokens(13)
    run = on_one if layout is None else on_ranks
    y = run(spec, weights, x, layout=LAYOUTS.get(layout), options=Options(backend=backend))
    other = tokens(13, seed=8) * 50
    other[[2, 7, 12]] = x[[2, 7, 12]]
    z = run(spec, weights, other, layout=LAYOUTS.get(layout), options=Options(backend=backend))
    assert_close(z[[2, 7, 12]], y[[2, 7, 12]])
