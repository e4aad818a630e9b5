"""What stands between and beside the products of shared experts on a GPU, one launch each, for any number of tokens.

Shape suffixes: T tokens, H hidden, S intermediate of the shared experts.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moerunner.kernels.activation import act, gate_by
from moerunner.kernels.common import blocks, computable, follow, launch, power_of_2
from moerunner.kernels.operators import numbers_of, operator
from moerunner.spec import ActivationSpec


@triton.jit
def _activation(
    g_TS, u_TS, h_TS, width, stride_g, stride_u, GATED: tl.constexpr, KIND: tl.constexpr, ALPHA: tl.constexpr,
    BETA: tl.constexpr, LIMIT: tl.constexpr, CLAMP_AFTER: tl.constexpr, GATE_SOFTCAP: tl.constexpr, UP_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """h = act(g) * u, BLOCK columns of a token."""
    follow(PDL)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    y = tl.load(g_TS + token * stride_g + column, mask=inside, other=0.0).to(tl.float32)
    y = act(y, KIND, ALPHA, LIMIT, CLAMP_AFTER, GATE_SOFTCAP)
    if GATED:
        u = tl.load(u_TS + token * stride_u + column, mask=inside, other=0.0).to(tl.float32)
        y = gate_by(y, u, BETA, LIMIT, UP_SOFTCAP)
    tl.store(h_TS + token * width + column, y.to(h_TS.dtype.element_ty), mask=inside)


@triton.jit
def _share(x_TH, gate_H, share_T, hidden, stride_xt, stride_xh, stride_h, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """share = sigmoid(x . gate) of a token."""
    follow(PDL)
    token = tl.program_id(0).to(tl.int64)
    acc = tl.zeros([BLOCK], tl.float32)
    for start in range(0, hidden, BLOCK):
        h = start + tl.arange(0, BLOCK)
        x = tl.load(x_TH + token * stride_xt + h.to(tl.int64) * stride_xh, mask=h < hidden, other=0.0).to(tl.float32)
        acc += x * tl.load(gate_H + h.to(tl.int64) * stride_h, mask=h < hidden, other=0.0).to(tl.float32)
    tl.store(share_T + token, tl.sigmoid(tl.sum(acc, 0)))


def _rows(g: Tensor, *rest: Any) -> Tensor:
    return torch.empty(g.shape, dtype=g.dtype, device=g.device)


@operator("gated", fake=_rows)
def triton_gated(
    g: Tensor,
    u: Tensor | None,
    kind: int,
    alpha: float,
    beta: float,
    limit: float | None,
    clamp_after: bool,
    gate_softcap: float | None,
    up_softcap: float | None,
) -> Tensor:
    """act(g) * (u + beta) in float32, [T, S], rounded to g's dtype; act(g) without u. Constants as in `triton_experts`."""
    g_TS, u_TS = computable(g), computable(u)
    assert g_TS is not None
    g_TS = g_TS if g_TS.stride(1) == 1 else g_TS.contiguous()
    u_TS = u_TS if u_TS is None or u_TS.stride(1) == 1 else u_TS.contiguous()
    (tokens, width), h = g_TS.shape, _rows(g_TS)
    block = min(1024, power_of_2(width))
    if tokens:
        launch(
            _activation, (tokens, blocks(width, block)),
            g_TS, u_TS, h, width, g_TS.stride(0), 0 if u_TS is None else u_TS.stride(0), u_TS is not None,
            kind, alpha, beta, limit, clamp_after, gate_softcap, up_softcap, block,
            device=g.device, warps=max(1, block // 256),
        )  # fmt: skip
    return h.to(g.dtype)


def _of_tokens(x: Tensor, gate: Tensor) -> Tensor:
    return torch.empty(x.shape[0], dtype=torch.float32, device=x.device)


@operator("share", fake=_of_tokens)
def triton_share(x: Tensor, gate: Tensor) -> Tensor:
    """sigmoid(x . gate) in float32, [T], of x [T, H] and gate [1, H] in any strides and dtypes."""
    x_TH, gate_H, share = computable(x), computable(gate), _of_tokens(x, gate)
    assert x_TH is not None
    assert gate_H is not None
    tokens, hidden = x_TH.shape
    if tokens:
        launch(
            _share, (tokens,), x_TH, gate_H, share, hidden, *x_TH.stride(), gate_H.stride(1), min(2048, power_of_2(hidden)),
            device=x.device, warps=4,
        )  # fmt: skip
    return share


def gated(gate: Tensor, up: Tensor | None, activation: ActivationSpec) -> Tensor:
    """`ops.activation.gated` for [T, S]."""
    return triton_gated(gate, up, *numbers_of(activation))
