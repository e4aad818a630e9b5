"""Routing in one launch: every rule, tie, NaN and shape gives what `ops/route.py` gives; and where a plan chooses it."""

import importlib.util
from functools import partial

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
from moerunner import GroupSpec, LayerWeights, MoERunner, MoESpec, Options, RoutingSpec, SharedSpec, SpecError
from moerunner.execute import Verbs
from moerunner.kernels import route as module
from moerunner.kernels import routing
from moerunner.kernels.cpu import build, library
from moerunner.kernels.cpu.route import cpu_route, run
from moerunner.kernels.route import triton_route
from moerunner.ops.route import route as plain
from moerunner.plan import resolve
from moerunner.spec import ExpertsSpec

pytestmark = pytest.mark.rotating(3)

UNIT = torch.finfo(torch.float32).eps
NATIVE = [path for path in build.paths() if not library.absent(path)]


@pytest.fixture(params=["triton", *(NATIVE or [None])])
def kernels(request):
    """What routes: Triton, or the native path of a name."""
    if request.param is None:
        pytest.skip(library.why_not())
    return request.param


@pytest.fixture
def device(kernels):
    return "cuda" if kernels == "triton" and torch.cuda.is_available() else "cpu"


@pytest.fixture
def route(kernels):
    return partial(routing.route, triton_route if kernels == "triton" else partial(run, kernels))


def layer(*, experts=8, top_k=3, **routing) -> MoESpec:
    rest = {n: routing.pop(n) for n in ("shared", "zero_experts", "apply_routed_scale_to_output") if n in routing}
    base = {"hidden_size": 16, "experts": ExpertsSpec(intermediate_size=8), "apply_routed_scale_to_output": False}
    spec = {**base, "num_experts": experts, "top_k": top_k, "routing": RoutingSpec(**routing), "routed_scaling_factor": 2.5}
    return MoESpec(**{**spec, **rest})


RULES = {
    "softmax": layer(),
    "softmax, odd": layer(experts=13, top_k=5, renormalise="sum"),
    "softmax by logit": layer(choose="logit", selection_bias=True, renormalise="sum", eps=1e-2),
    "sigmoid": layer(score="sigmoid", selection_bias=True, renormalise="max_sum", eps=2.4),
    "sqrtsoftplus": layer(score="sqrtsoftplus", selection_bias=True, renormalise="sum"),
    "softmax_topk": layer(score="softmax_topk", choose="logit"),
    "sigmoid_topk": layer(score="sigmoid_topk", choose="logit", selection_bias=True),
    "sparsemixer": layer(score="sparsemixer", top_k=2, jitter=0.2),
    "sparsemixer, odd": layer(score="sparsemixer", experts=5, top_k=2, logit_scale=0.3),
    "p-norm of 2": layer(renormalise="p_norm"),
    "p-norm of 3": layer(
        score="sigmoid",
        renormalise="p_norm",
        p=3.0,
        logit_scale=0.6,
        logit_softcap=1.5,
        shared=SharedSpec(width=8, count=2, gate="router"),
    ),
    "scaled and capped": layer(logit_scale=1.7, logit_softcap=1.2, renormalise="sum"),
    "scaled down": layer(logit_scale=-1.7, experts=5, choose="logit"),
    "learned scales": layer(per_expert_scale=True, global_scale=True, experts=11),
    "shared experts": layer(
        score="sigmoid", renormalise="sum", global_scale=True, shared=SharedSpec(width=8, count=3, gate="router")
    ),
    "zero experts": layer(zero_experts=3, selection_bias=True),
    "groups, best two": layer(experts=16, score="sigmoid", selection_bias=True, groups=GroupSpec(count=4, kept=2)),
    "groups, best": layer(experts=16, groups=GroupSpec(count=4, kept=1, score="max"), renormalise="sum"),
    "groups, odd": layer(experts=15, groups=GroupSpec(count=3, kept=2), score="sigmoid"),
    "groups, odd members": layer(experts=20, groups=GroupSpec(count=4, kept=2), score="sigmoid"),
    "groups filled with 0": layer(
        experts=12, choose="logit", selection_bias=True, groups=GroupSpec(count=4, kept=2, score="max", fill="zero")
    ),
    "hash": layer(choose="hash", score="sqrtsoftplus", renormalise="sum", per_expert_scale=True),
    "hash, softmax": layer(choose="hash", score="softmax"),
    "hash, softmax_topk": layer(choose="hash", score="softmax_topk"),
    "modalities": layer(modalities=2, selection_bias=True),
    "modalities, odd": layer(modalities=3, experts=15, score="softmax_topk", choose="logit"),
    "one expert": layer(experts=1, top_k=1, score="sigmoid"),
    "all experts": layer(top_k=8),
}
rule = pytest.mark.parametrize("name", list(RULES))


def draw_inputs(spec: MoESpec, tokens: int, device: str) -> dict[str, torch.Tensor | None]:
    r, total = spec.routing, spec.num_experts + spec.zero_experts
    drawn = {
        "selection_bias": torch.randn(total) if r.selection_bias else None,
        "per_expert_scale": torch.rand(total) + 0.5 if r.per_expert_scale else None,
        "global_scale": torch.rand(1) + 0.5 if r.global_scale else None,
        "hash_table": torch.randint(total, (7, spec.top_k)) if r.choose == "hash" else None,
        "input_ids": torch.randint(7, (tokens,)),
        "token_types": torch.randint(r.modalities if r.modalities > 1 else 5, (tokens,)),  # of one set any number
    }
    return {n: None if t is None else t.to(device) for n, t in drawn.items()}


def assert_same(got, expected, units=8):
    """The same ids and NaN; weights within so many units in the last place (NumPy's functions are not PyTorch's)."""
    assert torch.equal(got.ids, expected.ids)
    assert got.scaled == expected.scaled
    for ours, theirs in ((got.weights, expected.weights), (got.shared_weights, expected.shared_weights)):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert ours.dtype == theirs.dtype == torch.float32
            torch.testing.assert_close(ours, theirs, rtol=units * UNIT, atol=1e-38, equal_nan=True)


@rule
@pytest.mark.parametrize("scale", [False, True])
def test_every_rule(route, device, name, scale):
    spec = RULES[name]
    z, inputs = 2 * torch.randn(5, spec.num_logits, device=device), draw_inputs(spec, 5, device)
    assert_same(route(z, spec, scale=scale, **inputs), plain(z, spec, scale=scale, **inputs))


@rule
def test_ties_go_to_the_lowest_id(route, device, name):
    """Also between 0 and -0, among equal groups, and where all are equal."""
    spec = RULES[name]
    z = torch.randn(6, spec.num_logits).round()
    z[0], z[1] = 1.0, torch.where(torch.rand(spec.num_logits) < 0.5, 0.0, -0.0)
    inputs = draw_inputs(spec, 6, device)
    if inputs["selection_bias"] is not None:
        inputs["selection_bias"].zero_()
    assert_same(route(z.to(device), spec, **inputs), plain(z.to(device), spec, **inputs))


@rule
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_rows_that_are_not_finite(route, device, name, bad):
    """Some values of a row, all, or all but one: the ids are still distinct, and no other row notices."""
    spec = RULES[name]
    z = torch.randn(5, spec.num_logits)
    z[0], z[1, ::2], z[2, -1], z[3, 1:] = bad, bad, bad, bad
    inputs = draw_inputs(spec, 5, device)
    got = route(z.to(device), spec, **inputs)
    assert_same(got, plain(z.to(device), spec, **inputs))
    assert spec.routing.choose == "hash" or all(len(set(row)) == spec.top_k for row in got.ids.tolist())


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus", "softmax_topk", "sparsemixer"])
@pytest.mark.parametrize("shift", [-200.0, -40.0, 40.0])
def test_large_logits(route, device, score, shift):
    choose = "logit" if score.endswith("topk") else "score"
    spec = layer(experts=6, top_k=2, score=score, choose=choose)
    z = 5 * torch.randn(4, 6, device=device) + shift
    assert_same(route(z, spec), plain(z, spec))


def test_sqrtsoftplus_near_its_line_and_far(route, device):
    """Where it is nearly the root of a logit, and where its exponential has no place in float32."""
    spec = layer(experts=24, top_k=24, score="sqrtsoftplus")
    z = torch.linspace(-10, 110, 10 * 24, device=device).view(10, 24)
    assert_same(route(z, spec), plain(z, spec))


@pytest.mark.parametrize("score", ["max", "top2_sum"])
@pytest.mark.parametrize("fill", ["-inf", "zero"])
def test_groups_of_keys_that_are_hard_to_tell_apart(route, device, score, fill):
    """Infinities of both signs in one group, whose sum is none; zeros of both signs; keys below what losers are filled with."""
    inf, nan, largest = torch.inf, torch.nan, torch.finfo(torch.float32).max
    z = torch.tensor([
        [inf, -inf, nan, 1, 1, 0, 0, 0, 0, -1, -1, -1],
        [-0.0, -0.0, -1, 0, 0, -1, 3, 1, -1, -1, -1, -1],
        [largest, 0, 0, inf, 0, 0, 1, 1, 1, 2, 2, 2],
        [-1, -1, -1, -2, -2, -2, -3, -3, -3, -4, -4, -4],
        [nan, nan, nan, -inf, -inf, -inf, nan, 0, -inf, -0.0, nan, nan],
    ], device=device)  # fmt: skip
    groups = GroupSpec(count=4, kept=2, score=score, fill=fill)
    spec = layer(experts=12, score="sigmoid_topk", choose="logit", groups=groups)
    assert_same(route(z, spec), plain(z, spec))


@pytest.mark.parametrize("tile", [(1, 1), (2, 1), (4, 4)])
@pytest.mark.parametrize("name", ["softmax", "groups, odd members", "hash", "shared experts", "modalities"])
@pytest.mark.parametrize("kernels", ["triton"], indirect=True)
def test_tokens_of_one_program(monkeypatch, route, device, name, tile):
    """Five tokens, so that the last program is not full."""
    monkeypatch.setattr(module, "tile", lambda tokens, lanes: tile)
    spec = RULES[name]
    z, inputs = torch.randn(5, spec.num_logits, device=device), draw_inputs(spec, 5, device)
    assert_same(route(z, spec, **inputs), plain(z, spec, **inputs))


@pytest.mark.parametrize("tokens", [1, 7, 1024, 1025, 100000])
@pytest.mark.parametrize("lanes", [1, 8, 128, 256, 512, 2048])
def test_tiles_are_powers_of_two(tokens, lanes):
    assert all(size in (1, 2, 4) for size in module.tile(tokens, lanes))


@rule
def test_no_tokens(route, device, name):
    spec = RULES[name]
    z, inputs = torch.empty(0, spec.num_logits, device=device), draw_inputs(spec, 0, device)
    assert_same(route(z, spec, **inputs), plain(z, spec, **inputs))


def test_as_many_as_there_may_be(route, device):
    spec = layer(experts=1024, top_k=32, score="sigmoid", selection_bias=True, groups=GroupSpec(count=64, kept=40))
    z, inputs = torch.randn(2, 1024, device=device), draw_inputs(spec, 2, device)
    assert_same(route(z, spec, **inputs), plain(z, spec, **inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_strides_and_narrow_dtypes(route, device, dtype):
    spec = RULES["shared experts"]
    z, inputs = torch.randn(spec.num_logits, 12, device=device).to(dtype).T[::2], draw_inputs(spec, 6, device)
    inputs["global_scale"] = inputs["global_scale"].to(dtype)
    assert not z.is_contiguous()
    assert_same(route(z, spec, **inputs), plain(z, spec, **inputs))


@pytest.mark.parametrize("name", ["hash", "modalities", "learned scales", "zero experts"])
@pytest.mark.parametrize("integers", [torch.int32, torch.int64], ids=str)
def test_inputs_with_gaps_and_of_short_integers(route, device, name, integers):
    spec = RULES[name]
    z, inputs = torch.randn(6, spec.num_logits, device=device), draw_inputs(spec, 6, device)
    drawn = {n: t if t.is_floating_point() else t.to(integers) for n, t in inputs.items() if t is not None}
    other = {**inputs, **{n: torch.stack([t, t + 1], -1)[..., 0] for n, t in drawn.items()}}
    assert_same(route(z, spec, **other), plain(z, spec, **inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("name", ["shared experts", "p-norm of 3"])
def test_from_tokens_and_the_gate(route, device, tokens, dtype, name):
    """Few tokens: float32 products of the gate as it is stored, any strides, a hidden size that no tile divides."""
    spec = RULES[name]
    x, gate = torch.randn(tokens, 2100, device=device), torch.randn(1050, spec.num_logits, device=device)
    x, gate = x.to(dtype)[:, ::2], gate.to(dtype).T / 32
    bias, inputs = torch.randn(spec.num_logits, device=device), draw_inputs(spec, tokens, device)
    got = route(x, spec, gate=gate, gate_bias=bias, **inputs)
    z = (x.double() @ gate.double().T + bias.double()).float()
    assert_same(got, plain(z, spec, **inputs), units=50)


@pytest.mark.parametrize(("name", "missing"), [("hash", "input_ids"), ("hash", "hash_table"), ("modalities", "token_types")])
def test_an_input_that_is_missing(route, device, name, missing):
    inputs = {**draw_inputs(RULES[name], 2, device), missing: None}
    messages = []
    for rule in (route, plain):
        with pytest.raises(SpecError) as caught:
            rule(torch.randn(2, 8, device=device), RULES[name], **inputs)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


@pytest.fixture
def any_path():
    if reason := library.why_not():
        pytest.skip(reason)


@pytest.fixture
def operator(kernels):
    """What a plan runs: of the native paths the one that is chosen here."""
    if kernels not in ("triton", library.chosen()[0]):
        pytest.skip("is not the path that is chosen here")
    return triton_route if kernels == "triton" else cpu_route


@pytest.mark.parametrize("tokens", [0, 3])
def test_opcheck(operator, device, tokens):
    z, bias = torch.randn(tokens, 10, device=device), torch.randn(8, device=device)
    numbers = (8, 2, 1, False, 1.0, None, 2, 1, True, 0.0, 1, 0.0, 2.0, 0.01, 1, 1.0)
    torch.library.opcheck(operator, (z, None, None, bias, None, None, None, None, None, *numbers))


@pytest.mark.parametrize("name", ["groups, best two", "shared experts"])
def test_compiles_without_a_break(operator, device, name):
    spec, route = RULES[name], partial(routing.route, operator)
    z, inputs = torch.randn(3, spec.num_logits, device=device), draw_inputs(spec, 3, device)

    def ahead(z):
        top = route(z * 2, spec, scale=True, **inputs)
        return top.ids, top.weights + 1

    compiled = torch.compile(ahead, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(compiled(z), ahead(z), strict=True))


# ---- in native code


@pytest.fixture(params=NATIVE or [None])
def native(request):
    if request.param is None:
        pytest.skip(library.why_not())
    return partial(routing.route, partial(run, request.param))


def draw_rule() -> MoESpec:
    """Any rule there is, with numbers of experts and groups that no vector divides."""

    def pick(*options):
        return options[torch.randint(len(options), ()).item()]

    count, members = pick(1, 2, 3, 7), pick(2, 3, 5, 33)
    experts = count * members
    top_k = torch.randint(1, min(experts, 12) + 1, ()).item()
    score = pick("softmax", "sigmoid", "sqrtsoftplus", "softmax_topk", "sigmoid_topk", "sparsemixer")
    routing = {
        "score": score,
        "logit_scale": pick(1.0, 0.7),
        "logit_softcap": pick(None, 3.0),
        "per_expert_scale": pick(True, False),
    }
    if score == "sparsemixer":
        return layer(experts=experts, top_k=2, jitter=pick(0.01, 0.3), **routing)
    choose = pick("logit", "hash") if score.endswith("topk") else pick("score", "logit", "hash")
    routing |= {"choose": choose, "global_scale": pick(True, False), "renormalise": pick("none", "sum", "max_sum", "p_norm")}
    routing |= {"eps": {"sum": pick(0.0, 1e-3), "max_sum": 0.4}.get(routing["renormalise"], 0.0), "p": pick(2.0, 1.5)}
    if choose != "hash":
        kept = max(-(-top_k // members), torch.randint(1, count + 1, ()).item())
        group = GroupSpec(count=count, kept=kept, score=pick("max", "top2_sum"), fill=pick("-inf", "zero"))
        routing |= {"selection_bias": pick(True, False), "groups": pick(None, group)}
    shared = pick(None, SharedSpec(width=8, count=3, gate="router")) if score == "sigmoid" else None
    return layer(experts=experts, top_k=top_k, shared=shared, **routing)


@pytest.mark.parametrize("number", range(40))
def test_rules_drawn_at_random(native, number):
    """Logits lie on a grid, so that they are equal or far apart; weights no further from float64 than twice PyTorch's."""
    spec, tokens = draw_rule(), 9
    z = (2 * torch.randn(tokens, spec.num_logits) * 64).round() / 64
    inputs = draw_inputs(spec, tokens, "cpu")
    if inputs["selection_bias"] is not None:
        inputs["selection_bias"] = inputs["selection_bias"].round()
    got, close, exact = (
        native(z, spec, scale=True, **inputs),
        plain(z, spec, scale=True, **inputs),
        plain(z.double(), spec, scale=True, **inputs),
    )
    same = (close.ids == exact.ids).all(1)  # PyTorch's own float32 scores may tie where float64 ones do not
    assert torch.equal(got.ids[same], exact.ids[same])
    assert (got.shared_weights is None) == (exact.shared_weights is None)
    for name in ("weights", "shared_weights") if exact.shared_weights is not None else ("weights",):
        ours, theirs, true = (getattr(top, name)[same].double() for top in (got, close, exact))
        assert torch.equal(ours.isnan(), true.isnan())
        assert (
            ((ours - true).abs() <= 2 * (theirs - true).abs() + 16 * UNIT * true.abs() + 1e-38).logical_or(true.isnan()).all()
        )


@pytest.mark.parametrize("name", ["softmax, odd", "groups, best two", "shared experts", "sparsemixer", "hash"])
def test_any_number_of_threads_and_tokens(native, name):
    """The same bits for a token alone, in any batch, from memory that held other things, with one thread and with three."""
    spec, tokens = RULES[name], 700
    z, inputs = torch.randn(tokens, spec.num_logits), draw_inputs(spec, tokens, "cpu")
    one = native(z, spec, **inputs)
    assert_same(one, plain(z, spec, **inputs), units=32)
    few = {n: v[5:8] if n in ("input_ids", "token_types") and v is not None else v for n, v in inputs.items()}
    assert torch.equal(native(z[5:8], spec, **few).weights, one.weights[5:8])
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
    torch.set_num_threads(3)
    try:
        three = native(z, spec, **inputs)
    finally:
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(False)
    for field in ("ids", "weights", "shared_weights"):
        ours, theirs = getattr(one, field), getattr(three, field)
        assert ours is theirs if ours is None else torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("tokens", "hidden"), [(1, 64), (1, 3), (6, 100), (16, 2500)])
def test_the_gate_with_several_threads(native, dtype, tokens, hidden):
    spec = layer(experts=130, top_k=6)
    x, gate = (torch.randn(n, hidden + gap).to(dtype)[:, :hidden] for n, gap in ((tokens, 3), (130, 5)))
    gate /= hidden**0.5
    torch.set_num_threads(3)
    try:
        got = native(x, spec, gate=gate)
        mixed = native(x, spec, gate=gate.float())
    finally:
        torch.set_num_threads(1)
    z = (x.double() @ gate.double().T).float()
    assert_same(got, plain(z, spec), units=100)
    assert_same(mixed, plain(z, spec), units=100)
    assert_same(native(x, spec, gate=gate.double()), mixed)


@pytest.mark.parametrize("routing", [{"score": "softmax"}, {"score": "sigmoid", "renormalise": "sum"}], ids=str)
def test_sums_are_in_float64(native, routing):
    """Of one large number and many that it has no place for in float32."""
    spec = layer(experts=4096, top_k=1000, **routing)
    z = torch.full((1, 4096), -17.0)
    z[0, 0] = 0.0
    exact = plain(z.double(), spec)
    torch.testing.assert_close(native(z, spec).weights.double(), exact.weights, rtol=8 * UNIT, atol=0.0)


def test_sparsemixer_counts_what_lies_at_the_limit(native):
    """Its distance, relative to the top, is the float32 nearest to twice the jitter."""
    spec, top = layer(experts=3, top_k=2, score="sparsemixer", jitter=0.2), torch.rand(1000) + 0.5
    second = 0.6 * top
    z = torch.stack([second, top, torch.full_like(top, -9.0)], 1)[(top - second) / top == torch.tensor(0.4)]
    assert len(z)
    got = native(z, spec)
    assert_same(got, plain(z, spec))
    assert (got.weights[:, 0] < 0.7).all()


@pytest.mark.parametrize("bad", [-1, 8, 10])
def test_a_table_that_names_no_expert(native, bad):
    """Also one whose number is that of a shared expert's logit."""
    spec = layer(choose="hash", score="sigmoid", shared=SharedSpec(width=8, count=3, gate="router"))
    inputs = draw_inputs(spec, 4, "cpu")
    inputs["hash_table"][:, 1] = bad
    with pytest.raises(SpecError, match=r"holds ids outside 0\.\.7"):
        native(torch.randn(4, 11), spec, **inputs)


# ---- the plan


def _weights(spec: MoESpec, device: str = "cpu") -> LayerWeights:
    return LayerWeights.of(spec, {n: 0.2 * torch.randn(s, device=device) for n, s in spec.weight_shapes().items()})


def _plan(device="cuda", spec=RULES["sigmoid"], **options):
    return resolve(spec, None, _weights(spec).meta(), device, Options(**options))


def test_a_plan_routes_in_one_launch_on_a_gpu():
    step, gate = _plan().step("route"), _plan().step("gate")
    assert gate.few == (16, "triton")
    assert _plan(dtype="bfloat16").step("gate").few == (4, "triton")
    rounded = layer(logits_dtype="model")
    assert (_plan(spec=rounded).step("gate").few, _plan("cpu", rounded).step("gate").few) == ((16, "triton"), (0, ""))
    assert (step.one_launch, step.name) == ("triton", "route (sigmoid in one launch)")
    assert "not sigmoid: one launch is preferred on cuda" in _plan().explain()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": "cpu", "grad": True}, "has no backward"),
        ({"device": "cpu", "dtype": "float64"}, "computes in float32, the tokens are float64"),
        ({"grad": True}, "has no backward"),
        ({"batch_invariant": True}, "is not batch invariant"),
        ({"dtype": "float64"}, "computes in float32, the tokens are float64"),
        ({"spec": layer(experts=2000)}, "holds 1024 experts of which 32 are chosen, not 3 of 2000"),
        ({"spec": layer(experts=64, top_k=33)}, "holds 1024 experts of which 32 are chosen, not 33 of 64"),
    ],
)
def test_a_plan_that_does_not_says_why(changes, reason):
    plan = _plan(**changes)
    step = plan.step("route")
    assert not step.one_launch
    assert plan.step("gate").few == (0, "")
    assert step.refused == (("one launch", reason),)
    assert f"not one launch: {reason}" in plan.explain()


def test_a_plan_routes_in_one_launch_on_a_cpu(any_path):
    """Whatever the number of experts; a batch-invariant gate is PyTorch's, which is the same for few tokens and for many."""
    for spec in (RULES["sigmoid"], layer(experts=2000, top_k=40)):
        step, gate = _plan("cpu", spec).step("route"), _plan("cpu", spec).step("gate")
        assert (step.one_launch, step.name, gate.few) == ("cpu", f"route ({spec.routing.score} in one launch)", (16, "cpu"))
    invariant = _plan("cpu", batch_invariant=True)
    assert (invariant.step("route").one_launch, invariant.step("gate").few) == ("cpu", (0, ""))


def test_a_plan_without_native_code(monkeypatch):
    monkeypatch.setattr(library, "why_not", lambda: "was not compiled")
    step = _plan("cpu").step("route")
    assert (step.one_launch, step.refused) == ("", (("one launch", "was not compiled"),))


def test_a_plan_without_triton(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "triton" else found(name, *rest))
    assert _plan().step("route").refused == (("one launch", "needs triton, which is not installed"),)


@pytest.mark.parametrize("routing", [{"score": "external"}, {"simulate": "uniform"}])
def test_a_rule_without_logits_names_no_other(routing):
    step = _plan(spec=layer(**routing)).step("route")
    assert (step.one_launch, step.refused) == ("", ())


def test_ranks_may_route_by_different_kernels():
    assert _plan().fingerprint == _plan("cpu").fingerprint


@pytest.mark.parametrize("name", ["groups, best two", "hash", "modalities", "shared experts", "learned scales"])
def test_a_runner_routes_by_its_plan(operator, device, name):
    """The functions of a plan in one launch against those of the plan without it, from the caller's tokens on."""
    spec = RULES[name]
    shapes = spec.weight_shapes(vocab_size=7)
    drawn = {n: torch.randn(s, device=device) for n, s in shapes.items()}
    if "hash_table" in drawn:
        drawn["hash_table"] = torch.randint(8, shapes["hash_table"], device=device)
    weights = LayerWeights.of(spec, drawn)
    runner = MoERunner(spec, weights)
    of = "cpu" if operator is cpu_route else "cuda"
    verbs = Verbs(resolve(spec, None, weights.meta(), of), runner._comm, runner._slots)
    without = resolve(spec, None, weights.meta(), of, Options(grad=True))
    routes = [verbs.route, Verbs(without, runner._comm, runner._slots).route]
    for tokens in (4, 17):  # the gate's product is a kernel for the first, PyTorch's for the second
        inputs = {n: torch.randint(c, (tokens,), device=device) for n, c in (("input_ids", 7), ("token_types", 2))}
        x = torch.randn(tokens, 16, device=device)
        got, expected = (route(x, weights, **inputs) for route in routes)
        assert_same(got, expected, units=50)
        logits = torch.randn(tokens, spec.num_logits, device=device)
        got, expected = (route(x, weights, router_logits=logits, **inputs) for route in routes)
        assert_same(got, expected)
        for double in ({"router_logits": logits.double()}, {"router_input": x.double()}):
            assert verbs.route(x, weights, **double, **inputs).weights.dtype == torch.float64
