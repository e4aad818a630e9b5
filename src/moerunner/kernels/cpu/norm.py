"""RMS norm of rows in native code: `kernels/norm.py` for CPUs, in float32 and bfloat16."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from moerunner.kernels.cpu import library

FORMS = {"weight * rounded": 0, "rounded(weight * x)": 1, "rounded((1 + weight) * x)": 2}
"""Where the normed row is rounded to the tokens' dtype, and what multiplies it."""

DTYPES = {torch.float32: 0, torch.bfloat16: 1}


def rms_norm(x: Tensor, weight: Tensor, eps: float, form: int, *, path: str = "") -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, in float32, times the weight; in x's dtype and shape.

    weight: [H], in x's dtype, one of `DTYPES`. form: of `FORMS`. path: of the native code; the one for this machine.
    """
    x_RH = x.reshape(-1, x.shape[-1])
    x_RH = x_RH if x_RH.stride(1) == 1 else x_RH.contiguous()
    weight, out = weight.contiguous(), torch.empty(x.shape, dtype=x.dtype)
    rows, width = x_RH.shape
    if rows:
        call = library.NormCall(
            x_RH.data_ptr(), weight.data_ptr(), out.data_ptr(), rows, width, x_RH.stride(0), DTYPES[x.dtype], form, eps,
            torch.get_num_threads(), library.torch_threads(),
        )  # fmt: skip
        library.load(path or library.chosen()[0]).moerunner_rms_norm(ctypes.byref(call))
    return out
