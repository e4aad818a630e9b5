"""Section B of docs/faults.md: reductions, shared experts and ranks. Ranks are simulated, as threads of this process."""

import contextlib
import dataclasses
import threading

import pytest
import torch
from helpers import (
    BACKENDS,
    EXPERTS,
    HIDDEN,
    LAYOUTS,
    NARROW,
    NORM,
    REPLICATED,
    SHARDED,
    SHARED,
    TRAINABLE,
    WIDEN,
    assert_close,
    check,
    error,
    make_spec,
    make_weights,
    on_one,
    on_ranks,
    pad_experts,
    plain,
    tokens,
    toy_backend,
    value,
)

from moerunner import (
    Custom,
    DistributedError,
    Layout,
    Linear,
    MoERunner,
    Options,
    PlanError,
    RMSNorm,
    RoutingSpec,
    SharedSpec,
    TransformSpec,
)
from moerunner.experts import eager
from moerunner.ops.reference import reference, reference_route
from moerunner.parallel import alltoall
from moerunner.parallel.comm import simulate
from moerunner.parallel.pairs import SlotMap
from moerunner.plan import Step, resolve
from moerunner.values import LayerWeights, Partial, Replicate, Shard, TopK

GATED = SharedSpec(width=20, gate="sigmoid", bias=True)
BIASED = SharedSpec(width=20, bias=True)
BOTH = pytest.mark.parametrize("dispatch", ["allgather", "alltoall"])


def plan_of(layout, options=None, **changes):
    """The plan of a layer whose weights are cut for this layout."""
    spec = make_spec(**{"factor": 2.5, "on_output": True, "shared": SHARED, **changes})
    return simulate(layout, lambda bound: MoERunner(spec, make_weights(spec), bound, options).plan)[0]


def with_steps(plan, *, drop=(), after=None, add=None):
    """The same plan with steps left out, or one more behind the last step of the verb `after`."""
    steps = [s for s in plan.steps if s.verb not in drop]
    if add is not None:
        at = max(i for i, s in enumerate(steps) if s.verb == after) + 1
        steps.insert(at, add)
    return dataclasses.replace(plan, steps=tuple(steps))


@pytest.mark.parametrize("shared", [None, SHARED, GATED], ids=["alone", "shared", "gated"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_B1_every_layout_equals_one_rank(layout, shared):
    spec = make_spec(factor=2.5, on_output=True, shared=shared)
    check(spec, make_weights(spec), tokens(13), layout=LAYOUTS[layout])


def test_B1_a_second_reduction_cannot_be_built():
    plan = plan_of(Layout(tp=2))
    again = Step(verb="reduce", value="out", axes=("tp",), at="finish", dtype="float32")
    with pytest.raises(PlanError, match="reduces over tp a value that is") as caught:
        with_steps(plan, after="reduce", add=again)
    assert caught.value.first == "reduce out over tp"


def test_B1_a_missing_reduction_cannot_be_built():
    plan = plan_of(Layout(tp=2))
    with pytest.raises(PlanError, match="asked for is"):
        with_steps(plan, drop=("reduce",))


def test_B1_the_shared_part_cannot_be_reduced_before_it_joins_a_partial_sum():
    plan = plan_of(Layout(tp=2))
    early = Step(verb="reduce", value="shared", axes=("tp",), at="join", dtype="float32")
    with pytest.raises(PlanError, match="adds"):
        with_steps(plan, after="scale", add=early)


@pytest.mark.parametrize("axis", ["dp", "ep", "tp"])
def test_B1_a_whole_value_cannot_be_reduced_nor_a_partial_one_split_again(axis):
    whole = value()
    for placed in (Replicate(), Shard(0)):
        with pytest.raises(PlanError, match=f"reduces over {axis}"):
            value(on={axis: placed}).reduce("again", (axis,))
    with pytest.raises(PlanError, match=f"needs the whole value on {axis}"):
        value(on={axis: Partial()}).make_partial("again", (axis,))
    with pytest.raises(PlanError, match=f"takes its tokens over {axis}"):
        value(on={axis: Partial()}).take_shard("its tokens", (axis,))
    with pytest.raises(PlanError, match=f"gathers tokens over {axis}"):
        whole.gather("again", (axis,))
    assert value(on={axis: Partial()}).reduce("once", (axis,)).at(axis) == Replicate()


class Reducing:
    """A toy kernel whose result is already summed over the ranks: it does that itself, over the ranks it is told of."""

    def __init__(self):
        self.rank = threading.local()

    def run(self, x, topk, weights, call):
        y = eager.run(x, topk, weights, call)
        return self.rank.comm._all_reduce(y, self.rank.comm.layout.split_axes) if call.output == "summed" else y


def on_reducing_ranks(spec, weights, x, layout):
    kernel = Reducing()

    def main(bound):
        kernel.rank.comm = bound.comm
        runner = MoERunner(spec, weights, bound, options)
        return runner(x), runner.plan.collectives

    with toy_backend(kernel.run, reduced=True) as options:
        results = simulate(layout, main)
    assert all(torch.equal(y, results[0][0]) for y, _ in results)
    return results[0]


@pytest.mark.parametrize("layout", ["tp2", "ep2", "ep2 tp2", "ep2 tp2, whole shared"])
@pytest.mark.parametrize("shared", [None, BIASED], ids=["alone", "shared"])
def test_B2_a_result_that_is_reduced_is_not_reduced_again(shared, layout):
    spec = make_spec(factor=2.5, on_output=True, shared=shared, experts={"bias": True})
    weights, x = make_weights(spec), tokens()
    y, collectives = on_reducing_ranks(spec, weights, x, LAYOUTS[layout])
    assert_close(y, reference(spec, LayerWeights.of(spec, weights), x))
    alone = shared is not None and LAYOUTS[layout].shards_shared  # only the shared part is still a partial sum
    assert len(collectives) == alone


def test_B2_a_reduced_result_may_be_normed_at_once():
    spec = make_spec(shared=BIASED, output_transform=NORM)
    weights, x = make_weights(spec), tokens()
    y, collectives = on_reducing_ranks(spec, weights, x, Layout(tp=2))
    assert_close(y, reference(spec, LayerWeights.of(spec, weights), x))
    assert len(collectives) == 1


@BOTH
def test_B2_a_combine_that_brings_finished_rows_home_is_the_last_reduction(dispatch):
    plan = plan_of(Layout(ep=2, tokens="sharded"), Options(dispatch=dispatch))
    assert plan.step("reduce") is None
    again = Step(verb="reduce", value="routed", axes=("ep",), at="join", dtype="float32")
    with pytest.raises(PlanError, match="reduces over ep"):
        with_steps(plan, after="combine", add=again)


@pytest.mark.parametrize("layout", REPLICATED)
def test_B3_a_layer_without_shared_experts_issues_one_collective(layout):
    spec = make_spec(factor=2.5, on_output=True)
    record = []
    check(spec, make_weights(spec), tokens(), layout=LAYOUTS[layout])
    on_ranks(spec, make_weights(spec), tokens(), layout=LAYOUTS[layout], record=record)
    assert {tuple(log) for _, _, log in record} == {(("all_reduce", LAYOUTS[layout].split_axes),)}


@pytest.mark.parametrize("gate", ["none", "sigmoid"])
@pytest.mark.parametrize("layout", SHARDED)
def test_B4_sharded_tokens_with_shared_expert(layout, gate):
    spec = make_spec(factor=2.5, on_output=True, shared=SharedSpec(width=20, gate=gate, bias=True))
    check(spec, make_weights(spec), tokens(13), layout=LAYOUTS[layout])


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(ep=2), Layout(ep=2, tp=2), Layout(dp=2, tp=2)], ids=str)
def test_B4_a_sharded_shared_expert_cannot_read_sharded_tokens(layout):
    mixed = dataclasses.replace(layout, tokens="sharded", shared="sharded")
    with pytest.raises(PlanError, match="needs the whole value") as caught:
        plan_of(mixed)
    assert caught.value.second == "shared"


@pytest.mark.parametrize("layout", [Layout(dp=2), Layout(dp=2, tp=2), Layout(dp=2, ep=2, tp=2)], ids=str)
@pytest.mark.parametrize("mode", ["replicated", "sharded"])
def test_B5_copies_with_tokens_of_their_own_stay_apart(mode, layout):
    layout = dataclasses.replace(layout, tokens=mode)
    spec = make_spec(factor=2.5, on_output=True, shared=GATED)
    check(spec, make_weights(spec), tokens(13), layout=layout)
    assert not any("dp" in axes for _, axes in plan_of(layout).collectives)


def test_B5_a_partial_and_a_whole_value_do_not_add():
    for axis in ("dp", "ep", "tp"):
        partial = value(on={axis: Partial()}, maker="the shared expert")
        for whole in (value(), value(on={axis: Shard(0)})):
            with pytest.raises(PlanError, match=f"over {axis}"):
                whole.add("the sum", partial)
            with pytest.raises(PlanError, match=f"over {axis}"):
                partial.add("the sum", whole)
    with pytest.raises(PlanError) as caught:
        value().add("the sum", partial)
    assert (caught.value.first, caught.value.second) == ("the shared expert", "the sum")


@pytest.mark.parametrize("output", ["replicate", "shard", "partial"])
@pytest.mark.parametrize("layout", ["tp2", "ep2", "ep2 tp2"])
def test_B6_a_replicated_shared_expert_counts_once(layout, output):
    layout = dataclasses.replace(LAYOUTS[layout], shared="replicated")
    spec = make_spec(factor=2.5, on_output=True, shared=BIASED, zero_experts=2, output_bias=True)
    check(spec, make_weights(spec), tokens(13), layout=layout, options=Options(output=output))


LATENT = {"input_transform": NARROW, "output_transform": WIDEN}
BENT = {
    "norm on the routed part": {"output_transform": NORM},
    "latent with norm": {
        "input_transform": NARROW,
        "output_transform": TransformSpec((RMSNorm(features=12), Linear(in_features=12, out_features=HIDDEN))),
    },
    "latent with bias": {
        "input_transform": NARROW,
        "output_transform": TransformSpec((Linear(in_features=12, out_features=HIDDEN, bias=True),)),
    },
    "norm at the end": {"final_transform": NORM},
    "norm on both": {"output_transform": NORM, "final_transform": NORM},
    "norm of each expert": {"experts": {"row_norm": RMSNorm(features=HIDDEN)}},
}


@pytest.mark.parametrize("shared", [None, SHARED], ids=["alone", "shared"])
@pytest.mark.parametrize("layout", ["tp2", "ep2 tp2", "sharded tokens, ep4", "sharded tokens, ep2 tp2"])
@pytest.mark.parametrize("bent", BENT)
def test_B7_what_is_not_linear_waits_for_the_reduction(bent, layout, shared):
    spec = make_spec(factor=2.5, on_output=True, shared=shared, **BENT[bent])
    check(spec, make_weights(spec), tokens(11), layout=LAYOUTS[layout])


def test_B7_a_norm_of_a_partial_sum_cannot_be_built():
    plan = plan_of(Layout(tp=2), output_transform=NORM)
    with pytest.raises(PlanError, match="not linear and the value is a partial sum over tp") as caught:
        with_steps(plan, drop=("reduce",))
    assert caught.value.first == f"experts ({plan.backend})"
    plan = plan_of(Layout(tp=2), experts={"row_norm": RMSNorm(features=HIDDEN)})
    with pytest.raises(PlanError, match="norms rows that are partial sums over tp"):
        with_steps(plan, drop=("reduce",))


def test_B7_each_row_is_normed_before_it_is_weighted_and_summed():
    raw = {"weighted": False, "summed": False, "scaled": False}
    assert value(**raw).row_norm("norm") == value(**raw)
    for fact in ("weighted", "summed"):
        with pytest.raises(PlanError, match=f"already {fact}"):
            value(**{**raw, fact: True}).row_norm("norm")


@pytest.mark.parametrize("layout", ["tp2", "ep2", "ep2 tp2", "dp2 tp2"])
def test_B8_a_linear_transform_costs_no_reduction_of_its_own(layout):
    double = {"output_transform": TransformSpec((Custom(in_features=HIDDEN, out_features=HIDDEN, linear=True),))}
    for changes in (LATENT, double):
        functions = {"output_transform.0": lambda y: 2 * y} if changes is double else {}
        spec = make_spec(factor=2.5, on_output=True, shared=SHARED, **changes)
        weights, record = {**make_weights(spec), **functions}, []
        check(spec, weights, tokens(), layout=LAYOUTS[layout])
        on_ranks(spec, weights, tokens(), layout=LAYOUTS[layout], record=record)
        assert all(log == [("all_reduce", LAYOUTS[layout].split_axes)] for _, _, log in record)


def test_B8_a_norm_costs_exactly_one_more():
    assert [axes for _, axes in plan_of(Layout(tp=2), output_transform=NORM).collectives] == [("tp",), ("tp",)]
    alone = plan_of(Layout(tp=2), output_transform=NORM, shared=None)
    assert [axes for _, axes in alone.collectives] == [("tp",)]


@pytest.mark.parametrize("shared", [None, SHARED, GATED], ids=["alone", "shared", "gated"])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_B9_one_tensor_whatever_the_layer_has(count, shared):
    spec = make_spec(shared=shared)
    for y in (
        on_one(spec, make_weights(spec), tokens(count)),
        on_ranks(spec, make_weights(spec), tokens(count), layout=Layout(tp=2)),
        on_ranks(spec, make_weights(spec), tokens(count), layout=Layout(ep=2, tokens="sharded")),
    ):
        assert isinstance(y, torch.Tensor)
        assert y.shape == (count, HIDDEN)


@BOTH
def test_B10_shared_experts_see_the_callers_tokens(dispatch):
    spec = make_spec(factor=2.5, on_output=True, shared=SHARED, **LATENT)
    layout, options = Layout(ep=2, tokens="sharded"), Options(dispatch=dispatch)
    check(spec, make_weights(spec), tokens(13), layout=layout, options=options)


@pytest.mark.parametrize("layout", [None, "tp2", "sharded tokens, ep2", "sharded tokens, ep4"])
def test_B10_only_the_routed_experts_see_transformed_tokens(layout):
    # The transform keeps the width, so that nothing but the values would tell.
    spec = make_spec(factor=2.5, on_output=True, shared=GATED, zero_experts=2, input_transform=NORM)
    weights = make_weights(spec)
    weights["input_transform.0.weight"] = weights["input_transform.0.weight"] * 3
    check(spec, weights, tokens(13), layout=LAYOUTS.get(layout))


@pytest.mark.parametrize("verb", ["shared", "zero", "gate"])
def test_B10_reading_anything_else_cannot_be_built(verb):
    plan = plan_of(Layout(), zero_experts=2)
    steps = tuple(dataclasses.replace(s, reads="routed") if s.verb == verb else s for s in plan.steps)
    with pytest.raises(PlanError, match="instead of the caller's tokens"):
        dataclasses.replace(plan, steps=steps)


def overwrites_its_input(x, topk, weights, call):
    y = eager.run(x, topk, weights, call)
    x.fill_(float("nan"))
    return y


@pytest.mark.parametrize("layout", [None, *LAYOUTS])
def test_B11_a_kernel_that_writes_its_input_harms_nobody(layout):
    spec = make_spec(factor=2.5, on_output=True, shared=SHARED, zero_experts=2)
    x = tokens(13)
    with toy_backend(overwrites_its_input, writes_input=True) as options:
        check(spec, make_weights(spec), x, layout=LAYOUTS.get(layout), options=options)
    assert torch.equal(x, tokens(13)), "the caller's tokens were overwritten"


def test_B11_nor_with_two_expert_sets():
    spec = make_spec(RoutingSpec(modalities=2), shared=SHARED)
    x = tokens(13)
    with toy_backend(overwrites_its_input, writes_input=True) as options:
        check(spec, make_weights(spec), x, options=options)
    assert torch.equal(x, tokens(13))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("on_input", [False, True])
def test_B11_our_own_kernels_leave_the_tokens_alone(on_input, backend):
    routing = RoutingSpec(score="sigmoid_topk", choose="logit", weights_on="input" if on_input else "output")
    spec = make_spec(routing, shared=SHARED)
    x = tokens()
    check(spec, make_weights(spec), x, options=Options(backend=backend))
    assert torch.equal(x, tokens())


@pytest.mark.parametrize("redundant", [0, 1, 3])
@pytest.mark.parametrize("mode", ["replicated", "sharded"])
def test_B12_copies_of_experts_change_nothing(mode, redundant):
    spec = make_spec(factor=2.5, on_output=True, shared=SHARED, experts={"bias": True})
    check(spec, make_weights(spec), tokens(13), layout=Layout(ep=3, tokens=mode, redundant=redundant))


def test_B12_experts_placed_by_hand_change_nothing():
    spec = make_spec(factor=2.5, on_output=True, shared=SHARED)
    for mode in ("replicated", "sharded"):
        layout = Layout(ep=2, tokens=mode, placement=((7, 0, 3, 5, 1), (2, 6, 0, 4)))
        check(spec, make_weights(spec), tokens(13), layout=layout)


@pytest.mark.parametrize(
    ("layout", "dispatch"),
    [(Layout(ep=2), "auto"), (Layout(ep=2, tp=2, tokens="sharded"), "alltoall"), (Layout(ep=2, tokens="sharded"), "allgather")],
    ids=["local", "alltoall", "allgather"],
)
def test_B12_experts_that_move_between_calls_change_nothing(layout, dispatch):
    spec = make_spec(factor=2.5, on_output=True, shared=GATED, experts={"bias": True})
    weights = make_weights(spec)

    def main(bound):
        runner = MoERunner(spec, weights, bound, Options(dispatch=dispatch))
        found = [runner(tokens(9))]
        for placement in (((7, 0, 3, 5, 1), (2, 6, 0, 4)), ((2, 6, 0, 4), (7, 0, 3, 5, 1))):
            runner.rebalance(placement)
            found.append(runner(tokens(9)))
        return found

    expected = reference(spec, LayerWeights.of(spec, weights), tokens(9))
    for y in (y for found in simulate(layout, main) for y in found):
        assert_close(y, expected)


@pytest.mark.parametrize("layout", [Layout(ep=2, tokens="sharded"), Layout(ep=2, tp=2, tokens="sharded")], ids=str)
def test_B13_shared_experts_run_while_tokens_travel_and_nothing_else_is_issued(layout):
    spec = make_spec(factor=2.5, on_output=True, shared=GATED)
    weights = make_weights(spec)

    def main(bound):
        comm, events = bound.comm, []
        issue = comm._all_to_all

        def all_to_all(*given):
            wait = issue(*given)
            events.append("start")
            return lambda: (events.append("wait"), wait())[1]

        comm._all_to_all = all_to_all
        runner = MoERunner(spec, weights, bound, Options(dispatch="alltoall"))
        runner(tokens(0)[:0])
        events.clear()
        verbs = next(iter(runner._verbs.values()))
        shared = verbs._shared_run
        verbs._shared_run = lambda *given: (events.append(f"shared after {len(comm.log)}"), shared(*given))[1]
        comm.log.clear()
        y = runner(tokens(3))
        assert runner.plan.step("shared").overlaps
        assert "runs while the routed tokens travel" in runner.explain()
        return events, y

    issued = 1 + (layout.tp > 1)
    for events, y in simulate(layout, main):
        assert events == ["start", f"shared after {issued}", "wait", "start", "wait"]
        assert_close(y, reference(spec, LayerWeights.of(spec, weights), tokens(3)))


@pytest.mark.parametrize("verb", ["dispatch", "combine", "reduce", "experts", "join"])
def test_B13_nothing_else_runs_on_a_side_stream(verb):
    plan = plan_of(Layout(ep=2), shared=GATED)
    steps = tuple(dataclasses.replace(s, side=8) if s.verb == verb else s for s in plan.steps)
    told = "issues a collective on a side stream" if verb in ("dispatch", "combine", "reduce") else "changes '.*' on a side"
    with pytest.raises(PlanError, match=told):
        dataclasses.replace(plan, steps=steps)


@pytest.mark.parametrize(
    "layout", [Layout(), Layout(ep=2), Layout(ep=2, tp=2, tokens="sharded"), Layout(tp=2, tokens="sharded")]
)
def test_B13_shared_experts_have_a_side_stream_on_cuda_where_that_is_safe(layout):
    spec = make_spec(shared=GATED)

    def shared(device="cuda", **options):
        meta = LayerWeights.of(spec, make_weights(spec)).meta()
        dispatch = "alltoall" if layout.tokens == "sharded" and layout.ep > 1 else "auto"
        plan = resolve(spec, layout, meta, device, Options(backend="eager", dispatch=dispatch, **options))
        assert [s.verb for s in plan.steps if s.side] in ([], ["shared"])
        return plan.step("shared"), plan.explain()

    step, said = shared()
    travels = layout.tokens == "sharded" and layout.ep > 1
    assert step.side > 1 << 40 if travels else step.side == 256
    assert "on a side stream" in said
    for device, options, reason in (
        ("cpu", {}, ""),
        ("cuda", {"overlap": False}, "not a side stream: Options.overlap is off"),
        ("cuda", {"grad": True}, "not a side stream: a backward"),
    ):
        step, said = shared(device, **options)
        assert step.side == 0
        assert reason in said


@pytest.mark.parametrize("copies", [0, 3])
@pytest.mark.parametrize(
    ("layout", "adds"),
    [(Layout(ep=2), False), (Layout(ep=2), True), (Layout(ep=2, tp=2, tokens="sharded"), False)],
    ids=["local", "added", "alltoall"],
)
def test_B12_B13_a_side_stream_changes_nothing_and_sees_no_collective(monkeypatch, layout, adds, copies):
    """With streams that only tell what they are asked: the side one waits for the tokens, and the join for it.

    Where the experts' kernel adds the shared experts, it waits for them, and they begin before the router.
    """
    layout = dataclasses.replace(layout, redundant=copies)
    spec = make_spec(factor=2.5, on_output=True, shared=GATED)
    weights = make_weights(spec)
    here = threading.local()

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            here.events.append(f"{self.name} waits for {other.name}")

    @contextlib.contextmanager
    def entered(stream):
        here.events.append(f"{stream.name} begins")
        before = len(here.comm.log)
        yield
        assert len(here.comm.log) == before
        here.events.append(f"{stream.name} ends")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("main"))
    monkeypatch.setattr(torch.cuda, "stream", entered)
    kept = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: kept.append(stream.name))

    def main(bound):
        here.events, here.comm = [], bound.comm
        dispatch = "alltoall" if layout.tokens == "sharded" else "auto"
        runner = MoERunner(spec, weights, bound, options if adds else Options(dispatch=dispatch))
        alone = runner(tokens(9))
        verbs = next(iter(runner._verbs.values()))
        verbs._side_tokens = 9
        experts, join, route = verbs.experts, verbs.join, verbs.route
        verbs.route = lambda *given, **said: (here.events.append("route"), route(*given, **said))[1]
        verbs.experts = lambda *given: (here.events.append("experts"), experts(*given))[1]
        verbs.join = lambda *given: (here.events.append("join"), join(*given))[1]
        beside = runner(tokens(9))
        runner(tokens(10))  # too many
        return here.events, torch.equal(alone, beside)

    def adding(x, topk, weights, call, addend):
        return eager.run(x, topk, weights, call) * call.scale + addend.output()

    with toy_backend(adding, adds=True, applies_scale=True) as options:
        found = simulate(layout, main)
    started, waits, rest = ["side waits for main", "side begins", "side ends"], "main waits for side", ["experts", "join"]
    for events, same in found:
        first = [*started, "route", "experts", waits, "join"] if adds else ["route", *started, "experts", "join", waits]
        assert events == [*first, "route", *rest]
        assert same
    assert set(kept) == {"side", "main"}


def test_B14_what_travels_is_not_the_callers_tokens():
    topk = TopK(torch.tensor([[0, 5], [1, 6]]), torch.ones(2, 2))

    def main(bound):
        x = torch.ones(2, HIDDEN)
        slots = SlotMap(bound.layout, EXPERTS)
        travelling = alltoall.dispatch(x, topk, slots, bound.comm, dtype=torch.float32)
        x.fill_(float("nan"))
        return travelling.wait()[0]

    for rows in simulate(Layout(ep=2, tokens="sharded"), main):
        assert torch.equal(rows, torch.ones(4, HIDDEN))


@pytest.mark.parametrize("shared", ["sharded", "replicated"])
@pytest.mark.parametrize("layout", ["tp2", "ep2", "ep2 tp2"])
def test_B15_what_each_rank_gives_to_the_callers_reduction_adds_up_once(layout, shared):
    layout = dataclasses.replace(LAYOUTS[layout], shared=shared)
    for changes in ({}, {"join": "average"}, {"output_transform": NORM}, {"final_transform": NORM}):
        spec = make_spec(
            factor=2.5, on_output=True, shared=GATED, zero_experts=2, output_bias=True, experts={"bias": True}, **changes
        )
        record = []
        on_ranks(spec, make_weights(spec), tokens(), layout=layout, options=Options(output="partial"), record=record)
        check(spec, make_weights(spec), tokens(), layout=layout, options=Options(output="partial"))
        if "final_transform" not in changes and "output_transform" not in changes:
            assert not record[0][2], "the caller reduces, the layer does not"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["tp2", "tp3", "ep2", "ep2 tp2", "sharded tokens, ep2 tp2", "sharded tokens, ep4"])
def test_B16_a_bias_counts_once_on_any_number_of_ranks(layout, backend):
    spec = make_spec(factor=2.5, on_output=True, shared=GATED, experts={"bias": True}, output_bias=True)
    weights = make_weights(spec)
    for name in ("b2", "shared_b2", "output_bias"):
        weights[name] = weights[name] * 20  # nearly all of the output
    check(spec, weights, tokens(13), layout=LAYOUTS[layout], options=Options(backend=backend))


@pytest.mark.parametrize("axes", [(), ("ep",), ("ep", "tp")])
def test_B16_a_bias_that_counts_on_other_ranks_than_the_sum_is_over_cannot_be_built(axes):
    plan = plan_of(Layout(tp=2), output_bias=True)
    steps = tuple(dataclasses.replace(s, axes=axes) if s.verb == "join" else s for s in plan.steps)
    with pytest.raises(PlanError, match="counts a bias once over"):
        dataclasses.replace(plan, steps=steps)


def test_B16_nor_is_it_lost_before_a_norm_of_each_row():
    spec = make_spec(experts={"bias": True, "row_norm": RMSNorm(features=HIDDEN)})
    weights = make_weights(spec)
    weights["b2"] = weights["b2"] * 20
    for layout in ("tp2", "ep2 tp2", "sharded tokens, ep2 tp2"):
        check(spec, weights, tokens(13), layout=LAYOUTS[layout])


@pytest.mark.parametrize("layout", ["tp2", "ep2", "ep2 tp2", "ep2 tp2, whole shared"])
@pytest.mark.parametrize("shared", [None, GATED], ids=["alone", "shared"])
def test_B17_every_rank_has_the_whole_gradient_of_the_router_and_the_tokens(shared, layout):
    spec = make_spec(factor=2.5, on_output=True, shared=shared, output_bias=True, **LATENT)
    weights, x, given = make_weights(spec), tokens(), torch.linspace(-1, 1, 7 * HIDDEN).view(7, HIDDEN)

    def trained(layer):
        leaves = {n: t.double().requires_grad_() for n, t in {"x": x, **weights}.items()}
        with torch.enable_grad():
            layer({n: leaves[n] for n in weights})(leaves["x"]).backward(given.double())
        return {n: leaf.grad for n, leaf in leaves.items()}

    alone = trained(lambda w: MoERunner(spec, w))
    whole = [n for n in alone if n not in ("w13", "w2") and not (n.startswith("shared_w") and LAYOUTS[layout].shards_shared)]
    assert {"x", "gate", "output_bias"} <= set(whole)
    for got in simulate(LAYOUTS[layout], lambda bound: trained(lambda w: MoERunner(spec, w, bound))):
        for name in {*whole} - {"shared_b13"}:
            assert_close(got[name], alone[name], 1e-12)


def gradients(run, spec, weights, x):
    """Of a fixed scalar of the output, for the tokens and for every floating tensor."""
    leaves = {n: t.double().requires_grad_() for n, t in {"x": x, **weights}.items() if t.is_floating_point()}
    y = run(spec, {n: leaves[n] for n in weights}, leaves["x"])
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return {n: leaf.grad for n, leaf in leaves.items()}


def dense(spec, weights, x):
    """Softmax over all, renormalised over the chosen two; every expert on every token, zeroed by the mask of the choice."""
    probs = torch.softmax(x @ weights["gate"].T, -1)
    chosen = torch.zeros_like(probs).scatter(1, probs.topk(2).indices, 1.0)
    weight = probs * chosen / (probs * chosen).sum(-1, keepdim=True)
    gate, up = torch.einsum("th,eih->tei", x, weights["w13"]).chunk(2, -1)
    each = torch.einsum("tei,ehi->teh", torch.nn.functional.silu(gate) * up, weights["w2"])
    g, u = (x @ weights["shared_w13"].T).chunk(2, -1)
    shared = (torch.nn.functional.silu(g) * u) @ weights["shared_w2"].T
    return spec.routed_scaling_factor * (weight.unsqueeze(-1) * each).sum(1) + shared


@pytest.mark.parametrize("on_output", [False, True])
def test_B18_gradients_reach_the_router_the_experts_and_the_tokens(on_output):
    spec = make_spec(RoutingSpec(renormalise="sum"), factor=2.5, on_output=on_output, shared=SHARED)
    weights = make_weights(spec)
    ours = gradients(lambda s, w, x: MoERunner(s, w)(x), spec, weights, tokens())
    truth = gradients(dense, spec, weights, tokens())
    for name, grad in truth.items():
        assert_close(ours[name], grad, 1e-12)


@pytest.mark.parametrize("backend", TRAINABLE)
def test_B18_slots_without_an_expert_carry_no_gradient(backend):
    spec = make_spec(factor=2.5, on_output=True)
    w = {n: t.requires_grad_() for n, t in make_weights(spec).items()}
    x = tokens().requires_grad_()
    ids = torch.arange(14).view(7, 2) % 8
    ids[0], ids[3, 1] = -1, -1
    weight = torch.rand(7, 2, generator=torch.Generator().manual_seed(3)).requires_grad_()
    MoERunner(spec, w, options=Options(backend=backend))(x, topk=TopK(ids, weight)).sum().backward()
    assert not x.grad[0].any()
    assert not weight.grad[ids < 0].any()
    kept = [(t, k) for t in range(7) for k in range(2) if ids[t, k] >= 0]
    ones = reference(spec, LayerWeights.of(spec, make_weights(spec)), tokens(), topk=TopK(ids, torch.ones(7, 2)))
    assert ones.isfinite().all()
    for t, k in kept:  # d out / d weight is the expert's own output
        alone = TopK(ids[t, k].view(1, 1), torch.ones(1, 1))
        expert = reference(spec, LayerWeights.of(spec, make_weights(spec)), tokens()[t : t + 1], topk=alone)
        assert_close(weight.grad[t, k], expert.sum(), 1e-4)


@pytest.mark.parametrize("count", [0, 1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", SHARDED)
def test_B19_a_rank_without_tokens_joins_every_collective(layout, dtype, count):
    spec = make_spec(factor=2.5, on_output=True, shared=GATED)
    weights, record = make_weights(spec, dtype=dtype), []
    x = tokens(count, dtype=dtype)
    y = on_ranks(spec, weights, x, layout=LAYOUTS[layout], record=record)
    logs = {rank: tuple(log) for rank, _, log in record}
    assert len(set(logs.values())) == 1
    assert len(logs) == LAYOUTS[layout].world
    if count:
        check(spec, weights, x, layout=LAYOUTS[layout])
    assert y.shape == x.shape


@BOTH
def test_B19_all_tokens_on_one_rank_and_all_of_them_to_one_expert(dispatch):
    spec = make_spec(factor=2.5, on_output=True, shared=SHARED)
    weights = make_weights(spec)
    topk = TopK(torch.tensor([[5, 6]]).repeat(9, 1), torch.rand(9, 2))
    layout = Layout(ep=2, tokens="sharded")
    check(spec, weights, tokens(9), layout=layout, options=Options(dispatch=dispatch), topk=topk)
    uneven = {0: slice(0, 0), 1: slice(0, 9)}

    def main(bound):
        part = uneven[bound.comm.rank]
        mine = TopK(topk.ids[part], topk.weights[part])
        return MoERunner(spec, weights, bound, Options(dispatch=dispatch))(tokens(9)[part], topk=mine)

    ref = reference(spec, LayerWeights.of(spec, weights), tokens(9), topk=topk)
    assert_close(torch.cat(simulate(layout, main)), ref)


def test_B20_ranks_that_built_different_layers_say_so_before_they_exchange_anything():
    weights = {on: make_weights(make_spec(factor=2.5, on_output=on, shared=SHARED)) for on in (False, True)}

    def main(bound):
        odd = bound.comm.rank == 1
        spec = make_spec(factor=2.5, on_output=odd, shared=SHARED)
        with pytest.raises(DistributedError, match="rank 1 disagrees with rank 0"):
            MoERunner(spec, weights[odd], bound)(tokens())
        return len(bound.comm.log)

    assert simulate(Layout(tp=2), main) == [0, 0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_B20_groups_hold_the_ranks_that_differ_on_their_axes_only(layout):
    layout = LAYOUTS[layout]
    for rank in range(layout.world):
        here = layout.coordinates(rank)
        for axes in (("tp",), ("ep",), ("ep", "tp"), ("dp", "ep", "tp")):
            members = layout.group(rank, axes)
            fixed = [a for a in here if a not in axes]
            same = [r for r in range(layout.world) if all(layout.coordinates(r)[a] == here[a] for a in fixed)]
            assert members == same


def test_B20_experts_read_only_tokens_whose_routing_lies_where_they_do():
    plan = plan_of(Layout(ep=2, tokens="sharded"), Options(dispatch="allgather"))
    steps = tuple(dataclasses.replace(s, gathers=()) if s.verb == "dispatch" else s for s in plan.steps)
    with pytest.raises(PlanError, match="needs the whole value on ep"):
        dataclasses.replace(plan, steps=steps)
    plan = plan_of(Layout(ep=2))
    apart = Step(verb="select", value="topk", axes=("ep",), at="dispatch")
    with pytest.raises(PlanError, match="their routing is"):
        with_steps(plan, after="route", add=apart)


@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_B21_ep_equals_tp_for_any_number_of_experts_per_token(top_k):
    spec = make_spec(factor=2.5, on_output=True, shared=SHARED, top_k=top_k, experts={"bias": True})
    weights, x = make_weights(spec), tokens(13)
    for layout in ("tp2", "ep2", "ep3, uneven", "sharded tokens, ep4", "sharded tokens, ep2 tp2"):
        check(spec, weights, x, layout=LAYOUTS[layout])


@BOTH
@pytest.mark.parametrize("changes", [{}, {"shared": SHARED}, {"shared": SHARED, "output_transform": NORM}], ids=str)
def test_B22_the_width_stored_for_the_kernel_is_not_the_width_of_the_layer(changes, dispatch):
    spec = make_spec(factor=2.5, on_output=True, experts={"bias": True}, **changes)
    weights = make_weights(spec)
    padded = pad_experts(weights, HIDDEN + 16, fill=3.0)
    for layout in (Layout(ep=2, tokens="sharded"), Layout(ep=2, tp=2, tokens="sharded")):
        check(spec, padded, tokens(13), layout=layout, options=Options(dispatch=dispatch))


def test_B23_finished_rows_and_a_partial_sum_do_not_add():
    plan = plan_of(Layout(ep=2))
    finished = Step(verb="reduce", value="routed", axes=("ep",), at="join", dtype="float32")
    with pytest.raises(PlanError, match="over ep"):
        with_steps(plan, after="scale", add=finished)


def test_B23_a_reduction_travels_in_float32_for_float16():
    # Each rank's share is far beyond float16, their sum is not.
    spec = make_spec(num_experts=2)
    weights = make_weights(spec, dtype=torch.float16)
    weights["w13"][1], weights["w2"][1] = weights["w13"][0], -weights["w2"][0]
    weights["w2"] = weights["w2"] * 2000
    weights["gate"] = torch.zeros_like(weights["gate"])
    x = tokens(dtype=torch.float16) * 20
    ids = torch.tensor([[0, 1]]).repeat(7, 1)
    topk = TopK(ids, torch.tensor([[1.0, 0.999]]).repeat(7, 1))
    alone = reference(spec, LayerWeights.of(spec, weights), x, topk=TopK(ids[:, :1], torch.ones(7, 1)))
    assert alone.abs().max() > 65504
    for layout in ("ep2", "ep2 tp2", "sharded tokens, ep2"):
        y = on_ranks(spec, weights, x, layout=LAYOUTS[layout], topk=topk)
        assert y.isfinite().all()
        ref = reference(spec, LayerWeights.of(spec, weights), x, topk=topk)
        assert error(y, ref) <= 2 * error(plain(spec, LayerWeights.of(spec, weights), x, topk=topk), ref) + 1e-3


@pytest.mark.parametrize("layout", ["tp2", "ep2 tp2", "sharded tokens, ep2", "sharded tokens, ep2 tp2"])
def test_B23_shares_travel_in_the_dtype_that_was_asked_for(layout):
    spec = make_spec(factor=2.5, on_output=True, shared=SHARED)
    weights, x = make_weights(spec, dtype=torch.bfloat16), tokens(13, dtype=torch.bfloat16)
    sent = []

    def main(bound):
        for name in ("_all_reduce", "_reduce_scatter"):
            issue = getattr(bound.comm, name)
            setattr(bound.comm, name, lambda y, *more, issue=issue: (sent.append(y.dtype), issue(y, *more))[1])
        return MoERunner(spec, weights, bound, options)(x[bound.comm.rank : bound.comm.rank + 1])

    for dtype in (None, torch.float32):
        options = Options(reduce_dtype=dtype)
        sent.clear()
        simulate(LAYOUTS[layout], main)
        assert set(sent) == {dtype or torch.bfloat16}
        check(spec, weights, x, layout=LAYOUTS[layout], options=options)


def test_the_planner_is_a_pure_function():
    spec = make_spec(factor=2.5, on_output=True, shared=SHARED)
    meta = LayerWeights.of(spec, make_weights(spec)).meta()
    plans = [resolve(spec, Layout(), meta, "cpu", Options()) for _ in range(2)]
    assert plans[0] == plans[1]
    assert plans[0].fingerprint == plans[1].fingerprint
    assert len(reference_route(spec, LayerWeights.of(spec, make_weights(spec)), tokens())) == 7
