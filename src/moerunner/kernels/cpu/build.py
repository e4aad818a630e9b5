"""Compiles the kernels, one shared library for each instruction set: when the package is installed, or later by

    python -m moerunner.kernels.cpu.build

It needs a C++17 compiler (the one that CXX names, g++, clang++ or c++) and nothing else, not even the rest of this package.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
SOURCES = ("experts.cpp", "route.cpp", "linear.cpp", "norm.cpp")
RECORD = "build.json"
"""Beside the libraries: the compiler, what the sources were, and for each path that is not there the reason."""

_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl")
PATHS: Mapping[str, Mapping[str, Sequence[str]]] = {
    "x86_64": {
        "portable": (),
        "avx2": _AVX2,
        "avx512": _AVX512,
        "avx512_bf16": (*_AVX512, "-mavx512bf16"),
        "amx": (*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
    },
    "aarch64": {"neon": ()},
}
"""Per machine the paths from slow to fast, with the flags that each needs."""

_FUSED = ("-ffp-contract=fast", "--param=avoid-fma-max-bits=0")
"""GCC's tunings for some processors, from 13 on for any, split products from long sums, in some loops and not in others: a
token's bits would then depend on how many come with it."""
_FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", *_FUSED, "-fPIC", "-shared", "-fvisibility=hidden", "-pthread")


def paths() -> Mapping[str, Sequence[str]]:
    """Those of this machine's kind; of any other kind the portable one."""
    kind = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())
    return PATHS.get(kind, {"portable": ()})


def file_of(path: str, folder: Path = FOLDER) -> Path:
    """Where the library of a path lies."""
    return folder / f"libmoerunner_{path}.so"


def compiler() -> str | None:
    """The C++ compiler, if there is one."""
    named = os.environ.get("CXX", "").split()
    return next((found for name in (*named[:1], "g++", "clang++", "c++") if (found := shutil.which(name))), None)


def compile_path(path: str, target: Path, extra: Sequence[str] = ()) -> str:
    """Compiles one library. Returns the reason why it could not, or nothing."""
    cxx = compiler()
    if cxx is None:
        return "no C++ compiler was found"
    command = [cxx, *_FLAGS, *paths()[path], *extra, *(str(FOLDER / name) for name in SOURCES), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return ""
    first = next((line for line in done.stderr.splitlines() if "error" in line), f"it exited with {done.returncode}")
    return f"{Path(cxx).name} could not compile it: {first.removeprefix(str(FOLDER) + os.sep)}"


def build(folder: Path = FOLDER) -> dict[str, str]:
    """Compiles every path of this machine into the folder and records what came of it. Returns the reasons of those missing."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in paths():
        file_of(path, folder).unlink(missing_ok=True)
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        reasons = dict(zip(paths(), pool.map(lambda path: compile_path(path, file_of(path, folder)), paths()), strict=True))
    missing = {path: reason for path, reason in reasons.items() if reason}
    (folder / RECORD).write_text(json.dumps({"compiler": _version(), "sources": digest(), "missing": missing}, indent=1) + "\n")
    return missing


def digest() -> str:
    """Of all that libraries are made from: one that was built from other sources would misread what it is called with."""
    files = sorted(FOLDER.glob("*.h")) + [FOLDER / name for name in (*SOURCES, Path(__file__).name)]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def _version() -> str | None:
    cxx = compiler()
    if cxx is None:
        return None
    return subprocess.run([cxx, "--version"], capture_output=True, text=True, check=False).stdout.partition("\n")[0] or cxx


if __name__ == "__main__":
    missing = build()
    for path in paths():
        print(f"{path}: {missing.get(path, 'built')}")
    sys.exit(1 if len(missing) == len(paths()) else 0)
