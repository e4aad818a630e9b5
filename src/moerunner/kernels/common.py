"""What every Triton launch needs: whether kernels are interpreted, and launches that overlap their predecessor's end."""

from __future__ import annotations

import functools
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor


@triton.jit
def _probe():
    pass


INTERPRETING = not isinstance(_probe, triton.JITFunction)
"""Whether TRITON_INTERPRET was set when the kernels of this process were decorated."""


@triton.jit
def follow(PDL: tl.constexpr):
    """First statement of a dependent kernel: lets the next one start, then waits for the results of the one before.

    With programmatic dependent launch a kernel's programs start while its predecessor still runs, which hides the launch.
    Some program of every kernel of a chain must wait, also if it reads nothing of the one before: its successor relies on the
    order. Kernels that do some work before call the two by hand, or `lead`.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@triton.jit
def lead(PDL: tl.constexpr):
    """`follow` for a kernel whose successor reads, before it waits, what is older than this one.

    The successor may start once all before this kernel is over. What it reads early must come from the L2 cache (`.cg`): a
    multiprocessor's own cache may be older than that.
    """
    if PDL:
        gdc_wait()
        gdc_launch_dependents()


@triton.jit
def in_eights(row, EIGHTS: tl.constexpr):
    """Rows of a weight, which lie side by side in eights if EIGHTS: what masks did to them, the compiler cannot see through."""
    if EIGHTS:
        return tl.max_contiguous(tl.multiple_of(row, 8), 8)
    else:
        return row


@triton.jit
def prefetch(pointer):
    """Has the L2 cache fetch the 128 bytes around each pointer; nothing waits for them."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [pointer.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


_ready: dict[tuple[Any, ...], Any] = {}
"""Compiled kernels by everything that Triton compiles them for; it takes 30 to 60 us to find one by itself, this takes 5."""
_MOST_READY = 4096
_NUMBERS = {int, float, bool, str, type(None)}


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Any,
    device: torch.device,
    warps: int,
    stages: int = 3,
    first: bool = False,
    exact: bool = False,
) -> None:
    """Runs a kernel that takes `PDL` last and waits for its predecessor, see `follow`.

    first: it starts plainly, when all before it is over. exact: it rounds as PyTorch's elementwise kernels do, so no product is
    contracted into a sum and no tiny value becomes 0.
    """
    if INTERPRETING:
        kernel[grid](*args, PDL=False, num_warps=warps, num_stages=stages)
        return
    key = (kernel.fn, device, warps, stages, first, exact, *[a if type(a) in _NUMBERS else _compiled_for(a) for a in args])
    pdl, found = _hopper(device), _ready.get(key)
    with current(device):
        if found is not None:
            found[(*grid, 1, 1)[:3]](*args, pdl)
            return
        extra = {"launch_pdl": not first} if pdl else {}
        if exact:
            extra |= {"enable_fp_fusion": False} | ({} if torch.version.hip else {"enable_reflect_ftz": False})
        made = kernel[grid](*args, PDL=pdl, num_warps=warps, num_stages=stages, **extra)
    if len(_ready) >= _MOST_READY:
        _ready.clear()
    if hasattr(made, "__getitem__"):  # nothing, or a promise, while Triton is told to compile otherwise
        _ready[key] = made


def _compiled_for(arg: Any) -> Any:
    """What of an argument decides which kernel is compiled; of a number it is the value, which is more than Triton looks at."""
    if isinstance(arg, torch.Tensor):
        return arg.dtype, arg.data_ptr() % 16 == 0, torch.version.hip and arg.untyped_storage().size() < 2**31
    if isinstance(arg, TensorDescriptor):
        return arg.base.dtype, *arg.block_shape
    return arg


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Inside, this GPU is the current one, where Triton launches: a model may be spread over several by `device_map`."""
    elsewhere = device.type == "cuda" and device.index not in (None, torch.cuda.current_device())
    return torch.cuda.device(device) if elsewhere else nullcontext()


def cache_folder(kind: str) -> Path:
    """Where what was compiled or measured on this machine is kept for the user."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "moerunner" / kind


def write_whole(path: Path, data: bytes) -> None:
    """Puts a file in its place in one step, so that no other process reads a part of it. Raises OSError where it cannot."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}")
    draft.write_bytes(data)
    draft.replace(path)


def blocks(count: int, size: int) -> int:
    """How many blocks of this size hold so many."""
    return -(-count // size)


def power_of_2(n: int) -> int:
    """The next one that is at least n."""
    return 1 << (n - 1).bit_length()


def has_tma(device: torch.device) -> bool:
    """Whether kernels may read through tensor descriptors, which the interpreter can as well."""
    return INTERPRETING or _hopper(device)


@functools.cache
def _hopper(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9


def computable(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor as kernels can compute with it: float32 for bfloat16 in the interpreter, whose arithmetic in it is wrong."""
    if tensor is not None and INTERPRETING and tensor.dtype == torch.bfloat16:
        return tensor.float()
    return tensor
