"""From logits to ids and weights: every formula, ties, and logits that are not finite."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st
from tests.support.numerics import assert_close, relative_error
from tests.support.plain import plain_route
from tests.support.strategies import SEEDS, make_tokens, make_weights, replay, specs

from moerunner import ExpertsSpec, GroupSpec, LayerWeights, MoESpec, RoutingSpec, SharedSpec, TopK
from moerunner.ops import route as module
from moerunner.ops.reference import reference_route
from moerunner.ops.route import gate_logits, route, stable_topk

LEARNED = ("selection_bias", "per_expert_scale", "global_scale", "hash_table")
KINDS = ("normal", "near", "wide", "very negative", "shifted up")


def layer(routing: RoutingSpec, *, experts: int = 8, top_k: int = 2, **changes) -> MoESpec:
    base = {"hidden_size": 8, "experts": ExpertsSpec(intermediate_size=4), "apply_routed_scale_to_output": False}
    return MoESpec(**{**base, "num_experts": experts, "top_k": top_k, "routing": routing, **changes})


def run(spec: MoESpec, weights: LayerWeights | None, logits: torch.Tensor, **inputs) -> TopK:
    learned = {} if weights is None else {n: weights.tensors.get(n) for n in LEARNED}
    return route(logits, spec, **learned, **inputs)


def some_logits(kind: str, count: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(count, width, generator=generator)
    return {"normal": 2 * z, "near": 0.05 * z, "wide": 10 * z, "very negative": z - 30, "shifted up": z + 30}[kind]


routed_specs = specs().filter(lambda s: s.routing.score != "external")


# ---- formulas


@settings(max_examples=80)
@given(routed_specs, SEEDS)
def test_the_oracle_is_the_formula(spec, seed):
    """The judge is judged: the oracle, token by token in Python, against whole tensors of float64 in plain PyTorch."""
    weights, tokens = make_weights(spec, seed), make_tokens(spec, seed + 1, 4)
    choices = reference_route(spec, weights, tokens.x, **tokens.inputs)
    ids, w, shared = plain_route(spec, weights, tokens.x, **tokens.inputs, dtype=torch.float64)
    clear = [t for t, choice in enumerate(choices) if choice.margin > 1e-9]
    ours = replay(spec, choices)
    exact = torch.tensor([c.weights for c in choices], dtype=torch.float64)
    assert torch.equal(ids[clear].sort(-1).values, ours.ids[clear].sort(-1).values)
    assert_close(w[clear].gather(1, ids[clear].argsort(-1)), exact[clear].gather(1, ours.ids[clear].argsort(-1)), 1e-12)
    if shared is not None:
        exact_shared = torch.tensor([c.shared_weights for c in choices], dtype=torch.float64)
        assert_close(shared[clear], exact_shared[clear], 1e-12)  # normalised together with the chosen ones


@pytest.mark.parametrize(
    ("logits", "margin"),
    [
        ([0.9, 0.9 - 1e-8, 0.3, 0.2], 1e-8),  # whichever comes first, the two weights change places
        ([0.9, 0.7, 0.9 * (1 - 0.02) - 1e-9, 0.2], 1e-9),  # near the best or not, which is one weight or another
        ([0.9, 0.5, 0.5 - 3e-9, 0.2], 3e-9),  # the last chosen and the first left out
        ([0.9, 0.6, 0.4, 0.2], 0.188),  # the third lies at least this far from being near the second
    ],
)
def test_sparsemixer_is_no_clearer_than_its_order_and_what_lies_near(logits, margin):
    routing = RoutingSpec(score="sparsemixer", renormalise="none", jitter=0.01)
    experts = ExpertsSpec(intermediate_size=8)
    spec = MoESpec(hidden_size=8, num_experts=4, top_k=2, routing=routing, experts=experts, apply_routed_scale_to_output=False)
    given_logits = torch.tensor([logits], dtype=torch.float64)
    (choice,) = reference_route(spec, make_weights(spec, 0), torch.zeros(1, 8), router_logits=given_logits)
    assert choice.margin == pytest.approx(margin, rel=1e-6)


@settings(max_examples=80)
@given(routed_specs, SEEDS, st.sampled_from(KINDS))
def test_every_rule_equals_the_oracle(spec, seed, kind):
    """Ids where the margin is far above float32 noise, gathered scores everywhere; tied rows are counted."""
    # Powers of scores that are almost 0 are 0 in float32, as they are in the models' own code.
    assume(spec.routing.renormalise != "p_norm" or kind in ("normal", "near"))
    weights = make_weights(spec, seed)
    tokens = make_tokens(spec, seed + 1, 6)
    z = some_logits(kind, 6, spec.num_logits, seed)
    top = run(spec, weights, z, **tokens.inputs)
    choices = reference_route(spec, weights, tokens.x, router_logits=z, **tokens.inputs)
    size = key_size(spec, weights, z)
    rows = []
    for t, choice in enumerate(choices):
        ids = top.ids[t].tolist()
        assert len(set(ids)) == spec.top_k
        if choice.margin > 1e-4 * size[t]:
            assert sorted(ids) == sorted(choice.ids)
        if ids == choice.ids or (spec.routing.score != "sparsemixer" and sorted(ids) == sorted(choice.ids)):
            rows.append(t)
    event(f"tied rows: {6 - len(rows)}")
    wanted = replay(spec, choices)
    if rows and all(math.isfinite(v) for t in rows for v in choices[t].weights):
        exact = torch.tensor([choices[t].weights for t in rows], dtype=torch.float64)
        got = top.weights[rows].gather(1, top.ids[rows].argsort(-1))
        assert_close(got, exact.gather(1, wanted.ids[rows].argsort(-1)), 1e-5 if kind == "wide" else 3e-6)


def key_size(spec: MoESpec, weights: LayerWeights, logits: torch.Tensor) -> list[float]:
    """The largest key of each row, which its float32 noise is measured by."""
    r, z = spec.routing, logits.double() * spec.routing.logit_scale
    z = z if r.logit_softcap is None else r.logit_softcap * torch.tanh(z / r.logit_softcap)
    by_logit = r.choose == "logit" or r.score == "sparsemixer"
    key = z if by_logit else {"softmax": z.softmax(-1), "sigmoid": z.sigmoid()}.get(r.score, z.exp().log1p().sqrt())
    bias = weights.tensors["selection_bias"].abs().max() if r.selection_bias else 0.0
    return (key.abs().amax(-1) + bias).tolist()


FORMULAS = {
    "mixtral": (
        RoutingSpec(score="softmax", renormalise="sum"),
        lambda z, b: _top(z.softmax(-1), z.softmax(-1), lambda w: w / w.sum(-1, keepdim=True)),
    ),
    "gpt-oss": (
        RoutingSpec(score="softmax_topk", choose="logit"),
        lambda z, b: _top(z, z, lambda w: w.softmax(-1)),
    ),
    "deepseek-v3, one group": (
        RoutingSpec(score="sigmoid", selection_bias=True, renormalise="sum", eps=1e-20),
        lambda z, b: _top(z.sigmoid() + b, z.sigmoid(), lambda w: w / (w.sum(-1, keepdim=True) + 1e-20)),
    ),
    "deepseek-v4": (
        RoutingSpec(score="sqrtsoftplus", selection_bias=True, renormalise="sum"),
        lambda z, b: _top(torch.log1p(z.exp()).sqrt() + b, torch.log1p(z.exp()).sqrt(), lambda w: w / w.sum(-1, keepdim=True)),
    ),
    "llama 4": (
        RoutingSpec(score="sigmoid_topk", choose="logit", weights_on="input"),
        lambda z, b: _top(z, z, torch.sigmoid),
    ),
    "softcap": (
        RoutingSpec(score="softmax", logit_softcap=1.5),
        lambda z, b: _top((1.5 * torch.tanh(z / 1.5)).softmax(-1), (1.5 * torch.tanh(z / 1.5)).softmax(-1), lambda w: w),
    ),
    "euclidean": (
        RoutingSpec(score="sigmoid", renormalise="p_norm", p=2.0),
        lambda z, b: _top(z.sigmoid(), z.sigmoid(), lambda w: w / w.square().sum(-1, keepdim=True).sqrt()),
    ),
    "at least eps": (
        RoutingSpec(score="sigmoid", renormalise="max_sum", eps=0.9),
        lambda z, b: _top(z.sigmoid(), z.sigmoid(), lambda w: w / w.sum(-1, keepdim=True).clamp(min=0.9)),
    ),
}


def _top(key, score, finish):
    ids = key.argsort(-1, descending=True)[:, :2]
    return ids, finish(score.gather(1, ids))


@pytest.mark.parametrize("name", FORMULAS)
def test_formulas_as_papers_write_them(name):
    routing, formula = FORMULAS[name]
    z, bias = torch.randn(40, 8, dtype=torch.float64) * 2, torch.randn(8, dtype=torch.float64) * 0.3
    ids, w = formula(z, bias)
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        top = route(z.to(dtype), layer(routing), selection_bias=bias.float() if routing.selection_bias else None)
        if dtype == torch.float64:
            ids, w = formula(z, bias.float().double())
            assert top.weights.dtype == torch.float64
        same = (top.ids == ids).all(-1)
        assert same.float().mean() > 0.95
        assert_close(top.weights[same], w[same], limit)


def test_deepseek_groups_by_hand():
    """Two groups of four, one kept: by the sum of the two best 0.6 + 0.6 beats 0.9 + 0.1, by the best it does not."""
    z = torch.logit(torch.tensor([[0.9, 0.1, 0.05, 0.05, 0.6, 0.6, 0.05, 0.05]]))
    by_sum = RoutingSpec(score="sigmoid", groups=GroupSpec(count=2, kept=1, score="top2_sum"))
    by_best = RoutingSpec(score="sigmoid", groups=GroupSpec(count=2, kept=1, score="max"))
    assert run(layer(by_sum), None, z).ids.tolist() == [[4, 5]]
    assert run(layer(by_best), None, z).ids.tolist() == [[0, 1]]


@pytest.mark.parametrize(("fill", "ids"), [("-inf", [0, 1]), ("zero", [4, 5])])
def test_a_group_that_lost_may_be_chosen_again_only_if_it_is_filled_with_zeros(fill, ids):
    """All keys of the winning group are negative: a zero is larger than they are."""
    z = torch.tensor([[-1.0, -2, -3, -4, -9, -9, -9, -9]])
    groups = GroupSpec(count=2, kept=1, score="max", fill=fill)
    top = run(layer(RoutingSpec(choose="logit", groups=groups)), None, z)
    assert top.ids.tolist() == [ids]
    assert_close(top.weights, z.softmax(-1)[:, ids].double())


def test_sparsemixer_by_hand():
    """Each weight is a softmax over the logits within 2 * jitter of the best, the second without the first."""
    z = torch.tensor([[2.0, 1.99, 1.0, -3.0], [5.0, 1.0, 0.995, -1.0]])
    top = run(layer(RoutingSpec(score="sparsemixer", jitter=0.01), experts=4), None, z)
    assert top.ids.tolist() == [[0, 1], [0, 1]]
    near = 1 / (1 + math.exp(-0.01))
    assert_close(top.weights, torch.tensor([[near, 1.0], [1.0, 1 / (1 + math.exp(-0.005))]], dtype=torch.float64))


# ---- bias


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("size", [0.3, 12.0, 35.0])
def test_the_bias_chooses_and_does_not_weigh(score, size):
    """Scores far below the bias's own rounding error still come out exactly: they are gathered, never subtracted."""
    z = torch.randn(30, 8) * 2 - (12 if score != "softmax" else 0)
    bias = torch.randn(8) * size
    plain = RoutingSpec(score=score, selection_bias=True)
    top = route(z, layer(plain), selection_bias=bias)
    exact = {
        "softmax": z.double().softmax(-1),
        "sigmoid": z.double().sigmoid(),
        "sqrtsoftplus": torch.log1p(z.double().exp()).sqrt(),
    }[score]
    assert_close(top.weights, exact.gather(1, top.ids))
    relative = ((top.weights - exact.gather(1, top.ids)) / exact.gather(1, top.ids)).abs()
    assert relative.max() < 5e-6, "small scores are as exact as large ones"
    key, ids = (exact + bias).sort(dim=-1, descending=True)
    clear = (key[:, :-1] - key[:, 1:])[:, :2].amin(-1) > 1e-4
    assert clear.any()
    assert torch.equal(top.ids[clear], ids[clear, :2])


@pytest.mark.parametrize("eps", [1e-20, 1e-9])
def test_all_scores_zero_give_zeros_with_eps(eps):
    z = torch.full((3, 8), -300.0)
    assert not z.sigmoid().any()
    for how in ("sum", "max_sum"):
        top = run(layer(RoutingSpec(score="sigmoid", renormalise=how, eps=eps)), None, z)
        assert top.ids.tolist() == [[0, 1]] * 3
        assert torch.equal(top.weights, torch.zeros(3, 2))


# ---- ties


@settings(max_examples=80)
@given(
    st.lists(st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, math.inf, -math.inf, 3.4e38]), min_size=1, max_size=12),
    st.data(),
    st.sampled_from([torch.float32, torch.float64]),
    st.booleans(),
)
def test_equal_keys_go_to_the_lowest_id(keys, data, dtype, many):
    """Both ways of ordering, for few keys and for many, equal a sort by (key, id)."""
    k = data.draw(st.integers(1, len(keys)))
    old, module._FEW = module._FEW, 0 if many else 1 << 30
    try:
        got = stable_topk(torch.tensor([keys, keys[::-1]], dtype=dtype), k).tolist()
    finally:
        module._FEW = old
    for row, order in zip(got, (keys, keys[::-1]), strict=True):
        stored = torch.tensor(order, dtype=dtype).tolist()
        assert row == sorted(range(len(order)), key=lambda e: (-stored[e], e))[:k]


@settings(max_examples=60)
@given(routed_specs, SEEDS)
def test_tied_logits_route_like_a_sort(spec, seed):
    """Few distinct logits, so that every row ties: ids are still those of the oracle, which sorts by (key, id)."""
    assume(spec.routing.logit_softcap is None and abs(spec.routing.logit_scale) == 1.0)
    weights, tokens = make_weights(spec, seed), make_tokens(spec, seed + 1, 6)
    for name in ("selection_bias",):
        if name in weights.tensors:
            weights.tensors[name].zero_()
    generator = torch.Generator().manual_seed(seed)
    z = torch.randint(-1, 2, (6, spec.num_logits), generator=generator).float()
    z = torch.where(z == 0, torch.tensor([0.0, -0.0])[torch.randint(2, z.shape, generator=generator)], z)
    top = run(spec, weights, z, **tokens.inputs)
    choices = reference_route(spec, weights, tokens.x, router_logits=z, **tokens.inputs)
    same_groups = spec.routing.groups is None or spec.routing.groups.score == "max"
    if same_groups:  # sums of two scores may differ in the last bit between float32 and float64
        assert [c.ids for c in choices] == top.ids.tolist()


def test_many_rows_tie_like_one():
    z = torch.zeros(3000, 16)
    assert z.numel() > module._FEW
    spec = layer(RoutingSpec(score="sigmoid"), experts=16, top_k=4)
    assert torch.equal(run(spec, None, z).ids, torch.arange(4).expand(3000, 4))
    assert torch.equal(run(spec, None, z[:1]).ids, torch.arange(4).expand(1, 4))


# ---- not finite


@settings(max_examples=100)
@given(routed_specs, SEEDS, st.sampled_from(["nan", "inf", "-inf", "one nan", "one inf", "mixed"]))
def test_bad_rows_get_distinct_ids_in_range_and_change_no_other(spec, seed, bad):
    weights, tokens = make_weights(spec, seed), make_tokens(spec, seed + 1, 5)
    z = some_logits("normal", 5, spec.num_logits, seed)
    clean = run(spec, weights, z, **tokens.inputs)
    poisoned = z.clone()
    for row in (1, 4):
        if bad in ("nan", "inf", "-inf"):
            poisoned[row] = float(bad)
        elif bad == "mixed":
            poisoned[row, ::2], poisoned[row, 1::2] = math.nan, math.inf
        else:
            poisoned[row, 0] = float(bad.split()[1])
    top = run(spec, weights, poisoned, **tokens.inputs)
    good = [0, 2, 3]
    assert torch.equal(top.ids[good], clean.ids[good])
    assert torch.equal(top.weights[good], clean.weights[good])
    choosable = spec.num_experts + spec.zero_experts
    for row in top.ids.tolist():
        assert len(set(row)) == spec.top_k
        assert all(0 <= e < choosable for e in row)


# ---- the rest


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus", "softmax_topk", "sigmoid_topk"])
def test_all_experts_chosen(score):
    routing = RoutingSpec(score=score, choose="logit", renormalise="sum")
    top = run(layer(routing, top_k=8), None, torch.randn(9, 8))
    assert torch.equal(top.ids.sort(-1).values, torch.arange(8).expand(9, 8))
    assert_close(top.weights.sum(-1), torch.ones(9, dtype=torch.float64))
    assert (top.weights.diff(dim=-1) <= 0).all(), "largest first"


@settings(max_examples=25)
@given(routed_specs, SEEDS)
def test_no_token_has_no_routing(spec, seed):
    weights, tokens = make_weights(spec, seed), make_tokens(spec, seed, 0)
    top = run(spec, weights, torch.zeros(0, spec.num_logits), **tokens.inputs)
    assert top.ids.shape == top.weights.shape == (0, spec.top_k)
    assert top.ids.dtype == torch.int64


@settings(max_examples=40)
@given(routed_specs, SEEDS)
def test_the_factor_multiplies_every_weight_once(spec, seed):
    weights, tokens = make_weights(spec, seed), make_tokens(spec, seed + 1, 3)
    z = some_logits("normal", 3, spec.num_logits, seed)
    bare, scaled = (run(spec, weights, z, **tokens.inputs, scale=s) for s in (False, True))
    assert not bare.scaled
    assert scaled.scaled
    assert torch.equal(scaled.weights, bare.weights * spec.routed_scaling_factor)
    assert torch.equal(scaled.ids, bare.ids)
    if bare.shared_weights is not None:
        assert torch.equal(scaled.shared_weights, bare.shared_weights * spec.routed_scaling_factor)


def test_shared_experts_share_the_normalisation():
    spec = layer(RoutingSpec(score="sigmoid", renormalise="sum"), shared=SharedSpec(width=4, count=2, gate="router"))
    top = run(spec, None, torch.randn(6, 10))
    assert top.shared_weights is not None
    assert_close((top.weights.sum(-1) + top.shared_weights.sum(-1)), torch.ones(6, dtype=torch.float64))
    assert int(top.ids.max()) < 8


def test_learned_scales_follow_the_chosen_expert():
    z, scale, factor = torch.randn(20, 8), torch.rand(8) + 0.5, torch.tensor([1.7])
    plain = run(layer(RoutingSpec()), None, z)
    spec = layer(RoutingSpec(per_expert_scale=True, global_scale=True))
    top = route(z, spec, per_expert_scale=scale, global_scale=factor)
    assert_close(top.weights, plain.weights.double() * scale.double()[plain.ids] * 1.7, 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_logits_are_widened_first(dtype):
    z = torch.randn(50, 8).to(dtype)
    for routing in (RoutingSpec(renormalise="sum"), RoutingSpec(score="sigmoid")):
        narrow, wide = run(layer(routing), None, z), run(layer(routing), None, z.float())
        assert narrow.weights.dtype == torch.float32
        assert torch.equal(narrow.ids, wide.ids)
        assert torch.equal(narrow.weights, wide.weights)


def test_the_gate_is_a_float32_product_unless_the_model_says_otherwise():
    x, gate, bias = torch.randn(20, 64).bfloat16(), torch.randn(8, 64), torch.randn(8)
    exact = x.double() @ gate.double().T + bias.double()
    wide = gate_logits(x, gate, bias, RoutingSpec())
    narrow = gate_logits(x, gate.bfloat16(), bias.bfloat16(), RoutingSpec(logits_dtype="model"))
    assert (wide.dtype, narrow.dtype) == (torch.float32, torch.bfloat16)
    assert_close(wide, exact)
    assert 1e-4 < relative_error(narrow, exact) < 2e-2
    assert gate_logits(x.double(), gate, bias, RoutingSpec()).dtype == torch.float64


def test_a_table_gives_ids_and_the_score_gives_weights():
    table = torch.stack([torch.randperm(8)[:2] for _ in range(5)])
    tokens, z = torch.tensor([4, 0, 0, 2]), torch.randn(4, 8)
    top = route(z, layer(RoutingSpec(score="sigmoid", choose="hash")), hash_table=table, input_ids=tokens)
    assert torch.equal(top.ids, table[tokens])
    assert_close(top.weights, z.double().sigmoid().gather(1, top.ids))


def test_tokens_choose_from_their_own_set_alone():
    z, kinds = torch.randn(30, 8), torch.randint(2, (30,))
    spec = layer(RoutingSpec(score="softmax", modalities=2, renormalise="none"), top_k=3)
    top = route(z, spec, token_types=kinds)
    assert torch.equal(top.ids // 4, kinds.unsqueeze(1).expand(30, 3))
    for t in range(30):
        own = z[t, 4 * kinds[t] : 4 * kinds[t] + 4]
        assert_close(top.weights[t], own.double().softmax(-1)[top.ids[t] % 4])


@pytest.mark.parametrize("how", ["uniform", "balanced", "normal"])
@pytest.mark.parametrize("count", [0, 1, 64])
def test_simulated_routing(how, count):
    spec = layer(RoutingSpec(simulate=how), routed_scaling_factor=2.0)
    top = route(None, spec, num_tokens=count, device=torch.device("cpu"), scale=True)
    assert top.ids.shape == (count, 2)
    assert all(len(set(row)) == 2 for row in top.ids.tolist())
    assert torch.equal(top.weights, torch.full((count, 2), 1.0))
    if how == "balanced" and count == 64:
        assert top.ids.flatten().bincount(minlength=8).tolist() == [16] * 8
    if how == "uniform" and count == 64:
        assert top.ids.flatten().bincount(minlength=8).min() > 2
