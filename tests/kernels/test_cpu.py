"""The native CPU kernels, by every path that this machine has, against float64; and what chooses a path."""

import dataclasses
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moerunner.errors import UnsupportedError
from moerunner.experts import choose, eager, fused_experts
from moerunner.experts import cpu as backend
from moerunner.experts.base import Request
from moerunner.kernels.cpu import build, library, nodes
from moerunner.kernels.cpu.experts import LAYOUTS, cpu_experts, run
from moerunner.kernels.operators import KINDS
from moerunner.quant import int8
from moerunner.spec import ActivationSpec
from moerunner.values import TopK

pytest.importorskip("triton", reason="the cases are shared with the Triton kernels, Triton is not installed")
from cases import case, error

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
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


HERE = [name for name in build.paths() if not library.absent(name)]


@pytest.fixture(params=HERE or [None])
def path(request):
    if request.param is None:
        pytest.skip(library.why_not())
    return request.param


@pytest.mark.parametrize("name", list(build.paths()))
def test_every_path_or_why_not(name):
    if reason := library.absent(name):
        pytest.skip(reason)
    check(name, case("cpu", bias=True))


@pytest.fixture
def any_path():
    if reason := library.why_not():
        pytest.skip(reason)


def call(path, c, **changes):
    own = {name: changes.pop(name) for name in ("own_threads", "cpus_of_nodes") if name in changes}
    invariant = changes.pop("invariant", False)
    c = dataclasses.replace(c, **changes)
    a, w = c.call.activation.resolved(), c.weights
    return run(
        path, c.x, c.topk.ids, c.topk.weights, w.w13, w.w2, w.get("b13"), w.get("b2"), w.get("w13_scale"), w.get("w2_scale"),
        LAYOUTS.index(w.gate_up), KINDS.index(a.kind), 1.0 if a.alpha is None else a.alpha, a.beta, a.limit, a.clamp_after,
        a.gate_softcap, a.up_softcap, c.call.input_weighting, c.call.output == "rows", invariant, **own,
    )  # fmt: skip


def check(path, c, **own):
    """Few numbers can make plain PyTorch exact by luck: above the bound the median of the same with other numbers decides."""
    y = call(path, c, **own)
    if error(y, c.exact()) > c.bound():
        others = [c.redrawn() for _ in range(15)]
        assert statistics.median(error(call(path, other, **own), other.exact()) / other.bound() for other in others) <= 1
    return y


@pytest.mark.parametrize("tokens", [1, 20])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_activations(path, dtype, name, tokens):
    check(path, case("cpu", dtype, tokens=tokens, top_k=2, activation=ACTIVATIONS[name], bias=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "relu2", "limit"])
def test_ungated(path, dtype, name):
    check(path, case("cpu", dtype, gate_up="none", activation=ACTIVATIONS[name], bias=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("gate_up", ["concat", "interleaved"])
@pytest.mark.parametrize("tokens", [3, 24])
def test_layouts_and_strides(path, dtype, gate_up, transposed, tokens):
    check(path, case("cpu", dtype, tokens=tokens, gate_up=gate_up, transposed=transposed, bias=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("hidden", "inter"), [(1, 1), (7, 5), (8, 8), (33, 47), (136, 24), (1100, 9)])
@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(1, 1, 1), (3, 4, 4), (20, 1, 2), (51, 2, 3)])
def test_odd_shapes(path, dtype, hidden, inter, tokens, top_k, experts):
    check(path, case("cpu", dtype, tokens=tokens, top_k=top_k, experts=experts, hidden=hidden, inter=inter, skip=False))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_zero_where_there_is_no_expert(path, dtype):
    c = case("cpu", dtype, output="rows", bias=True)
    y = check(path, c)
    assert y.dtype == dtype
    assert torch.equal(y[c.topk.ids < 0], torch.zeros_like(y[c.topk.ids < 0]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("output", ["summed", "rows"])
def test_input_weighting(path, dtype, output):
    check(path, case("cpu", dtype, input_weighting=True, bias=True, output=output))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 30])
def test_int8_weights(path, dtype, tokens):
    """Against float64 on the weights that the codes stand for."""
    c = case("cpu", torch.float32, tokens=tokens, hidden=133, bias=True)
    held = int8.quantize(c.weights)
    plain = int8.dequantize(held, torch.float64)
    c = dataclasses.replace(c, x=c.x.to(dtype), weights=plain)
    rounded = {n: dataclasses.replace(e, tensor=e.tensor.to(dtype)) for n, e in held.tensors.items() if n in ("b13", "b2")}
    exact = dataclasses.replace(plain, tensors={**plain.tensors, **rounded})
    y = call(path, c, weights=dataclasses.replace(held, tensors={**held.tensors, **rounded}))
    c = dataclasses.replace(c, weights=exact)
    assert error(y, c.exact()) <= c.bound()


def test_no_expert_and_no_token(path):
    c = case("cpu")
    c.topk.ids.fill_(-1)
    assert not call(path, c).any()
    assert call(path, c, x=c.x[:0], topk=TopK(c.topk.ids[:0], c.topk.weights[:0])).shape == (0, 72)


@pytest.mark.parametrize("tokens", [3, 30])
def test_a_bad_token_stays_alone(path, tokens):
    """NaN in one token reaches its own row only, through clamps too, and every other row keeps its bits."""
    c = case("cpu", tokens=tokens, activation=ActivationSpec(limit=1.0), skip=False)
    clean, x = call(path, c), c.x.clone()
    x[2] = torch.nan
    y = call(path, c, x=x)
    assert y[2].isnan().all()
    others = [t for t in range(len(x)) if t != 2]
    assert torch.equal(y[others], clean[others])


def test_nan_in_an_expert_that_nobody_chose(path):
    c = case("cpu", torch.bfloat16, tokens=2, top_k=1, skip=False)
    c.topk.ids.copy_(torch.tensor([[0], [3]]))
    clean = call(path, c)
    for name in ("w13", "w2"):
        c.weights.tensors[name].tensor[[1, 2, 4]] = torch.nan
    assert torch.equal(call(path, c), clean)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_token_does_not_depend_on_the_batch(path, dtype):
    """The same bits alone, among few and among many, with one thread and with several, of either pool, and every run."""
    c = case("cpu", dtype, tokens=70, top_k=2, hidden=1100, inter=90, bias=True)
    y = call(path, c, invariant=True)
    for part in (slice(0, 1), slice(3, 6), slice(7, 27)):
        alone = TopK(c.topk.ids[part].contiguous(), c.topk.weights[part].contiguous())
        assert torch.equal(call(path, c, x=c.x[part], topk=alone, invariant=True), y[part])
    fast = call(path, c)
    torch.set_num_threads(3)
    try:
        assert torch.equal(call(path, c), fast)
        assert torch.equal(call(path, c, own_threads=True, invariant=True), y)
    finally:
        torch.set_num_threads(1)


TWO, WITH_AN_EMPTY_ONE = ((0,), (1,)), ((0, 1), (5,), (6,))  # nodes of memory, which this machine need not have


@pytest.mark.parametrize("cpus_of_nodes", [TWO, WITH_AN_EMPTY_ONE], ids=["two", "with an empty one"])
@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(1, 2, 5), (3, 1, 1), (11, 4, 7), (60, 3, 10), (100, 2, 4)])
def test_sums_by_node_are_the_sums(path, monkeypatch, cpus_of_nodes, tokens, top_k, experts):
    """Added in one order; nothing changes for rows, nor for sums that must not depend on the nodes."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    shape = {"tokens": tokens, "top_k": top_k, "experts": experts, "hidden": 96, "inter": 72}
    c = case("cpu", **shape, bias=True, skip=tokens > 1)
    y = check(path, c, cpus_of_nodes=cpus_of_nodes)
    assert torch.equal(y, call(path, c, cpus_of_nodes=cpus_of_nodes))
    rows = {"call": dataclasses.replace(c.call, output="rows")}
    for change in (rows, {"invariant": True}):
        by_node, plainly = (call(path, c, cpus_of_nodes=given, **change) for given in (cpus_of_nodes, ()))
        assert torch.equal(by_node, plainly)


@pytest.mark.parametrize("expert", [0, 4])
def test_all_chosen_experts_lie_on_one_node(path, monkeypatch, expert):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    c = case("cpu", tokens=9, top_k=2, hidden=96, inter=72)
    c.topk.ids[c.topk.ids >= 0] = expert
    check(path, c, cpus_of_nodes=TWO)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_held_is_spread_over_the_nodes_and_no_copy_of_it(path, monkeypatch, dtype):
    spread = []
    monkeypatch.setattr(nodes, "ours", lambda: TWO)
    monkeypatch.setattr(nodes, "spread", lambda weights: spread.append(weights.data_ptr()))
    c = case("cpu", hidden=96, inter=72)
    call(path, c, x=c.x.to(dtype))
    assert spread == [c.weights.w13.data_ptr(), c.weights.w2.data_ptr()]
    monkeypatch.setattr(nodes, "ours", lambda: ())
    call(path, c)
    assert len(spread) == 2, "one node has all there is"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_addresses_that_are_not_aligned(path, dtype):
    """Tensors that begin anywhere, tokens and weights with gaps between their rows."""
    c = case("cpu", dtype, tokens=9)

    def shifted(t):
        place = torch.full((t[..., 0].numel() * (t.shape[-1] + 3) + 1,), torch.nan, dtype=t.dtype)[1:]
        return place.view(*t.shape[:-1], t.shape[-1] + 3)[..., : t.shape[-1]].copy_(t)

    entries = {n: dataclasses.replace(e, tensor=shifted(e.tensor)) for n, e in c.weights.tensors.items()}
    moved = call(path, c, x=shifted(c.x), weights=dataclasses.replace(c.weights, tensors=entries))
    assert torch.equal(moved, call(path, c))


def test_strided_tokens_and_ids(path):
    """Tokens whose inner stride is not one, ids that are not contiguous."""
    c = case("cpu", tokens=6)
    x = c.x.T.contiguous().T
    topk = TopK(c.topk.ids.T.contiguous().T, c.topk.weights.T.contiguous().T)
    assert torch.equal(call(path, c, x=x, topk=topk), call(path, c))


def test_memory_is_kept_and_given_back(path):
    c = case("cpu", tokens=30)
    native = library.load(path)
    call(path, c)
    kept = native.moerunner_kept()
    call(path, c)
    assert native.moerunner_kept() == kept > 0
    native.moerunner_release()
    assert native.moerunner_kept() == 0
    check(path, c)


def test_auto_takes_it_and_others_serve_where_it_cannot(any_path):
    request = Request(
        device="cpu", dtype="bfloat16", activation=ActivationSpec(), gate_up="concat",
        shapes=((8, 32, 64), (8, 64, 16)), strides=((2048, 64, 1), (1024, 16, 1)), batch_invariant=True, deterministic=True,
    )  # fmt: skip
    chosen = choose(request)
    assert chosen.backend is backend
    assert chosen.few is None
    plain = dataclasses.replace(request, batch_invariant=False)
    for change, reason in (({"grad": True}, "has no backward"), ({"dtype": "float64"}, "not float64")):
        other = choose(dataclasses.replace(plain, **change))
        assert other.backend.INFO.name in ("eager", "grouped_mm")
        assert any(name == "cpu" and reason in why for name, why in other.refused)


def test_without_a_library_the_others_serve_and_say_why(monkeypatch):
    monkeypatch.setattr(backend, "INFO", dataclasses.replace(backend.INFO, unavailable=lambda: "was not compiled"))
    c = case("cpu", skip=False)
    y = fused_experts(c.x, c.weights.w13, c.weights.w2, c.topk.weights, c.topk.ids)
    assert error(y, c.exact()) <= c.bound()
    with pytest.raises(UnsupportedError, match="was not compiled"):
        fused_experts(c.x, c.weights.w13, c.weights.w2, c.topk.weights, c.topk.ids, backend="cpu")


def python(code, **environment):
    place = {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, env={**os.environ, **place, **environment}, capture_output=True, text=True, check=False)


def test_the_switch_forces_a_path_or_says_why_not(any_path):
    code = "from moerunner.kernels.cpu import library; print(library.chosen())"
    for name in build.paths():
        said = python(code, MOERUNNER_CPU_ISA=name).stdout
        assert said == (f"('{name}', '')\n" if not library.absent(name) else said)
        assert library.absent(name) in said.encode().decode("unicode_escape") or not library.absent(name)
    assert "no path of this machine is called 'sse9'" in python(code, MOERUNNER_CPU_ISA="sse9").stdout


def test_opcheck(any_path):
    c = case("cpu", tokens=6, skip=False)
    w = c.weights
    arguments = (c.x, c.topk.ids, c.topk.weights, w.w13, w.w2, None, None, None, None, 0, 0, 1.0, 0.0, 2.0, False, None, None)
    for rows in (False, True):
        torch.library.opcheck(cpu_experts, (*arguments, False, rows, False))


def test_compiles_without_a_break(any_path):
    c = case("cpu", skip=False)

    def layer(x):
        return backend.run(x * 2, c.topk, c.weights, c.call) + 1

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(c.x), layer(c.x))


def test_weights_in_another_dtype_than_tokens(any_path):
    c = case("cpu", torch.float32, skip=False)
    x = c.x.bfloat16()
    y = backend.run(x, c.topk, c.weights, c.call)
    assert error(y, eager.run(x.double(), c.topk, c.weights, c.call)) < 0.02


SANITIZED = {
    # Sixteen lanes, pairs of bfloat16 and tiles, without their instructions: the logic of AMX on any machine.
    "amx emulated": ("-DLANES=16", "-DPAIRS", "-DTILES", "-DEMULATED"),
    "avx512_bf16 emulated": ("-DLANES=16", "-DPAIRS", "-DEMULATED"),
    "avx512 emulated": ("-DLANES=16", "-DEMULATED"),
    **build.paths(),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] if n != "avx2" else []) for n in SANITIZED])
def test_sanitizers(name, tmp_path):
    """Under ASan and UBSan, which see every read beside a tensor; in C++, against plain loops in double."""
    if name in build.paths() and (reason := library.absent(name)):
        pytest.skip(reason)
    compiler, driver = build.compiler(), tmp_path / "driver"
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    flags = ("-std=c++17", "-O1", "-pthread", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
    probe = tmp_path / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    if subprocess.run([compiler, *flags, str(probe), "-o", str(driver)], capture_output=True, check=False).returncode:
        pytest.skip(f"{compiler} has no sanitizers")
    source = Path(__file__).with_name("cpu_driver.cpp")
    subprocess.run([compiler, *flags, *SANITIZED[name], str(source), "-o", str(driver)], check=True)
    seed = str(torch.randint(10**6, ()).item())
    whole_stack = {**os.environ, "ASAN_OPTIONS": "detect_stack_use_after_return=0"}  # GCC aligns its fake one to 32 bytes only
    done = subprocess.run([driver, seed, "30"], env=whole_stack, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"seed {seed}\n{done.stdout}{done.stderr[-3000:]}"


def test_it_is_built_without_torch_and_says_what_is_missing(tmp_path, monkeypatch):
    """Where there is no compiler, nothing but the record is written."""
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert set(build.build(tmp_path)) == set(build.paths())
    assert [file.name for file in tmp_path.iterdir()] == [build.RECORD]
    monkeypatch.setattr(library, "FOLDER", tmp_path)
    monkeypatch.setattr(library, "file_of", lambda path: build.file_of(path, tmp_path))
    assert "no C++ compiler was found" in library.absent(next(iter(build.paths())))


def test_a_library_of_other_sources_is_not_loaded(any_path, monkeypatch):
    """Its structures may differ, so that it would write anywhere."""
    monkeypatch.setattr(library, "digest", lambda: "another")
    assert library.absent(HERE[0]) == "was compiled from other sources; run: python -m moerunner.kernels.cpu.build"
