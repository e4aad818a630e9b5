"""Products with a matrix whose weights are read once, in native code: a linear layer for few tokens.

On a processor without instructions for half precision PyTorch's products of two tokens and more in it take several times as
long as reading the weights; float16 ones, for fear of large sums, go through a copy of the weights in float32.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from moerunner.kernels.cpu import library
from moerunner.kernels.operators import operator

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
AT_ONCE = 64  # tokens of a call, whose sums stay in the second cache
PATHS = ("avx2",)  # where it was measured beside PyTorch's
HALF = (torch.bfloat16, torch.float16)


def worthwhile() -> bool:
    """Whether weights in half precision are multiplied faster here than by PyTorch, for two tokens and more."""
    return library.chosen()[0] in PATHS


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, path: str = "") -> Tensor:
    """`product`, rounded once to x's dtype."""
    return product(x, weight, bias, path=path).to(x.dtype)


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, path: str = "") -> Tensor:
    """x weight^T + bias, [..., N] in float32.

    x: [..., K], float32 or weight's dtype. weight: [N, K], bias: [N], both in one of `DTYPES`. path: of the native code; by
    default that of this machine.

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
            *x_tK.shape, weight.shape[0], x_tK.stride(0), weight.stride(0), DTYPES[x.dtype], DTYPES[weight.dtype],
            torch.get_num_threads(), library.torch_threads(),
        )  # fmt: skip
        if library.load(path or library.chosen()[0]).moerunner_linear(ctypes.byref(call)):
            raise MemoryError("no memory for the rows of a linear layer")
    return out.view(*x.shape[:-1], weight.shape[0])


def _fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=torch.float32)


@operator("cpu_product", device="CPU", fake=_fake)
def cpu_product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`product` as an operator."""
    return product(x, weight, bias)
