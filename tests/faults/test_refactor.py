"""Faults that one refactor of an engine brought, by the number of their report, and those found by reading its source.

Both lists are in docs/faults.md.
"""

import copy
import dataclasses
import pickle
import threading

import pytest
import torch
from helpers import (
    BACKENDS,
    HIDDEN,
    LAYOUTS,
    NARROW,
    NORM,
    REPLICATED,
    ROUTERS,
    SHARED,
    WIDEN,
    assert_close,
    check,
    inputs_for,
    make_spec,
    make_weights,
    on_one,
    on_ranks,
    pad_experts,
    tokens,
    toy_backend,
)

import moerunner
from moerunner import (
    ActivationSpec,
    GroupSpec,
    Layout,
    MoERunner,
    Options,
    RoutingSpec,
    SharedSpec,
    SpecError,
    UnsupportedError,
)
from moerunner.experts import eager
from moerunner.experts.registry import names
from moerunner.ops.reference import reference
from moerunner.parallel.comm import simulate
from moerunner.values import LayerWeights

# What follows the experts, and the verb before which the routed rows must have been cut to their true width.
CUT = {
    "nothing": ({}, "finish"),
    "shared": ({"shared": SHARED}, "join"),
    "transform": ({"output_transform": NORM}, "output_transform"),
    "both": ({"shared": SHARED, "output_transform": NORM}, "output_transform"),
    "latent": ({"input_transform": NARROW, "output_transform": WIDEN}, "output_transform"),
    "zero experts": ({"zero_experts": 2}, "join"),
    "bias": ({"output_bias": True}, "join"),
    "norm at the end": ({"final_transform": NORM}, "final_transform"),
}


def padded_layer(follows, **more):
    spec = make_spec(factor=2.5, on_output=True, **CUT[follows][0], **more)
    return spec, pad_experts(make_weights(spec), spec.routed_hidden_size + 16, fill=3.0)


@pytest.mark.parametrize("layout", [None, "tp2", "ep2", "sharded tokens, ep2"])
@pytest.mark.parametrize("follows", CUT)
def test_40794_routed_rows_are_cut_before_anything_reads_their_width(follows, layout):
    spec, weights = padded_layer(follows)
    check(spec, weights, tokens(11), layout=LAYOUTS.get(layout))
    verbs = [s.verb for s in MoERunner(spec, weights).plan.steps]
    assert verbs.count("trim") == 1
    if CUT[follows][1] != "finish":
        assert verbs.index("trim") < verbs.index(CUT[follows][1])


def test_40865_without_shared_or_transform_the_cut_comes_last():
    spec, weights = padded_layer("nothing")
    plan = simulate(Layout(tp=2), lambda bound: MoERunner(spec, weights, bound).plan)[0]
    assert [s.verb for s in plan.steps][-1] == "trim"
    assert plan.states[-2]["out"].padded_to == HIDDEN + 16
    for layout in ("tp2", "ep2 tp2"):
        check(spec, weights, tokens(), layout=LAYOUTS[layout])


@pytest.mark.parametrize("transform", [None, NORM])
@pytest.mark.parametrize("shared", [None, SHARED])
def test_45707_a_shared_expert_or_a_transform_is_enough(shared, transform):
    spec = make_spec(shared=shared, output_transform=transform)
    weights = pad_experts(make_weights(spec), HIDDEN + 16)
    early = [s.value == "routed" for s in MoERunner(spec, weights).plan.steps if s.verb == "trim"]
    assert early == [shared is not None or transform is not None]
    check(spec, weights, tokens(), layout=LAYOUTS["tp2"])


@pytest.mark.parametrize("applies", [False, True])
@pytest.mark.parametrize("on_output", [False, True])
def test_45037_the_side_that_does_not_own_the_factor_gets_one(on_output, applies):
    spec = make_spec(factor=2.5, on_output=on_output, shared=SHARED)
    seen = []

    def run(x, topk, weights, call):
        seen.append((call.scale, topk.scaled))
        return eager.run(x, topk, weights, call) * (call.scale if applies else 1.0)

    with toy_backend(run, applies_scale=applies) as options:
        check(spec, make_weights(spec), tokens(), options=options)
    assert seen == [(2.5 if applies and on_output else 1.0, not on_output)]


@pytest.mark.parametrize("layout", [None, "tp2", "ep2", "sharded tokens, ep4"])
def test_43769_a_kernel_that_applies_the_factor_is_given_it(layout):
    spec = make_spec(factor=2.5, on_output=True, shared=SHARED)

    def run(x, topk, weights, call):
        y = eager.run(x, topk, weights, call)
        return y * call.scale

    with toy_backend(run, applies_scale=True) as options:
        check(spec, make_weights(spec), tokens(11), layout=LAYOUTS.get(layout), options=options)


@pytest.mark.parametrize("layout", REPLICATED)
@pytest.mark.parametrize("gate", ["none", "sigmoid"])
def test_49122_shared_experts_do_not_reduce_by_themselves(gate, layout):
    spec = make_spec(factor=2.5, on_output=True, shared=SharedSpec(width=20, gate=gate))
    record = []
    y = on_ranks(spec, make_weights(spec), tokens(), layout=LAYOUTS[layout], record=record)
    assert_close(y, reference(spec, LayerWeights.of(spec, make_weights(spec)), tokens()))
    assert {len(log) for _, _, log in record} == {1}


def test_38990_and_41306_the_plan_says_why_each_kernel_was_or_was_not_chosen():
    spec = make_spec(shared=SHARED)
    runner = MoERunner(spec, make_weights(spec))
    step = runner.plan.step("experts")
    assert {step.kernel, *dict(step.refused)} == set(names())
    assert step.reason
    assert all(reason for _, reason in step.refused)
    assert all(name in runner.explain() for name in names())


def test_what_plugins_and_users_import_stays_where_it_is():
    public = "MoERunner MoESpec RoutingSpec ExpertsSpec SharedSpec ActivationSpec GroupSpec TransformSpec Layout Options Plan"
    public += (
        " TopK ExpertWeights LayerWeights fused_experts resolve MoEError SpecError PlanError WeightsError UnsupportedError"
    )
    assert set(public.split()) <= set(moerunner.__all__)
    assert all(hasattr(moerunner, name) for name in moerunner.__all__)
    from moerunner.experts import choose, fused_experts, register

    assert all(callable(f) for f in (register, choose, fused_experts))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_685_whoever_looks_at_the_layers_output_sees_the_finished_one(layout):
    layout = LAYOUTS[layout]
    spec = make_spec(factor=2.5, on_output=True, shared=SHARED)
    weights, x = make_weights(spec), tokens(4)
    ref = reference(spec, LayerWeights.of(spec, weights), x)

    def main(bound):
        seen = []
        runner = MoERunner(spec, weights, bound)
        runner.register_forward_hook(lambda module, args, y: seen.append(y))
        runner(x)  # the same tokens on every rank, so that each must see the same result
        return seen[0]

    for y in simulate(layout, main):
        assert_close(y, ref)


def test_685_a_partial_sum_is_only_given_to_those_who_ask_and_the_plan_says_so():
    spec = make_spec(shared=SHARED)
    for output, last in (("replicate", "replicate"), ("partial", "partial")):
        options = Options(output=output)
        plan = simulate(Layout(tp=2), lambda bound, o=options: MoERunner(spec, make_weights(spec), bound, o).plan)[0]
        assert plan.wanted == last
        assert plan.states[-1]["out"].at("tp").is_partial() == (output == "partial")
        assert (" partial" in plan.explain().splitlines()[-2]) == (output == "partial")


@pytest.mark.parametrize("shared", [SHARED, SharedSpec(width=20, gate="sigmoid")], ids=["plain", "gated"])
@pytest.mark.parametrize("factor", [1.8, 2.5])
def test_reading_1_float16_with_a_shared_expert_is_not_divided_by_the_factor(factor, shared):
    spec = make_spec(factor=factor, on_output=True, shared=shared)
    weights, x = make_weights(spec, dtype=torch.float16), tokens(dtype=torch.float16)
    half = check(spec, weights, x)
    wide = MoERunner(spec, {n: t.float() for n, t in weights.items()})(x.float())
    assert_close(half, wide, 1e-3)


def test_reading_2_nothing_that_a_plan_was_made_from_can_be_changed_behind_it():
    spec = make_spec(shared=SHARED)
    plan = MoERunner(spec, make_weights(spec)).plan
    for frozen in (spec, spec.routing, spec.experts, spec.shared, Layout(), Options(), plan, plan.steps[0]):
        for field in dataclasses.fields(frozen):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(frozen, field.name, None)


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("bias", [False, True])
def test_reading_3_a_grouping_never_falls_back_to_another_formula(score, bias):
    for groups in (GroupSpec(count=3, kept=1), GroupSpec(count=4, kept=1)):
        with pytest.raises(SpecError):
            make_spec(RoutingSpec(score=score, selection_bias=bias, groups=groups), factor=2.5, top_k=3)
    good = make_spec(RoutingSpec(score=score, selection_bias=bias, groups=GroupSpec(count=4, kept=2)), factor=2.5, top_k=3)
    check(good, make_weights(good), tokens())


@pytest.mark.parametrize("backend", BACKENDS)
def test_reading_4_and_5_limits_are_the_configured_ones(backend):
    for limit in (0.25, 1.0, 7.0):
        for kind in ("silu", "swigluoai"):
            for after in (False, True):
                act = ActivationSpec(kind=kind, limit=limit, clamp_after=after, alpha=1.3 if kind == "swigluoai" else None)
                spec = make_spec(experts={"activation": act})
                check(spec, make_weights(spec), 4 * tokens(), options=Options(backend=backend))
    with toy_backend(activations=frozenset({"silu"})) as options, pytest.raises(UnsupportedError, match="limit"):
        MoERunner(spec, make_weights(spec), options=options)


def test_reading_7_and_8_a_forward_leaves_nothing_behind():
    spec = make_spec(ROUTERS["biased sigmoid"], factor=2.5, on_output=True, shared=SHARED, zero_experts=2)
    runner = MoERunner(spec, make_weights(spec))
    runner(tokens())
    before = {name: id(v) for name, v in vars(runner).items()}
    state = {name: t.clone() for name, t in runner.state_dict().items()}
    with pytest.raises(SpecError):
        runner(tokens(), router_logits=torch.zeros(1, 1))
    runner.route(tokens(3))
    y = runner(tokens(5))
    assert {name: id(v) for name, v in vars(runner).items()} == before
    assert all(torch.equal(t, state[name]) for name, t in runner.state_dict().items())
    assert torch.equal(y, MoERunner(spec, make_weights(spec))(tokens(5)))


def test_reading_7_and_8_nor_do_two_at_once_meet():
    spec = make_spec(factor=2.5, on_output=True, shared=SHARED, zero_experts=2)
    runner = MoERunner(spec, make_weights(spec))
    expected = [runner(tokens(5, seed=s)) for s in range(4)]
    wrong = []

    def work(seed):
        for _ in range(10):
            if not torch.equal(runner(tokens(5, seed=seed)), expected[seed]):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(s,)) for s in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("router", ["biased sigmoid", "token table", "two modalities"])
def test_reading_7_and_8_a_copy_stands_on_its_own(router):
    spec = make_spec(ROUTERS[router], factor=2.5, on_output=True, shared=SHARED)
    runner, inputs = MoERunner(spec, make_weights(spec)), inputs_for(spec, 7)
    expected = runner(tokens(), **inputs)
    for other in (copy.deepcopy(runner), pickle.loads(pickle.dumps(runner))):
        assert torch.equal(other(tokens(), **inputs), expected)
        with torch.no_grad():
            for t in other.state_dict().values():
                if t.is_floating_point():
                    t.zero_()
        assert torch.equal(runner(tokens(), **inputs), expected)
        assert torch.equal(on_one(spec, make_weights(spec), tokens(), **inputs), expected)
