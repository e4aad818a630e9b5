"""The router's launch that has the first product of shared experts beside it: both are right, in every form."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is not installed")
from test_one_launch import RULES, assert_same, draw_inputs, layer

from moerunner import LayerWeights, MoERunner, Options, RoutingSpec, SharedSpec
from moerunner.execute import Verbs
from moerunner.experts.registry import get
from moerunner.kernels import beside
from moerunner.kernels import shared as shared_kernels
from moerunner.kernels.beside import route_beside, triton_route_beside
from moerunner.kernels.route import route
from moerunner.ops.reference import gated_activation, reference, reference_route
from moerunner.ops.route import gate_logits
from moerunner.ops.route import route as plain
from moerunner.parallel.layout import Layout
from moerunner.plan import resolve
from moerunner.spec import ActivationSpec

pytestmark = pytest.mark.rotating(3)

HIDDEN, WIDTH = 16, 11
ACTIVATIONS = {
    "silu": ActivationSpec(),
    "alpha": ActivationSpec(alpha=1.3, beta=0.5),
    "limit": ActivationSpec(limit=0.8),
    "clamp_after": ActivationSpec(limit=0.4, clamp_after=True),
    "softcaps": ActivationSpec(gate_softcap=1.5, up_softcap=0.9),
    "gelu": ActivationSpec(kind="gelu"),
    "relu2": ActivationSpec(kind="relu2"),
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Every case has several columns and pieces of a row, and partial ones."""
    monkeypatch.setattr(beside, "_FEATURES", 8)


def draw(device, *size, dtype=torch.float32):
    return torch.randn(*size).to(device, dtype)


def both(device, spec, tokens, shared, activation, dtype=torch.float32):
    """What the launch gives, and the router's own choice of the same tokens."""
    x, gate = draw(device, tokens, HIDDEN, dtype=dtype), draw(device, spec.num_logits, HIDDEN, dtype=dtype)
    inputs = {**draw_inputs(spec, tokens, device), "gate": gate, "scale": True}
    seen = draw(device, tokens, HIDDEN, dtype=dtype)
    return x, route_beside(x, *shared, activation, seen, spec, **inputs), route(seen, spec, **inputs)


@pytest.mark.parametrize("name", list(RULES))
def test_every_rule_beside_shared_experts(device, name):
    if RULES[name].shared is not None:
        pytest.skip("the router weighs them")
    shared = draw(device, WIDTH, HIDDEN), draw(device, WIDTH, HIDDEN), draw(device, 1, HIDDEN)
    _, (topk, _, _), alone = both(device, RULES[name], 3, shared, ActivationSpec())
    assert_same(topk, alone, units=4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_what_the_down_product_reads(device, name, gated, dtype):
    act = ACTIVATIONS[name]
    if not gated and (act.beta or act.up_softcap):
        pytest.skip("needs a gate")
    w13 = draw(device, 2 * WIDTH, HIDDEN, dtype=dtype)
    one, two = w13[:WIDTH], draw(device, HIDDEN, WIDTH, dtype=dtype).T  # rows of one tensor, and a transposed one
    own = draw(device, 1, HIDDEN, dtype=dtype)
    x, (_, h, share), _ = both(device, RULES["sigmoid"], 2, (one, two if gated else None, own), act, dtype)
    g, u, z = (x.double() @ w.double().T for w in (one, two, own))
    exact = gated_activation(g, u if gated else None, act)
    unit = torch.finfo(dtype).eps
    assert h.dtype == dtype
    assert (h.double() - exact).abs().max() <= (unit + 1e-6) * exact.abs().max()
    assert share.dtype == torch.float32
    torch.testing.assert_close(share.double(), torch.sigmoid(z)[:, 0], rtol=2e-6, atol=0)


def test_without_a_gate_of_their_own(device):
    _, (_, h, share), _ = both(device, RULES["softmax"], 2, (draw(device, WIDTH, HIDDEN), None, None), ActivationSpec())
    assert h.shape == (2, WIDTH)
    assert share is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_logits_in_the_models_dtype(device, dtype, bias):
    """Rounded once, as PyTorch's product in this dtype: keys that are equal then are chosen in the order of their ids."""
    spec = layer(experts=16, top_k=12, logits_dtype="model", logit_bias=bias)
    x, gate = draw(device, 9, HIDDEN, dtype=dtype), draw(device, 16, HIDDEN, dtype=dtype)
    b = draw(device, 16, dtype=dtype) if bias else None
    wide = x.float() @ gate.float().T + (0 if b is None else b.float())
    got = route(x, spec, gate=gate, gate_bias=b)
    expected = plain(wide.to(dtype), spec)
    slack = 4e-7 * (x.float().abs() @ gate.float().abs().T + (0 if b is None else b.float().abs()))
    clear = ((wide + slack).to(dtype) == (wide - slack).to(dtype)).all(1)  # else the order of a sum decides how it is rounded
    assert clear.any()
    assert torch.equal(got.ids[clear], expected.ids[clear])
    assert not torch.equal(route(x, layer(experts=16, top_k=12, logit_bias=bias), gate=gate, gate_bias=b).weights, got.weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_activation_in_one_launch(device, name, gated, dtype):
    """Of halves of one product, which have strides, and of two of their own; no token gives none."""
    act = ACTIVATIONS[name]
    if not gated and (act.beta or act.up_softcap):
        pytest.skip("needs a gate")
    both = draw(device, 5, 2 * 1030, dtype=dtype)
    for g, u in (both.chunk(2, dim=-1), [half.contiguous() for half in both.chunk(2, dim=-1)], (both.T[:3], both.T[3:6])):
        h = shared_kernels.gated(g, u if gated else None, act)
        exact = gated_activation(g.double(), u.double() if gated else None, act)
        assert (h.dtype, h.shape) == (dtype, g.shape)
        assert (h.double() - exact).abs().max() <= (torch.finfo(dtype).eps + 1e-6) * exact.abs().max()
    assert shared_kernels.gated(both[:0], None, act).shape == (0, 2060)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_share_in_one_launch(device, dtype):
    for x in (draw(device, 3, 2100, dtype=dtype), draw(device, 2100, 3, dtype=dtype).T, draw(device, 0, 8, dtype=dtype)):
        gate = draw(device, 1, x.shape[1], dtype=dtype) * 0.03
        exact = torch.sigmoid(x.double() @ gate.double().T)[:, 0]
        share = shared_kernels.triton_share(x, gate)
        torch.testing.assert_close(share.double(), exact, rtol=3e-6, atol=0)


def test_opchecks(device):
    g = draw(device, 3, 20)
    torch.library.opcheck(shared_kernels.triton_gated, (g[:, :10], g[:, 10:], 0, 1.0, 0.0, None, False, None, None))
    torch.library.opcheck(shared_kernels.triton_share, (g, draw(device, 1, 20)))


def test_opcheck(device):
    x, gate = draw(device, 2, HIDDEN), draw(device, 8, HIDDEN)
    own = (draw(device, WIDTH, HIDDEN), draw(device, WIDTH, HIDDEN), None, 0, 1.0, 0.0, None, False, None, None)
    rule = (8, 3, 1, False, 1.0, None, 1, 1, False, float("-inf"), 1, 1e-9, 2.0, 0.0, 1, 2.5, False)
    torch.library.opcheck(triton_route_beside, (x, *own, x, gate, *[None] * 7, *rule))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_logits_of_many_tokens_are_those_of_a_float32_product(dtype, bias):
    """By the matrix unit, which rounds nothing to 16 bits; where a gradient is wanted, by PyTorch's product in float32."""
    x, gate = draw("cuda", 300, 7168, dtype=dtype), draw("cuda", 256, 7168, dtype=dtype) * 0.02
    b = draw("cuda", 256, dtype=dtype) if bias else None
    exact = F.linear(x.double(), gate.double(), None if b is None else b.double())
    plain = F.linear(x.float(), gate.float(), None if b is None else b.float())
    with torch.no_grad():
        logits = gate_logits(x, gate, b, RoutingSpec())
    assert logits.dtype == torch.float32
    error, yardstick = ((y.double() - exact).abs().max() / exact.abs().max() for y in (logits, plain))
    assert error <= 2 * yardstick + 1e-6
    gate.requires_grad_()
    trained = gate_logits(x, gate, b, RoutingSpec())
    assert torch.equal(trained, plain)
    assert trained.requires_grad


# ---- the layer


def cuda_layer(device, shared, dtype=torch.float32, layout=None, **routing):
    """The functions of a plan for a GPU, wherever they run, with the runner and weights whose they are."""
    spec = layer(experts=64, shared=shared, apply_routed_scale_to_output=shared.gate != "router", **routing)
    drawn = {n: (0.3 * torch.randn(s)).to(device, dtype) for n, s in spec.weight_shapes().items()}
    weights = LayerWeights.of(spec, drawn)
    runner = MoERunner(spec, weights)
    return spec, weights, runner, Verbs(resolve(spec, layout, weights.meta(), "cuda"), runner._comm, runner._slots)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("logits", ["float32", "model"])
@pytest.mark.parametrize("gate", ["none", "sigmoid", "router"])
def test_a_layer_of_few_tokens_and_of_more(device, monkeypatch, gate, logits, dtype):
    """Few: four launches, and nothing computes the shared experts apart. More: they do, and the kernel adds them."""
    shared, score = SharedSpec(width=WIDTH, gate=gate), "sigmoid" if gate == "router" else "softmax"
    spec, weights, runner, verbs = cuda_layer(device, shared, dtype, renormalise="sum", score=score, logits_dtype=logits)
    apart = []
    monkeypatch.setattr(verbs, "_shared_run", lambda *given, run=verbs._shared_run: (apart.append(1), run(*given))[1])
    drawn = draw(device, 200, HIDDEN, dtype=dtype)
    margins = torch.tensor([choice.margin for choice in reference_route(spec, weights, drawn)])
    clearest = margins.argsort(descending=True).to(device)  # elsewhere a rounded logit may choose another expert
    for tokens in (1, 2, 3, 20):
        x = drawn[clearest[torch.randperm(20, device=device)[:tokens]]]
        before = len(apart)
        with torch.no_grad():
            y = runner._run(verbs, weights, x, alone=True)
        assert len(apart) - before == (gate == "router" or tokens > 2)
        exact = reference(spec, weights, x)
        assert (y.double().cpu() - exact).abs().max() <= (8 * torch.finfo(dtype).eps + 2e-6) * exact.abs().max()


def test_what_the_caller_routes_is_not_routed_again(device):
    spec, weights, runner, verbs = cuda_layer(device, SharedSpec(width=WIDTH, gate="sigmoid"))
    x = draw(device, 2, HIDDEN)
    with torch.no_grad():
        logits = F.linear(x, weights.tensors["gate"])
        whole = runner._run(verbs, weights, x, alone=True)
        for said in ({"router_logits": logits}, {"topk": verbs.route(x, weights)}, {"router_input": x.double()}):
            y = runner._run(verbs, weights, x, alone=True, **said)
            torch.testing.assert_close(y, whole, rtol=1e-5, atol=1e-6)
    assert spec.shared is not None


@pytest.mark.parametrize(
    ("changes", "options", "few"),
    [
        ({}, {}, 2),
        ({"shared": SharedSpec(width=8, bias=True)}, {}, 0),
        ({"shared": SharedSpec(width=8, gate="router"), "score": "sigmoid", "apply_routed_scale_to_output": False}, {}, 0),
        ({"experts": 1024, "top_k": 1}, {}, 16),  # no more than the gate's kernel takes
        ({"experts": 1024, "top_k": 1}, {"dtype": "bfloat16"}, 4),
        ({"experts": 8}, {}, 1),
        ({}, {"batch_invariant": True}, 0),
        ({"experts": 2000}, {}, 0),  # too many for the router's one launch
    ],
)
def test_up_to_how_many_tokens(changes, options, few):
    spec = layer(**{"experts": 64, "shared": SharedSpec(width=8), "apply_routed_scale_to_output": True, **changes})
    weights = LayerWeights.of(spec, {n: torch.randn(s) for n, s in spec.weight_shapes().items()})
    plan = resolve(spec, None, weights.meta(), "cuda", Options(**options))
    assert plan.step("experts").adds == (spec.shared.gate != "router")
    assert plan.step("shared").joined == few
    assert (f"up to {few} tokens in the launches of the router" in plan.explain()) == bool(few)
    for other in (resolve(spec, None, weights.meta(), "cpu"), resolve(spec, None, weights.meta(), "cuda", Options(grad=True))):
        assert (other.step("experts").adds, other.step("shared").joined) == (False, 0)


def test_a_slice_of_them_is_added_before_the_reduction():
    spec = layer(experts=64, shared=SharedSpec(width=8), apply_routed_scale_to_output=True)
    weights = LayerWeights.of(spec, {n: torch.randn(s) for n, s in spec.weight_shapes().items()})
    step = resolve(spec, Layout(tp=2), weights.meta(), "cuda").step("experts")
    assert (step.adds, step.rounds) == (True, False)
    assert not resolve(spec, Layout(tp=2, shared="replicated"), weights.meta(), "cuda").step("experts").adds
    assert get("triton").INFO.adds
