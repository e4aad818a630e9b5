"""MoERunner on one rank equals the float64 oracle, for random specs over all features together."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from tests.support.numerics import FLOAT32_BOUND, assert_as_good_as_plain, assert_close, relative_error, rms_error
from tests.support.running import CPU_BACKENDS, plain
from tests.support.strategies import (
    SEEDS,
    STORAGES,
    Storage,
    Tokens,
    make_tokens,
    make_weights,
    replay,
    replayed,
    specs,
)
from torch import Tensor

from moerunner import ExpertsSpec, LayerWeights, MoERunner, MoESpec, Options, RoutingSpec, TopK, UnsupportedError
from moerunner.ops.reference import Choice, reference, reference_route

COUNTS = st.sampled_from([3, 0, 1, 2, 5, 8])
CLEAR = 1e-4  # a margin between the last chosen and the first left-out key, far above float32 noise on keys of size 1


def clear_rows(choices: list[Choice]) -> list[int]:
    return [t for t, choice in enumerate(choices) if choice.margin > CLEAR]


def runner_of(spec: MoESpec, weights: LayerWeights, backend: str = "auto") -> MoERunner | None:
    if backend == "auto":
        return MoERunner(spec, weights)
    try:
        return MoERunner(spec, weights, options=Options(backend=backend))
    except UnsupportedError:
        return None


def check_float32(spec: MoESpec, seed: int, storage: Storage, count: int, backend: str) -> None:
    weights = make_weights(spec, seed, torch.float32, storage)
    tokens = make_tokens(spec, seed + 1, count)
    runner = runner_of(spec, weights, backend)
    if runner is None:
        event(f"{backend} refused")
        return
    event(f"ran on {runner.plan.backend}")
    with torch.no_grad():
        y, top = runner(tokens.x, **tokens.inputs), runner.route(tokens.x, **tokens.inputs)
    assert y.shape == tokens.x.shape
    assert y.dtype == torch.float32
    if "topk" in tokens.inputs:
        assert_close(y, reference(spec, weights, tokens.x, **tokens.inputs))
        return
    choices = reference_route(spec, weights, tokens.x, **tokens.inputs)
    rows = clear_rows(choices)
    event(f"tied rows: {count - len(rows)} of {count}")
    chosen = [choices[t] for t in rows]
    routing = replay(spec, chosen)
    factor = 1.0 if spec.apply_routed_scale_to_output else spec.routed_scaling_factor
    for t, choice in zip(rows, chosen, strict=True):
        assert sorted(top.ids[t].tolist()) == sorted(choice.ids), f"row {t}"
    if rows:
        by_id, order = top.ids[rows].sort(-1)
        assert_close(top.weights[rows].gather(1, order), routing.weights.gather(1, routing.ids.argsort(-1)) * factor)
        assert torch.equal(by_id, routing.ids.sort(-1).values)
        if routing.shared_weights is not None:
            assert_close(top.shared_weights[rows], routing.shared_weights * factor)
    own = Tokens(tokens.x[rows], {"topk": routing})
    wanted = reference(spec, weights, own.x, **own.inputs)
    assert_close(y[rows], wanted, 2 * FLOAT32_BOUND)  # a chain of ten random products: one value of a few may lie out so far
    assert rms_error(y[rows], wanted) <= FLOAT32_BOUND


def check_low_precision(spec: MoESpec, seed: int, storage: Storage, backend: str, dtype: torch.dtype) -> None:
    if runner_of(spec, make_weights(spec, seed, dtype, storage), backend) is None:
        event(f"{backend} refused")
        return

    def draw(number: int, few_apart: bool) -> tuple[Tensor, Tensor, Tensor]:
        weights = make_weights(spec, seed + 10**6 * number, dtype, storage)
        runner = runner_of(spec, weights, backend)
        tokens = replayed(spec, weights, make_tokens(spec, seed + 10**6 * number + 1, 32, dtype))
        with torch.no_grad():
            y, few = runner(tokens.x, **tokens.inputs), tokens.take(5, 7)
            if few_apart:
                y[5:7] = runner(few.x, **few.inputs)
        return y, plain(spec, weights, tokens), reference(spec, weights, tokens.x, **tokens.inputs)

    assert_as_good_as_plain(lambda n: draw(n, few_apart=False))
    assert_as_good_as_plain(lambda n: draw(n, few_apart=True))


@settings(max_examples=120)
@given(specs(), SEEDS, STORAGES, COUNTS, st.sampled_from(["auto", *CPU_BACKENDS]))
def test_float32_equals_the_oracle(spec, seed, storage, count, backend):
    check_float32(spec, seed, storage, count, backend)


@pytest.mark.slow
@settings(max_examples=2500)
@given(specs(), SEEDS, STORAGES, COUNTS, st.sampled_from(["auto", *CPU_BACKENDS]))
def test_float32_equals_the_oracle_long(spec, seed, storage, count, backend):
    check_float32(spec, seed, storage, count, backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@settings(max_examples=30)
@given(specs(), SEEDS, STORAGES, st.sampled_from(["auto", *CPU_BACKENDS]))
def test_low_precision_is_as_good_as_plain_torch(dtype, spec, seed, storage, backend):
    check_low_precision(spec, seed, storage, backend, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@settings(max_examples=600)
@given(specs(), SEEDS, STORAGES, st.sampled_from(["auto", *CPU_BACKENDS]))
def test_low_precision_is_as_good_as_plain_torch_long(dtype, spec, seed, storage, backend):
    check_low_precision(spec, seed, storage, backend, dtype)


@settings(max_examples=30)
@given(specs(), SEEDS)
def test_float64_is_float64_all_the_way(spec, seed):
    weights = make_weights(spec, seed, torch.float64)
    tokens = replayed(spec, weights, make_tokens(spec, seed + 1, 4, torch.float64))
    top = tokens.inputs["topk"]
    shared = None if top.shared_weights is None else top.shared_weights.double()
    exact = dataclasses.replace(top, weights=top.weights.double(), shared_weights=shared)
    tokens = Tokens(tokens.x, {"topk": exact})
    with torch.no_grad():
        y = MoERunner(spec, weights)(tokens.x, **tokens.inputs)
    assert_close(y, reference(spec, weights, tokens.x, **tokens.inputs), 1e-13)


@settings(max_examples=40)
@given(specs(), SEEDS, st.sampled_from([torch.float32, torch.bfloat16]), st.data())
def test_nothing_but_the_row_itself_reaches_a_row(spec, seed, dtype, data):
    """Rows of NaN and Inf, and -1 ids with NaN weights, change no other row; a row without experts still has its rest."""
    weights, count = make_weights(spec, seed, dtype), 6 if dtype == torch.float32 else 32
    tokens = replayed(spec, weights, make_tokens(spec, seed + 1, count, dtype))
    runner = MoERunner(spec, weights)
    bad = data.draw(st.sets(st.integers(0, 5), min_size=1, max_size=5))
    with torch.no_grad():
        clean = runner(tokens.x, **tokens.inputs)
        x = tokens.x.clone()
        for row in bad:
            x[row] = data.draw(st.sampled_from([float("nan"), float("inf"), -float("inf")]))
        poisoned = runner(x, **tokens.inputs)
    good = [t for t in range(count) if t not in bad]
    assert torch.equal(clean[good], poisoned[good]), "a poisoned row changed another, with the same rows per expert"

    def masked(number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Without the bad rows' experts: the layer, plain PyTorch, the oracle."""
        at = seed + 10**6 * number
        weights = make_weights(spec, at, dtype)
        tokens = replayed(spec, weights, make_tokens(spec, at + 1, count, dtype))
        top = tokens.inputs["topk"]
        ids, w = top.ids.clone(), top.weights.clone()
        ids[list(bad)], w[list(bad)] = -1, float("nan")
        top = dataclasses.replace(top, ids=ids, weights=w)
        with torch.no_grad():
            y = MoERunner(spec, weights)(tokens.x, topk=top)
        zeroed = dataclasses.replace(top, weights=torch.where(ids < 0, 0, w))
        by_hand = plain(spec, weights, Tokens(tokens.x, {"topk": zeroed}))
        return y, by_hand, reference(spec, weights, tokens.x, topk=top)

    if dtype == torch.float32:
        y, _, wanted = masked(0)
        assert_close(y, wanted)
    else:
        assert_as_good_as_plain(masked)


@settings(max_examples=30)
@given(specs(), SEEDS)
def test_own_routing_keeps_nan_rows_to_themselves(spec, seed):
    weights, tokens = make_weights(spec, seed), make_tokens(spec, seed + 1, 5)
    runner = MoERunner(spec, weights)
    with torch.no_grad():
        clean = runner(tokens.x, **tokens.inputs)
        x = tokens.x.clone()
        x[2], x[4] = float("nan"), float("inf")
        y = runner(x, **tokens.inputs)
        top = runner.route(x, **tokens.inputs)
    assert_close(y[[0, 1, 3]], clean[[0, 1, 3]].double())
    choosable = spec.num_experts + spec.zero_experts
    for row in top.ids.tolist():
        real = [e for e in row if e >= 0]
        assert len(set(real)) == len(real)
        assert all(e < choosable for e in real)


@settings(max_examples=30)
@given(specs(), SEEDS, st.sampled_from([torch.float32, torch.bfloat16]))
def test_the_same_call_gives_the_same_bits(spec, seed, dtype):
    weights, tokens = make_weights(spec, seed, dtype), make_tokens(spec, seed + 1, 7, dtype)
    with torch.no_grad():
        first, other = MoERunner(spec, weights), MoERunner(spec, weights)
        y = first(tokens.x, **tokens.inputs)
        assert torch.equal(y, first(tokens.x, **tokens.inputs))
        assert torch.equal(y, other(tokens.x, **tokens.inputs))


@settings(max_examples=30)
@given(specs(), SEEDS, st.sampled_from([(), (0,), (1,), (2, 3), (2, 0, 3), (1, 1, 2, 3)]))
def test_any_leading_shape(spec, seed, shape):
    weights = make_weights(spec, seed)
    count = 1
    for size in shape:
        count *= size
    tokens = make_tokens(spec, seed + 1, count)
    runner = MoERunner(spec, weights)
    with torch.no_grad():
        flat = runner(tokens.x, **tokens.inputs)
        shaped = {n: v.reshape(shape) if isinstance(v, torch.Tensor) else v for n, v in tokens.inputs.items()}
        y = runner(tokens.x.reshape(*shape, spec.hidden_size), **shaped)
    assert y.shape == (*shape, spec.hidden_size)
    assert torch.equal(y.reshape(flat.shape), flat)


@settings(max_examples=30)
@given(specs(), SEEDS)
def test_routing_goes_out_and_in_through_one_door(spec, seed):
    """`forward` with the answer of `route` is `forward`, whoever has applied the factor."""
    weights, tokens = make_weights(spec, seed), make_tokens(spec, seed + 1, 5)
    runner = MoERunner(spec, weights)
    with torch.no_grad():
        top = runner.route(tokens.x, **tokens.inputs)
        y = runner(tokens.x, **tokens.inputs)
        assert torch.equal(runner(tokens.x, topk=top), y)
        factor = spec.routed_scaling_factor
        if top.scaled:
            shared = None if top.shared_weights is None else top.shared_weights / factor
            bare = TopK(top.ids, top.weights / factor, shared_weights=shared)
            assert_close(runner(tokens.x, topk=bare), y.double())


@settings(max_examples=20)
@given(specs(), SEEDS)
def test_logits_and_router_input_stand_for_the_gate(spec, seed):
    if spec.routing.score == "external":
        return
    weights, tokens = make_weights(spec, seed), make_tokens(spec, seed + 1, 4)
    other = make_tokens(spec, seed + 2, 4)
    logits = torch.randn(4, spec.num_logits)
    runner = MoERunner(spec, weights)
    with torch.no_grad():
        for extra in ({"router_logits": logits}, {"router_input": other.x}):
            choices = reference_route(spec, weights, tokens.x, **tokens.inputs, **extra)
            rows = clear_rows(choices)
            y = runner(tokens.x, **tokens.inputs, **extra)
            wanted = reference(spec, weights, tokens.x, topk=replay(spec, choices))
            assert_close(y[rows], wanted[rows])


def test_the_yardstick_has_errors_of_the_size_of_its_dtype():
    """The measure itself: were plain PyTorch's error huge here, every test of this file would pass."""
    spec = MoESpec(
        hidden_size=16,
        num_experts=8,
        top_k=2,
        routing=RoutingSpec(renormalise="sum"),
        experts=ExpertsSpec(intermediate_size=16),
        apply_routed_scale_to_output=False,
    )
    for dtype, low, high in ((torch.bfloat16, 1e-3, 2e-2), (torch.float16, 1e-4, 3e-3), (torch.float32, 1e-8, 6e-7)):
        weights = make_weights(spec, 0, dtype)
        tokens = replayed(spec, weights, make_tokens(spec, 1, 32, dtype))
        error = relative_error(plain(spec, weights, tokens), reference(spec, weights, tokens.x, **tokens.inputs))
        assert low < error < high
