"""RMS norm in one launch: against float64, and which form of it a module of Transformers has."""

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("triton")

from moerunner.kernels.cpu import build, library  # noqa: E402
from moerunner.kernels.cpu import norm as native  # noqa: E402
from moerunner.models.decoding import norms  # noqa: E402
from moerunner.verify import tiny_model  # noqa: E402


@pytest.fixture
def there(device):
    """Norms of a model can be replaced here."""
    if device == "cpu" and (reason := library.why_not()):
        pytest.skip(reason)


def exact(x, weight, eps, form):
    y = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + eps)
    return y * (weight.double() + (form == native.FORMS["rounded((1 + weight) * x)"]))


@pytest.mark.parametrize(("shape", "form"), [((1, 64), 0), ((3, 5, 4, 16), 1), ((2, 130), 2), ((0, 8), 0), ((1100, 24), 1)])
def test_against_float64(shape, form, device):
    from moerunner.kernels.norm import rms_norm

    x = torch.randn(*shape, device=device) * 3
    weight = torch.randn(shape[-1], device=device)
    y = rms_norm(x, weight, 1e-6, form)
    assert y.shape == x.shape
    torch.testing.assert_close(y.double(), exact(x, weight, 1e-6, form), rtol=2e-6, atol=0)


def test_rows_that_lie_apart(device):
    from moerunner.kernels.norm import rms_norm

    x, weight = torch.randn(6, 2, 16, device=device)[:, 1], torch.randn(16, device=device)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5, 0), rms_norm(x.contiguous(), weight, 1e-5, 0), rtol=0, atol=0)


@pytest.mark.parametrize("path", list(build.paths()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "form"), [((1, 64), 0), ((3, 5, 4, 17), 1), ((2, 130), 2), ((0, 8), 0), ((700, 90), 1)])
def test_native_code(path, dtype, shape, form):
    """The same bits with one thread and with three, and for rows that lie apart."""
    if reason := library.absent(path):
        pytest.skip(reason)
    x, weight = (torch.randn(*shape) * 3).to(dtype), torch.randn(shape[-1]).to(dtype)
    y = native.rms_norm(x, weight, 1e-6, form, path=path)
    assert (y.shape, y.dtype) == (x.shape, dtype)
    limit = 2e-6 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(y.double(), exact(x, weight, 1e-6, form), rtol=limit, atol=0)
    apart = torch.stack([x, x], -2)[..., 1, :]
    torch.set_num_threads(3)
    try:
        assert torch.equal(native.rms_norm(apart, weight, 1e-6, form, path=path), y)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize(("family", "form"), [("qwen3_moe", (0, 1)), ("qwen3_next", (2,)), ("gpt_oss", (0, 1))])
def test_the_form_of_a_family_is_found_out(family, form, device, there):
    """In float32 the first two are one."""
    model = tiny_model(family).to(device)
    found = dict(norms._norms(model))
    assert found
    names = {type(module).__name__ for module in model.modules() if type(module).__name__.endswith("RMSNorm")}
    assert names >= {type(module).__name__ for module in found}
    from moerunner.kernels.norm import rms_norm

    module = next(iter(found))
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    assert norms._form(module, module.weight, eps, rms_norm, native.FORMS.values()) in form
    x = torch.randn(3, len(module.weight), device=device)
    torch.testing.assert_close(found[module](x), module(x), rtol=2e-6, atol=1e-7)


def test_a_norm_that_computes_something_else_is_left_alone(device, there):
    class OddRMSNorm(torch.nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.weight, self.eps, self.factor = torch.nn.Parameter(torch.ones(32)), 1e-6, factor

        def forward(self, x):
            return self.factor * self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)

    assert dict(norms._norms(OddRMSNorm(1.0).to(device)))
    assert not dict(norms._norms(OddRMSNorm(1.001).to(device)))
    hooked = OddRMSNorm(1.0).to(device)
    hooked.register_forward_hook(lambda *_: None)
    assert not dict(norms._norms(hooked))
    assert torch.equal(hooked.weight.data, torch.ones_like(hooked.weight)), "what was tried stays in it"
