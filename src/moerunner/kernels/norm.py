"""RMS norm of rows in one launch, rounded where Transformers' own code rounds.

Shape suffixes: R rows, H width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moerunner.kernels.common import blocks, launch, power_of_2

_TILE = 2048  # numbers that one program holds at least: short rows share a program


@triton.jit
def _rms_norm(
    x_RH, weight_H, out_RH, R, H, stride, eps,
    FORM: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = tl.arange(0, BLOCK)
    here = (row < R)[:, None] & (at < H)[None, :]
    x = tl.load(x_RH + row.to(tl.int64)[:, None] * stride + at[None, :], mask=here, other=0.0).to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, 1) / H + eps)[:, None]
    weight = tl.load(weight_H + at, mask=at < H, other=0.0).to(tl.float32)
    if FORM == 0:
        y = y.to(out_RH.dtype.element_ty).to(tl.float32) * weight[None, :]
    elif FORM == 1:
        y = y * weight[None, :]
    else:
        y = y * (1.0 + weight)[None, :]
    tl.store(out_RH + row.to(tl.int64)[:, None] * H + at[None, :], y.to(out_RH.dtype.element_ty), mask=here)


def rms_norm(x: Tensor, weight: Tensor, eps: float, form: int) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dimension, in float32, times the weight; in x's dtype and shape.

    weight: [H], in x's dtype. form: of `cpu.norm.FORMS`.
    """
    x_RH = x.reshape(-1, x.shape[-1])
    x_RH = x_RH if x_RH.stride(1) == 1 else x_RH.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, width = x_RH.shape
    block = power_of_2(width)
    together = max(1, _TILE // block) if rows > 1024 else 1
    if rows:
        launch(
            _rms_norm, (blocks(rows, together),), x_RH, weight, out, rows, width, x_RH.stride(0), eps, form, together, block,
            device=x.device, warps=min(8, max(1, together * block // 512)), first=True,
        )  # fmt: skip
    return out
