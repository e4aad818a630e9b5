"""Linear layers in native code: against float64, and in the place of a model's own while text is generated."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from moerunner import ExpertsSpec, LayerWeights, MoERunner, MoESpec, RoutingSpec, SharedSpec  # noqa: E402
from moerunner.kernels.cpu import build, library  # noqa: E402
from moerunner.kernels.cpu import linear as native  # noqa: E402
from moerunner.kernels.cpu.linear import AT_ONCE, DTYPES, HALF, linear, product  # noqa: E402
from moerunner.models.decoding import linears  # noqa: E402
from moerunner.ops.precision import linear_in_native_code  # noqa: E402
from moerunner.ops.reference import reference  # noqa: E402
from moerunner.verify import tiny_model  # noqa: E402


@pytest.mark.parametrize("path", list(build.paths()))
@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
@pytest.mark.parametrize(
    ("tokens", "width", "outputs"), [(0, 8, 8), (1, 64, 48), (2, 130, 77), (5, 17, 1), (AT_ONCE + 3, 96, 50), (3, 2100, 113)]
)
@pytest.mark.parametrize("bias", [False, True])
def test_against_float64(path, dtype, tokens, width, outputs, bias):
    """At most twice as far as PyTorch; the same bits with three threads, and for rows that lie apart."""
    if reason := library.absent(path):
        pytest.skip(reason)
    x, w = torch.randn(tokens, width).to(dtype), torch.randn(outputs, width).to(dtype)
    b = torch.randn(outputs).to(dtype) if bias else None
    y = linear(x, w, b, path=path)
    assert (y.shape, y.dtype) == ((tokens, outputs), dtype)
    exact = torch.nn.functional.linear(x.double(), w.double(), None if b is None else b.double())
    plain = torch.nn.functional.linear(x, w, b)
    far = [float((one.double() - exact).norm() / exact.norm().clamp(min=1e-30)) for one in (y, plain)]
    assert far[0] <= 2 * far[1] + 1e-6
    apart = [torch.stack([t, torch.full_like(t, torch.nan)], 1)[:, 0] for t in (x, w)]
    torch.set_num_threads(3)
    try:
        assert torch.equal(linear(*apart, b, path=path), y)
        assert torch.equal(linear(x.reshape(tokens, 1, width), w.T.contiguous().T, b, path=path)[:, 0], y)
    finally:
        torch.set_num_threads(1)
    for t in range(min(tokens, 3)):
        assert torch.equal(linear(x[t], w, b, path=path), y[t]), "a token's result does not depend on the batch"


@pytest.mark.parametrize("path", list(build.paths()))
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_tokens_in_float32_and_weights_in_half_precision(path, dtype, bias):
    if reason := library.absent(path):
        pytest.skip(reason)
    x, w = torch.randn(7, 203), torch.randn(31, 203).to(dtype)
    b = torch.randn(31).to(dtype) if bias else None
    exact = torch.nn.functional.linear(x.double(), w.double(), None if b is None else b.double())
    y = product(x, w, b, path=path)
    assert (y.shape, y.dtype) == ((7, 31), torch.float32)
    assert float((y - exact).norm() / exact.norm()) <= 1e-6
    torch.library.opcheck(native.cpu_product, (x, w, b))


@pytest.mark.parametrize("tokens", [1, 2, 9, AT_ONCE + 1])
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_shared_experts_of_few_tokens(dtype, tokens, monkeypatch):
    """Nearer to float64 than PyTorch's products or as near, and the plan says which they are."""
    if reason := library.why_not():
        pytest.skip(reason)
    spec = MoESpec(
        hidden_size=96,
        num_experts=4,
        top_k=2,
        routing=RoutingSpec(renormalise="sum"),
        experts=ExpertsSpec(intermediate_size=40),
        shared=SharedSpec(width=72, gate="sigmoid"),
        apply_routed_scale_to_output=False,
    )
    weights = {name: (torch.randn(shape) * 0.2).to(dtype) for name, shape in spec.weight_shapes().items()}
    x = torch.randn(tokens, 96).to(dtype)
    exact = reference(spec, LayerWeights.of(spec, {name: t.double() for name, t in weights.items()}), x)
    far, taken = [], []
    own = native.cpu_product
    monkeypatch.setattr("moerunner.ops.precision.cpu_product", lambda *args: taken.append(args) or own(*args))
    for paths in ((), (library.chosen()[0],)):
        monkeypatch.setattr(native, "PATHS", paths)
        runner = MoERunner(spec, weights)
        far.append(float((runner(x).double() - exact).norm() / exact.norm()))
        assert bool(taken) == (bool(paths) and tokens <= AT_ONCE and (tokens > 1 or dtype == torch.float16))
        assert ("products in native code" in str(runner.explain())) == bool(paths)
    assert far[1] <= 1.2 * far[0]


def test_what_goes_to_pytorch(monkeypatch):
    """Float32 weights, a dtype of its own for tokens or bias, weights whose rows are no runs, no tokens."""
    monkeypatch.setattr("moerunner.ops.precision.cpu_product", None)
    x, w = torch.randn(3, 8), torch.randn(5, 8)
    half = w.bfloat16()
    for args in ((x, w), (x.half(), half), (x, half, torch.randn(5)), (x, half.T.contiguous().T), (x[:0], half)):
        assert linear_in_native_code(*args).shape == (len(args[0]), 5)


def test_a_row_that_is_no_number_stays_alone():
    if reason := library.why_not():
        pytest.skip(reason)
    x, w = torch.randn(6, 40), torch.randn(9, 40)
    y = linear(x, w)
    x[2] = torch.nan
    spoilt = linear(x, w)
    assert spoilt[2].isnan().all()
    rest = [0, 1, 3, 4, 5]
    assert torch.equal(spoilt[rest], y[rest])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_place_of_a_models_own(dtype, monkeypatch):
    """From two tokens on, outside of what is patched, and only while it lasts."""
    monkeypatch.setattr(native, "PATHS", tuple(build.paths()))
    if reason := library.why_not():
        pytest.skip(reason)
    model = tiny_model("qwen3_moe", dtype=dtype)
    ids, counted = torch.randint(3, 250, (2, 9)), []
    monkeypatch.setattr(linears, "linear", lambda x, *rest: counted.append(x) or linear(x, *rest))
    layer, before = model.model.layers[0], model(ids).logits.double()
    exact = tiny_model("qwen3_moe")
    exact.load_state_dict(model.state_dict())
    true = exact(ids).logits.double()  # in float32, far nearer than either
    with linears.in_native_code(model):
        assert "forward" in vars(layer.self_attn.q_proj)
        assert "forward" in vars(model.lm_head)
        after = model(ids).logits.double()
    assert len(counted) >= 4 * len(model.model.layers) + 1
    assert float((after - true).norm()) <= 2 * float((before - true).norm())
    assert not any("forward" in vars(module) for module in model.modules())
    with linears.in_native_code(model):
        counted.clear()
        layer.self_attn.q_proj(torch.randn(1, 1, 64).to(dtype))
        assert not counted, "PyTorch is as fast for one"


def test_what_is_left_alone(monkeypatch):
    """Float32, a layer with a hook, a class of its own, and every layer where nothing was measured."""
    monkeypatch.setattr(native, "PATHS", (library.chosen()[0],))

    class Own(torch.nn.Linear):
        pass

    half = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), Own(4, 4)).bfloat16()
    half[1].register_forward_hook(lambda *_: None)
    assert [module for module, _ in linears._linears(half)] == [half[0]]
    assert not list(linears._linears(torch.nn.Linear(4, 4)))
    monkeypatch.setattr(native, "PATHS", ())
    with linears.in_native_code(half):
        assert "forward" not in vars(half[0])
