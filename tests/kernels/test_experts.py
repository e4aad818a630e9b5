"""Every kernel path against float64: activations, biases, layouts, strides, dtypes, outputs, slots without an expert."""

import dataclasses

import numpy
import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
from cases import TILES, case, error

from moerunner.experts import triton as backend
from moerunner.kernels import experts
from moerunner.kernels.experts import FINAL, triton_experts
from moerunner.kernels.tiles import Grouped
from moerunner.spec import ActivationSpec
from moerunner.values import TopK

ACTIVATIONS = {
    "silu": ActivationSpec(),
    "alpha": ActivationSpec(alpha=1.3, beta=0.5),
    "limit": ActivationSpec(limit=0.8),
    "clamp_after": ActivationSpec(limit=0.4, clamp_after=True),
    "swigluoai": ActivationSpec(kind="swigluoai"),
    "softcaps": ActivationSpec(gate_softcap=1.5, up_softcap=0.9),
    "gelu": ActivationSpec(kind="gelu"),
    "gelu_tanh": ActivationSpec(kind="gelu_tanh", limit=1.0),
    "relu": ActivationSpec(kind="relu"),
    "relu2": ActivationSpec(kind="relu2", beta=1.0),
}
path = pytest.mark.parametrize("path", list(TILES))


def _check(c, path):
    y = c.kernel(TILES[path])
    assert error(y, c.exact()) <= c.bound()
    return y


@path
@pytest.mark.rotating(3)
@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_activations(device, path, name):
    _check(case(device, tokens=4, activation=ACTIVATIONS[name], bias=True), path)


@path
@pytest.mark.rotating(3)
@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "relu2", "limit"])
def test_ungated(device, path, name):
    _check(case(device, tokens=4, gate_up="none", activation=ACTIVATIONS[name], bias=True), path)


@path
@pytest.mark.rotating(3)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("gate_up", ["concat", "interleaved"])
def test_layouts_and_strides(device, path, gate_up, transposed):
    _check(case(device, tokens=4, gate_up=gate_up, transposed=transposed, bias=True), path)


@pytest.mark.parametrize("gate_up", ["concat", "interleaved", "none"])
@pytest.mark.parametrize("path", ["grouped", "tma"])
def test_weights_that_lie_transposed_are_read_as_they_lie(device, path, gate_up, monkeypatch):
    """In runs of eight rows; where rows are no multiple of that, one by one. One token too takes such a path."""
    read, described = [], experts._described
    monkeypatch.setattr(
        experts, "_described", lambda w, product, turned, **how: (read.append(turned), described(w, product, turned, **how))[1]
    )
    _check(case(device, tokens=4, gate_up=gate_up, transposed=True, bias=True), path)
    assert read == [True, True] * (path == "tma")
    for hidden, inter in ((72, 36), (70, 40)):
        _check(case(device, tokens=4, gate_up=gate_up, transposed=True, hidden=hidden, inter=inter), path)
    monkeypatch.setattr(experts, "_few", None)
    c = case(device, tokens=1, gate_up=gate_up, transposed=True, skip=False)
    assert error(c.kernel(), c.exact()) <= c.bound()


@pytest.mark.rotating(3)
@pytest.mark.parametrize("tma", [False, True])
def test_tiles_that_an_expert_fills_at_most_by_half(device, tma):
    """Rows per expert: none, one, half a tile, one more, a whole tile, and one and some more."""
    product = TILES["tma" if tma else "grouped"].up
    counts = [0, 1, 64, 65, 128, 190]
    c = case(device, tokens=sum(counts), top_k=1, experts=len(counts), hidden=40, inter=24, bias=True, skip=False)
    ids = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))[torch.randperm(sum(counts))]
    c = dataclasses.replace(c, topk=dataclasses.replace(c.topk, ids=ids[:, None].to(device)))
    assert error(c.kernel(Grouped(128, product, product)), c.exact()) <= c.bound()


@path
@pytest.mark.rotating(3)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("output", ["summed", "rows"])
def test_half_precision(device, path, dtype, output):
    c = case(device, dtype, tokens=4, bias=True, output=output)
    y = _check(c, path)
    assert y.dtype == (torch.float32 if output == "summed" else dtype)


@pytest.mark.rotating(3)
@path
def test_rows_are_zero_where_there_is_no_expert(device, path):
    c = case(device, output="rows", bias=True)
    y = _check(c, path)
    assert torch.equal(y[c.topk.ids < 0], torch.zeros_like(y[c.topk.ids < 0]))


@pytest.mark.rotating(3)
@path
def test_input_weighting(device, path):
    _check(case(device, input_weighting=True, bias=True), path)


@pytest.mark.rotating(3)
@path
def test_scale_and_final_dtype(device, path):
    c = case(device, torch.float16, scale=2.5)
    assert torch.equal(c.kernel(TILES[path], FINAL), _check(c, path).half())


@path
@pytest.mark.rotating(3)
@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("down", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shared_experts_are_added_once_and_are_not_scaled(device, path, dtype, down, share):
    """As rows, or as what their down product reads; a token without any expert has them too."""
    c = case(device, dtype, tokens=4, bias=True, scale=2.5)
    c.topk.ids[1] = -1
    addend = draw_addend(c, down=down, share=share)
    exact = c.exact() + addend_exact(addend)
    bound = 2 * (c.bound() * c.exact().abs().max() / exact.abs().max() + torch.finfo(dtype).eps) + 1e-6
    y = c.kernel(TILES[path], addend=addend)
    assert error(y, exact) <= bound
    assert y.dtype == torch.float32
    assert torch.equal(c.kernel(TILES[path], FINAL, addend=addend), y.to(dtype))


def test_shared_experts_in_another_dtype(device):
    """Tiles whose kernels have no down product of theirs; tokens in half precision, a checkpoint's weight in float32."""
    c = case(device, torch.bfloat16, tokens=3, skip=False)
    rows, down, _ = draw_addend(c, down=True, share=False)
    y = c.kernel(TILES["grouped"], addend=(rows, down.float(), None))
    assert torch.equal(y, c.kernel(TILES["grouped"], addend=(rows, down, None)))


@path
def test_shared_experts_alone(device, path):
    """To the precision of their own product: what the routed experts would hide."""
    c = case(device, tokens=3, skip=False)
    c.topk.ids.fill_(-1)
    addend = draw_addend(c, down=True, share=True, transposed=True)
    assert error(c.kernel(TILES[path], addend=addend), addend_exact(addend)) <= 2e-6


def draw_addend(c, *, down, share, width=37, transposed=False):
    """Rows, of a width that no tile divides, the down weight and the share of a token."""
    tokens, hidden = c.x.shape
    rows = torch.randn(tokens, width if down else hidden).to(c.x)
    weight = torch.randn(hidden, width).to(c.x) * width**-0.5
    weight = weight.T.contiguous().T if transposed else weight
    return rows, weight if down else None, torch.rand(tokens, device=c.x.device) if share else None


def addend_exact(addend):
    rows, down, share = (None if t is None else t.double() for t in addend)
    y = rows if down is None else rows @ down.T
    return y if share is None else y * share[:, None]


@path
@pytest.mark.rotating(3)
@pytest.mark.parametrize(("hidden", "inter"), [(8, 8), (136, 24)])
@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(1, 1, 1), (3, 4, 4), (20, 1, 2)])
def test_odd_shapes(device, path, hidden, inter, tokens, top_k, experts):
    c = case(device, tokens=tokens, top_k=top_k, experts=experts, hidden=hidden, inter=inter, skip=False)
    _check(c, path)


@pytest.mark.rotating(3)
@path
def test_all_tokens_on_one_expert(device, path):
    c = case(device, tokens=20, top_k=1, skip=False)
    c.topk.ids.fill_(3)
    _check(c, path)


@path
def test_no_expert_at_all(device, path):
    c = case(device)
    c.topk.ids.fill_(-1)
    assert not c.kernel(TILES[path]).any()


@pytest.mark.parametrize("output", ["summed", "rows"])
def test_zero_tokens(device, output):
    c = case(device, tokens=6, output=output)
    y = c.kernel(x=c.x[:0], ids=c.topk.ids[:0], topk_weights=c.topk.weights[:0])
    assert y.shape == ((0, 72) if output == "summed" else (0, 3, 72))


@pytest.mark.rotating(3)
@path
def test_a_bad_token_stays_alone(device, path):
    """NaN in one token reaches its own row only, through clamps too, and every other row keeps its bits."""
    c = case(device, activation=ActivationSpec(limit=1.0), skip=False)
    clean, x = c.kernel(TILES[path]), c.x.clone()
    x[2] = torch.nan
    y = c.kernel(TILES[path], x=x)
    assert y[2].isnan().all()
    others = [t for t in range(len(x)) if t != 2]
    assert torch.equal(y[others], clean[others])


@pytest.mark.rotating(3)
@path
def test_same_bits_every_run(device, path):
    c = case(device, torch.float16)
    assert torch.equal(c.kernel(TILES[path]), c.kernel(TILES[path]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_tokens_bits_do_not_depend_on_the_batch(device, dtype, monkeypatch):
    """Alone, in other company, in other places of a tile, beside another number of tokens."""
    if device == "cpu":  # NumPy's product, which stands for the matrix unit, sums a row by its place in the tile
        monkeypatch.setattr(numpy, "matmul", lambda a, b, dtype: numpy.einsum("mk,kn->mn", a, b, dtype=dtype))
    c = case(device, dtype, tokens=90, experts=2, top_k=2, bias=True, skip=False, hidden=136)
    whole, order = _batch_invariant(c, range(90)), torch.randperm(90).tolist()
    assert error(whole, c.exact()) <= c.bound()
    for rows in ([0], [89], [7, 3], list(range(40, 75)), order):
        assert torch.equal(_batch_invariant(c, rows), whole[list(rows)])


def _batch_invariant(c, rows):
    rows = list(rows)
    topk = TopK(c.topk.ids[rows], c.topk.weights[rows])
    return backend.run(c.x[rows], topk, c.weights, dataclasses.replace(c.call, batch_invariant=True))


def test_tokens_with_strides(device):
    c = case(device)
    wide = torch.zeros(2 * len(c.x), c.x.shape[1] + 8, device=device)
    wide[::2, : c.x.shape[1]] = c.x
    strided = c.kernel(x=wide[::2, : c.x.shape[1]], ids=c.topk.ids.T.contiguous().T, topk_weights=c.topk.weights)
    assert torch.equal(strided, c.kernel())


def _arguments(c):
    w, ids = c.weights, c.topk.ids
    return (c.x, ids, c.topk.weights, w.w13, w.w2, None, None, 0, 0, 1.0, 0.0, 2.0, False, None, None, False, 1, 1.0, False)


@pytest.mark.parametrize("tokens", [1, 6])
def test_opcheck(device, tokens):
    c = case(device, tokens=tokens, skip=False)
    torch.library.opcheck(triton_experts, _arguments(c))


def test_compiles_without_a_break(device):
    c = case(device, skip=False)

    def layer(x):
        return backend.run(x * 2, c.topk, c.weights, c.call) + 1

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(c.x), layer(c.x))
