"""What every Triton launch needs: whether kernels are interpreted, and launches that overlap their predecessor's end."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def _probe():
    pass


INTERPRETING = not isinstance(_probe, triton.JITFunction)
"""Whether TRITON_INTERPRET was set when the kernels of this process were decorated."""


@triton.jit
def follow(PDL: tl.constexpr):
    """First statement of a dependent kernel: lets the next one start, then waits for the results of the one before.

    With programmatic dependent launch a kernel's programs start while its predecessor still runs, which hides the launch.
    Every kernel of a chain must call this, also those that read nothing of it: its successor relies on the order.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


def overlap(device: torch.device, *, first: bool = False) -> dict[str, Any]:
    """Launch arguments for kernels with a `PDL` parameter. first: the kernel follows none of ours and starts plainly."""
    if INTERPRETING:
        return {"PDL": False}
    able = _hopper(device)
    return {"PDL": able, "launch_pdl": able and not first}


def has_tma(device: torch.device) -> bool:
    """Whether kernels may read through tensor descriptors, which the interpreter can as well."""
    return INTERPRETING or _hopper(device)


@functools.cache
def _hopper(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9


def computable(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor as kernels can compute with it. The interpreter's bfloat16 arithmetic and rounding are wrong: float32 there."""
    if tensor is not None and INTERPRETING and tensor.dtype == torch.bfloat16:
        return tensor.float()
    return tensor
