"""Section D of docs/faults.md: padding, masks, indices, and memory that nobody wrote."""

import dataclasses

import pytest
import torch
from helpers import (
    BACKENDS,
    EXPERTS,
    HIDDEN,
    INNER,
    LAYOUTS,
    NARROW,
    NORM,
    ROUTERS,
    SHARDED,
    SHARED,
    WIDEN,
    assert_close,
    check,
    error,
    inputs_for,
    make_spec,
    make_weights,
    on_one,
    on_ranks,
    pad_experts,
    poisoned_memory,
    recording,
    tokens,
    toy_backend,
    value,
)

import moerunner.experts.grouped_mm as grouped
from moerunner import (
    Layout,
    Linear,
    MoERunner,
    Options,
    PlanError,
    RMSNorm,
    RoutingSpec,
    SpecError,
    TransformSpec,
    WeightsError,
    fused_experts,
)
from moerunner.ops.permute import sort_by_expert
from moerunner.ops.reference import reference
from moerunner.plan import Step
from moerunner.values import LayerWeights, TopK

WIDE = HIDDEN + 16
NAN = float("nan")
LATENT = {"input_transform": NARROW, "output_transform": WIDEN}
AROUND = {
    "alone": {},
    "shared": {"shared": SHARED},
    "zero experts": {"zero_experts": 2},
    "norm after": {"output_transform": NORM},
    "norm after, shared": {"output_transform": NORM, "shared": SHARED},
    "latent": LATENT,
    "latent, shared": {**LATENT, "shared": SHARED},
    "norm at the end": {"final_transform": NORM},
    "output bias": {"output_bias": True},
    "average": {"shared": SHARED, "join": "average"},
    "norm of each expert": {"experts": {"row_norm": RMSNorm(features=HIDDEN)}},
    "norm of each expert without weight": {"experts": {"row_norm": RMSNorm(features=HIDDEN, weight=False)}, "shared": SHARED},
    "biases": {"experts": {"bias": True}, "shared": SHARED},
}


def padded(spec, weights, width, fill=3.0):
    """Stored wider; whatever lies in the padding of w2 and of the biases must never be looked at."""
    wide = pad_experts(weights, width, fill)
    for name in ("w2", "b2"):
        if name in wide:
            wide[name] = pad_experts(weights, width, NAN)[name]
    return wide


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", [None, "tp2", "ep2 tp2", "sharded tokens, ep2", "sharded tokens, ep4"])
@pytest.mark.parametrize("around", AROUND)
@pytest.mark.rotating(3)
def test_D1_a_hidden_size_that_is_no_multiple_of_the_tile(around, layout, backend):
    spec = make_spec(factor=2.5, on_output=True, **AROUND[around])
    weights = padded(spec, make_weights(spec), spec.routed_hidden_size + 16)
    check(spec, weights, tokens(11), layout=LAYOUTS.get(layout), options=Options(backend=backend))


@pytest.mark.parametrize("around", AROUND)
def test_D1_stored_wider_or_not_is_the_same_layer(around):
    spec = make_spec(factor=2.5, on_output=True, **AROUND[around])
    weights = make_weights(spec)
    stored = padded(spec, weights, spec.routed_hidden_size + 16)
    assert_close(on_one(spec, stored, tokens()), on_one(spec, weights, tokens()))


def test_D1_padding_twice_or_cutting_by_padding_cannot_be_built():
    with pytest.raises(PlanError, match="already padded to 32"):
        value(padded_to=32).pad("again", 48)
    with pytest.raises(PlanError, match="which would cut it"):
        value(width=16).pad("pad", 8)
    with pytest.raises(PlanError, match="has no padding"):
        value(width=16).trim("trim", 16)
    with pytest.raises(PlanError, match="the true width is 16"):
        value(width=16, padded_to=32).trim("trim", 24)
    with pytest.raises(PlanError, match="reads 32 features of which 16 are true"):
        value(width=16, padded_to=32).transform("norm", 16, 16, linear=True)
    with pytest.raises(PlanError, match="norms 32 features of which 16 are true"):
        value(width=16, padded_to=32, weighted=False, summed=False).row_norm("norm")
    with pytest.raises(PlanError, match="takes width 12, the value has 16"):
        value(width=16).transform("up", 12, 16, linear=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", [None, *LAYOUTS])
def test_D2_nan_padding_rows_leave_real_rows_alone(layout, backend):
    spec = make_spec(ROUTERS["biased sigmoid"], factor=2.5, on_output=True, shared=SHARED, zero_experts=2)
    weights, x = make_weights(spec), tokens(13)
    ref = reference(spec, LayerWeights.of(spec, weights), x)
    bad = [0, 4, 5, 12]
    good = [t for t in range(13) if t not in bad]
    x[bad] = NAN
    run = on_one if layout is None else on_ranks
    y = run(spec, weights, x, layout=LAYOUTS.get(layout), options=Options(backend=backend))
    assert_close(y[good], ref[good])
    assert y[bad].isnan().all()


@pytest.mark.parametrize("junk", [NAN, float("inf"), 1e30])
@pytest.mark.parametrize("layout", ["tp2", "ep2", "ep2 tp2", *SHARDED])
def test_D3_padded_rows_join_the_collectives_without_harm(layout, junk):
    spec = make_spec(factor=2.5, on_output=True, shared=SHARED)
    weights, x = make_weights(spec), tokens(13)
    topk = MoERunner(spec, weights).route(x)
    ids = topk.ids.clone()
    ids[9:] = -1  # the tail of the batch is padding
    given = TopK(ids, torch.where(ids >= 0, topk.weights, NAN))
    ref = reference(spec, LayerWeights.of(spec, weights), x, topk=given)
    x[9:] = junk
    y = on_ranks(spec, weights, x, layout=LAYOUTS[layout], topk=given)
    assert_close(y[:9], ref[:9])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", [None, "tp2", "ep2", "sharded tokens, ep2", "sharded tokens, ep4"])
def test_D4_rows_without_an_expert_cost_nothing_and_are_zero(layout, backend):
    spec = make_spec(factor=2.5, experts={"bias": True})
    weights, x = make_weights(spec), tokens(9)
    ids = torch.arange(18).view(9, 2) % EXPERTS
    ids[2], ids[5, 0], ids[8] = -1, -1, -1
    topk = TopK(ids, torch.where(ids >= 0, 0.5, NAN))
    x[2], x[8] = NAN, float("inf")
    run = on_one if layout is None else on_ranks
    y = run(spec, weights, x, layout=LAYOUTS.get(layout), options=Options(backend=backend), topk=topk)
    assert not y[[2, 8]].any(), "no expert and no shared expert: zero"
    clean = tokens(9)
    ref = reference(spec, LayerWeights.of(spec, weights), clean, topk=TopK(ids, torch.full((9, 2), 0.5)))
    assert_close(y, ref)


def test_D4_no_expert_is_given_a_padded_row():
    ids = torch.tensor([[3, -1], [-1, -1], [0, 3]])
    order = sort_by_expert(ids, EXPERTS)
    assert order.ends_E.tolist() == [1, 1, 1, 3, 3, 3, 3, 3]
    assert sorted(order.slot_R[:3].tolist()) == [0, 4, 5]


def test_D4_no_padded_row_travels():
    spec = make_spec()
    ids = torch.arange(18).view(9, 2) % EXPERTS
    ids[3:] = -1
    calls = []
    with toy_backend(recording(calls)) as options:
        chosen = dataclasses.replace(options, dispatch="alltoall")
        layout = Layout(ep=2, tokens="sharded")
        topk = TopK(ids, torch.ones(9, 2))
        on_ranks(spec, make_weights(spec), tokens(9), layout=layout, options=chosen, topk=topk)
    assert sum(len(c.x) for c in calls) == 6


@pytest.mark.parametrize("mode", ["replicated", "sharded"])
def test_D5_ids_beyond_the_routed_count_are_kept(mode):
    # Copies of experts have slots behind the last expert; zero experts have ids there.
    layout = Layout(ep=2, redundant=4, tokens=mode)
    slots = layout.slots(EXPERTS)
    flat = [e for row in slots for e in row]
    assert len(flat) > EXPERTS
    spec = make_spec(factor=2.5, shared=SHARED)
    weights, x = make_weights(spec), tokens(13)
    logical = MoERunner(spec, weights).route(x)
    last = {e: i for i, e in enumerate(flat) if e >= 0}  # the copy with the highest slot
    physical = torch.tensor([[last[e] for e in row] for row in logical.ids.tolist()])
    assert (physical >= EXPERTS).any()
    y = on_ranks(spec, weights, x, layout=layout, topk=dataclasses.replace(logical, ids=physical, space="physical"))
    assert_close(y, reference(spec, LayerWeights.of(spec, weights), x))
    zero = make_spec(factor=2.5, zero_experts=4)
    ids = torch.arange(26).view(13, 2) % 12
    check(zero, make_weights(zero), x, layout=Layout(ep=2, tokens=mode), topk=TopK(ids, torch.rand(13, 2)))


@pytest.mark.parametrize("ids", [[[0, 8]], [[-2, 1]], [[99, 0]]])
def test_D5_ids_of_nobody_are_refused(ids):
    spec = make_spec()
    weights, topk = make_weights(spec), TopK(torch.tensor(ids), torch.ones(1, 2))
    with pytest.raises(SpecError, match="ids reach from"):
        MoERunner(spec, weights)(tokens(1), topk=topk)
    with pytest.raises(SpecError, match="ids reach from"):
        fused_experts(tokens(1), weights["w13"], weights["w2"], topk.weights, topk.ids)


class _NanTail(torch.autograd.Function):
    """Rows behind `stop`, and their gradients, as a grouped product may leave them: never written."""

    @staticmethod
    def forward(ctx, x, stop):
        ctx.stop = stop
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        grad[ctx.stop :] = NAN
        return grad, None


def undefined_tail(x, w, *, offs):
    stop = int(offs[-1])
    y = torch.nn.functional.grouped_mm(_NanTail.apply(x, stop), w, offs=offs)
    return torch.cat([y[:stop], torch.full_like(y[stop:], NAN)])


@pytest.mark.parametrize(
    ("changes", "on_input"), [({}, False), ({}, True), ({"bias": True}, False), ({"row_norm": RMSNorm(features=HIDDEN)}, False)]
)
def test_D7_rows_behind_the_last_expert_are_never_read(monkeypatch, changes, on_input):
    monkeypatch.setattr(grouped, "grouped_mm", undefined_tail)
    routing = RoutingSpec(score="sigmoid", weights_on="input" if on_input else "output")
    spec = make_spec(routing, factor=2.5, shared=SHARED, experts=changes)
    ids = torch.arange(14).view(7, 2) % EXPERTS
    ids[1], ids[4, 1] = -1, -1
    weights, weight = make_weights(spec), torch.rand(7, 2, generator=torch.Generator().manual_seed(1))
    y = check(spec, weights, tokens(), options=Options(backend="grouped_mm"), topk=TopK(ids, weight))
    grads = {}
    for backend in ("grouped_mm", "eager"):
        leaves = {n: t.clone().requires_grad_() for n, t in {**weights, "x": tokens(), "w": weight}.items()}
        runner = MoERunner(spec, {n: leaves[n] for n in weights}, options=Options(backend=backend))
        out = runner(leaves["x"], topk=TopK(ids, leaves["w"]))
        (out * torch.arange(HIDDEN)).sum().backward()
        grads[backend] = {n: leaf.grad for n, leaf in leaves.items() if leaf.grad is not None}
        assert_close(out.detach(), y)
    for name, grad in grads["eager"].items():
        assert error(grads["grouped_mm"][name], grad) < 2e-5, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("what", ["experts", "tokens"])
def test_D8_offsets_pass_two_to_the_31(tmp_path, what, backend):
    # A sparse file stands for the memory, so that only the pages that are used exist.
    spec = make_spec(factor=2.5, num_experts=3)
    weights, x = make_weights(spec), tokens(4)
    step = (1 << 31) // 2 + 64 if what == "experts" else 1 << 30
    length = 4 * step + INNER * HIDDEN * 2
    with open(tmp_path / "sparse", "wb") as file:
        file.truncate(length * 4)
    far = torch.from_file(str(tmp_path / "sparse"), shared=True, size=length, dtype=torch.float32)
    if what == "experts":
        view = far.as_strided((3, 2 * INNER, HIDDEN), (step, HIDDEN, 1))
        assert 2 * view.stride(0) > 1 << 31
        weights["w13"] = view.copy_(weights["w13"])
    else:
        view = far.as_strided((4, HIDDEN), (step, 1))
        assert 3 * view.stride(0) > 1 << 31
        x = view.copy_(x)
    check(spec, weights, x, options=Options(backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", [None, "ep2 tp2", "sharded tokens, ep2", "sharded tokens, ep4", "sharded tokens, ep2 tp2"])
def test_D9_nothing_is_read_that_was_never_written(layout, backend):
    spec = make_spec(
        ROUTERS["groups by best two"], factor=2.5, on_output=True, shared=SHARED, experts={"bias": True}, output_transform=NORM
    )
    weights = make_weights(spec)
    with poisoned_memory():
        check(spec, weights, tokens(9), layout=LAYOUTS.get(layout), options=Options(backend=backend))
        stored = pad_experts(weights, WIDE)
        check(spec, stored, tokens(9), layout=LAYOUTS.get(layout), options=Options(backend=backend))


@pytest.mark.parametrize("router", ROUTERS)
def test_D9_nor_by_any_router(router):
    spec = make_spec(ROUTERS[router], factor=2.5)
    with poisoned_memory():
        check(spec, make_weights(spec), tokens())


@pytest.mark.parametrize("backend", BACKENDS)
def test_D9_a_buffer_for_the_result_is_written_in_full(backend):
    spec = make_spec()
    w, x = make_weights(spec), tokens()
    topk = MoERunner(spec, w).route(x)
    ids = topk.ids.clone()
    ids[3] = -1
    out = torch.full((7, HIDDEN), NAN)
    given = fused_experts(x, w["w13"], w["w2"], topk.weights, ids, backend=backend, out=out)
    assert given is out
    assert_close(out, reference(spec, LayerWeights.of(spec, w), x, topk=TopK(ids, topk.weights)))


def test_D10_what_comes_per_token_has_one_entry_per_token():
    spec = make_spec(ROUTERS["two modalities"])
    w, x = make_weights(spec), tokens()
    runner, types = MoERunner(spec, w), torch.zeros(7, dtype=torch.int64)
    runner(x, token_types=types)
    ids = torch.zeros(7, 2, dtype=torch.int64)
    for wrong in (
        {"token_types": types[:1]},
        {"token_types": types.repeat(4)},
        {"token_types": types, "router_logits": torch.zeros(1, EXPERTS)},
        {"token_types": types, "router_logits": torch.zeros(7, EXPERTS + 1)},
        {"token_types": types, "router_input": torch.zeros(1, HIDDEN)},
        {"topk": TopK(ids, torch.ones(7, 1))},
        {"topk": TopK(ids[:1], torch.ones(1, 2))},
        {"topk": TopK(ids, torch.ones(7, 8))},
    ):
        with pytest.raises(SpecError):
            runner(x, **wrong)
    for weights_TK, ids_TK in ((torch.ones(7, 1), ids), (torch.ones(1, 2), ids), (torch.ones(7, 2), ids[:1])):
        with pytest.raises(WeightsError, match="do not fit"):
            fused_experts(x, w["w13.0"], w["w2.0"], weights_TK, ids_TK)


def test_D11_small_outputs_are_compared_by_relative_error():
    ref = torch.tensor([1e-6, -3e-6, 2e-6, 4e-6])
    wrong = ref.flip(0)  # all of it within 1e-5, and nothing of it right
    assert torch.allclose(wrong, ref, atol=1e-5)
    assert error(wrong, ref) > 0.5
    assert error(ref * (1 + 1e-7), ref) < 2e-7
    assert error(torch.zeros(4), ref) == 1.0
    assert error(torch.full((4,), NAN), ref) == float("inf")
    assert error(ref[:2], ref) == float("inf")
    assert error(torch.ones(2), torch.zeros(2)) == float("inf")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_D12_any_number_of_rows_per_expert_from_any_view(backend, dtype):
    spec = make_spec(num_experts=2, top_k=1)
    weights = make_weights(spec, dtype=dtype)
    oracle = LayerWeights.of(spec, weights)
    wide = tokens(600, hidden=2 * HIDDEN, dtype=dtype)
    ids = torch.cat([torch.zeros(300, 1), torch.ones(300, 1)]).long()
    weight = torch.rand(600, 1, generator=torch.Generator().manual_seed(1))
    ref = reference(spec, oracle, wide[:, ::2], topk=TopK(ids, weight))
    limit = 2e-6 if dtype == torch.float32 else 2e-2
    for rows in (1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 256, 257, 300):
        some = torch.cat([torch.arange(rows), torch.arange(300, 300 + 301 - rows)])[:600]
        topk = TopK(ids[some], weight[some])
        views = (wide[some][:, ::2], wide[some][:, ::2].contiguous(), wide[some][:, ::2].T.contiguous().T)
        for x in views:
            y = on_one(spec, weights, x, options=Options(backend=backend), topk=topk)
            assert_close(y, ref[some], limit)


@pytest.mark.parametrize("backend", BACKENDS)
def test_D12_all_tokens_on_one_expert(backend):
    spec = make_spec(factor=2.5, shared=SHARED, top_k=1)
    z = torch.full((300, EXPERTS), -3.0)
    z[:, 6] = 5.0
    check(spec, make_weights(spec), tokens(300), options=Options(backend=backend), router_logits=z)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("router", ROUTERS)
def test_D12_one_token_alone(router, backend):
    spec = make_spec(ROUTERS[router], factor=2.5, shared=SHARED)
    for seed in range(3):
        check(spec, make_weights(spec), tokens(1, seed=seed), options=Options(backend=backend))


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
@pytest.mark.parametrize("ids", [[3, 5, 1], [3, -1, 1], [-1, -1, 6], [-1, -1, -1]], ids=str)
@pytest.mark.parametrize("on_input", [False, True])
def test_D12_one_token_with_empty_slots(on_input, ids, backend):
    routing = RoutingSpec(score="sigmoid_topk", choose="logit", weights_on="input" if on_input else "output")
    spec = make_spec(routing, factor=2.5, top_k=3, shared=SHARED, experts={} if on_input else {"bias": True})
    topk = TopK(torch.tensor([ids]), torch.tensor([[0.5, -1.25, 2.0]]).where(torch.tensor([ids]) >= 0, NAN))
    check(spec, make_weights(spec), tokens(1), options=Options(backend=backend), topk=topk)
    for layout in ("tp2", "ep2 tp2", "sharded tokens, ep4"):
        check(spec, make_weights(spec), tokens(1), layout=LAYOUTS[layout], options=Options(backend=backend), topk=topk)


@pytest.mark.parametrize("router", ["softmax", "token table", "two modalities"])
def test_no_tokens_at_all(router):
    spec = make_spec(ROUTERS[router], shared=SHARED, zero_experts=0)
    for backend in BACKENDS:
        y = on_one(spec, make_weights(spec), tokens(0), options=Options(backend=backend), **inputs_for(spec, 0))
        assert y.shape == (0, HIDDEN)


def test_a_result_of_the_wrong_width_cannot_be_built():
    spec = make_spec()
    runner = MoERunner(spec, pad_experts(make_weights(spec), WIDE))
    plan = runner.plan
    with pytest.raises(PlanError, match="returns 32 features, the layer has 16"):
        dataclasses.replace(plan, steps=tuple(s for s in plan.steps if s.verb != "trim"))
    with pytest.raises(PlanError, match="adds widths"):
        value(width=16).add("the sum", value(width=12))
    for name, first, second in (
        ("first", value(padded_to=32), value()),
        ("second", value(), value(padded_to=32)),
    ):
        with pytest.raises(PlanError, match=rf"adds a padded value \({name}: 32 for 16\)"):
            first.add("the sum", second)
    for fact in ("weighted", "summed", "scaled"):
        with pytest.raises(PlanError, match=f"never been {fact}"):
            value().add("the sum", value(**{fact: False}))
        with pytest.raises(PlanError, match=f"never been {fact}"):
            value(**{fact: False}).add("the sum", value())


def test_a_transform_of_unfinished_rows_cannot_be_built():
    spec = make_spec(factor=2.5, on_output=True, output_transform=NORM)
    plan = MoERunner(spec, make_weights(spec)).plan
    late = [s for s in plan.steps if s.verb != "scale"]
    at = next(i for i, s in enumerate(late) if s.verb == "output_transform") + 1
    with pytest.raises(PlanError, match="has not been scaled"):  # a norm does not commute with the factor
        dataclasses.replace(plan, steps=(*late[:at], Step(verb="scale"), *late[at:]))
    twice = TransformSpec((Linear(in_features=HIDDEN, out_features=HIDDEN),))
    spec = make_spec(output_transform=twice)
    plan = MoERunner(spec, make_weights(spec)).plan
    steps = [dataclasses.replace(s, sums=False) if s.verb == "experts" else s for s in plan.steps]
    with pytest.raises(PlanError, match="has not been summed"):
        dataclasses.replace(plan, steps=tuple(steps))


def test_routing_by_modality_keeps_its_padding_apart():
    spec = make_spec(RoutingSpec(modalities=2), shared=SHARED)
    x = tokens(9)
    ids = torch.tensor([[0, 1], [4, 5], [-1, -1], [3, 7], [2, -1], [-1, 6], [7, 0], [5, 4], [-1, -1]])
    check(spec, make_weights(spec), x, topk=TopK(ids, torch.rand(9, 2)))
    for layout in ("ep2", "sharded tokens, ep4", "tp2"):
        check(spec, make_weights(spec), x, layout=LAYOUTS[layout], topk=TopK(ids, torch.rand(9, 2)))
