"""What stands between an expert's two products, and RMSNorm. Computed in float32, or float64 for float64 inputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moerunner.ops.precision import wide
from moerunner.spec import ActivationSpec, RMSNorm


def activate(h: Tensor, activation: ActivationSpec, *, gate_up: str) -> Tensor:
    """act(gate) * (up + beta), or act(h) when nothing gates.

    h: [..., 2I], gate and up one after the other (`concat`) or alternating (`interleaved`); [..., I] for `none`.
    Returns [..., I] in h's dtype. Formulas: `ActivationSpec`.
    """
    if gate_up == "none":
        return gated(h, None, activation)
    if gate_up == "concat":
        gate, up = h.chunk(2, dim=-1)
        return gated(gate, up, activation)
    return gated(h[..., 0::2], h[..., 1::2], activation)


def gated(gate: Tensor, up: Tensor | None, activation: ActivationSpec) -> Tensor:
    """The same for halves that are apart; `up` is None where nothing gates."""
    a, g = activation.resolved(), wide(gate)
    if a.limit is not None and not a.clamp_after:
        g = g.clamp(max=a.limit)
    y = _nonlinear(g, a)
    if a.limit is not None and a.clamp_after:
        y = y.clamp(max=a.limit)
    if up is not None:
        u = wide(up)
        if a.limit is not None:
            u = u.clamp(-a.limit, a.limit)
        if a.up_softcap is not None:
            u = a.up_softcap * torch.tanh(u / a.up_softcap)
        y = y * (u + a.beta) if a.beta else y * u
    return y.to(gate.dtype)


def _nonlinear(g: Tensor, a: ActivationSpec) -> Tensor:
    if a.kind == "silu":
        if a.gate_softcap is None and a.alpha == 1.0:
            return F.silu(g)
        head = g if a.gate_softcap is None else a.gate_softcap * torch.tanh(g / a.gate_softcap)
        return head * torch.sigmoid(g if a.alpha is None else a.alpha * g)
    if a.kind == "gelu":
        return F.gelu(g)
    if a.kind == "gelu_tanh":
        return F.gelu(g, approximate="tanh")
    return F.relu(g) if a.kind == "relu" else F.relu(g).square()


def rms_norm(x: Tensor, weight: Tensor | None, norm: RMSNorm) -> Tensor:
    """RMSNorm over the last dimension, in x's dtype. Formulas: `RMSNorm`."""
    h = wide(x)
    factor = None if weight is None else weight.to(h.dtype)
    if factor is not None and norm.centred:
        factor = factor + 1
    if factor is not None and norm.weight_first:
        h = h * factor
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + norm.eps)
    return (h if factor is None or norm.weight_first else h * factor).to(x.dtype)
