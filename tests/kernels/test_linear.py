"""Linear layers in native code: against float64, and in the place of a model's own while text is generated."""

import pytest
import torch

transformers = pytest.importorskip("transformers")

from moerunner.kernels.cpu import build, library  # noqa: E402
from moerunner.kernels.cpu.linear import AT_ONCE, DTYPES, linear  # noqa: E402
from moerunner.models.decoding import linears  # noqa: E402
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
    monkeypatch.setattr(linears, "_PATHS", tuple(build.paths()))
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
    monkeypatch.setattr(linears, "_PATHS", (library.chosen()[0],))

    class Own(torch.nn.Linear):
        pass

    half = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), Own(4, 4)).bfloat16()
    half[1].register_forward_hook(lambda *_: None)
    assert [module for module, _ in linears._linears(half)] == [half[0]]
    assert not list(linears._linears(torch.nn.Linear(4, 4)))
    monkeypatch.setattr(linears, "_PATHS", ())
    with linears.in_native_code(half):
        assert "forward" not in vars(half[0])
