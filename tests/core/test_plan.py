"""A plan that passes its check computes the right answer, and a plan that would not cannot be built."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tests.faults.helpers import toy_backend
from tests.support.numerics import relative_error

from moerunner import (
    ExpertsSpec,
    LayerWeights,
    Layout,
    Linear,
    MoERunner,
    MoESpec,
    Options,
    Plan,
    PlanError,
    RMSNorm,
    RoutingSpec,
    SharedSpec,
    TransformSpec,
)
from moerunner.execute import Verbs
from moerunner.experts import eager
from moerunner.ops.reference import reference
from moerunner.parallel.comm import simulate
from moerunner.parallel.layout import BoundLayout
from moerunner.plan import Step
from moerunner.values import AXES

WIDTH, LATENT = 16, 8


def spec_of(**changes: Any) -> MoESpec:
    base: dict[str, Any] = {
        "hidden_size": WIDTH,
        "num_experts": 6,
        "top_k": 2,
        "routing": RoutingSpec(score="sigmoid", renormalise="sum", eps=1e-20),
        "experts": ExpertsSpec(intermediate_size=10),
        "routed_scaling_factor": 2.5,
        "apply_routed_scale_to_output": True,
    }
    return MoESpec(**{**base, **changes})


SHARED = SharedSpec(width=12)
NORM = TransformSpec((RMSNorm(features=WIDTH),))
DOWN = TransformSpec((Linear(in_features=WIDTH, out_features=LATENT),))
UP = TransformSpec((Linear(in_features=LATENT, out_features=WIDTH),))
UP_NORM = TransformSpec((Linear(in_features=LATENT, out_features=WIDTH), RMSNorm(features=WIDTH)))
ROWS = ExpertsSpec(intermediate_size=10, row_norm=RMSNorm(features=WIDTH))

SPECS = {
    "plain": spec_of(),
    "factor in weights": spec_of(apply_routed_scale_to_output=False, shared=SHARED),
    "shared": spec_of(shared=SHARED),
    "latent, linear": spec_of(shared=SHARED, input_transform=DOWN, output_transform=UP),
    "latent, norm": spec_of(shared=SHARED, input_transform=DOWN, output_transform=UP_NORM),
    "final norm": spec_of(shared=SHARED, final_transform=NORM),
    "row norm": spec_of(shared=SHARED, experts=ROWS),
    "zero experts": spec_of(zero_experts=3, top_k=3, join="sum"),
    "average, bias": spec_of(shared=SHARED, join="average", output_bias=True),
    "no factor": spec_of(routed_scaling_factor=1.0, shared=SHARED),
}
LAYOUTS = {
    "one": Layout(),
    "tp2": Layout(tp=2),
    "ep2": Layout(ep=2),
    "ep2 tp2": Layout(ep=2, tp=2),
    "tp2 shared whole": Layout(tp=2, shared="replicated"),
    "sharded ep2": Layout(ep=2, tokens="sharded"),
    "sharded ep4": Layout(ep=4, tokens="sharded"),
    "sharded ep2 tp2": Layout(ep=2, tp=2, tokens="sharded"),
}
PAD = 3  # experts' weights are stored this much wider, so that pads and trims are in the plans


def weights_of(spec: MoESpec, pad: int) -> LayerWeights:
    tensors = {n: torch.randn(shape) * 0.4 for n, shape in spec.weight_shapes().items()}
    for name, tensor in tensors.items():
        kind = name.split(".")[0]  # modality sets have a number behind it
        if kind in ("w13", "w2", "row_norm"):
            tensors[name] = torch.nn.functional.pad(tensor, (0, 0, 0, pad) if kind == "w2" else (0, pad))
    return LayerWeights.of(spec, tensors)


def tokens_of(layout: Layout, count: int = 6) -> list[torch.Tensor]:
    whole = torch.randn(count, WIDTH)
    if layout.tokens == "replicated":
        return [whole] * layout.world
    return [torch.randn(n, WIDTH) for n in ([3, 0, 2, 4] * layout.world)[: layout.world]]


def mutations(steps: tuple[Step, ...]) -> Iterator[tuple[str, tuple[Step, ...]]]:
    """Every plan that one slip would make: a step left out, done twice, or changed places with the next."""
    for i, step in enumerate(steps):
        yield f"without {step.name}", steps[:i] + steps[i + 1 :]
        yield f"twice {step.name}", steps[: i + 1] + steps[i:]
        if i + 1 < len(steps):
            swapped = (*steps[:i], steps[i + 1], step, *steps[i + 2 :])
            yield f"{steps[i + 1].name} before {step.name}", swapped


def run(plan: Plan, bound: BoundLayout, runner: MoERunner, x: torch.Tensor) -> torch.Tensor:
    runner._verbs.clear()
    runner._verbs["cpu", x.dtype, False] = Verbs(plan, bound.comm, runner._slots)
    runner._agreed = {x.dtype}
    return runner(x)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SPECS)
def test_one_slip_is_refused_or_harmless(name: str, layout: str) -> None:
    spec, place = SPECS[name], LAYOUTS[layout]
    weights, rows = weights_of(spec, PAD), tokens_of(place)
    expected = [reference(spec, weights, x) for x in rows]
    plan = simulate(place, lambda bound: MoERunner(spec, weights, bound).plan)[0]
    refused, legal, named = 0, 0, set()
    for what, steps in mutations(plan.steps):
        try:
            changed = dataclasses.replace(plan, steps=steps)
        except PlanError as error:
            named.update((error.first, error.second))
            refused += 1
            continue
        legal += 1

        def rank_main(bound: BoundLayout, changed: Plan = changed) -> torch.Tensor:
            with torch.no_grad():
                return run(changed, bound, MoERunner(spec, weights, bound), rows[bound.comm.rank])

        for y, ref in zip(simulate(place, rank_main), expected, strict=True):
            assert y.shape == ref.shape, what
            if ref.numel():
                assert relative_error(y, ref) <= 2e-6, what
    assert refused >= 8, (refused, legal)
    assert "" not in named


def moved(steps: tuple[Step, ...]) -> Iterator[tuple[str, tuple[Step, ...]]]:
    """One step at every other place, and once more at every place."""
    for i, step in enumerate(steps):
        rest = steps[:i] + steps[i + 1 :]
        for j in range(len(steps)):
            yield f"{step.name} moved to {j}", (*rest[:j], step, *rest[j:])
            yield f"{step.name} again at {j}", (*steps[:j], step, *steps[j:])


def foreign(steps: tuple[Step, ...], layout: Layout) -> Iterator[tuple[str, tuple[Step, ...]]]:
    """A reduction, selection, split, trim or factor of any value, at any verb, at every place."""
    axes = [*[(a,) for a in layout.split_axes], layout.split_axes]
    extra = [
        Step(verb="scale"),
        Step(verb="scale", value="shared"),
        Step(verb="scale", value="out"),
        Step(verb="pad", width=99),
    ]
    for at in ("", "row_norm", "combine", "scale", "output_transform", "join", "final_transform", "finish"):
        for value in ("routed", "shared", "zero", "out", "topk"):
            extra.append(Step(verb="trim", value=value, at=at, width=WIDTH))
            for over in axes if layout.split_axes else ():
                extra += [Step(verb=v, value=value, at=at, axes=over, dtype="float32") for v in ("reduce", "select", "shard")]
                extra.append(Step(verb="reduce", value=value, at=at, axes=over, dtype="float32", scatter=True))
    for step in extra:
        for j in range(len(steps) + 1):
            yield f"{step.name} of {step.value} at '{step.at}' in place {j}", (*steps[:j], step, *steps[j:])


def altered(steps: tuple[Step, ...], layout: Layout, *facts: str) -> Iterator[tuple[str, tuple[Step, ...]]]:
    """One field of one step another: what it says of itself (`facts` too), its axes, its value, its place."""
    for i, step in enumerate(steps):
        changes: list[dict[str, Any]] = [
            {f: not getattr(step, f)} for f in ("linear", "scales", "weighs", "sums", "rounds", "scatter", *facts)
        ]
        for name in ("axes", "gathers"):
            now = getattr(step, name)
            changes += [{name: tuple(b for b in AXES if (b in now) != (b == a))} for a in layout.split_axes]
        if step.verb != "pad":  # an absurd width of a pad is found by the first product, loudly
            changes += [{name: getattr(step, name) + n} for name in ("width", "takes") for n in (-1, 1, PAD)]
        changes += [{name: v} for name in ("value", "reads") for v in ("routed", "shared", "zero", "out", "topk", "tokens")]
        changes += [{"at": at} for at in ("", "combine", "join", "finish", "output_transform", "row_norm", "nowhere")]
        for change in changes:
            if any(getattr(step, f) != v for f, v in change.items()):
                yield f"{step.name} with {change}", (*steps[:i], dataclasses.replace(step, **change), *steps[i + 1 :])


def check_any_slip(
    name: str, layout: str, *facts: str, runs: int | None, options: Options | None = None, pad: int = PAD
) -> None:
    """Every plan that is one step or one field away is refused, with both steps named, or computes the right answer."""
    spec, place = SPECS[name], LAYOUTS[layout]
    weights, rows = weights_of(spec, pad), tokens_of(place)
    expected = [reference(spec, weights, x) for x in rows]
    plan = simulate(place, lambda bound: MoERunner(spec, weights, bound, options).plan)[0]
    legal, tried, named = [], 0, True
    for what, steps in (*moved(plan.steps), *foreign(plan.steps, place), *altered(plan.steps, place, *facts)):
        tried += 1
        try:
            changed = dataclasses.replace(plan, steps=steps)
        except PlanError as error:
            named = named and error.first != "" != error.second
        else:
            if steps != plan.steps:
                legal.append((what, changed))
    assert named
    assert tried > 200
    assert len(legal) < tried
    for what, changed in legal if runs is None else random.sample(legal, min(runs, len(legal))):

        def rank_main(bound: BoundLayout, changed: Plan = changed) -> torch.Tensor:
            with torch.no_grad():
                return run(changed, bound, MoERunner(spec, weights, bound, options), rows[bound.comm.rank])

        for y, ref in zip(simulate(place, rank_main), expected, strict=True):
            assert relative_error(y, ref) <= 2e-6, what


def adds_shared(x, topk, weights, call, addend=None):
    y = eager.run(x, topk, weights, call) * call.scale
    return y if addend is None else y + addend.output()


ADDING: dict[str, Any] = {"run": adds_shared, "adds": True, "applies_scale": True}


ADDED = {  # where a kernel that can adds the shared experts: one sum with the routed ones, and nothing between
    (name, layout): name not in ("plain", "zero experts", "latent, linear", "latent, norm", "row norm")
    and layout in ("one", "tp2", "ep2", "ep2 tp2")
    for name in SPECS
    for layout in LAYOUTS
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SPECS)
def test_a_kernel_that_can_adds_the_shared_experts(name: str, layout: str) -> None:
    """Where it may, and once: the result is the same."""
    spec, place, asked = SPECS[name], LAYOUTS[layout], []
    weights, rows = weights_of(spec, 0), tokens_of(place)

    def recorded(*given):
        asked.append(len(given) == 5)
        return adds_shared(*given)

    with toy_backend(**{**ADDING, "run": recorded}) as options, torch.no_grad():
        found = simulate(place, lambda bound: MoERunner(spec, weights, bound, options)(rows[bound.comm.rank]))
        plan = simulate(place, lambda bound: MoERunner(spec, weights, bound, options).plan)[0]
    assert set(asked) == {ADDED[name, layout]}
    assert ("adds the shared experts" in plan.explain()) == ADDED[name, layout]
    with toy_backend(**{**ADDING, "adds": False}) as without:
        assert plan.fingerprint == plan_of(spec, place, without).fingerprint
    for y, x in zip(found, rows, strict=True):
        assert relative_error(y, reference(spec, weights, x)) <= 2e-6 if len(x) else y.shape == x.shape


def test_shared_experts_that_are_trained_are_added_apart() -> None:
    """They begin before the tokens are marked as the beginning of a sum over ranks, whose gradients are added up."""
    with toy_backend(**ADDING, backward=True) as options:
        for grad, added in ((False, True), (True, False)):
            plan = plan_of(SPECS["shared"], LAYOUTS["tp2"], options.replace(grad=grad))
            step = plan.step("experts")
            assert step is not None
            assert step.adds == added


def test_any_slip_of_a_kernel_that_adds_is_refused_or_harmless() -> None:
    with toy_backend(**ADDING) as options:
        for name, layout in random.sample(list(ADDED), 3):
            check_any_slip(name, layout, "adds", runs=15, options=options, pad=0)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "layout"), [where for where, added in ADDED.items() if added])
def test_any_slip_of_a_kernel_that_adds_is_refused_or_harmless_everywhere(name: str, layout: str) -> None:
    with toy_backend(**ADDING) as options:
        check_any_slip(name, layout, "adds", runs=None, options=options, pad=0)


@pytest.mark.parametrize(
    ("name", "layout", "changes", "what"),
    [
        ("plain", "one", {}, "reads 'shared', which no step before it makes"),
        ("latent, linear", "one", {}, "before an output transform of the routed part alone"),
        ("row norm", "one", {}, "never been weighted"),
        ("tp2 shared", "tp2 shared whole", {}, "adds Partial"),
        ("average, bias", "one", {"rounds": True}, "rounded already"),
        ("average", "one", {"rounds": True}, "averages a value that has been rounded"),
        ("sets", "one", {}, "before sets of experts"),
    ],
)
def test_shared_experts_that_a_kernel_must_not_add(name: str, layout: str, changes: dict[str, Any], what: str) -> None:
    specs = {
        "tp2 shared": SPECS["shared"],
        "average": spec_of(shared=SHARED, join="average"),
        "sets": spec_of(shared=SHARED, routing=dataclasses.replace(spec_of().routing, modalities=2)),
    }
    with toy_backend(**ADDING) as options:
        plan = plan_of({**SPECS, **specs}[name], LAYOUTS[layout], options)
    steps = tuple(dataclasses.replace(s, adds=True, **changes) if s.verb == "experts" else s for s in plan.steps)
    with pytest.raises(PlanError, match=what):
        dataclasses.replace(plan, steps=steps)


def test_any_slip_is_refused_or_harmless() -> None:
    for name, layout in random.sample([(name, layout) for name in SPECS for layout in LAYOUTS], 3):
        check_any_slip(name, layout, runs=15)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", SPECS)
def test_any_slip_is_refused_or_harmless_everywhere(name: str, layout: str) -> None:
    check_any_slip(name, layout, runs=None)


def plan_of(spec: MoESpec, layout: Layout | None = None, options: Options | None = None, pad: int = 0) -> Plan:
    weights = weights_of(spec, pad)
    return simulate(layout or Layout(), lambda bound: MoERunner(spec, weights, bound, options).plan)[0]


def insert(plan: Plan, step: Step, *, after: str) -> Plan:
    at = next(i for i, s in enumerate(plan.steps) if s.verb == after) + 1
    return dataclasses.replace(plan, steps=(*plan.steps[:at], step, *plan.steps[at:]))


@pytest.mark.parametrize(
    ("step", "after", "spec", "layout", "first", "what"),
    [
        (Step(verb="scale"), "scale", "plain", "one", "scale", "second time"),
        (Step(verb="scale"), "combine", "factor in weights", "one", "route", "second time"),
        (Step(verb="scale"), "combine", "no factor", "one", "the spec (factor 1)", "second time"),
        (Step(verb="reduce", axes=("tp",)), "combine", "plain", "one", "the input", "reduces over tp"),
        (Step(verb="reduce", value="out", axes=("tp",)), "reduce", "plain", "tp2", "reduce out over tp", "reduces over tp"),
        (Step(verb="reduce", axes=("ep",)), "combine", "shared", "sharded ep2", "combine (allgather)", "reduces over ep"),
        (Step(verb="select", axes=("tp",)), "combine", "plain", "tp2", "experts", "needs the whole value"),
        (Step(verb="row_norm"), "combine", "plain", "one", "the spec", "is not part of the layer"),
        (Step(verb="trim", width=WIDTH), "combine", "plain", "one", "the input", "no padding"),
        (Step(verb="pad", width=8), "route", "plain", "one", "the input", "would cut"),
        (Step(verb="pad", width=WIDTH), "join", "final norm", "one", "join (routed + shared)", "carries out later"),
        (Step(verb="trim", value="zero"), "route", "plain", "one", "the input", "reads 'zero'"),
        (Step(verb="shard", axes=("tp",)), "combine", "plain", "tp2", "the input", "reads 'out'"),
        (Step(verb="finish"), "join", "plain", "one", "the spec", "no verb 'finish'"),
        (
            Step(verb="output_transform", takes=WIDTH, width=WIDTH, linear=False),
            "combine",
            "no factor",
            "tp2",
            "the spec",
            "is not part of the layer",
        ),
    ],
)
def test_an_inserted_step_names_the_one_it_contradicts(
    step: Step, after: str, spec: str, layout: str, first: str, what: str
) -> None:
    plan = plan_of(SPECS[spec], LAYOUTS[layout])
    with pytest.raises(PlanError, match=what) as caught:
        insert(plan, step, after=after)
    named = plan.step(first)
    assert caught.value.first == (first if named is None else named.name)
    assert caught.value.second.startswith(step.verb)


@pytest.mark.parametrize(
    ("changes", "layout", "what"),
    [
        ({}, "one", "scales"),
        ({"shared": SHARED}, "one", "adds to"),
        ({"zero_experts": 2}, "one", "adds to"),
        ({"output_bias": True}, "one", "adds a bias to"),
        ({}, "tp2", "reduces"),
        ({"output_transform": NORM}, "one", "transforms"),
        ({"final_transform": NORM}, "one", "transforms"),
        ({"experts": ROWS}, "one", "has not been summed"),
        ({"routing": dataclasses.replace(spec_of().routing, modalities=2)}, "one", "each set of experts has rounded"),
    ],
)
def test_what_a_kernel_has_rounded_is_not_computed_with(changes: dict[str, Any], layout: str, what: str) -> None:
    factor = {} if what == "scales" else {"routed_scaling_factor": 1.0}
    plan = plan_of(spec_of(**factor, **changes), LAYOUTS[layout])
    steps = tuple(dataclasses.replace(s, rounds=True) if s.verb == "experts" else s for s in plan.steps)
    with pytest.raises(PlanError, match=what) as caught:
        dataclasses.replace(plan, steps=steps)
    assert caught.value.first == f"experts ({plan.backend})" or what == "has not been summed"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("changes", "pad", "last"),
    [({}, 0, True), ({}, PAD, True), ({"shared": SHARED}, 0, False), ({"output_bias": True}, 0, False), ({}, "tp2", False)],
)
def test_a_kernel_that_can_rounds_where_its_sum_is_the_output(changes, pad, last, dtype) -> None:
    """One rounding in either case; asked of the kernel it spares a launch."""
    spec, asked = spec_of(routed_scaling_factor=1.0, **changes), []
    layout, pad = (LAYOUTS[pad], 0) if isinstance(pad, str) else (Layout(), pad)
    weights = weights_of(spec, pad).map(lambda _, t: t.to(dtype) if t.is_floating_point() else t)
    x = torch.randn(5, WIDTH, dtype=dtype)

    def run(x, topk, weights, call):
        asked.append(call.output)
        y = eager.run(x, topk, weights, dataclasses.replace(call, output="summed"))
        return y.to(x.dtype) if call.output == "final" else y

    def on_a_rank(bound: BoundLayout, options: Options) -> torch.Tensor:
        with torch.no_grad():
            return MoERunner(spec, weights, bound, options)(x)

    plain = simulate(layout, lambda bound: on_a_rank(bound, Options(backend="eager")))
    with toy_backend(run, rounds=True) as options:
        found = simulate(layout, lambda bound: on_a_rank(bound, options))
    half = dtype != torch.float32
    assert set(asked) == {"final" if last and half else "summed"}
    assert all(torch.equal(y, other) for y, other in zip(found, plain, strict=True))


def test_what_is_not_linear_waits_for_the_reduction() -> None:
    plan = plan_of(SPECS["latent, norm"], LAYOUTS["tp2"])
    with pytest.raises(PlanError, match="not linear and the value is a partial sum over tp") as caught:
        dataclasses.replace(plan, steps=tuple(s for s in plan.steps if s.at != "output_transform"))
    assert caught.value.first == f"experts ({plan.backend})"
    assert caught.value.second.startswith("output_transform")


@pytest.mark.parametrize("verb", ["gate", "shared"])
def test_gate_and_shared_experts_read_the_callers_tokens(verb: str) -> None:
    plan = plan_of(SPECS["latent, linear"])
    moved = [s for s in plan.steps if s.verb != verb]
    bad = dataclasses.replace(next(s for s in plan.steps if s.verb == verb), reads="routed")
    at = next(i for i, s in enumerate(moved) if s.verb == "input_transform") + 1
    with pytest.raises(PlanError, match="instead of the caller's tokens") as caught:
        dataclasses.replace(plan, steps=(*moved[:at], bad, *moved[at:]))
    assert caught.value.first.startswith("input_transform") or caught.value.second.startswith("dispatch")


@pytest.mark.parametrize("layout", ["tp2", "ep2 tp2", "sharded ep2 tp2"])
def test_a_replicated_bias_counts_once(layout: str) -> None:
    plan = plan_of(SPECS["average, bias"], LAYOUTS[layout])
    at = next(i for i, s in enumerate(plan.steps) if s.verb == "join")
    for axes in ((), ("ep",), ("tp",), ("ep", "tp")):
        steps = (*plan.steps[:at], dataclasses.replace(plan.steps[at], axes=axes), *plan.steps[at + 1 :])
        if axes == plan.steps[at].axes:
            dataclasses.replace(plan, steps=steps)
            continue
        with pytest.raises(PlanError, match="counts a bias once") as caught:
            dataclasses.replace(plan, steps=steps)
        assert caught.value.second == "join (average)"


MINIMAL = {
    "tp2": (("all_reduce", ("tp",)),),
    "ep2": (("all_reduce", ("ep",)),),
    "ep2 tp2": (("all_reduce", ("ep", "tp")),),
    "tp2 shared whole": (("all_reduce", ("tp",)),),
    "sharded ep2": (("all_gather", ("ep",)), ("reduce_scatter", ("ep",))),
    "sharded ep4": (("all_to_all", ("ep",)), ("all_to_all", ("ep",))),
}


@pytest.mark.parametrize("layout", MINIMAL)
@pytest.mark.parametrize("name", ["plain", "shared", "latent, linear", "final norm", "average, bias"])
def test_as_few_collectives_as_can_be(name: str, layout: str) -> None:
    assert plan_of(SPECS[name], LAYOUTS[layout]).collectives == MINIMAL[layout]


def test_a_norm_costs_a_reduction_of_its_own() -> None:
    issued = plan_of(SPECS["latent, norm"], LAYOUTS["tp2"]).collectives
    assert issued == (("all_reduce", ("tp",)), ("all_reduce", ("tp",)))
    assert plan_of(SPECS["latent, norm"], LAYOUTS["tp2 shared whole"]).collectives == (("all_reduce", ("tp",)),)


def test_partial_output_is_left_to_the_caller() -> None:
    spec = SPECS["average, bias"]
    weights, x = weights_of(spec, PAD), torch.randn(5, WIDTH)
    for layout in (LAYOUTS["tp2"], LAYOUTS["ep2 tp2"], LAYOUTS["tp2 shared whole"]):
        parts = simulate(layout, lambda bound: MoERunner(spec, weights, bound, Options(output="partial"))(x))
        assert relative_error(torch.stack(parts).double().sum(0), reference(spec, weights, x)) <= 2e-6
        assert plan_of(spec, layout, Options(output="partial")).collectives == ()


def test_fingerprints_tell_layers_apart_and_not_kernels() -> None:
    plan = plan_of(SPECS["shared"], LAYOUTS["tp2"])
    assert plan.fingerprint == plan_of(SPECS["shared"], LAYOUTS["tp2"], Options(backend="eager")).fingerprint
    others = [(SPECS["plain"], LAYOUTS["tp2"]), (SPECS["shared"], LAYOUTS["ep2"]), (SPECS["no factor"], LAYOUTS["tp2"])]
    assert plan.fingerprint not in {plan_of(*other).fingerprint for other in others}


def test_explain_says_what_runs_and_why() -> None:
    plan = plan_of(SPECS["latent, norm"], LAYOUTS["ep2 tp2"], pad=PAD)
    text = plan.explain()
    for part in (f"experts ({plan.backend})", "not grouped_mm: needs", "is not linear", "8 of 11", "all_reduce over ep+tp"):
        assert part in text, text
