"""Kernels in CUDA C++: compiled by NVRTC on first use, in a second or two, kept in the user's cache.

PyTorch's CUDA builds bring NVRTC and cuda-bindings. There is no interpreter for these kernels: whoever has one also has
something in Triton that serves where `why_not` gives a reason.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib
import re
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from moerunner.kernels.common import INTERPRETING, cache_folder, current, write_whole

_FOLDER = Path(__file__).parent
_thread = threading.local()


@functools.cache
def why_not(device: torch.device) -> str:
    """Nothing if kernels in CUDA C++ run on this device, else the reason."""
    if INTERPRETING or torch.version.hip is not None or device.type != "cuda":
        return "it runs on NVIDIA GPUs only"
    try:
        with current(device):  # a small kernel tells whether this compiler and this driver go together
            _enter(device)
            _loaded(device, "order.cu", "count_experts", ("ID=int",), 0)
    except ImportError as error:
        return (
            f"the package cuda-bindings is missing ({error}); PyTorch's CUDA builds bring it, else: pip install cuda-bindings"
        )
    except RuntimeError as error:
        return f"kernels in CUDA C++ cannot be compiled or loaded: {error}"
    return ""


def launch(
    name: str,
    grid: int,
    threads: int,
    *args: Any,
    device: torch.device,
    file: str,
    defines: Sequence[str] = (),
    shared: int = 0,
) -> None:
    """Runs a kernel of `file` once. args: ctypes values, or objects of cuda-bindings that hold what is passed.

    Raises RuntimeError if CUDA or its compiler refuses.
    """
    driver, _ = bindings()
    addresses = [ctypes.addressof(a) if isinstance(a, ctypes.Structure | ctypes._SimpleCData) else a.getPtr() for a in args]
    pointers = (ctypes.c_void_p * len(args))(*addresses)
    with current(device):
        _enter(device)
        kernel = _loaded(device, file, name, tuple(defines), shared)
        stream = torch.cuda.current_stream(device).cuda_stream
        checked(
            driver.cuLaunchKernel(kernel, grid, 1, 1, threads, 1, 1, shared, stream, ctypes.addressof(pointers), 0),
            f"launch {name} of {file}",
        )


def compiled(file: str, arch: str, defines: Sequence[str]) -> bytes:
    """A file beside this one as machine code for arch (such as sm_90a), from the cache or by NVRTC. defines: such as "UP=1"."""
    _, nvrtc = bindings()
    version = ".".join(map(str, checked(nvrtc.nvrtcVersion(), "tell NVRTC's version")))
    options = [f"--gpu-architecture={arch}", "--std=c++17", *(f"-D{d}" for d in defines)]
    source = _source(file)
    name = hashlib.sha256(b"\0".join([source, version.encode(), *(o.encode() for o in options)])).hexdigest()
    kept = cache_folder("kernels") / f"{name}.cubin"
    try:
        return kept.read_bytes()
    except OSError:
        code = _compile(file, source, options)
    with contextlib.suppress(OSError):  # the next process compiles it again, where the cache cannot be written
        write_whole(kept, code)
    return code


def _source(file: str) -> bytes:
    """The file with those that it includes in it, so that a change of any is another source."""
    text = (_FOLDER / file).read_text()
    return re.sub(r'#include "(.+)"', lambda found: (_FOLDER / found[1]).read_text(), text).encode()


def _compile(file: str, source: bytes, options: list[str]) -> bytes:
    _, nvrtc = bindings()
    program = checked(nvrtc.nvrtcCreateProgram(source, file.encode(), 0, [], []), f"begin to compile {file}")
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            said = b" " * checked(nvrtc.nvrtcGetProgramLogSize(program), "give the compiler's log")
            checked(nvrtc.nvrtcGetProgramLog(program, said), "give the compiler's log")
            text = said.rstrip(bytes(1)).decode(errors="replace").strip()
            raise RuntimeError(f"{file} was not compiled ({status.name}): {text[:2000]}")
        code = b" " * checked(nvrtc.nvrtcGetCUBINSize(program), f"give the compiled {file}")
        checked(nvrtc.nvrtcGetCUBIN(program, code), f"give the compiled {file}")
        return code
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _enter(device: torch.device) -> None:
    """Gives this thread the context that PyTorch uses on the device, which is the current one; a new thread has none."""
    if getattr(_thread, "entered", False):
        return
    driver, _ = bindings()
    if not int(checked(driver.cuCtxGetCurrent(), "tell the context")):
        torch.cuda.init()
        index = torch.cuda.current_device()
        checked(driver.cuCtxSetCurrent(checked(driver.cuDevicePrimaryCtxRetain(index), "give the context")), "set the context")
    _thread.entered = True


@functools.cache
def _loaded(device: torch.device, file: str, name: str, defines: tuple[str, ...], shared: int) -> Any:
    """The kernel on this device, which is the current one, with so many bytes of dynamic shared memory."""
    driver, _ = bindings()
    major, minor = torch.cuda.get_device_capability(device)
    module = checked(driver.cuModuleLoadData(compiled(file, f"sm_{major}{minor}{'a' * (major >= 9)}", defines)), f"load {file}")
    kernel = checked(driver.cuModuleGetFunction(module, name.encode()), f"find {name} in {file}")
    most = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    checked(driver.cuFuncSetAttribute(kernel, most, shared), f"give {name} of {file} its shared memory")
    return kernel


@functools.cache
def bindings() -> tuple[Any, Any]:
    """(driver, nvrtc). Raises ImportError where cuda-bindings is not installed."""
    driver, nvrtc = (importlib.import_module(f"cuda.bindings.{name}") for name in ("driver", "nvrtc"))
    return driver, nvrtc


def checked(result: tuple[Any, ...], what: str) -> Any:
    """What a function of CUDA returned beside its status. Raises RuntimeError if that is an error."""
    status, *values = result
    if status.value != 0:
        raise RuntimeError(f"CUDA did not {what}: {status.name}")
    return values[0] if len(values) == 1 else values
