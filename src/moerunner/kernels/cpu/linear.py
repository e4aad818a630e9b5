"""Products with a matrix whose weights are read once, in native code: a linear layer for few tokens."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from moerunner.kernels.cpu import library

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
AT_ONCE = 64  # tokens of a call, whose sums stay in the second cache


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, path: str = "") -> Tensor:
    """x weight^T + bias, summed in float32 and rounded once, [..., N] in x's dtype.

    x: [..., K]. weight: [N, K], bias: [N], both in x's dtype, one of `DTYPES`. path: of the native code; that of this machine.

    Raises:
        MemoryError: for the rows that it works on.
    """
    x_TK = x.reshape(-1, x.shape[-1])
    x_TK = x_TK if x_TK.stride(1) == 1 else x_TK.contiguous()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    bias = None if bias is None else bias.contiguous()
    out = torch.empty(x_TK.shape[0], weight.shape[0], dtype=torch.float32)
    for x_tK, out_tN in zip(x_TK.split(AT_ONCE), out.split(AT_ONCE), strict=True) if out.numel() else ():
        call = library.LinearCall(
            x_tK.data_ptr(), weight.data_ptr(), None if bias is None else bias.data_ptr(), out_tN.data_ptr(),
            *x_tK.shape, weight.shape[0], x_tK.stride(0), weight.stride(0), DTYPES[x.dtype],
            torch.get_num_threads(), library.torch_threads(),
        )  # fmt: skip
        if library.load(path or library.chosen()[0]).moerunner_linear(ctypes.byref(call)):
            raise MemoryError("no memory for the rows of a linear layer")
    return out.to(x.dtype).view(*x.shape[:-1], weight.shape[0])
