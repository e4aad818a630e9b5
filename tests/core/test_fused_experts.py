"""`fused_experts`: the experts as one plain function, over backends, storages, constants and maps."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tests.support.numerics import assert_as_good_as_plain, assert_close
from tests.support.plain import plain_activation
from tests.support.running import CPU_BACKENDS
from tests.support.strategies import SEEDS, STORAGES, Storage, activations, make_weights

from moerunner import (
    ActivationSpec,
    ExpertsSpec,
    MoESpec,
    RoutingSpec,
    SpecError,
    UnsupportedError,
    WeightsError,
    fused_experts,
)
from moerunner.ops.reference import reference
from moerunner.values import LayerWeights, TopK

BACKENDS = st.sampled_from(["auto", *CPU_BACKENDS])


@dataclasses.dataclass(frozen=True)
class Problem:
    spec: MoESpec
    weights: LayerWeights = dataclasses.field(repr=False)
    x: torch.Tensor = dataclasses.field(repr=False)
    topk: TopK = dataclasses.field(repr=False)

    @property
    def arguments(self) -> dict[str, Any]:
        experts, a = self.weights.experts[0], self.spec.experts.activation
        return {
            **{n: experts.get(n) for n in ("w13", "w2", "b13", "b2")},
            "x": self.x,
            "topk_ids": self.topk.ids,
            "topk_weights": self.topk.weights,
            "activation": a.kind,
            **{n: getattr(a, n) for n in ("limit", "alpha", "beta", "clamp_after")},
            "gate_up": experts.gate_up,
            "input_weighting": self.spec.routing.weights_on == "input",
        }

    def expected(self) -> torch.Tensor:
        return reference(self.spec, self.weights, self.x, topk=self.topk)


def problem(
    dtype: torch.dtype, *, seed: int, count: int, storage: Storage, activation: ActivationSpec, gated: bool, bias: bool, k: int
) -> Problem:
    on_input = not bias and seed % 3 == 0
    spec = MoESpec(
        hidden_size=16,
        num_experts=5,
        top_k=k,
        routing=RoutingSpec(score="external", weights_on="input" if on_input else "output"),
        experts=ExpertsSpec(intermediate_size=8, activation=activation, gated=gated, bias=bias),
        apply_routed_scale_to_output=False,
    )
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(count, 5, generator=generator).argsort(-1)[:, :k]
    ids = torch.where(torch.rand(count, k, generator=generator) < 0.2, -1, ids)
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    w = torch.where(ids < 0, float("nan"), torch.rand(count, k, generator=generator, dtype=exact))
    weights = make_weights(spec, seed, dtype, dataclasses.replace(storage, pad=0))
    return Problem(spec, weights, torch.randn(count, 16, generator=generator).to(dtype), TopK(ids, w))


@st.composite
def facts(draw: st.DrawFn) -> dict[str, Any]:
    """Everything of a problem but its dtype and the number of tokens."""
    gated = draw(st.booleans())
    activation = draw(activations(gated))
    assume(activation.gate_softcap is None and activation.up_softcap is None)
    return {
        "activation": activation,
        "gated": gated,
        "seed": draw(SEEDS),
        "storage": draw(STORAGES),
        "bias": draw(st.booleans()),
        "k": draw(st.integers(1, 4)),
    }


def call(problem: Problem, backend: str, **changes: Any) -> torch.Tensor | None:
    try:
        return fused_experts(**{**problem.arguments, "backend": backend, **changes})
    except UnsupportedError:
        assert backend != "auto"
        return None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(max_examples=100)
@given(facts(), st.sampled_from([7, 0, 1, 2]), BACKENDS)
def test_equals_the_oracle(dtype, given_facts, count, backend):
    one = problem(dtype, count=count, **given_facts)
    x = one.x.clone()
    y = call(one, backend)
    if y is not None:
        assert y.dtype == dtype
        assert_close(y, one.expected(), 2e-6 if dtype == torch.float32 else 1e-12)
        assert torch.equal(one.x, x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@settings(max_examples=40)
@given(facts(), BACKENDS)
def test_low_precision_is_as_good_as_plain_torch(dtype, given_facts, backend):
    def draw(number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        one = problem(dtype, count=32, **{**given_facts, "seed": given_facts["seed"] + 3 * 10**6 * number})
        y = call(one, backend)
        assert y is not None
        return y, by_hand(one), one.expected()

    if call(problem(dtype, count=32, **given_facts), backend) is not None:
        assert_as_good_as_plain(draw)


def by_hand(problem: Problem) -> torch.Tensor:
    experts, out = problem.weights.experts[0], torch.zeros_like(problem.x)
    for t, k in (problem.topk.ids >= 0).nonzero().tolist():
        e, w = problem.topk.ids[t, k], problem.topk.weights[t, k].to(problem.x.dtype)
        on_input = problem.spec.routing.weights_on == "input"
        x = problem.x[t] * w if on_input else problem.x[t]
        b13, b2 = (None if (b := experts.get(n)) is None else b[e] for n in ("b13", "b2"))
        h = torch.nn.functional.linear(x, experts.w13[e], b13)
        y = torch.nn.functional.linear(plain_activation(h, problem.spec.experts.activation, experts.gate_up), experts.w2[e], b2)
        out[t] += y if on_input else y * w
    return out


def example(dtype: torch.dtype = torch.float32, count: int = 6, **changes: Any) -> Problem:
    plain = {"seed": 1, "storage": Storage(), "activation": ActivationSpec(), "gated": True, "bias": True, "k": 3}
    return problem(dtype, count=count, **{**plain, **changes})


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("holds", [[0, 1], [4], [], [0, 1, 2, 3, 4]])
def test_a_map_leaves_out_the_experts_of_other_ranks(backend, holds):
    one = example()
    arguments, ids = one.arguments, one.topk.ids
    expert_map = torch.full((5,), -1)
    expert_map[holds] = torch.arange(len(holds))
    local = {n: arguments[n][holds or [0]] for n in ("w13", "w2", "b13", "b2")}
    mine = torch.isin(ids, torch.tensor(holds or [-9]))
    wanted = reference(one.spec, one.weights, one.x, topk=TopK(torch.where(mine, ids, -1), one.topk.weights))
    assert_close(fused_experts(**{**arguments, **local, "backend": backend, "expert_map": expert_map}), wanted)


def test_shares_of_all_ranks_make_up_the_whole():
    one = example()
    arguments, total = one.arguments, torch.zeros(6, 16, dtype=torch.float64)
    for rank in range(3):
        holds = [e for e in range(5) if e % 3 == rank]
        expert_map = torch.full((5,), -1, dtype=torch.int32)
        expert_map[holds] = torch.arange(len(holds), dtype=torch.int32)
        local = {n: arguments[n][holds] for n in ("w13", "w2", "b13", "b2")}
        total += fused_experts(**{**arguments, **local, "expert_map": expert_map}).double()
    assert_close(total, one.expected())


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"expert_map": torch.tensor([0, 1, 2, 3, 5])}, SpecError, "expert_map: ids reach from 0 to 5, allowed are -1 to 4"),
        ({"expert_map": torch.tensor([0, 1, 2, 3, -2])}, SpecError, "expert_map: ids reach from -2"),
        ({"expert_map": torch.zeros(5)}, WeightsError, "expert_map must be whole numbers"),
        ({"expert_map": torch.arange(3), "topk_ids": torch.full((6, 3), 4)}, SpecError, "topk ids: ids reach from 4 to 4"),
        ({"topk_ids": torch.zeros(6, 3, dtype=torch.bool)}, WeightsError, "topk_ids must be whole numbers"),
        ({"out": torch.zeros(2, 6, 16)}, WeightsError, r"out has shape \[2, 6, 16\], the result \[6, 16\]"),
        ({"out": torch.zeros(1, 16)}, WeightsError, "out has shape"),
        ({"gate_up": "sideways"}, UnsupportedError, "does not read gate_up='sideways'"),
        ({"activation": "relu", "alpha": 2.0}, SpecError, "has no alpha"),
        ({"clamp_after": True}, SpecError, "there is no limit"),
    ],
)
def test_what_does_not_fit_is_refused(change, error, match):
    with pytest.raises(error, match=match):
        fused_experts(**{**example().arguments, **change})


@pytest.mark.parametrize("change", [{"beta": 1.0}, {"activation": "swigluoai"}])
def test_a_constant_of_the_up_half_needs_one(change):
    one = example(gated=False)
    with pytest.raises(SpecError, match="need a gated expert"):
        fused_experts(**{**one.arguments, **change})


@pytest.mark.parametrize("shape", [(6,), (2, 3), (1, 6, 1), (3, 1, 2)])
def test_any_leading_shape(shape):
    one = example()
    flat = fused_experts(**one.arguments)
    shaped = {"x": one.x.reshape(*shape, 16), "topk_ids": one.topk.ids.reshape(*shape, 3)}
    y = fused_experts(**{**one.arguments, **shaped, "topk_weights": one.topk.weights.reshape(*shape, 3)})
    assert torch.equal(y, flat.reshape(*shape, 16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_result_can_be_written_where_the_caller_wants(dtype):
    one = example(dtype)
    out = torch.full((6, 16), float("nan"), dtype=dtype)
    y = fused_experts(**one.arguments, out=out)
    assert y is out
    assert torch.equal(out, fused_experts(**one.arguments))


@pytest.mark.parametrize("ids", [torch.int32, torch.int64, torch.int16, torch.uint8])
def test_ids_of_any_whole_number_type(ids):
    one = example()
    kept = one.topk.ids.clamp(min=0)
    arguments = {**one.arguments, "topk_weights": torch.rand(6, 3)}
    wanted = fused_experts(**{**arguments, "topk_ids": kept})
    assert torch.equal(fused_experts(**{**arguments, "topk_ids": kept.to(ids)}), wanted)


def test_weights_are_not_rounded_to_the_tokens_dtype():
    """1 + 2^-10 is 1 in bfloat16: with experts that give 256 the sum of two tells them apart."""
    w13, w2 = torch.zeros(1, 16, 8, dtype=torch.bfloat16), torch.zeros(1, 8, 8, dtype=torch.bfloat16)
    b2 = torch.full((1, 8), 256.0, dtype=torch.bfloat16)
    x, ids = torch.zeros(1, 8, dtype=torch.bfloat16), torch.zeros(1, 2, dtype=torch.int64)
    weights = torch.tensor([[1 + 3 / 1024, -1.0]])
    y = fused_experts(x, w13, w2, weights, ids, b2=b2)
    assert torch.equal(y, torch.full_like(y, 0.75))
