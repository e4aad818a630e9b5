"""What stands between an expert's two products: every kind with every constant, and RMSNorm."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.numerics import assert_close, relative_error
from tests.support.plain import plain_activation
from tests.support.strategies import KINDS, SEEDS, activations, norms

from moerunner import ActivationSpec, RMSNorm
from moerunner.ops.activation import activate, gated, rms_norm
from moerunner.ops.reference import gated_activation

LAYOUTS = st.sampled_from(["concat", "interleaved", "none"])


def split(h: torch.Tensor, gate_up: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    half = h.shape[-1] // 2
    if gate_up == "none":
        return h, None
    return (h[..., :half], h[..., half:]) if gate_up == "concat" else (h[..., ::2], h[..., 1::2])


@settings(max_examples=200)
@given(st.data(), LAYOUTS, SEEDS, st.sampled_from([0.1, 1.0, 20.0]), st.sampled_from([torch.float32, torch.float64]))
def test_every_function_equals_the_oracle_and_plain_torch(data, gate_up, seed, size, dtype):
    activation = data.draw(activations(gate_up != "none"))
    h = (torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(seed)) * size).to(dtype)
    before = h.clone()
    y = activate(h, activation, gate_up=gate_up)
    assert y.dtype == dtype
    assert torch.equal(h, before)
    g, u = split(h.double(), gate_up)
    limit = 1e-12 if dtype == torch.float64 else 2e-6
    assert_close(y, gated_activation(g, u, activation), limit)
    assert_close(y, plain_activation(h.double(), activation, gate_up), limit)


@settings(max_examples=60)
@given(st.data(), LAYOUTS, SEEDS, st.sampled_from([torch.bfloat16, torch.float16]))
def test_low_precision_is_rounded_once(data, gate_up, seed, dtype):
    """Computed in float32 from the rounded input: the result is the exact one, rounded."""
    activation = data.draw(activations(gate_up != "none"))
    h = torch.randn(4, 16, generator=torch.Generator().manual_seed(seed)).to(dtype)
    y = activate(h, activation, gate_up=gate_up)
    exact = activate(h.double(), activation, gate_up=gate_up)
    one_rounding = torch.finfo(dtype).eps / 2
    assert y.dtype == dtype
    assert_close(y, exact, one_rounding + 2e-6)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=20)
@given(st.data(), SEEDS)
def test_halves_that_are_apart_are_the_same_function(kind, data, seed):
    activation = data.draw(activations().filter(lambda a: a.kind == kind))
    h = torch.randn(5, 12, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(activate(h, activation, gate_up="concat"), gated(*h.chunk(2, -1), activation))
    alternating = torch.stack(h.chunk(2, -1), -1).flatten(-2)
    assert torch.equal(activate(h, activation, gate_up="concat"), activate(alternating, activation, gate_up="interleaved"))


def one(spec: ActivationSpec, g: float, u: float | None = None) -> float:
    h = torch.tensor([[g]] if u is None else [[g, u]], dtype=torch.float64)
    return float(activate(h, spec, gate_up="none" if u is None else "concat"))


def sigmoid(v: float) -> float:
    return 1 / (1 + math.exp(-v))


@pytest.mark.parametrize(
    ("spec", "g", "u", "expected"),
    [
        (ActivationSpec(), 1.5, 2.0, 1.5 * sigmoid(1.5) * 2),
        (ActivationSpec(), 1.5, None, 1.5 * sigmoid(1.5)),
        (ActivationSpec(alpha=0.5), 1.5, 2.0, 1.5 * sigmoid(0.75) * 2),
        (ActivationSpec(beta=1.0), 1.5, 2.0, 1.5 * sigmoid(1.5) * 3),
        (ActivationSpec(limit=1.0), 3.0, -4.0, 1.0 * sigmoid(1.0) * -1),
        (ActivationSpec(limit=1.0), -3.0, 4.0, -3.0 * sigmoid(-3.0) * 1),
        (ActivationSpec(limit=1.0, clamp_after=True), 3.0, 4.0, 1.0),
        (ActivationSpec(limit=1.0, clamp_after=True), 0.5, 4.0, 0.5 * sigmoid(0.5)),
        (ActivationSpec(limit=1.0), 3.0, None, 1.0 * sigmoid(1.0)),
        (ActivationSpec(kind="swigluoai"), 2.0, 3.0, 2.0 * sigmoid(1.702 * 2) * 4),
        (ActivationSpec(kind="swigluoai"), 9.0, 9.0, 7.0 * sigmoid(1.702 * 7) * 8),
        (ActivationSpec(kind="swigluoai"), 9.0, -9.0, 7.0 * sigmoid(1.702 * 7) * -6),
        (ActivationSpec(kind="swigluoai", alpha=1.0, beta=0.0, limit=2.0), 9.0, 9.0, 2.0 * sigmoid(2.0) * 2),
        (ActivationSpec(kind="swigluoai", clamp_after=True), 9.0, 9.0, 7.0 * 8),
        (ActivationSpec(gate_softcap=2.0), 1.5, 2.0, 2 * math.tanh(0.75) * sigmoid(1.5) * 2),
        (ActivationSpec(up_softcap=0.5), 1.5, 2.0, 1.5 * sigmoid(1.5) * 0.5 * math.tanh(4)),
        (ActivationSpec(up_softcap=0.5, limit=1.0), 0.5, 2.0, 0.5 * sigmoid(0.5) * 0.5 * math.tanh(2)),
        (ActivationSpec(kind="relu"), -1.0, 2.0, 0.0),
        (ActivationSpec(kind="relu2"), 3.0, None, 9.0),
        (ActivationSpec(kind="relu2"), 3.0, 2.0, 18.0),
        (ActivationSpec(kind="relu2", limit=2.0), 3.0, None, 4.0),
        (ActivationSpec(kind="relu2", limit=2.0, clamp_after=True), 3.0, None, 2.0),
        (ActivationSpec(kind="gelu"), 1.0, 2.0, (1 + math.erf(1 / math.sqrt(2)))),
        (ActivationSpec(kind="gelu_tanh"), 1.0, 2.0, 1 + math.tanh(math.sqrt(2 / math.pi) * 1.044715)),
    ],
)  # fmt: skip
def test_by_hand(spec, g, u, expected):
    assert one(spec, g, u) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "relu", "relu2"])
@pytest.mark.parametrize("clamp_after", [False, True])
def test_the_gate_is_clamped_from_above_only_and_up_on_both_sides(kind, clamp_after):
    plain, spec = ActivationSpec(kind=kind), ActivationSpec(kind=kind, limit=1.0, clamp_after=clamp_after)
    g = torch.linspace(-30, 0.9, 50, dtype=torch.float64)
    ones = torch.ones_like(g)
    inside = gated(g, ones, plain) <= 1
    assert torch.equal(gated(g, ones, spec)[inside], gated(g, ones, plain)[inside])
    u = torch.tensor([-5.0, -1.0, 0.3, 1.0, 5.0], dtype=torch.float64)
    half = torch.full_like(u, 0.5)
    assert torch.equal(gated(half, u, spec), gated(half, u.clamp(-1, 1), plain))


def test_no_constant_is_ignored():
    """Each constant alone changes the result, so that a formula that drops one is seen."""
    h = torch.randn(6, 8, dtype=torch.float64) * 3
    changed = [
        ActivationSpec(limit=0.7),
        ActivationSpec(limit=0.7, clamp_after=True),
        ActivationSpec(alpha=1.3),
        ActivationSpec(beta=0.7),
        ActivationSpec(gate_softcap=0.9),
        ActivationSpec(up_softcap=0.9),
        *(ActivationSpec(kind=kind) for kind in KINDS if kind != "silu"),
        ActivationSpec(),
    ]
    results = [activate(h, a, gate_up="concat") for a in changed]
    for i, first in enumerate(results):
        for second in results[:i]:
            assert relative_error(first, second) > 1e-5


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_stays_in_its_place(bad):
    h = torch.randn(3, 8)
    clean = activate(h, ActivationSpec(limit=1.0, up_softcap=2.0), gate_up="concat")
    h[1, 2] = bad
    y = activate(h, ActivationSpec(limit=1.0, up_softcap=2.0), gate_up="concat")
    touched = torch.zeros(3, 4, dtype=torch.bool)
    touched[1, 2] = True
    assert torch.equal(y[~touched], clean[~touched])
    if math.isnan(bad):
        assert torch.isnan(y[1, 2])


@pytest.mark.parametrize("shape", [(0, 8), (2, 0, 8), (8,)])
def test_any_leading_shape(shape):
    assert activate(torch.zeros(shape), ActivationSpec(), gate_up="concat").shape == (*shape[:-1], 4)
    assert activate(torch.zeros(shape), ActivationSpec(), gate_up="none").shape == shape


# ---- RMSNorm


@settings(max_examples=40)
@given(SEEDS, norms(10, st.sampled_from([0.0, 1e-6, 0.5])), st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
def test_rms_norm(seed, norm, dtype):
    generator = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(3, 2, 10, generator=generator).to(dtype), torch.randn(10, generator=generator)
    y = rms_norm(x, weight if norm.weight else None, norm)
    factor = (weight.double() + norm.centred) if norm.weight else torch.ones(10, dtype=torch.float64)
    before, after = (factor, 1.0) if norm.weight_first else (1.0, factor)
    exact = x.double() * before
    exact = exact / (exact.square().mean(-1, keepdim=True) + norm.eps).sqrt() * after
    assert y.dtype == dtype
    assert_close(y, exact, {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: torch.finfo(dtype).eps}[dtype])


def test_rms_norm_of_large_values_in_half_precision():
    x = torch.full((1, 4), 6e4, dtype=torch.float16)
    assert_close(rms_norm(x, None, RMSNorm(features=4, weight=False)), torch.ones(1, 4, dtype=torch.float64), 1e-3)


def test_a_row_of_zeros_is_normed_to_zeros():
    assert not rms_norm(torch.zeros(2, 5), None, RMSNorm(features=5, weight=False)).any()
