"""In which precision the layer computes: sums and non-linear functions in float32 at least, products in the layer's dtype."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

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


def linear_by_blocks(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` of a [T, in] in products of 64 rows each, so that a row's bits do not depend on how many others there are.

    Libraries choose the order of sums by the number of rows; the last block is filled up with zeros.
    """
    padded = F.pad(x, (0, 0, 0, -len(x) % _BLOCK))
    parts = [linear(part, weight, bias) for part in padded.split(_BLOCK)]
    return torch.cat(parts)[: len(x)]
