"""The library for this machine: the fastest path that it has the instructions for, or the one that MOERUNNER_CPU_ISA names."""

from __future__ import annotations

import ctypes
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

from moerunner.errors import UnsupportedError
from moerunner.kernels.cpu.build import FOLDER, RECORD, digest, file_of, paths

SWITCH = "MOERUNNER_CPU_ISA"
_NEEDS = {
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "avx512_bf16": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16"},
    "amx": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "amx_tile", "amx_bf16"},
}
_FIELDS = (
    *((name, ctypes.c_void_p) for name in "x ids weights w13 w2 b13 b2 w13_scale w2_scale out".split()),
    *((name, ctypes.c_int64) for name in "tokens top_k experts hidden inter x_step".split()),
    *((name, ctypes.c_int64) for name in "w13_expert w13_row w13_column w2_expert w2_row w2_column".split()),
    *((name, ctypes.c_int64) for name in "x_dtype w_dtype layout kind per_slot rows invariant".split()),
    *((name, ctypes.c_double) for name in "alpha beta limit gate_softcap up_softcap".split()),
    *((name, ctypes.c_int64) for name in "clamp_after threads".split()),
    ("fork", ctypes.c_void_p),
    ("node_of_cpu", ctypes.c_void_p),
    ("cpus", ctypes.c_int64),
    ("nodes", ctypes.c_int64),
)


class Call(ctypes.Structure):
    """`struct Call` of experts.cpp."""

    _fields_ = list(_FIELDS)


class RouteCall(ctypes.Structure):
    """`struct RouteCall` of route.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in "x gate gate_bias selection_bias expert_scale global_scale given types".split()),
        *((name, ctypes.c_void_p) for name in "ids weights shared".split()),
        *((name, ctypes.c_int64) for name in "tokens logits experts top_k hidden x_row x_column gate_row".split()),
        *((name, ctypes.c_int64) for name in "x_dtype gate_dtype score by_logit groups kept best_two renormalise sets".split()),
        *((name, ctypes.c_double) for name in "scale softcap fill eps p jitter factor".split()),
        ("threads", ctypes.c_int64),
        ("fork", ctypes.c_void_p),
    ]


class NormCall(ctypes.Structure):
    """`struct NormCall` of norm.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in "x weight out".split()),
        *((name, ctypes.c_int64) for name in "rows width x_row dtype form".split()),
        ("eps", ctypes.c_double),
        ("threads", ctypes.c_int64),
        ("fork", ctypes.c_void_p),
    ]


class LinearCall(ctypes.Structure):
    """`struct LinearCall` of linear.cpp."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in "x w bias out".split()),
        *((name, ctypes.c_int64) for name in "tokens width outputs x_row w_row x_dtype dtype threads".split()),
        ("fork", ctypes.c_void_p),
    ]


@cache
def _instructions() -> frozenset[str]:
    """What the processor and the operating system offer, as Linux names it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return frozenset(next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), ()))


def absent(path: str) -> str:
    """Why a path cannot run here; empty when it can."""
    if path not in paths():
        return f"no path of this machine is called {path!r}, known: {', '.join(paths())}"
    lacking = sorted(_NEEDS.get(path, set()) - _instructions())
    if lacking:
        return f"the processor has no {', '.join(lacking)}"
    return _not_built(path) or ("" if path != "amx" else _forbidden())


@cache
def _forbidden() -> str:
    """Why Linux does not let this process use the tiles of AMX, which it has to ask for; empty when it does."""
    arch_prctl, request, tile_data = 158, 0x1023, 18
    if ctypes.CDLL(None, use_errno=True).syscall(arch_prctl, request, tile_data) == 0:
        return ""
    return f"the system does not permit AMX: {os.strerror(ctypes.get_errno())}"


def _not_built(path: str) -> str:
    record, found = _record(), file_of(path).exists()
    if not record:
        why = "was not compiled"
    elif not found:
        why = f"was not compiled, since {record['missing'].get(path, 'its file is gone')}"
    elif record.get("sources") != digest():
        why = "was compiled from other sources"
    else:
        return ""
    return f"{why}; run: python -m moerunner.kernels.cpu.build"


def _record() -> dict[str, Any]:
    record = FOLDER / RECORD
    return json.loads(record.read_text()) if record.exists() else {}


@cache
def chosen() -> tuple[str, str]:
    """The path to run, and with none the reason."""
    named = os.environ.get(SWITCH, "")
    if named:
        reason = absent(named)
        return ("", f"{SWITCH}={named}: {reason}") if reason else (named, "")
    reasons = {path: absent(path) for path in paths()}
    able = [path for path, reason in reasons.items() if not reason]
    return (able[-1], "") if able else ("", next(iter(reasons.values())))


def why_not() -> str:
    """Why no path can run here; empty when one can."""
    return chosen()[1]


@cache
def load(path: str) -> ctypes.CDLL:
    """The library of a path. Raises UnsupportedError with the reason where it cannot run."""
    reason = absent(path)
    if reason:
        raise UnsupportedError(reason, where=f"cpu kernels, path {path!r}")
    library = ctypes.CDLL(str(file_of(path)))
    library.moerunner_experts.argtypes = [ctypes.POINTER(Call)]
    library.moerunner_route.argtypes = [ctypes.POINTER(RouteCall)]
    library.moerunner_linear.argtypes = [ctypes.POINTER(LinearCall)]
    library.moerunner_rms_norm.argtypes = [ctypes.POINTER(NormCall)]
    library.moerunner_rms_norm.restype = None
    library.moerunner_kept.restype = ctypes.c_int64
    return library


@cache
def torch_threads() -> int | None:
    """Address of what starts the threads of PyTorch's own OpenMP pool, where it has one that can be used."""
    fork = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    return None if fork is None else ctypes.cast(fork, ctypes.c_void_p).value
