"""Rotary embedding in one launch: the bits of PyTorch's, found out for each family's own function, and put back."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("triton")

import moerunner  # noqa: E402
from moerunner.models.decoding import fused, rotary  # noqa: E402
from moerunner.models.decoding.swap import swapped  # noqa: E402
from moerunner.verify import tiny_model  # noqa: E402

DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * torch.cuda.is_available()
FILE = Path(__file__).with_name("compile_rotary.py")


def forms():
    from moerunner.kernels.rotary import FORMS

    return FORMS


def plain(x, cos, sin, form):
    """x: [B, heads, T, D], cos and sin: [B, T, columns], by PyTorch's own operators."""
    cos, sin = cos[:, None], sin[:, None]
    pairs = cos.shape[-1] // (2 if form.wide else 1)
    turning, rest = x[..., : 2 * pairs], x[..., 2 * pairs :]
    a, b = (turning[..., 0::2], turning[..., 1::2]) if form.beside else turning.chunk(2, -1)
    whole = cos, sin
    if form.half:
        whole = [torch.cat([t[..., :pairs]] * 2, -1) for t in whole]
    elif form.written_beside:
        whole = [torch.cat([t[..., 0::2], t[..., 1::2]], -1) for t in whole]
    a, b = torch.cat([a, b], -1), torch.cat([-b, a], -1)
    if not form.rounded:
        a, b, whole = a.float(), b.float(), [t.float() for t in whole]
    y = (a * whole[0] + b * whole[1]).to(x.dtype)
    y = torch.stack(y.chunk(2, -1), -1).flatten(-2) if form.written_beside else y
    return torch.cat([y, rest], -1)


def drawn(dtype, device, *, batch=1, tokens=1, heads=(4, 2), width=16, columns=16, cos_batch=None, cos_dtype=None):
    """Queries and keys as attention has them, [B, heads, T, D] in the memory of [B, T, heads, D], and cosines and sines."""
    x = [torch.randn(batch, tokens, n, width, device=device).to(dtype).transpose(1, 2) for n in heads]
    angles = [torch.randn(cos_batch or batch, tokens, columns, device=device).to(cos_dtype or dtype) for _ in range(2)]
    return *x, *angles


SHAPES = [
    {"tokens": 2, "batch": 2, "heads": (5, 1), "width": 24, "columns": 12, "cos_batch": 1},
    {},
    {"tokens": 9, "heads": (3, 3), "columns": 4},
    {"heads": (130, 7), "batch": 3},
]


@pytest.mark.rotating(3)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("form", "facts"), [(i, SHAPES[0]) for i in range(10)] + [(0, facts) for facts in SHAPES[1:]])
def test_the_bits_of_pytorch(form, facts, dtype, device):
    form = forms()[form]
    columns = facts.get("columns", 16) // (1 if form.wide else 2)
    q, k, cos, sin = drawn(dtype, device, **facts | {"columns": columns})
    from moerunner.kernels.rotary import rotary as kernel

    for x, out in zip((q, k), kernel(q, k, cos, sin, form), strict=True):
        assert out.dtype == dtype
        assert out.stride()[-1] == 1
        assert out.transpose(1, 2).is_contiguous(), "attention would have to copy it"
        assert torch.equal(out, plain(x, cos, sin, form))


def test_strides_of_any_kind(device):
    """Columns of wider rows, contiguous heads, expanded batches."""
    from moerunner.kernels.rotary import rotary as kernel

    wide = torch.randn(2, 5, 3, 40, device=device)[..., 8:24].transpose(1, 2)
    cos, sin = torch.randn(2, 5, 48, device=device)[..., 16:32], torch.randn(1, 5, 16, device=device)
    for k in (torch.randn(2, 4, 5, 16, device=device), torch.randn(1, 4, 5, 16, device=device).expand(2, -1, -1, -1)):
        for x, out in zip((wide, k), kernel(wide, k, cos, sin, forms()[0]), strict=True):
            assert torch.equal(out, plain(x, cos, sin.expand(2, -1, -1), forms()[0]))


def test_cosines_that_lie_across(device, seen):
    """gpt-oss's angles are a transposed product."""
    module = module_of(halves)
    q, k, cos, sin = drawn(torch.float32, device, tokens=3)
    cos, sin = (t.mT.contiguous().mT for t in (cos, sin))
    with replaced(module):
        found = module.apply_rotary_pos_emb(q, k, cos, sin)
    assert len(seen) == 1, "the kernel was not used"
    assert all(map(torch.equal, found, halves(q, k, cos, sin)))


def test_nothing_to_turn(device):
    from moerunner.kernels.rotary import rotary as kernel

    q, k, cos, sin = drawn(torch.float32, device, tokens=0)
    assert [out.shape for out in kernel(q, k, cos, sin, forms()[0])] == [q.shape, k.shape]


FAMILIES = {  # columns of the cosines for heads of 16, and the form
    "qwen3_moe": (16, 0),
    "mixtral": (16, 0),
    "olmoe": (16, 0),
    "glm4_moe": (8, 0),
    "qwen3_next": (8, 0),
    "gpt_oss": (8, 2),
    "deepseek_v3": (16, 4),
    "ernie4_5_moe": (16, 7),
    "glm4": (8, 6),
    "cohere": (16, 9),
    "gemma4": (16, 0),
    "nanochat": (16, None),  # turns the other way
    "deepseek_v4": (4, None),  # turns the last columns
}


@pytest.mark.parametrize(("family", "columns", "form"), [(name, *facts) for name, facts in FAMILIES.items()])
def test_the_form_of_a_family_is_found_out(family, columns, form, device):
    try:
        module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    except ModuleNotFoundError:
        pytest.skip(f"this Transformers has no {family}")
    name = "apply_rotary_pos_emb_interleave" if family == "deepseek_v3" else "apply_rotary_pos_emb"
    own = getattr(module, name)
    q, k, cos, sin = drawn(DTYPES[-1], device, tokens=2, columns=columns)
    given = (q, cos, sin) if family in ("gemma4", "deepseek_v4") else (q, k, cos, sin)
    with replaced(module):
        ours = getattr(module, name)
        found = ours.ours._form(given, {})
        assert found == (None if form is None else forms()[form])
        out = ours(*given)
    assert getattr(module, name) is own
    expected = own(*given)
    out, expected = (x if isinstance(x, tuple) else (x,) for x in (out, expected))
    assert all(map(torch.equal, out, expected))


def replaced(*modules):
    return swapped([(vars(module), name) for module in modules for name in rotary.NAMES], rotary.Fused.of)


def module_of(function):
    module = ModuleType("modeling")
    module.apply_rotary_pos_emb = function
    return module


def halves(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)

    def turned(x):
        a, b = x.chunk(2, -1)
        return x * cos + torch.cat([-b, a], -1) * sin

    return turned(q), turned(k)


@pytest.fixture
def seen(monkeypatch):
    """Shapes of the queries that the kernel turned, without those of trials."""
    from moerunner.kernels import rotary as kernels

    shapes, kernel = [], kernels.rotary

    def counted(q, *rest):
        if q.shape[:3] != (1, 3, 3):
            shapes.append(tuple(q.shape))
        return kernel(q, *rest)

    monkeypatch.setattr(kernels, "rotary", counted)
    return shapes


def test_heads_behind_tokens(seen, device):
    """What attention transposes later is [B, T, heads, D] here."""
    q, k, cos, sin = drawn(torch.float32, device, tokens=4)
    q, k = q.transpose(1, 2), k.transpose(1, 2)
    module = module_of(halves)
    with replaced(module):
        found = module.apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)
    assert seen
    assert all(map(torch.equal, found, halves(q, k, cos, sin, unsqueeze_dim=2)))


def maybe_keys(q, k, cos, sin, unsqueeze_dim=1):
    turned = halves(q, q if k is None else k, cos, sin, unsqueeze_dim)
    return turned[0], None if k is None else turned[1]


def test_without_keys(seen, device):
    q, k, cos, sin = drawn(torch.float32, device, tokens=2)
    module = module_of(maybe_keys)
    with replaced(module):
        for keys in (None, k):
            found = module.apply_rotary_pos_emb(q, keys, cos, sin)
            expected = maybe_keys(q, keys, cos, sin)
            assert torch.equal(found[0], expected[0])
            assert (found[1] is None) if keys is None else torch.equal(found[1], expected[1])
    assert len(seen) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, cos, sin: (q.requires_grad_(), k, cos, sin),
        lambda q, k, cos, sin: (q.double(), k.double(), cos.double(), sin.double()),
        lambda q, k, cos, sin: (q, k.half(), cos, sin),
        lambda q, k, cos, sin: (q.transpose(-1, -2).contiguous().transpose(-1, -2), k, cos, sin),
        lambda q, k, cos, sin: (q, k, cos[:, :1], sin[:, :1]),
        lambda q, k, cos, sin: (q[0], k[0], cos[:1], sin[:1]),
        lambda q, k, cos, sin: (torch.nn.Parameter(q, requires_grad=False), k, cos, sin),
        lambda q, k, cos, sin: (q.half(), k.half(), cos, sin),  # gives float32
    ],
)
def test_other_tensors_go_to_the_models_own(change, seen, device):
    given = change(*drawn(torch.float32, device, tokens=4, batch=2))
    module = module_of(halves)
    with replaced(module):
        found = module.apply_rotary_pos_emb(*given)
        assert all(x.requires_grad == y.requires_grad for x, y in zip(found, halves(*given), strict=True))
    assert not seen
    assert all(map(torch.equal, found, halves(*given)))


def test_a_function_that_computes_something_else_is_left_alone(seen, device):
    def odd(q, k, cos, sin):
        q, k = halves(q, k, cos, sin)
        return q * 1.001, k

    given = drawn(torch.float32, device)
    module = module_of(odd)
    with replaced(module):
        assert torch.equal(module.apply_rotary_pos_emb(*given)[0], odd(*given)[0])
    assert not seen


@pytest.mark.parametrize("function", [lambda x, sin, cos: x, lambda q, k, v, cos, sin: q, lambda q, freqs_cis: q, 3])
def test_a_function_of_other_arguments_is_left_alone(function):
    module = module_of(function)
    with replaced(module):
        assert module.apply_rotary_pos_emb is function


@pytest.mark.parametrize(
    "family", ["qwen3_moe", *(pytest.param(n, marks=pytest.mark.slow) for n in ("deepseek_v3", "gpt_oss"))]
)
def test_the_tokens_are_those_of_generate(family, seen, device):
    model = tiny_model(family).to(device)
    ids = torch.randint(3, 250, (1, 4), device=device)
    expected = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    with rotary.one_launch(model):
        made = moerunner.generate(model, input_ids=ids, max_new_tokens=4, pad_token_id=0)
    assert torch.equal(made.sequences, expected)
    assert {tokens for _, _, tokens, _ in seen} == {4, 1}, "the kernel was not used"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_changes():
    model = tiny_model("qwen3_moe")
    tables = [table for table, name in rotary.places_of(model) if name in table]
    assert tables
    before = [dict(table) for table in tables]
    with fused(model):
        assert [dict(table) for table in tables] == before


@pytest.mark.parametrize("some", [(0, 5), pytest.param(range(10), marks=pytest.mark.slow)])
def test_compiles_for_hopper(some):
    """No register spilled, and products rounded before they are added, as PyTorch's are."""
    here = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, FILE, *map(str, some)]
    done = subprocess.run(command, env=here, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [json.loads(line) for line in done.stdout.splitlines()] == [[0, 0]] * (2 * len(some))
