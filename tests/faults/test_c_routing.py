"""Section C of docs/faults.md: which experts, with which weights."""

import dataclasses

import pytest
import torch
from helpers import (
    BACKENDS,
    EXPERTS,
    HIDDEN,
    LAYOUTS,
    ROUTERS,
    SHARED,
    assert_close,
    check,
    inputs_for,
    make_spec,
    make_weights,
    on_one,
    on_ranks,
    recording,
    tokens,
    toy_backend,
    value,
)

from moerunner import (
    GroupSpec,
    Layout,
    MoERunner,
    Options,
    PlanError,
    RMSNorm,
    RoutingSpec,
    SharedSpec,
    SpecError,
    UnsupportedError,
)
from moerunner.ops.reference import reference_route
from moerunner.ops.route import route, stable_topk
from moerunner.plan import Step
from moerunner.plan.steps import check_end
from moerunner.values import LayerWeights, TopK

BY_LOGITS = {name: r for name, r in ROUTERS.items() if r.choose != "hash"}
INPUT = RoutingSpec(score="sigmoid_topk", choose="logit", weights_on="input")


def logits(count=7, seed=2, spread=1.0, shift=0.0):
    return torch.randn(count, EXPERTS, generator=torch.Generator().manual_seed(seed)) * spread + shift


def routed(spec, weights, z):
    """Ids and weights for these logits, from the layer itself and from the oracle."""
    x, inputs = tokens(len(z)), inputs_for(spec, len(z))
    ours = MoERunner(spec, weights).route(x, router_logits=z, **inputs)
    truth = reference_route(spec, LayerWeights.of(spec, weights), x, router_logits=z, **inputs)
    factor = spec.routed_scaling_factor if ours.scaled else 1.0
    return ours, [c.ids for c in truth], torch.tensor([c.weights for c in truth], dtype=torch.float64) * factor


def check_routing(spec, weights, z, limit=2e-6):
    ours, ids, w = routed(spec, weights, z)
    assert ours.ids.tolist() == ids
    assert ours.weights.dtype == torch.float32
    assert_close(ours.weights, w, limit)
    return ours


HARD = {
    "all negative": logits(24, shift=-8.0),
    "all very negative": logits(24, shift=-80.0),
    "all large": logits(24, shift=80.0),
    "far apart": logits(24, spread=5.0),
    "all zero": torch.zeros(3, EXPERTS),
    "all equal": torch.full((3, EXPERTS), -4.25),
    "two values": (logits(24) > 0).float(),
    "one expert for all": torch.eye(EXPERTS)[torch.full((24,), 5)] * 9,
    "some out of reach": torch.where(logits(24, seed=9) > 0.5, float("-inf"), logits(24)),
}


@pytest.mark.usefixtures("both_routes")
@pytest.mark.parametrize("case", HARD)
@pytest.mark.parametrize("router", ROUTERS)
def test_C1_hard_logits_route_as_the_oracle_says(router, case):
    spec = make_spec(ROUTERS[router], factor=2.5)
    z = HARD[case]
    if spec.routing.score == "sigmoid" and case == "all very negative":
        z = logits(24, shift=-40.0)  # sigmoid(-80) is no normal float32: C6
    elif case == "all very negative" and spec.routing.score == "sqrtsoftplus":
        z = logits(24, shift=-40.0)
    if spec.routing.logit_softcap is not None and case in ("all large", "all very negative", "far apart"):
        z = logits(24, spread=0.5)  # the cap makes them ties in float32: C13
    check_routing(spec, make_weights(spec), z)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("router", ["softmax", "softmax renormalised", "groups by best two", "sqrtsoftplus"])
def test_C1_and_the_layer_follows(router, backend):
    spec = make_spec(ROUTERS[router], factor=2.5, shared=SHARED)
    options = Options(backend=backend)
    check(spec, make_weights(spec), tokens(), options=options, router_logits=logits(shift=-9.0))


@pytest.mark.usefixtures("both_routes")
def test_C2_softmax_before_and_after_the_choice_are_two_names():
    z = logits()
    before, after = RoutingSpec(), RoutingSpec(score="softmax_topk", choose="logit")
    one, other = (check_routing(make_spec(r), make_weights(make_spec(r)), z) for r in (before, after))
    assert torch.equal(one.ids, other.ids)
    assert (one.weights.sum(-1) < 0.95).all(), "softmax over all leaves the rest to those not chosen"
    assert_close(other.weights.sum(-1), torch.ones(7))
    renormalised = make_spec(RoutingSpec(renormalise="sum"))
    same = check_routing(renormalised, make_weights(renormalised), z)
    assert_close(same.weights, other.weights)


def test_C2_a_softmax_of_the_chosen_cannot_choose_by_itself():
    for score in ("softmax_topk", "sigmoid_topk"):
        with pytest.raises(SpecError, match="of the chosen logits"):
            RoutingSpec(score=score)


BASE = RoutingSpec(score="sigmoid", selection_bias=True)
ONE_CHANGE = {
    "score": {"score": "softmax"},
    "root": {"score": "sqrtsoftplus"},
    "choose": {"choose": "logit"},
    "no bias": {"selection_bias": False},
    "logit bias": {"logit_bias": True},
    "scale": {"logit_scale": 0.3},
    "cap": {"logit_softcap": 0.5},
    "groups": {"groups": GroupSpec(count=2, kept=1)},
    "groups by best": {"groups": GroupSpec(count=2, kept=1, score="max")},
    "renormalise": {"renormalise": "sum"},
    "eps": {"renormalise": "sum", "eps": 0.5},
    "max": {"renormalise": "max_sum", "eps": 1.5},
    "norm": {"renormalise": "p_norm", "p": 3.0},
    "per expert": {"per_expert_scale": True},
    "global": {"global_scale": True},
    "on input": {"weights_on": "input"},
    "modalities": {"modalities": 2},
}


@pytest.mark.usefixtures("both_routes")
@pytest.mark.parametrize("change", ONE_CHANGE)
def test_C3_every_field_of_the_routing_means_something(change):
    spec, base = (make_spec(r) for r in (dataclasses.replace(BASE, **ONE_CHANGE[change]), BASE))
    x = tokens(16)
    weights = make_weights(spec)
    y = check(spec, weights, x)
    assert MoERunner(spec, weights).plan.fingerprint != MoERunner(base, make_weights(base)).plan.fingerprint
    plainly = {n: weights.get(n, make_weights(base)[n]) for n in make_weights(base)}
    other = (
        check(base, {n: t[0] if t.ndim != len(base.weight_shapes()[n]) else t for n, t in plainly.items()}, x)
        if (spec.routing.modalities == 1)
        else torch.zeros_like(y)
    )
    assert not torch.allclose(y, other, rtol=1e-3), "the field has no effect"


def test_C3_nothing_is_inferred():
    given = make_spec().to_dict()
    del given["apply_routed_scale_to_output"]
    with pytest.raises(SpecError, match="apply_routed_scale_to_output"):
        type(make_spec()).from_dict(given)
    for unused in ({"eps": 1e-20}, {"renormalise": "p_norm", "eps": 1e-20}):
        with pytest.raises(SpecError, match="does not use it"):
            RoutingSpec(score="sigmoid", **unused)
    for score in ("sparsemixer", "external"):
        with pytest.raises(SpecError, match="does not use"):
            RoutingSpec(score=score, renormalise="sum")
    with pytest.raises(SpecError, match="would be ignored"):
        RoutingSpec(choose="hash", selection_bias=True)


@pytest.mark.usefixtures("both_routes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("renormalise", ["none", "sum"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_C4_logits_of_any_dtype_are_read_as_what_they_are(score, renormalise, dtype):
    spec = make_spec(RoutingSpec(score=score, renormalise=renormalise))
    check_routing(spec, make_weights(spec), logits(40).to(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_C4_the_gate_of_a_narrow_layer_is_a_float32_product(dtype):
    spec = make_spec(RoutingSpec(score="sigmoid", renormalise="sum"))
    weights = make_weights(spec, dtype=dtype)
    weights["gate"] = weights["gate"].to(dtype)
    x = tokens(200, dtype=dtype)
    ours = MoERunner(spec, weights).route(x)
    truth = reference_route(spec, LayerWeights.of(spec, weights), x)
    sure = [t for t, c in enumerate(truth) if c.margin > 1e-6]
    assert len(sure) > 190
    assert [ours.ids[t].tolist() for t in sure] == [truth[t].ids for t in sure]
    assert_close(ours.weights[sure], torch.tensor([truth[t].weights for t in sure]))


def close_biases():
    """Correction biases that bfloat16 cannot tell apart, and the layer that needs them."""
    spec = make_spec(RoutingSpec(score="sigmoid", selection_bias=True, renormalise="sum"), top_k=3)
    weights = make_weights(spec, dtype=torch.bfloat16)
    weights["selection_bias"] = 6.0 + torch.arange(EXPERTS).flip(0) * 1e-3
    weights["gate"] = weights["gate"] * 1e-5
    return spec, weights


@pytest.mark.usefixtures("both_routes")
def test_C5_the_correction_bias_stays_float32():
    spec, weights = close_biases()
    rounded = weights["selection_bias"].bfloat16()
    assert len(set(rounded.tolist())) < EXPERTS
    x = tokens(30, dtype=torch.bfloat16)
    runner = MoERunner(spec, weights)
    expected = [c.ids for c in reference_route(spec, LayerWeights.of(spec, weights), x)]
    assert runner.route(x).ids.tolist() == expected == [[0, 1, 2]] * 30


@pytest.mark.parametrize("cast", [lambda r: r.to(torch.bfloat16), lambda r: r.bfloat16(), lambda r: r.half()])
@pytest.mark.parametrize("kind", [torch.Tensor, torch.nn.Parameter])
def test_C5_casting_the_layer_does_not_round_it(kind, cast):
    spec, weights = close_biases()
    given = {n: kind(t.float()) if kind is torch.nn.Parameter else t.float() for n, t in weights.items()}
    runner = cast(MoERunner(spec, given))
    assert runner.w13.dtype != torch.float32
    assert runner.selection_bias.dtype == torch.float32
    assert runner.route(tokens(5, dtype=runner.w13.dtype)).ids.tolist() == [[0, 1, 2]] * 5


@pytest.mark.usefixtures("both_routes")
@pytest.mark.parametrize("size", [12.0, 35.0, 1e4, -35.0])
@pytest.mark.parametrize("score", ["sigmoid", "softmax", "sqrtsoftplus"])
def test_C6_a_large_correction_bias_never_reaches_the_weights(score, size):
    spec = make_spec(RoutingSpec(score=score, selection_bias=True, renormalise="sum", eps=1e-20))
    weights = make_weights(spec)
    weights["selection_bias"] = torch.linspace(0, size, EXPERTS)
    ours = check_routing(spec, weights, logits())
    assert ours.weights.isfinite().all()
    check(spec, weights, tokens())


@pytest.mark.usefixtures("both_routes")
@pytest.mark.parametrize("renormalise", [{"renormalise": "sum", "eps": 1e-20}, {"renormalise": "max_sum", "eps": 1e-12}])
@pytest.mark.parametrize("bias", [False, True])
def test_C6_scores_that_are_all_zero_give_zero_and_not_nan(bias, renormalise):
    spec = make_spec(RoutingSpec(score="sigmoid", selection_bias=bias, **renormalise), factor=2.5, shared=SHARED)
    weights = make_weights(spec)
    ours = MoERunner(spec, weights).route(tokens(), router_logits=torch.full((7, EXPERTS), -200.0))
    assert not ours.weights.any()
    alone = {**weights, "w2": torch.zeros_like(weights["w2"])}
    zero = on_one(spec, weights, tokens(), router_logits=torch.full((7, EXPERTS), -200.0))
    assert_close(zero, check(spec, alone, tokens()))


BAD = {
    "nan": torch.full((EXPERTS,), float("nan")),
    "some nan": torch.where(torch.arange(EXPERTS) % 3 == 0, float("nan"), 1.0),
    "all but one nan": torch.where(torch.arange(EXPERTS) == 6, 1.0, float("nan")),
    "inf": torch.full((EXPERTS,), float("inf")),
    "-inf": torch.full((EXPERTS,), float("-inf")),
    "mixed": torch.tensor([float("nan"), float("inf"), float("-inf"), 0.0] * 2),
}


@pytest.mark.usefixtures("both_routes")
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("router", BY_LOGITS)
def test_C7_nan_logits_give_distinct_ids(router, bad):
    spec = make_spec(BY_LOGITS[router])
    z = logits()
    z[2] = BAD[bad]
    weights = make_weights(spec)
    ours = MoERunner(spec, weights).route(tokens(), router_logits=z, **inputs_for(spec, 7))
    assert all(len(set(row)) == spec.top_k for row in ours.ids.tolist()), "an expert was chosen twice"
    assert ((ours.ids >= 0) & (ours.ids < EXPERTS)).all()
    good = [t for t in range(7) if t != 2]
    clean = MoERunner(spec, weights).route(tokens(), router_logits=logits(), **inputs_for(spec, 7))
    assert torch.equal(ours.ids[good], clean.ids[good])
    assert torch.equal(ours.weights[good], clean.weights[good])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("router", ["softmax", "biased sigmoid", "groups by best two", "sparsemixer", "weights on the input"])
def test_C7_a_bad_row_stays_bad_and_alone(router, backend):
    spec = make_spec(ROUTERS[router], factor=2.5, shared=SHARED)
    weights, x = make_weights(spec), tokens()
    clean = check(spec, weights, x, options=Options(backend=backend))
    x[4] = float("nan")
    y = on_one(spec, weights, x, options=Options(backend=backend))
    assert y[4].isnan().all(), "a row of NaN may not turn into numbers"
    others = [t for t in range(7) if t != 4]
    assert_close(y[others], clean[others])


@pytest.mark.usefixtures("both_routes")
@pytest.mark.parametrize("bad", ["nan", "some nan", "mixed"])
def test_C7_a_hashed_row_keeps_the_ids_of_its_table(bad):
    spec = make_spec(ROUTERS["token table"])
    weights, z = make_weights(spec), logits()
    z[2] = BAD[bad]
    ids = torch.arange(7) * 4
    assert torch.equal(MoERunner(spec, weights).route(tokens(), router_logits=z, input_ids=ids).ids, weights["hash_table"][ids])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("top_k", [1, 2])
def test_C8_the_score_multiplies_what_the_expert_reads(top_k, backend):
    spec = make_spec(INPUT, top_k=top_k, shared=SHARED)
    weights = make_weights(spec)
    check(spec, weights, tokens(), options=Options(backend=backend))
    x = tokens()
    ours = MoERunner(spec, weights, options=Options(backend=backend))
    after = MoERunner(dataclasses.replace(spec, routing=dataclasses.replace(INPUT, weights_on="output")), weights)
    assert not torch.allclose(ours(x), after(x), rtol=1e-2), "silu is not linear, the two must differ"


@pytest.mark.parametrize("on_output", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", [None, "tp2", "ep2", "sharded tokens, ep2", "sharded tokens, ep4"])
def test_C9_weights_on_the_input_are_applied_once(layout, backend, on_output):
    for factor in (1.0, 2.5):
        spec = make_spec(INPUT, factor=factor, on_output=on_output, shared=SHARED, top_k=1)
        check(spec, make_weights(spec), tokens(11), layout=LAYOUTS.get(layout), options=Options(backend=backend))


def test_C9_weighing_twice_or_never_cannot_be_built():
    with pytest.raises(PlanError, match="second time") as caught:
        value(maker="the kernel").weigh("the combine")
    assert (caught.value.first, caught.value.second) == ("the kernel", "the combine")
    with pytest.raises(PlanError, match="not been weighted"):
        value(weighted=False, summed=False).sum_slots("the combine")
    with pytest.raises(PlanError, match="sums the chosen experts a second time"):
        value().sum_slots("the combine")
    spec = make_spec(INPUT)
    plan = MoERunner(spec, make_weights(spec)).plan
    steps = tuple(dataclasses.replace(s, weighs=True) if s.verb == "combine" else s for s in plan.steps)
    with pytest.raises(PlanError, match="routing weights a second time"):
        dataclasses.replace(plan, steps=steps)
    steps = tuple(dataclasses.replace(s, weighs=False, sums=False) if s.verb == "experts" else s for s in plan.steps)
    with pytest.raises(PlanError, match="never been weighted"):
        dataclasses.replace(plan, steps=steps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gate_up", ["concat", "interleaved"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_C10_the_order_of_input_weighting_does_not_depend_on_the_storage(backend, gate_up, dtype):
    spec = make_spec(INPUT, top_k=1, shared=SHARED)
    weights = LayerWeights.of(spec, make_weights(spec, dtype=dtype), gate_up)
    check(spec, weights, tokens(dtype=dtype), options=Options(backend=backend))


def test_C11_a_kernel_without_input_weighting_is_refused_with_the_reason():
    spec = make_spec(INPUT)
    with toy_backend(input_weighting=False) as options:
        with pytest.raises(UnsupportedError, match="input weighting") as caught:
            MoERunner(spec, make_weights(spec), options=options)
        assert "'toy'" in str(caught.value)
        refused = dict(MoERunner(spec, make_weights(spec)).plan.step("experts").refused)
        assert refused["toy"] == "has no input weighting"


def test_C11_a_kernel_that_cannot_skip_slots_is_refused():
    spec = make_spec()
    with toy_backend(id_minus_one=False) as options:
        with pytest.raises(UnsupportedError, match="id -1"):
            MoERunner(spec, make_weights(spec), options=options)


def test_C11_a_kernel_that_cannot_return_rows_is_refused_where_they_are_needed():
    spec = make_spec(experts={"row_norm": RMSNorm(features=HIDDEN)})
    with toy_backend(row_output=False) as options:
        with pytest.raises(UnsupportedError, match="does not return rows"):
            MoERunner(spec, make_weights(spec), options=options)
        sharded = Layout(ep=2, tokens="sharded")
        chosen = Options(backend=options.backend, dispatch="alltoall")
        with pytest.raises(UnsupportedError, match="does not return rows"):
            on_ranks(make_spec(), make_weights(make_spec()), tokens(), layout=sharded, options=chosen)
        check(make_spec(), make_weights(make_spec()), tokens(), options=options)


@pytest.mark.parametrize(
    "layout", [None, "tp2", "ep2", "sharded tokens, ep2", "sharded tokens, ep4", "sharded tokens, ep2 tp2"]
)
def test_C12_the_weights_are_float32_when_they_reach_the_kernel_and_the_combine(layout):
    spec = make_spec(factor=2.5)
    weights, x = make_weights(spec, dtype=torch.bfloat16), tokens(11, dtype=torch.bfloat16)
    calls = []
    with toy_backend(recording(calls)) as options:
        check(spec, weights, x, layout=LAYOUTS.get(layout), options=options)
    assert {c.topk.weights.dtype for c in calls} == {torch.float32}
    exact = set(MoERunner(spec, weights).route(x).weights.flatten().tolist())
    seen = {w for c in calls for w in c.topk.weights[c.topk.ids >= 0].flatten().tolist()}
    assert seen <= exact, "a weight was rounded on its way"


def test_C12_weights_are_not_rounded_in_the_sum():
    # 0.7 and 0.7 + 2^-10 are the same number in bfloat16. Two equal experts with opposite signs leave only the difference.
    spec = make_spec(num_experts=2)
    weights = make_weights(spec, dtype=torch.bfloat16)
    weights["w13"][1], weights["w2"][1] = weights["w13"][0], -weights["w2"][0]
    ids = torch.tensor([[0, 1]]).repeat(7, 1)
    topk = TopK(ids, torch.tensor([[0.7 + 2**-10, 0.7]]).repeat(7, 1))
    check(spec, weights, tokens(dtype=torch.bfloat16), topk=topk)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_C13_ties_go_to_the_lowest_id(dtype):
    key = torch.tensor([[1.0, 3, 3, 0, 3, 1], [0.0, -0.0, 0, -0.0, 0, 0], [-1, -1, -2, -1, -1, -3]], dtype=dtype)
    assert stable_topk(key, 4).tolist() == [[1, 2, 4, 0], [0, 1, 2, 3], [0, 1, 3, 4]]
    big = torch.tensor([[1e-45, 0.0, -1e-45, 3e38, -3e38, float("inf"), float("-inf"), float("nan")]], dtype=dtype)
    assert stable_topk(big, 8).tolist() == [[5, 3, 0, 1, 2, 4, 6, 7]]
    for few in (key, big):  # many keys may be ordered in another way than few
        k = min(4, few.shape[1])
        assert torch.equal(stable_topk(few.repeat(9000, 1), k), stable_topk(few, k).repeat(9000, 1))


@pytest.mark.parametrize("router", BY_LOGITS)
def test_C13_the_choice_does_not_depend_on_the_batch(router):
    spec = make_spec(BY_LOGITS[router])
    weights = make_weights(spec)
    z = torch.randint(-2, 3, (40, EXPERTS), generator=torch.Generator().manual_seed(5)).float()  # nearly every row has ties
    runner = MoERunner(spec, weights)
    types = torch.zeros(40, dtype=torch.int64) if spec.routing.modalities > 1 else None
    whole = runner.route(tokens(40), router_logits=z, token_types=types)
    assert whole.ids.tolist() == [
        c.ids for c in reference_route(spec, LayerWeights.of(spec, weights), tokens(40), router_logits=z, token_types=types)
    ]
    for rows in (slice(0, 1), slice(3, 10), slice(39, 40)):
        cut = None if types is None else types[rows]
        assert torch.equal(runner.route(tokens(40)[rows], router_logits=z[rows], token_types=cut).ids, whole.ids[rows])
    back = torch.arange(39, -1, -1)
    assert torch.equal(runner.route(tokens(40), router_logits=z[back], token_types=types).ids, whole.ids[back])


@pytest.mark.parametrize("score", ["max", "top2_sum"])
def test_C13_groups_that_tie_go_to_the_first_ones(score):
    spec = make_spec(RoutingSpec(score="sigmoid", groups=GroupSpec(count=4, kept=1, score=score)))
    check_routing(spec, make_weights(spec), torch.zeros(2, EXPERTS))
    assert route(torch.zeros(1, EXPERTS), spec).ids.tolist() == [[0, 1]]


@pytest.mark.parametrize("on_output", [False, True])
@pytest.mark.parametrize("layout", [None, "tp2", "ep2", "ep3, uneven", "ep2, copies", "sharded tokens, ep4"])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_C14_zero_experts_add_the_token_itself(score, layout, on_output):
    routing = RoutingSpec(score=score, selection_bias=True)
    spec = make_spec(routing, factor=2.5, on_output=on_output, zero_experts=4, top_k=3, shared=SHARED)
    weights, x = make_weights(spec), tokens(13)
    chosen = MoERunner(spec, weights).route(x).ids
    assert ((chosen >= EXPERTS).any(1) & (chosen < EXPERTS).any(1)).any(), "some tokens mix both kinds"
    check(spec, weights, x, layout=LAYOUTS.get(layout))


def test_C14_no_real_expert_works_for_a_zero_expert():
    spec = make_spec(zero_experts=4, top_k=2)
    weights, x, calls = make_weights(spec), tokens(4), []
    topk = TopK(torch.tensor([[8, 9], [0, 11], [10, 3], [1, 2]]), torch.rand(4, 2) + 0.5)
    with toy_backend(recording(calls)) as options:
        check(spec, weights, x, options=options, topk=topk)
    assert calls[0].topk.ids.tolist() == [[-1, -1], [0, -1], [-1, 3], [1, 2]]


def test_C14_the_identity_reaches_every_column():
    spec = make_spec(zero_experts=1, num_experts=1, top_k=2, hidden_size=300)
    weights = make_weights(spec)
    weights["w2"] = torch.zeros_like(weights["w2"])
    x = tokens(3, hidden=300)
    y = check(spec, weights, x, topk=TopK(torch.tensor([[0, 1]] * 3), torch.full((3, 2), 0.5)))
    assert_close(y, 0.5 * x)


def test_C14_slots_of_a_placement_are_never_taken_for_zero_experts():
    spec = make_spec(zero_experts=2)

    def build(bound):
        ids = torch.tensor([[8, 9]] * 3)
        return MoERunner(spec, make_weights(spec), bound)(tokens(3), topk=TopK(ids, torch.ones(3, 2), space="physical"))

    from moerunner.parallel.comm import simulate

    with pytest.raises(SpecError, match="zero experts"):
        simulate(Layout(ep=2, redundant=2), build)


SHARED_KINDS = {
    "plain": SHARED,
    "sigmoid": SharedSpec(width=20, gate="sigmoid", bias=True),
    "several": SharedSpec(width=10, count=3),
}


@pytest.mark.parametrize("shared", SHARED_KINDS)
@pytest.mark.parametrize("router", ROUTERS)
def test_C15_no_router_drops_the_shared_expert(router, shared):
    spec = make_spec(ROUTERS[router], factor=2.5, shared=SHARED_KINDS[shared])
    weights, x = make_weights(spec), tokens()
    y = check(spec, weights, x)
    without = {**weights, "shared_w2": torch.zeros_like(weights["shared_w2"])}
    if spec.shared.bias:
        without["shared_b2"] = torch.zeros_like(weights["shared_b2"])
    assert not torch.allclose(y, check(spec, without, x), rtol=1e-2)


@pytest.mark.parametrize("renormalise", ["none", "sum", "p_norm"])
@pytest.mark.parametrize("layout", [None, "tp2", "ep2 tp2", "sharded tokens, ep2"])
def test_C15_shared_experts_that_take_part_in_the_gate(layout, renormalise):
    routing = RoutingSpec(score="sigmoid", renormalise=renormalise, selection_bias=True, global_scale=True)
    spec = make_spec(routing, factor=2.5, shared=SharedSpec(width=20, count=2, gate="router"))
    check(spec, make_weights(spec), tokens(11), layout=LAYOUTS.get(layout))


@pytest.mark.parametrize(
    ("count", "kept", "top_k", "what"),
    [(3, 1, 2, "equal groups"), (4, 1, 3, "fewer than top_k"), (8, 3, 2, "groups of 2"), (4, 5, 2, "keeps 5 of 4")],
)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_C17_a_grouping_that_does_not_fit_is_refused_and_not_skipped(score, count, kept, top_k, what):
    with pytest.raises(SpecError, match=what):
        make_spec(RoutingSpec(score=score, groups=GroupSpec(count=count, kept=kept)), factor=2.5, top_k=top_k)


@pytest.mark.parametrize("on_output", [False, True])
@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_C17_one_group_is_no_group_with_score_and_factor_kept(score, on_output):
    one = RoutingSpec(score=score, groups=GroupSpec(count=1, kept=1))
    spec, plainly = (make_spec(r, factor=2.5, on_output=on_output) for r in (one, RoutingSpec(score=score)))
    weights = make_weights(spec)
    assert torch.equal(check(spec, weights, tokens()), check(plainly, weights, tokens()))


@pytest.mark.parametrize("top_k", [1, 2, EXPERTS])
@pytest.mark.parametrize("router", [r for r in ROUTERS if r not in ("sparsemixer", "two modalities", "groups by best")])
def test_any_number_of_experts_per_token(router, top_k):
    routing = ROUTERS[router]
    if routing.groups is not None and top_k == EXPERTS:
        routing = dataclasses.replace(routing, groups=dataclasses.replace(routing.groups, kept=routing.groups.count))
    spec = make_spec(routing, factor=2.5, top_k=top_k, shared=SHARED)
    check(spec, make_weights(spec), tokens())


def test_a_step_that_reads_what_nobody_made_cannot_be_built():
    spec = make_spec(shared=SHARED)
    plan = MoERunner(spec, make_weights(spec)).plan
    late = sorted(plan.steps, key=lambda s: s.verb == "route")
    with pytest.raises(PlanError, match="reads 'topk', which no step before it makes"):
        dataclasses.replace(plan, steps=tuple(late))
    with pytest.raises(PlanError, match="reads 'out'"):
        dataclasses.replace(plan, steps=(Step(verb="trim", value="out", width=HIDDEN), *plan.steps))
    with pytest.raises(PlanError, match="without an output"):
        check_end(plan.steps, plan.start, spec, "replicate", ())


def test_a_plan_that_is_not_the_whole_layer_cannot_be_built():
    spec = make_spec(shared=SHARED, zero_experts=2)
    plan = MoERunner(spec, make_weights(spec)).plan
    for verb in ("gate", "route", "dispatch", "experts", "combine", "shared", "zero", "join"):
        with pytest.raises(PlanError, match=f"no step does '{verb}'"):
            dataclasses.replace(plan, steps=tuple(s for s in plan.steps if s.verb != verb))
        twice = [s for s in plan.steps for _ in range(2 if s.verb == verb else 1)]
        with pytest.raises(PlanError, match="second time"):
            dataclasses.replace(plan, steps=tuple(twice))
    norm = Step(verb="output_transform", takes=HIDDEN, width=HIDDEN, at="output_transform")
    with pytest.raises(PlanError, match="is not part of the layer"):
        dataclasses.replace(plan, steps=(*plan.steps[:-1], norm, plan.steps[-1]))


def test_a_step_where_the_runner_does_not_carry_it_out_cannot_be_built():
    spec = make_spec(factor=2.5, on_output=True, shared=SHARED)
    plan = MoERunner(spec, make_weights(spec)).plan
    with pytest.raises(PlanError, match="no verb 'residual'"):
        dataclasses.replace(plan, steps=(*plan.steps, Step(verb="residual", value="out")))
    elsewhere = [dataclasses.replace(s, at="final_transform") if s.verb == "scale" else s for s in plan.steps]
    with pytest.raises(PlanError, match="changes 'routed' at 'final_transform'"):
        dataclasses.replace(plan, steps=tuple(elsewhere))
    late = sorted(plan.steps, key=lambda s: {"shared": 1, "scale": 2, "join": 3}.get(s.verb, 0))  # shared behind combine
    with pytest.raises(PlanError, match="carries out later") as caught:
        dataclasses.replace(plan, steps=tuple(late))
    assert caught.value.second == "shared"
