"""In which precision the layer computes: sums and non-linear functions in float32 at least, products in the layer's dtype."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moerunner.kernels.cpu.linear import AT_ONCE, HALF, cpu_product

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""x [T, in], weight [out, in], bias [out] or None -> [T, out]."""

_BLOCK = 64


def wide(x: Tensor) -> Tensor:
    """x in the dtype that sums and non-linear functions are computed in: float32, or float64 for float64."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b in x's dtype. float16 on a CPU, which has no fast path there, gives float32, so that nothing overflows."""
    if x.dtype == torch.float16 and x.device.type == "cpu":
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def linear_in_native_code(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` on a CPU that leaves float32 sums of up to 64 tokens as they are; one token in bfloat16 is PyTorch's.

    x: float32, or the dtype of the weights.
    """
    plain = weight.dtype not in HALF or weight.stride(1) != 1 or x.dtype not in (weight.dtype, torch.float32)
    other = bias is not None and bias.dtype != weight.dtype
    if plain or other or not 0 < len(x) <= AT_ONCE or (len(x) == 1 and x.dtype == torch.bfloat16):
        return linear(x, weight, bias)
    return cpu_product(x, weight, bias)


def linear_by_blocks(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` of a [T, in] in products of 64 rows each, so that a row's bits do not depend on how many others there are.

    Libraries choose the order of sums by the number of rows; the last block is filled up with zeros.
    """
    padded = F.pad(x, (0, 0, 0, -len(x) % _BLOCK))
    parts = [linear(part, weight, bias) for part in padded.split(_BLOCK)]
    return torch.cat(parts)[: len(x)]
