"""The activation between an expert's two products, in float32. Formulas: `ActivationSpec`."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _tanh(x):
    # 2 sigmoid(2x) - 1 cancels near 0, where the series is exact to float32.
    s = x * x
    near = x * (1.0 + s * (-1.0 / 3 + s * (2.0 / 15 + s * (-17.0 / 315 + s * (62.0 / 2835)))))
    return tl.where(tl.abs(x) < 0.3, near, 2.0 * tl.sigmoid(2.0 * x) - 1.0)


@triton.jit
def nonlinear(g, KIND: tl.constexpr, ALPHA: tl.constexpr, SOFTCAP: tl.constexpr):
    """act(g). KIND: index into `operators.KINDS`."""
    if KIND == 0:
        head = g
        if SOFTCAP is not None:
            head = SOFTCAP * _tanh(g / SOFTCAP)
        return head * tl.sigmoid(ALPHA * g)
    elif KIND == 1:
        return 0.5 * g * (1.0 + tl.erf(g * 0.7071067811865476))
    elif KIND == 2:
        return g * tl.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))
    positive = tl.where(g < 0, 0.0, g)
    return positive if KIND == 3 else positive * positive


@triton.jit
def _at_most(x, LIMIT: tl.constexpr):
    return tl.where(x > LIMIT, LIMIT, x)  # a select, so that NaN stays NaN


@triton.jit
def act(
    g,
    KIND: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    CLAMP_AFTER: tl.constexpr,
    GATE_SOFTCAP: tl.constexpr,
):
    """act(g) with the limit before or after it. LIMIT, GATE_SOFTCAP: None where there is none."""
    if LIMIT is not None:
        if CLAMP_AFTER:
            return _at_most(nonlinear(g, KIND, ALPHA, GATE_SOFTCAP), LIMIT)
        else:
            return nonlinear(_at_most(g, LIMIT), KIND, ALPHA, GATE_SOFTCAP)
    return nonlinear(g, KIND, ALPHA, GATE_SOFTCAP)


@triton.jit
def gate_by(y, u, BETA: tl.constexpr, LIMIT: tl.constexpr, UP_SOFTCAP: tl.constexpr):
    """y * (u + beta), u clamped to the limit and soft-capped."""
    if LIMIT is not None:
        u = -_at_most(-_at_most(u, LIMIT), LIMIT)
    if UP_SOFTCAP is not None:
        u = UP_SOFTCAP * _tanh(u / UP_SOFTCAP)
    return y * (u + BETA)
