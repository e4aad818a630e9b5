"""`explain()` and `Plan.to_dict()`: for every layer and layout, true, whole and the same on every rank."""

from __future__ import annotations

import json
import re

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.strategies import SEEDS, STORAGES, layouts, make_weights, options_for, specs

from moerunner import ExpertsSpec, Layout, MoERunner, MoESpec, Options, Plan, RoutingSpec, SharedSpec
from moerunner.experts.registry import names
from moerunner.parallel.comm import simulate

SPEC = MoESpec(
    hidden_size=16,
    num_experts=8,
    top_k=2,
    routing=RoutingSpec(score="sigmoid", renormalise="sum"),
    experts=ExpertsSpec(intermediate_size=8),
    shared=SharedSpec(width=8),
    routed_scaling_factor=2.5,
    apply_routed_scale_to_output=True,
)


@st.composite
def plans(draw: st.DrawFn) -> list[Plan]:
    """The plan of every rank of a layer."""
    spec = draw(specs())
    layout = draw(st.just(Layout()) | layouts(spec.num_experts))
    weights, options = make_weights(spec, draw(SEEDS), storage=draw(STORAGES)), draw(options_for(layout))
    options = options.replace(grad=draw(st.sampled_from([None, True])))
    if layout.world == 1:
        return [MoERunner(spec, weights, options=options).plan]
    return simulate(layout, lambda bound: MoERunner(spec, weights, bound, options).plan)


@settings(max_examples=50)
@given(plans())
def test_every_step_every_reason_and_every_collective_is_told(all_plans):
    plan = all_plans[0]
    text, data = plan.explain(), plan.to_dict()
    lines = text.splitlines()
    numbered = [line for line in lines if re.match(r" *\d+\. ", line)]
    assert len(numbered) == len(plan.steps)
    for step, line in zip(plan.steps, numbered, strict=True):
        assert step.name in line
        assert not step.reason or f"because {step.reason}" in text
        assert all(f"not {kernel}: {reason}" in text for kernel, reason in step.refused)
    assert lines[0].startswith(f"plan {plan.fingerprint}: {plan.dtype} on {plan.device}")
    told = {line.split(":")[0]: line for line in lines[1 + len(numbered) :] if not line.startswith(" ")}
    assert told["collectives"].count(" over ") == len(plan.collectives)
    assert ("none" in told["collectives"]) == (not plan.collectives)
    assert told.get("before them, counts of rows", "").count(" over ") == len(plan.counts)
    assert ("backward" in told) == bool(plan.options.grad)
    assert told.get("backward", "").count(" over ") == len(plan.backward_collectives) * bool(plan.options.grad)
    assert data["overlaps"] == [s.verb for s in plan.steps if "runs while the routed tokens travel" in s.reason]
    assert json.loads(json.dumps(data)) == data
    assert [row["verb"] for row in data["steps"]] == [s.verb for s in plan.steps]
    assert [(c["kind"], tuple(c["axes"])) for c in data["collectives"]] == list(plan.collectives)
    assert data["bytes_per_rank_per_token"] == plan.bytes_per_token() >= 0
    assert (plan.bytes_per_token() > 0) == bool(plan.collectives)
    assert data["world"] == plan.layout.world


@settings(max_examples=50)
@given(plans())
def test_every_backend_is_chosen_or_refused_with_a_reason(all_plans):
    experts = all_plans[0].step("experts")
    told = {experts.kernel, *(kernel for kernel, _ in experts.refused)}
    if experts.reason.startswith("asked for"):
        assert not experts.refused
    else:
        assert told == set(names())
    assert all(reason for _, reason in experts.refused)
    assert experts.reason


@settings(max_examples=50)
@given(plans())
def test_the_last_state_is_what_was_asked_for(all_plans):
    plan = all_plans[0]
    last = plan.to_dict()["steps"][-1]["state"]
    assert last.startswith(f"[T, {plan.spec.hidden_size}] weighted summed scaled")
    partial = plan.options.output == "partial" and bool(plan.layout.split_axes)
    assert ("partial" in last) == partial


@settings(max_examples=30)
@given(plans())
def test_ranks_agree_on_the_fingerprint(all_plans):
    assert len({plan.fingerprint for plan in all_plans}) == 1
    assert len({plan.collectives for plan in all_plans}) == 1


def fingerprint(spec: MoESpec = SPEC, layout: Layout | None = None, dtype: torch.dtype = torch.float32, **options) -> str:
    weights = make_weights(spec, 0, dtype)
    place = layout or Layout(tp=2)
    return simulate(place, lambda bound: MoERunner(spec, weights, bound, Options(**options)).plan.fingerprint)[0]


def test_what_ranks_must_agree_on_is_in_the_fingerprint():
    others = [
        fingerprint(),
        fingerprint(MoESpec.from_dict({**SPEC.to_dict(), "routed_scaling_factor": 1.5})),
        fingerprint(layout=Layout(ep=2)),
        fingerprint(layout=Layout(tp=2, shared="replicated")),
        fingerprint(layout=Layout(ep=2, placement="round_robin")),
        fingerprint(layout=Layout(ep=2, redundant=1)),
        fingerprint(layout=Layout(ep=2, tokens="sharded"), dispatch="alltoall"),
        fingerprint(layout=Layout(ep=2, tokens="sharded"), dispatch="allgather"),
        fingerprint(dtype=torch.bfloat16),
        fingerprint(output="shard"),
        fingerprint(output="partial"),
        fingerprint(reduce_dtype=torch.bfloat16),
    ]
    assert len(set(others)) == len(others)
    assert fingerprint() == fingerprint(backend="eager"), "a rank may run its own kernels"


def test_a_plan_for_people():
    weights = make_weights(SPEC, 0)
    layout = Layout(ep=2, tp=2)
    text = simulate(layout, lambda bound: MoERunner(SPEC, weights, bound).explain())[0]
    for part in (
        "float32 on cpu, dp 1 x ep 2 x tp 2, tokens replicated",
        "gate",
        "because reads the caller's tokens at full width",
        "scale",
        "because the spec applies its factor 2.5 to the output",
        "reduce out over ep+tp",
        "because the one reduction of routed and shared together",
        "collectives: all_reduce over ep+tp; 96 bytes sent per rank and token",
    ):
        assert part in text, text
