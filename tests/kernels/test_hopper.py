"""The Hopper kernel has no interpreter. Here it is compiled for sm_90a; what it computes is checked on a GPU."""

from __future__ import annotations

import contextlib
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")
from cases import TILES, case, error  # noqa: E402

from moerunner.kernels import hopper, nvrtc, tiles  # noqa: E402
from moerunner.kernels.operators import KINDS  # noqa: E402
from moerunner.kernels.tiles import Specialised, Transposed  # noqa: E402
from moerunner.spec import ActivationSpec  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
STACK = 160  # bytes: what an end of a tile with many facts keeps there, not the sums
UP = dict(UP=1, WEIGHTED=0, GATED=1, BIAS=0, HALF=0, KIND=0, LIMITED=0, CLAMP_AFTER=0, GATE_CAPPED=0, UP_CAPPED=0)
VARIANTS = {
    "up": {},
    "down": {"UP": 0, "WEIGHTED": 1},
    "gpt_oss": {"BIAS": 1, "LIMITED": 1},
    "copied": {"COPIED": 1},
    "ungated": {"GATED": 0, "KIND": KINDS.index("relu2"), "BIAS": 1},
    "input weighting, softcaps": {"WEIGHTED": 1, "GATE_CAPPED": 1, "UP_CAPPED": 1},
    "clamp after, gelu, bias": {"BIAS": 1, "KIND": KINDS.index("gelu"), "LIMITED": 1, "CLAMP_AFTER": 1},
    "down, bias": {"UP": 0, "WEIGHTED": 1, "BIAS": 1},
    "rows, float16": {"UP": 0, "HALF": 1},
}
FEW = ["up", "down"]


def _bindings():
    try:
        nvrtc.checked(nvrtc.bindings()[1].nvrtcVersion(), "tell NVRTC's version")
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"NVRTC is not installed: {error}")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _bindings()
    return tmp_path / "moerunner" / "kernels"


@pytest.mark.parametrize("rows", [128, 192])
@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n in FEW else [pytest.mark.slow]) for n in VARIANTS])
def test_compiles_for_hopper_and_keeps_the_sums_in_registers(cache, name, rows):
    flags = {"PARTS": rows // 64, "COLUMNS": hopper.COLUMNS[rows], "COPIED": 0} | UP | VARIANTS[name]
    compiles(cache, "hopper.cu", flags, 128 + 2 * rows, 0 if name in FEW else STACK)


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_compiles_with_tokens_as_columns_too(cache, name):
    if name != "copied":
        flags = {"MOST": hopper.MOST, "COPIED": 0} | UP | VARIANTS[name]
        compiles(cache, "transposed.cu", flags, 384, 0 if name in FEW else STACK)


def compiles(cache, file, flags, threads, stack):
    nvrtc.compiled(file, "sm_90a", [f"{flag}={value}" for flag, value in flags.items()])
    (made,) = cache.iterdir()
    said = subprocess.run([CUOBJDUMP, "-res-usage", made], capture_output=True, text=True, check=True).stdout
    used = re.search(r"grouped_product:\s+REG:(\d+) STACK:(\d+)", said)
    assert used, said
    assert int(used[1]) * threads <= 65536, "the registers at the start"
    assert int(used[2]) <= stack, said


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_the_order_compiles(cache, arch):
    assert nvrtc.compiled("order.cu", arch, ["ID=int"]) == nvrtc.compiled("order.cu", arch, ["ID=int"])
    assert len(list(cache.iterdir())) == 1, "the second came from the cache"
    assert nvrtc.compiled("order.cu", arch, ["ID=long long"]) != nvrtc.compiled("order.cu", arch, ["ID=int"])


def test_what_the_compiler_says_is_passed_on(cache):
    with pytest.raises(RuntimeError, match=r"(?s)hopper\.cu was not compiled .*identifier \"GATED\" is undefined") as raised:
        nvrtc.compiled("hopper.cu", "sm_90a", ["UP=1"])
    assert len(str(raised.value)) < 3000
    assert not cache.exists()


def test_why_nothing_runs_here_is_said(monkeypatch):
    """As if there were a GPU, without a driver and then without the package."""
    _bindings()
    nvrtc.why_not.cache_clear()
    monkeypatch.setattr(nvrtc, "INTERPRETING", False)
    monkeypatch.setattr(nvrtc, "current", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    if not torch.cuda.is_available():
        assert nvrtc.why_not(torch.device("cuda", 0)).startswith("kernels in CUDA C++ cannot be compiled or loaded: ")
    monkeypatch.setattr(nvrtc, "bindings", lambda: importlib.import_module("cuda_that_is_not_there"))
    for cached in (nvrtc.why_not, nvrtc._loaded):
        cached.cache_clear()
    assert "pip install cuda-bindings" in nvrtc.why_not(torch.device("cuda", 0))
    nvrtc.why_not.cache_clear()


def test_a_cache_that_cannot_be_written_costs_time_only(tmp_path, monkeypatch):
    _bindings()
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert nvrtc.compiled("order.cu", "sm_90a", ["ID=int"])


def test_it_is_chosen_for_many_rows_where_it_runs_and_only_there():
    assert "NVIDIA GPUs only" in hopper.why_not(torch.device("cpu"))
    for tokens, many in ((1, False), (512, False), (2048, Transposed()), (2560, Specialised(192)), (8192, Specialised(128))):
        facts = dict(top_k=8, experts=128, hidden=2048, inter=768)
        chosen = tiles.choose(tokens, **facts, itemsize=2, specialised=True)
        without = tiles.choose(tokens, **facts, itemsize=2)
        assert chosen == (many or without)
        assert not isinstance(without, Specialised | Transposed)
    assert tiles.choose(8192, 2, 8, 4096, 14336, itemsize=2, specialised=True) == Specialised(128, copied=True)
    assert not isinstance(tiles.choose(8192, 8, 128, 2048, 768, itemsize=4, specialised=True), Specialised)


def test_where_it_cannot_run_the_triton_tiles_serve(device):
    c = case(device, torch.float32, tokens=20)
    assert error(c.kernel(Specialised()), c.exact()) <= c.bound()


@pytest.mark.skipif(not torch.cuda.is_available() or hopper.why_not(torch.device("cuda")) != "", reason="needs a Hopper GPU")
@pytest.mark.parametrize("tiles", [*(Specialised(r, c) for r in (128, 192) for c in (False, True)), Transposed()], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"bias": True, "gate_up": "interleaved", "activation": ActivationSpec(kind="swigluoai")},
        {"gate_up": "none", "activation": ActivationSpec(kind="relu2"), "bias": True},
        {"input_weighting": True},
        {"output": "rows", "bias": True},
        {"hidden": 200, "inter": 136, "tokens": 300},
        {"tokens": 700, "experts": 2, "top_k": 1, "skip": False},  # several blocks of rows, and what is left of the last
        {"tokens": 700, "experts": 1, "top_k": 1, "inter": 104, "skip": False},
        {"tokens": 420, "experts": 2, "top_k": 1, "inter": 640},  # an odd number of tiles of columns
        *({"tokens": n, "experts": 1, "top_k": 1, "skip": False, "hidden": 208, "inter": 144} for n in (33, 97, 129, 161, 500)),
    ],
)
def test_equals_float64_on_a_gpu(facts, dtype, tiles):
    c = case("cuda", dtype, **{"hidden": 128, "inter": 64, "tokens": 40, **facts})
    first, again = c.kernel(tiles), c.kernel(tiles)
    assert error(first, c.exact()) <= c.bound()
    assert torch.equal(first, again)
    assert error(c.kernel(TILES["tma"]), first.double()) <= c.bound(), "what the Triton tiles give"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_process_and_a_thread_that_have_not_used_the_gpu_are_told_the_truth():
    """Neither has a context of CUDA at first, and the answer is kept."""
    code = """
import threading, torch
from moerunner.kernels import nvrtc, order
device, found = torch.device("cuda", 0), []
print(repr(nvrtc.why_not(device)))
def work():
    found.append(order.order_slots(torch.zeros(3000, 8, dtype=torch.int64, device=device), 4, 64).totals[0].item())
thread = threading.Thread(target=work)
thread.start(), thread.join()
print(found)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["''", f"[{24000 // 64}]"], done.stderr[-500:]
