"""Section A of docs/faults.md: the routed scaling factor is applied once, by one owner."""

import dataclasses

import pytest
import torch
from helpers import (
    BACKENDS,
    HIDDEN,
    LAYOUTS,
    NARROW,
    ROUTERS,
    SHARED,
    TRAINABLE,
    WIDEN,
    assert_close,
    check,
    inputs_for,
    make_spec,
    make_weights,
    on_one,
    poisoned_memory,
    recording,
    tokens,
    toy_backend,
    value,
)

from moerunner import (
    ActivationSpec,
    Layout,
    MoERunner,
    Options,
    PlanError,
    RoutingSpec,
    SharedSpec,
    SpecError,
    fused_experts,
)
from moerunner.experts import eager
from moerunner.ops.reference import reference
from moerunner.plan import Step
from moerunner.shared import SharedExperts
from moerunner.values import LayerWeights, TopK

OWNERS = pytest.mark.parametrize("on_output", [False, True], ids=["factor in the weights", "factor on the output"])


def applies_its_scale(x, topk, weights, call):
    return eager.run(x, topk, weights, call) * call.scale


def layer(factor=2.5, on_output=True, **changes):
    spec = make_spec(factor=factor, on_output=on_output, **{"shared": SHARED, **changes})
    return spec, make_weights(spec)


@OWNERS
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("router", ROUTERS)
def test_A1_every_router_and_kernel_applies_the_factor_once(router, backend, on_output):
    for factor in (1.0, 2.5):
        spec = make_spec(ROUTERS[router], factor=factor, on_output=on_output, shared=SHARED)
        options = Options(backend=backend, grad=backend in TRAINABLE)  # which routes by PyTorch's operators
        check(spec, make_weights(spec), tokens(), options=options)


def test_A2_a_second_owner_cannot_be_built():
    spec, weights = layer(on_output=False)
    plan = MoERunner(spec, weights).plan
    at = next(i for i, s in enumerate(plan.steps) if s.verb == "combine") + 1
    second = Step(verb="scale", reason="copied from another model")
    with pytest.raises(PlanError, match="second time") as caught:
        dataclasses.replace(plan, steps=(*plan.steps[:at], second, *plan.steps[at:]))
    assert (caught.value.first, caught.value.second) == (plan.step("route").name, "scale")


def test_A2_a_kernel_and_the_output_cannot_both_own_it():
    spec, weights = layer(on_output=True)
    plan = MoERunner(spec, weights).plan
    steps = [dataclasses.replace(s, scales=True) if s.verb == "experts" else s for s in plan.steps]
    with pytest.raises(PlanError, match="second time") as caught:
        dataclasses.replace(plan, steps=tuple(steps))
    assert (caught.value.first, caught.value.second) == (f"experts ({plan.backend})", "scale")


@pytest.mark.parametrize("shared", [None, SHARED], ids=["alone", "with shared"])
@OWNERS
def test_A2_no_owner_cannot_be_built(on_output, shared):
    spec, weights = layer(on_output=on_output, shared=shared)
    plan = MoERunner(spec, weights).plan
    steps = [dataclasses.replace(s, scales=False) for s in plan.steps if s.verb != "scale"]
    with pytest.raises(PlanError, match="never been scaled"):
        dataclasses.replace(plan, steps=tuple(steps))


def test_A2_the_zero_experts_need_the_factor_too():
    spec = make_spec(factor=2.5, on_output=True, zero_experts=2)
    plan = MoERunner(spec, make_weights(spec)).plan
    steps = [dataclasses.replace(s, scales=False) if s.verb == "zero" else s for s in plan.steps]
    with pytest.raises(PlanError, match="never been scaled"):
        dataclasses.replace(plan, steps=tuple(steps))


def test_A2_scaling_a_scaled_value_names_both_steps():
    with pytest.raises(PlanError) as caught:
        value(maker="the kernel").scale("the model")
    assert (caught.value.first, caught.value.second) == ("the kernel", "the model")


@OWNERS
def test_A2_weights_from_outside_are_scaled_once_whether_they_hold_the_factor_or_not(on_output):
    spec, weights = layer(on_output=on_output)
    x, runner = tokens(), MoERunner(*layer(on_output=on_output))
    expected = check(spec, weights, x)
    routed = runner.route(x)
    assert routed.scaled is not on_output
    torch.testing.assert_close(runner(x, topk=routed), expected, rtol=0, atol=0)
    bare = TopK(routed.ids, routed.weights if on_output else routed.weights / 2.5)
    assert_close(runner(x, topk=bare), expected)
    held = TopK(routed.ids, bare.weights * 2.5, scaled=True)
    if on_output:
        with pytest.raises(PlanError, match="second time"):
            runner(x, topk=held)
    else:
        assert_close(runner(x, topk=held), expected)


@pytest.mark.parametrize("count", [0, 1, 5])
@pytest.mark.parametrize("zero", [0, 2])
@pytest.mark.parametrize("shared", [None, SHARED], ids=["alone", "with shared"])
@OWNERS
def test_A3_the_layer_returns_one_tensor(on_output, shared, zero, count):
    spec = make_spec(factor=2.5, on_output=on_output, shared=shared, zero_experts=zero)
    y = MoERunner(spec, make_weights(spec))(tokens(count).view(1, count, HIDDEN))
    assert isinstance(y, torch.Tensor)
    assert y.shape == (1, count, HIDDEN)


@OWNERS
def test_A4_a_kernel_that_does_everything_equals_the_steps_one_by_one(on_output):
    spec, weights = layer(on_output=on_output)
    x = tokens()
    with toy_backend(applies_its_scale, applies_scale=True) as options:
        whole = check(spec, weights, x, options=options)
    topk = MoERunner(spec, weights).route(x)
    bare = topk.weights if on_output else topk.weights / 2.5
    routed = 2.5 * fused_experts(x, weights["w13"], weights["w2"], bare, topk.ids)
    assert_close(routed + SharedExperts(SHARED)(x, weights), whole)


def test_A5_kernel_must_declare_scale():
    spec, weights = layer(on_output=True)
    calls = []
    with toy_backend(recording(calls, applies_its_scale), applies_scale=True) as options:
        check(spec, weights, tokens(), options=options)
        plan = MoERunner(spec, weights, options=options).plan
    assert plan.step("scale") is None, "the kernel owns the factor, the plan may not scale again"
    assert calls[0].call.scale == 2.5
    calls.clear()
    with toy_backend(recording(calls)) as options:
        check(spec, weights, tokens(), options=options)
        plan = MoERunner(spec, weights, options=options).plan
    assert plan.step("scale") is not None, "the kernel does not declare the factor, the plan has to apply it"
    assert calls[0].call.scale == 1.0


def test_A5_a_kernel_that_forgets_to_declare_its_scale_gets_one():
    spec, weights = layer(on_output=True)
    with toy_backend(applies_its_scale) as options:
        check(spec, weights, tokens(), options=options)


@pytest.mark.parametrize("applies", [False, True])
@pytest.mark.parametrize("factor", [1.0, 2.5])
@OWNERS
def test_A6_the_kernel_gets_a_number_and_never_nothing(on_output, factor, applies):
    spec, weights = layer(factor, on_output)
    calls = []
    run = recording(calls, applies_its_scale if applies else eager.run)
    with toy_backend(run, applies_scale=applies) as options:
        check(spec, weights, tokens(), options=options)
    assert calls[0].call.scale == (factor if applies and on_output else 1.0)


@pytest.mark.parametrize("changes", [{}, {"shared": None}, {"zero_experts": 2}, {"join": "average"}], ids=str)
def test_A7_a_kernel_without_the_factor_loses_it_in_no_combination(changes):
    spec, weights = layer(on_output=True, **changes)
    with toy_backend(applies_scale=False) as options:
        check(spec, weights, tokens(), options=options)


@OWNERS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_A8_ep_equals_tp_equals_one_rank(layout, on_output):
    spec, weights = layer(on_output=on_output)
    check(spec, weights, tokens(11), layout=LAYOUTS[layout])


@pytest.mark.parametrize("factor", [1.0, 2.5, 0.4])
@OWNERS
def test_A9_the_shared_expert_weighs_exactly_one(on_output, factor):
    spec, weights = layer(factor, on_output)
    weights["w2"] = torch.zeros_like(weights["w2"])  # what is left is the shared expert
    y = check(spec, weights, tokens())
    assert_close(y, SharedExperts(SHARED)(tokens(), weights))


@pytest.mark.usefixtures("both_routes")
@pytest.mark.parametrize("factor", [1.0, 2.5, 0.4])
def test_A9_shared_experts_as_slots_of_the_router_are_scaled_with_it(factor):
    shared = SharedSpec(width=20, count=2, gate="router")
    spec, weights = layer(factor, False, shared=shared)
    check(spec, weights, tokens())
    slots = MoERunner(spec, weights).route(tokens())
    per_slot = torch.cat([slots.weights, slots.shared_weights], 1)
    assert_close(per_slot.sum(1), torch.full((7,), factor))  # normalised together, then times the factor
    with pytest.raises(SpecError, match="the factor is in the weights"):
        layer(factor, True, shared=shared)


@OWNERS
@pytest.mark.parametrize("dispatch", ["allgather", "alltoall"])
def test_A10_every_schedule_applies_the_factor_once(dispatch, on_output):
    spec, weights = layer(on_output=on_output)
    for layout in (Layout(ep=2, tokens="sharded"), Layout(ep=2, tp=2, tokens="sharded")):
        check(spec, weights, tokens(11), layout=layout, options=Options(dispatch=dispatch))


@OWNERS
def test_A10_two_half_batches_equal_the_whole_one(on_output):
    spec, weights = layer(on_output=on_output)
    x = tokens(12)
    runner = MoERunner(spec, weights)
    assert_close(torch.cat([runner(x[:5]), runner(x[5:])]), check(spec, weights, x))


@pytest.mark.usefixtures("both_routes")
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize(
    "renormalise",
    [{}, {"renormalise": "sum"}, {"renormalise": "max_sum", "eps": 1e-9}, {"renormalise": "p_norm", "p": 1.5}],
    ids=lambda given: given.get("renormalise", "none"),
)
@OWNERS
def test_A11_renormalising_does_not_eat_the_factor(on_output, renormalise, score):
    for factor in (1.0, 2.5):
        spec, weights = layer(factor, on_output, routing=RoutingSpec(score=score, **renormalise))
        check(spec, weights, tokens())


def test_A12_the_owner_follows_from_the_kernel_that_was_chosen():
    # Only relu is known to the kernel that scales: silu must go elsewhere, and the factor with it.
    for kind, toy in (("relu", True), ("silu", False)):
        spec = make_spec(factor=2.5, on_output=True, experts={"activation": ActivationSpec(kind=kind)}, shared=SHARED)
        weights = make_weights(spec)
        preferred = {"applies_scale": True, "activations": frozenset({"relu"}), "priority": {"cpu": 99}}
        with toy_backend(applies_its_scale, **preferred):
            plan = MoERunner(spec, weights).plan
            check(spec, weights, tokens())
        assert (plan.backend == "toy") == toy
        assert [s.verb for s in plan.steps if s.scales or s.verb == "scale"] == (["experts"] if toy else ["scale"])


@pytest.mark.parametrize("count", [1, 2, 40])
@pytest.mark.parametrize("preferred", ["the one that scales", "the one that does not"])
def test_A12_a_kernel_for_few_tokens_never_changes_the_owner(preferred, count):
    spec, weights = layer(on_output=True)
    high, low = ({"priority": {"cpu": 99}}, {"priority": {"cpu": 98}, "few_tokens": {"cpu": 8}})
    first = preferred == "the one that scales"
    with (
        toy_backend(applies_its_scale, name="scaling", applies_scale=True, **(high if first else low)),
        toy_backend(name="plain", **(low if first else high)),
    ):
        check(spec, weights, tokens(count))
        assert MoERunner(spec, weights).plan.backend == ("scaling" if first else "plain")


def test_A12_the_kernel_is_asked_for_each_dtype_apart():
    spec = make_spec(factor=2.5, on_output=True)
    doubles = {"cpu": frozenset({"float64"})}
    for dtype, scales in ((torch.float64, "experts"), (torch.float32, "scale")):
        weights = {n: t.to(dtype) for n, t in make_weights(spec).items()}
        with toy_backend(applies_its_scale, applies_scale=True, dtypes=doubles) as options:
            chosen = options if dtype == torch.float64 else Options()
            y = on_one(spec, weights, tokens(dtype=dtype), options=chosen)
            plan = MoERunner(spec, weights, options=chosen).plan
        assert_close(y, reference(spec, LayerWeights.of(spec, weights), tokens(dtype=dtype)))
        assert [s.verb for s in plan.steps if s.scales or s.verb == "scale"] == [scales]


@OWNERS
def test_A13_experts_split_over_two_kernels_are_scaled_alike(on_output):
    spec = make_spec(factor=2.5, on_output=on_output)
    weights = make_weights(spec)
    x = tokens(12)
    expected = check(spec, weights, x)
    topk = MoERunner(spec, weights).route(x)
    first = dataclasses.replace(topk, ids=torch.where(topk.ids < 4, topk.ids, -1))
    second = dataclasses.replace(topk, ids=torch.where(topk.ids >= 4, topk.ids, -1))
    assert (first.ids >= 0).any()
    assert (second.ids >= 0).any()
    with toy_backend(applies_its_scale, applies_scale=True) as options:
        one = MoERunner(spec, weights, options=options)(x, topk=first)
    other = MoERunner(spec, weights, options=Options(backend="eager"))(x, topk=second)
    assert_close(one + other, expected)


def test_A14_layers_that_share_a_kernel_do_not_share_a_factor():
    with toy_backend(applies_its_scale, applies_scale=True) as options:
        layers = [layer(factor, True) for factor in (2.5, 1.0, 0.4)]
        runners = [MoERunner(spec, weights, options=options) for spec, weights in layers]
        for _ in range(2):
            for runner, (spec, weights) in zip(runners, layers, strict=True):
                assert_close(runner(tokens()), reference(spec, LayerWeights.of(spec, weights), tokens()))


def test_A14_the_plain_function_has_no_factor_to_forget():
    spec, weights = layer(2.5, True, shared=None)
    x = tokens()
    topk = MoERunner(spec, weights).route(x)
    with toy_backend(applies_its_scale, applies_scale=True, name="scaling"):
        y = fused_experts(x, weights["w13"], weights["w2"], topk.weights, topk.ids, backend="scaling")
    assert_close(2.5 * y, check(spec, weights, x))


@OWNERS
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("top_k", [1, 8])
def test_A15_top_1_and_top_all_read_nothing_unwritten(top_k, backend, on_output):
    for factor in (1.0, 2.5):
        spec, weights = layer(factor, on_output, top_k=top_k)
        with poisoned_memory():
            check(spec, weights, tokens(), options=Options(backend=backend))


@pytest.mark.parametrize("shared", [None, SHARED, SharedSpec(width=20, gate="sigmoid")], ids=["alone", "shared", "gated"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@OWNERS
def test_A16_no_dtype_asks_the_decoder_to_compensate(on_output, dtype, shared):
    for factor in (1.0, 2.5, 0.4):
        spec = make_spec(factor=factor, on_output=on_output, shared=shared)
        check(spec, make_weights(spec, dtype=dtype), tokens(dtype=dtype))


@pytest.mark.parametrize("layout", ["tp2", "ep2 tp2", "sharded tokens, ep2", "sharded tokens, ep4"])
@OWNERS
def test_A16_nor_on_many_ranks_in_float16(on_output, layout):
    spec = make_spec(factor=2.5, on_output=on_output, shared=SHARED)
    check(spec, make_weights(spec, dtype=torch.float16), tokens(11, dtype=torch.float16), layout=LAYOUTS[layout])


@OWNERS
def test_A16_nor_around_transforms(on_output):
    spec = make_spec(factor=2.5, on_output=on_output, shared=SHARED, input_transform=NARROW, output_transform=WIDEN)
    check(spec, make_weights(spec, dtype=torch.float16), tokens(dtype=torch.float16), **inputs_for(spec, 7))
