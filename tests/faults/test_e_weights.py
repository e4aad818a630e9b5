"""Section E of docs/faults.md: weights, their layouts, their loading, and what a kernel must honour or refuse."""

import dataclasses
import itertools

import pytest
import torch
from helpers import (
    BACKENDS,
    EXPERTS,
    HIDDEN,
    INNER,
    LAYOUTS,
    NORM,
    ROUTERS,
    SHARED,
    TRAINABLE,
    assert_close,
    check,
    make_spec,
    make_weights,
    on_one,
    on_ranks,
    tokens,
    toy_backend,
)

from moerunner import (
    ActivationSpec,
    Layout,
    MoERunner,
    Options,
    RMSNorm,
    RoutingSpec,
    SharedSpec,
    SpecError,
    UnsupportedError,
    WeightsError,
    fused_experts,
)
from moerunner.experts import eager
from moerunner.experts.base import ALL_ACTIVATIONS, Request, refusals
from moerunner.ops.reference import reference
from moerunner.parallel.comm import simulate
from moerunner.values import ExpertTensor, ExpertWeights, LayerWeights, TopK

FULL = make_spec(
    RoutingSpec(score="sigmoid", selection_bias=True, logit_bias=True, renormalise="sum", per_expert_scale=True),
    factor=2.5,
    on_output=True,
    experts={"bias": True, "row_norm": RMSNorm(features=HIDDEN)},
    shared=SharedSpec(width=20, gate="sigmoid", bias=True),
    output_transform=NORM,
    output_bias=True,
)


@pytest.mark.parametrize("name", FULL.weight_shapes())
def test_E2_a_tensor_that_was_not_loaded_is_an_error(name):
    weights = make_weights(FULL)
    check(FULL, weights, tokens())
    del weights[name]
    with pytest.raises(WeightsError, match=f"missing {name}"):
        MoERunner(FULL, weights)


@pytest.mark.parametrize("name", FULL.weight_shapes())
def test_E2_nor_is_a_tensor_of_the_wrong_shape_taken(name):
    weights = make_weights(FULL)
    weights[name] = torch.cat([weights[name], weights[name]])
    with pytest.raises(WeightsError, match=name):
        MoERunner(FULL, weights)


def test_E2_everything_that_is_wrong_is_listed_at_once():
    weights = make_weights(FULL)
    del weights["gate"], weights["b2"]
    weights["gate_proj"] = torch.zeros(1)
    with pytest.raises(WeightsError, match="missing b2, gate; not in the spec: gate_proj"):
        MoERunner(FULL, weights)


@pytest.mark.parametrize("alias", ["w1", "w3", "gate_proj", "up_proj", "gate_up_proj", "w31", "down_proj"])
def test_E3_no_name_is_guessed(alias):
    spec = make_spec()
    weights = make_weights(spec)
    with pytest.raises(WeightsError, match=alias):
        MoERunner(spec, {**weights, alias: weights["w13"]})
    with pytest.raises(WeightsError, match=alias):
        ExpertWeights.of({"w13": weights["w13"], "w2": weights["w2"], alias: weights["w13"]})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gate_up", ["concat", "interleaved"])
def test_E3_gate_rows_come_first_or_alternate_and_never_change_places(gate_up, backend):
    spec = make_spec(shared=SHARED, experts={"bias": True})
    weights = make_weights(spec)
    stored = dict(weights)
    if gate_up == "interleaved":
        for name in ("w13", "b13"):
            stored[name] = torch.stack(weights[name].chunk(2, 1), 2).flatten(1, 2)
    expected = check(spec, weights, tokens(), options=Options(backend=backend))
    layer = LayerWeights.of(spec, stored, gate_up)
    assert_close(check(spec, layer, tokens(), options=Options(backend=backend)), expected)
    swapped = {**weights, "w13": torch.cat(weights["w13"].chunk(2, 1)[::-1], 1)}
    assert not torch.allclose(on_one(spec, swapped, tokens()), expected, rtol=1e-2)


@pytest.mark.parametrize("layout", [None, "tp2", "tp3", "ep2 tp2, whole shared", "sharded tokens, ep2"])
def test_E3_gate_and_up_of_the_shared_expert_may_lie_apart(layout):
    spec = make_spec(factor=2.5, shared=SharedSpec(width=7, gate="sigmoid", bias=True))
    weights = make_weights(spec)
    whole = LayerWeights.of(spec, weights)
    gate, up = weights["shared_w13"].chunk(2)
    tensors = {n: t for n, t in whole.tensors.items() if n != "shared_w13"}
    apart = dataclasses.replace(whole, tensors={**tensors, "shared_gate_proj": gate, "shared_up_proj": up})
    run = on_one if layout is None else on_ranks
    y = run(spec, apart, tokens(11), layout=LAYOUTS.get(layout))
    assert_close(y, reference(spec, whole, tokens(11)))
    assert_close(check(spec, apart, tokens(11), layout=LAYOUTS.get(layout)), y)


SQUARE = [(48, 24), (16, 16), (32, 16), (16, 8)]  # 2I == H, I == H, ...


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("hidden", "inner"), SQUARE)
def test_E4_no_shape_is_read_as_a_layout(hidden, inner, backend):
    for gated in (True, False):
        spec = make_spec(hidden_size=hidden, experts={"intermediate_size": inner, "gated": gated}, shared=None)
        x = tokens(hidden=hidden)
        check(spec, make_weights(spec), x, options=Options(backend=backend))
        for layout in ("tp2", "ep2 tp2"):
            check(spec, make_weights(spec), x, layout=LAYOUTS[layout], options=Options(backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("hidden", "inner"), [(48, 24), (16, 16), (16, 24)])
def test_E4_strides_are_free_and_shapes_are_not(hidden, inner, backend):
    spec = make_spec(hidden_size=hidden, experts={"intermediate_size": inner})
    weights, x = make_weights(spec), tokens(hidden=hidden)
    expected = check(spec, weights, x)
    turned = {n: t.transpose(1, 2).contiguous().transpose(1, 2) if n in ("w13", "w2") else t for n, t in weights.items()}
    assert turned["w13"].stride() != weights["w13"].stride()
    assert_close(check(spec, turned, x, options=Options(backend=backend)), expected)
    if 2 * inner != hidden:
        with pytest.raises(WeightsError, match="w13 has shape"):
            MoERunner(spec, {**weights, "w13": weights["w13"].transpose(1, 2)})


@pytest.mark.parametrize("backend", BACKENDS)
def test_E5_loading_twice_gives_the_same_layer(backend):
    one, other = make_weights(FULL), make_weights(FULL, seed=5)
    runner = MoERunner(FULL, {n: t.clone() for n, t in one.items()}, options=Options(backend=backend))
    first = runner(tokens())
    names = {n.replace(".", "_"): n for n in one}
    for weights in (one, one, other, one):
        runner.load_state_dict({name: weights[n] for name, n in names.items()})
        y = runner(tokens())
        assert_close(y, reference(FULL, LayerWeights.of(FULL, weights), tokens()), 5e-6)
        assert torch.equal(y, first) == (weights is one)
    assert set(runner.state_dict()) == set(names)


@pytest.mark.parametrize("backend", BACKENDS)
def test_E5_in_place_changes_are_noticed(backend):
    weights = make_weights(FULL)
    runner = MoERunner(FULL, weights, options=Options(backend=backend))
    for name in weights:
        with torch.no_grad():
            getattr(runner, name.replace(".", "_")).mul_(1.25)
        y = runner(tokens())
        assert_close(y, reference(FULL, LayerWeights.of(FULL, weights), tokens()), 5e-6)


@pytest.mark.parametrize("layout", [None, "tp2", "ep2 tp2", "sharded tokens, ep4"])
def test_E5_building_and_running_leaves_what_was_given_as_it_was(layout):
    weights = make_weights(FULL)
    before = {n: t.clone() for n, t in weights.items()}
    for _ in range(2):
        run = on_one if layout is None else on_ranks
        y = run(FULL, weights, tokens(), layout=LAYOUTS.get(layout))
        assert_close(y, reference(FULL, LayerWeights.of(FULL, before), tokens()), 5e-6)
    assert all(torch.equal(weights[n], before[n]) for n in before)


def test_E6_everything_of_an_expert_moves_as_one_record():
    spec = make_spec(ROUTERS["biased sigmoid"], factor=2.5, experts={"bias": True}, shared=SHARED)
    weights = make_weights(spec)
    expected = check(spec, weights, tokens())
    order = [3, 0, 7, 5, 1, 6, 2, 4]
    whole = LayerWeights.of(spec, weights)
    experts = whole.experts[0]
    scale = ExpertTensor(torch.arange(EXPERTS) + 0.5, 0, None, "whole")  # a format's own product, cached per expert
    experts = dataclasses.replace(experts, tensors={**experts.tensors, "alpha": scale})
    records = [experts.record(e) for e in order]
    assert all(set(r) == {"w13", "w2", "b13", "b2", "alpha"} for r in records)
    assert [float(r["alpha"]) for r in records] == [e + 0.5 for e in order]
    moved = {n: torch.stack([r[n] for r in records]) for n in ("w13", "w2", "b13", "b2")}
    moved |= {n: weights[n][order] for n in ("gate", "selection_bias")}
    assert_close(check(spec, {**weights, **moved}, tokens()), expected)
    part = experts.shard([2, -1, 5], 0, 1)
    assert part.get("alpha").tolist() == [2.5, 0.0, 5.5]


def test_E6_a_record_is_the_experts_memory_and_not_a_copy():
    experts = LayerWeights.of(FULL, make_weights(FULL)).experts[0]
    for name, tensor in experts.record(3).items():
        tensor.fill_(7.0)
        assert (experts.get(name)[3] == 7.0).all()
        assert not (experts.get(name)[2] == 7.0).any()


@pytest.mark.parametrize("layout", ["ep2", "ep3, uneven", "ep2, round robin", "ep2, copies", "ep2 tp2"])
@pytest.mark.parametrize("mode", ["replicated", "sharded"])
def test_E7_experts_of_other_ranks_may_hold_anything(mode, layout):
    layout = dataclasses.replace(LAYOUTS[layout], tokens=mode)
    spec = make_spec(factor=2.5, experts={"bias": True}, shared=SHARED)
    weights, x = make_weights(spec), tokens(13)

    def main(bound):
        comm = bound.comm
        own = set(layout.slots(EXPERTS)[comm.coordinates["ep"]])
        foreign = [e for e in range(EXPERTS) if e not in own]
        mine = {n: t.clone() for n, t in weights.items()}
        for name in ("w13", "w2", "b13", "b2"):
            mine[name][foreign] = float("nan")  # this rank never loaded them
        start = sum(layout.token_counts(13)[: comm.index(("ep", "tp"))]) if mode == "sharded" else 0
        stop = start + layout.token_counts(13)[comm.index(("ep", "tp"))] if mode == "sharded" else 13
        return MoERunner(spec, mine, bound)(x[start:stop])

    results = simulate(layout, main)
    y = torch.cat(results) if mode == "sharded" else results[0]
    assert_close(y, reference(spec, LayerWeights.of(spec, weights), x))


def test_E7_an_empty_slot_is_zero_and_not_what_lay_there():
    experts = LayerWeights.of(FULL, make_weights(FULL)).experts[0]
    experts.w13[0], experts.w2[0] = float("nan"), float("inf")
    part = experts.shard([1, -1], 0, 1)
    for name in ("w13", "w2", "b13", "b2"):
        assert not part.get(name)[1].any()
        assert torch.equal(part.get(name)[0], experts.get(name)[1])


@pytest.mark.parametrize("inner", [1, 5, 7, 10, 24])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(tp=3), Layout(tp=4), Layout(ep=2, tp=3)], ids=str)
def test_E9_a_width_that_does_not_divide_is_padded_with_nothing(layout, gated, inner):
    spec = make_spec(
        factor=2.5, experts={"intermediate_size": inner, "gated": gated, "bias": True}, shared=SharedSpec(width=7, bias=True)
    )
    check(spec, make_weights(spec), tokens(), layout=layout)


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(tp=3), Layout(ep=2, tp=2, tokens="sharded")], ids=str)
@pytest.mark.parametrize("inner", [5, 10])
def test_E9_nor_does_it_tear_interleaved_pairs_apart(inner, layout):
    spec = make_spec(factor=2.5, experts={"intermediate_size": inner, "bias": True})
    check(spec, LayerWeights.of(spec, make_weights(spec), "interleaved"), tokens(), layout=layout)


def test_E9_nor_the_shared_experts_of_a_router():
    spec = make_spec(shared=SharedSpec(width=7, count=3, gate="router"))
    for layout in ("tp2", "tp3", "ep2 tp2"):
        check(spec, make_weights(spec), tokens(), layout=LAYOUTS[layout])


ACTIVATIONS = {
    "silu": {},
    "gelu": {"kind": "gelu"},
    "gelu_tanh": {"kind": "gelu_tanh"},
    "relu": {"kind": "relu"},
    "relu2": {"kind": "relu2"},
    "swigluoai": {"kind": "swigluoai"},
    "swigluoai, other constants": {"kind": "swigluoai", "alpha": 1.1, "beta": 0.5, "limit": 2.0},
    "limit": {"limit": 1.0},
    "limit after": {"limit": 0.5, "clamp_after": True},
    "alpha": {"alpha": 1.702},
    "beta": {"beta": 1.0},
    "gate cap": {"gate_softcap": 0.8},
    "up cap": {"up_softcap": 0.8},
    "gelu with limit": {"kind": "gelu", "limit": 1.0},
    "relu2 with limit after": {"kind": "relu2", "limit": 0.5, "clamp_after": True},
}


@pytest.mark.parametrize("gate_up", ["concat", "interleaved"])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_E10_every_constant_of_an_activation_is_honoured(act, backend, gate_up):
    spec = make_spec(experts={"activation": ActivationSpec(**ACTIVATIONS[act])})
    weights, x = make_weights(spec), 3 * tokens()  # large enough for every clamp to bite
    layer = LayerWeights.of(spec, weights, gate_up)
    y = check(spec, layer, x, options=Options(backend=backend))
    if act != "silu":
        silu = make_spec()
        assert not torch.allclose(y, on_one(silu, LayerWeights.of(silu, weights, gate_up), x), rtol=1e-2)


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_E10_the_shared_expert_honours_them_too(act):
    spec = make_spec(shared=SharedSpec(width=20, activation=ActivationSpec(**ACTIVATIONS[act])))
    weights = make_weights(spec)
    weights["w2"] = torch.zeros_like(weights["w2"])
    check(spec, weights, 3 * tokens())


NEEDS = {
    "limit": {"limit": 1.0},
    "clamp_after": {"limit": 1.0, "clamp_after": True},
    "alpha": {"alpha": 1.1},
    "beta": {"beta": 1.0},
    "gate_softcap": {"gate_softcap": 1.0},
    "up_softcap": {"up_softcap": 1.0},
    "gelu": {"kind": "gelu"},
    "relu2": {"kind": "relu2"},
}


@pytest.mark.parametrize("missing", NEEDS)
def test_E10_a_kernel_that_ignores_one_is_refused_by_name(missing):
    spec = make_spec(experts={"activation": ActivationSpec(**NEEDS[missing])})
    weights = make_weights(spec)
    with toy_backend(activations=ALL_ACTIVATIONS - {missing}) as options:
        with pytest.raises(UnsupportedError, match=f"does not know the activation's {missing}"):
            MoERunner(spec, weights, options=options)
        if not {"gate_softcap", "up_softcap"} & set(NEEDS[missing]):  # not offered by the plain function
            ids, w13, w2 = torch.zeros(7, 1, dtype=torch.int64), weights["w13"], weights["w2"]
            asked = {"activation" if k == "kind" else k: v for k, v in NEEDS[missing].items()}
            with pytest.raises(UnsupportedError, match=missing):
                fused_experts(tokens(), w13, w2, ids + 1.0, ids, backend="toy", **asked)
    with toy_backend(activations=ALL_ACTIVATIONS) as options:
        check(spec, weights, tokens(), options=options)


def test_E10_swigluoai_brings_its_constants():
    spec = make_spec(experts={"activation": ActivationSpec(kind="swigluoai")})
    for missing in ("limit", "alpha", "beta"):
        with toy_backend(activations=ALL_ACTIVATIONS - {missing}) as options:
            with pytest.raises(UnsupportedError, match=missing):
                MoERunner(spec, make_weights(spec), options=options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh", "relu", "relu2"])
@pytest.mark.parametrize("gated", [True, False])
def test_E11_gated_or_not_on_every_kernel(gated, kind, backend, dtype):
    spec = make_spec(
        experts={"gated": gated, "activation": ActivationSpec(kind=kind), "bias": True},
        shared=SharedSpec(width=24, gated=gated, activation=ActivationSpec(kind=kind)),
    )
    check(spec, make_weights(spec, dtype=dtype), tokens(dtype=dtype), options=Options(backend=backend))


def test_E11_gate_and_up_are_declared_and_must_agree_with_the_spec():
    gated, plainly = make_spec(), make_spec(experts={"gated": False, "intermediate_size": 2 * INNER})
    weights = make_weights(gated)
    with pytest.raises(WeightsError, match="gated=True"):
        LayerWeights.of(
            gated, {"gate": weights["gate"], "experts": ExpertWeights.of({"w13": weights["w13"], "w2": weights["w2"]}, "none")}
        )
    flat = make_weights(plainly)
    with pytest.raises(WeightsError, match="gated=False"):
        LayerWeights.of(plainly, {"gate": flat["gate"], "experts": ExpertWeights.of({"w13": flat["w13"], "w2": flat["w2"]})})
    for impossible in ({"beta": 1.0}, {"up_softcap": 1.0}, {"kind": "swigluoai"}):
        with pytest.raises(SpecError, match="need a gated expert"):
            make_spec(experts={"gated": False, "activation": ActivationSpec(**impossible)})


REFUSED = {
    "bias": ({"bias": False}, "has no bias", {"bias": True}),
    "interleaved": ({"gate_up": frozenset({"concat"})}, "gate_up='interleaved'", {}),
    "ungated": ({"gate_up": frozenset({"concat"})}, "gate_up='none'", {"gated": False}),
    "dtype": ({"dtypes": {"cpu": frozenset({"bfloat16"})}}, "takes bfloat16 on cpu, not float32", {}),
    "device": ({"dtypes": {"cuda": frozenset({"float32"})}}, "runs on cuda, not on cpu", {}),
    "format": ({"formats": frozenset({"other"})}, "does not read the format 'none'", {}),
    "rows": ({"stride_bytes": 512}, "needs rows in multiples of 512 bytes", {}),
}


@pytest.mark.parametrize("what", REFUSED)
def test_E13_what_a_kernel_does_not_declare_is_refused_with_the_reason(what):
    declares, reason, experts = REFUSED[what]
    spec = make_spec(experts=experts)
    weights = LayerWeights.of(spec, make_weights(spec), "interleaved" if what == "interleaved" else "concat")
    with toy_backend(**declares) as options:
        with pytest.raises(UnsupportedError) as caught:
            MoERunner(spec, weights, options=options)
        assert reason in str(caught.value)
        assert "'toy'" in str(caught.value)
        auto = MoERunner(spec, weights).plan.step("experts")
        assert reason in dict(auto.refused)["toy"]
    check(spec, weights, tokens())


def test_E13_strides_that_a_kernel_cannot_read_are_refused_when_the_plan_is_made():
    spec = make_spec()
    weights = make_weights(spec)
    odd = torch.zeros(EXPERTS, 2 * INNER, HIDDEN + 1)[..., :HIDDEN].copy_(weights["w13"])
    neither = torch.zeros(EXPERTS, 2 * INNER, 2 * HIDDEN)[..., ::2].copy_(weights["w13"])
    for w13 in (odd, neither):
        with pytest.raises(UnsupportedError, match="strides in multiples of 16 bytes"):
            MoERunner(spec, {**weights, "w13": w13}, options=Options(backend="grouped_mm"))
        check(spec, {**weights, "w13": w13}, tokens())
    # A slice of the intermediate width can be too narrow for the rows between the two products.
    spec = make_spec(experts={"intermediate_size": 12})
    with pytest.raises(UnsupportedError, match="rows in multiples of 16 bytes"):
        on_ranks(spec, make_weights(spec), tokens(), layout=Layout(tp=2), options=Options(backend="grouped_mm"))
    check(spec, make_weights(spec), tokens(), layout=Layout(tp=2))


def test_E13_when_nothing_can_run_it_every_reason_is_given():
    spec = make_spec(experts={"activation": ActivationSpec(limit=1.0)})
    weights = {n: t.to(torch.float64) for n, t in make_weights(spec).items()}
    with toy_backend(activations=frozenset({"silu"})):
        with pytest.raises(UnsupportedError) as caught:
            MoERunner(spec, weights, options=Options(batch_invariant=True))
    text = str(caught.value)
    assert all(f"{name}:" in text for name in (*BACKENDS, "toy"))
    assert "not float64" in text
    assert "limit" in text
    assert "not batch invariant" in text


def test_E13_every_capability_that_can_be_asked_for_is_looked_at():
    silu = ActivationSpec()
    plain = Request(device="cpu", dtype="float32", activation=silu, gate_up="concat", shapes=(), strides=())
    assert refusals(eager.INFO, plain) == []
    for flag in ("bias", "input_weighting", "rows", "grad", "deterministic", "batch_invariant", "capturable"):
        lacking = {"rows": "row_output", "grad": "backward"}.get(flag, flag)
        asked = dataclasses.replace(plain, **{flag: True})
        assert len(refusals(dataclasses.replace(eager.INFO, **{lacking: False}), asked)) == 1, flag
        assert refusals(dataclasses.replace(eager.INFO, **{lacking: True}), asked) == [], flag
    assert len(refusals(dataclasses.replace(eager.INFO, id_minus_one=False), plain)) == 1


def test_E13_a_name_cannot_be_taken_twice():
    with toy_backend(), pytest.raises(UnsupportedError, match="exists"), toy_backend():
        pass
    with pytest.raises(UnsupportedError, match="exists"), toy_backend(name="eager"):
        pass


@pytest.mark.parametrize("backend", BACKENDS)
def test_E14_what_is_weighted_is_what_the_experts_read(backend):
    # One expert, weight w, on the input: the layer is expert(w * x), whatever else the token may carry.
    spec = make_spec(RoutingSpec(score="sigmoid_topk", choose="logit", weights_on="input"), num_experts=1, top_k=1)
    weights, x = make_weights(spec), tokens()
    ids = torch.zeros(7, 1, dtype=torch.int64)
    options = Options(backend=backend)
    for w in (0.0, 0.25, -2.0):
        weighted = on_one(spec, weights, x, options=options, topk=TopK(ids, torch.full((7, 1), w)))
        bare = on_one(spec, weights, w * x, options=options, topk=TopK(ids, torch.ones(7, 1)))
        assert torch.equal(weighted, bare)


@pytest.mark.parametrize("options", list(itertools.product([False, True], repeat=2)), ids=str)
def test_switching_an_option_changes_nothing(options):
    deterministic, grad = options
    spec = make_spec(factor=2.5, on_output=True, shared=SHARED)
    weights = make_weights(spec)
    expected = check(spec, weights, tokens())
    for backend in TRAINABLE if grad else BACKENDS:
        chosen = Options(backend=backend, deterministic=deterministic, grad=grad)
        assert_close(check(spec, weights, tokens(), options=chosen), expected)
