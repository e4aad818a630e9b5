"""Few tokens: the router's launch also has the first product of the shared experts, for which the GPU would else wait.

One program chooses a token's experts and all others read weights meanwhile: the custom op `moerunner::route_beside`.

Shape suffixes: T tokens, H hidden, S intermediate of the shared experts.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moerunner.kernels import routing
from moerunner.kernels.activation import act, gate_by
from moerunner.kernels.common import blocks, computable, power_of_2
from moerunner.kernels.few import two_products
from moerunner.kernels.operators import numbers_of, operator
from moerunner.kernels.route import Beside, decide, routed, run, sigmoid
from moerunner.spec import ActivationSpec
from moerunner.values import TopK


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["logits"])
def _route_beside(
    x_TH, gate_proj_SH, up_proj_SH, shared_gate_H, h_TS, share_T, hidden, width, stride_xt, stride_xh, stride_gs, stride_gh,
    stride_us, stride_uh, stride_h,
    logits, selection_bias, per_expert_scale, global_scale, hash_table, input_ids, token_types, ids_TK, weights_TK, shared_TS,
    T, stride_t, stride_e, E: tl.constexpr, K: tl.constexpr, S: tl.constexpr, SCORE: tl.constexpr, BY_LOGIT: tl.constexpr,
    LOGIT_SCALE: tl.constexpr, SOFTCAP: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, BEST_TWO: tl.constexpr,
    FILL: tl.constexpr, RENORMALISE: tl.constexpr, EPS: tl.constexpr, P: tl.constexpr, JITTER: tl.constexpr,
    SETS: tl.constexpr, FACTOR: tl.constexpr, GP: tl.constexpr, MP: tl.constexpr, KP: tl.constexpr, SP: tl.constexpr,
    ROWS: tl.constexpr,
    GATED: tl.constexpr, KIND: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr, LIMIT: tl.constexpr,
    CLAMP_AFTER: tl.constexpr, GATE_SOFTCAP: tl.constexpr, UP_SOFTCAP: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`decide` in the first T programs, one for each token. The others meanwhile read the weights of shared experts: BLOCK_N
    columns of h = act(x gate_proj^T) * (x up_proj^T), and, last of a token's, share = sigmoid(x . shared_gate).

    They read nothing of the gate's kernel, so they do not wait for it, see `lead`.
    """
    program = tl.program_id(0)
    if PDL:
        gdc_launch_dependents()
    if program < T:
        if PDL:
            gdc_wait()
        decide(
            program,
            logits, selection_bias, per_expert_scale, global_scale, hash_table, input_ids, token_types, ids_TK, weights_TK,
            shared_TS, T, stride_t, stride_e, E, K, S, SCORE, BY_LOGIT, LOGIT_SCALE, SOFTCAP, GROUPS, KEPT, BEST_TWO, FILL,
            RENORMALISE, EPS, P, JITTER, SETS, FACTOR, GP, MP, KP, SP, ROWS,
        )  # fmt: skip
    else:
        of_width = tl.cdiv(width, BLOCK_N)
        each = of_width
        if shared_gate_H is not None:
            each += 1
        token = ((program - T) // each).to(tl.int64)
        place = (program - T) % each
        x_H = x_TH + token * stride_xt
        if place < of_width:
            column = place * BLOCK_N + tl.arange(0, BLOCK_N)
            row = tl.where(column < width, column, 0).to(tl.int64)
            g, u = two_products(
                x_H, gate_proj_SH + row * stride_gs, up_proj_SH + row * stride_us, hidden, stride_xh, stride_gh, stride_uh,
                GATED, BLOCK_N, BLOCK_K,
            )  # fmt: skip
            y = act(g, KIND, ALPHA, LIMIT, CLAMP_AFTER, GATE_SOFTCAP)
            if GATED:
                y = gate_by(y, u, BETA, LIMIT, UP_SOFTCAP)
            tl.store(h_TS + token * width + column, y.to(h_TS.dtype.element_ty), mask=column < width)
        elif shared_gate_H is not None:
            zero = tl.zeros([1], tl.int64)
            gate = shared_gate_H + zero
            z, _ = two_products(x_H, gate, gate, hidden, stride_xh, stride_h, 0, False, 1, BLOCK_K)
            tl.store(share_T + token + zero, sigmoid(z))


_WARPS, _COLUMNS, _FEATURES = 4, 2, 2048
"""Warps, columns and features that a program of shared experts takes at once, as measured on an H200."""


_ROUTE = torch.library.infer_schema(routed, mutates_args=())[1:].replace("=False", "")  # what has a default is not passed on
_SCHEMA = (
    "(Tensor shared_x, Tensor gate_proj, Tensor? up_proj, Tensor? shared_gate, int kind, float alpha, float beta, "
    "float? limit, bool clamp_after, float? gate_softcap, float? up_softcap, "
    + _ROUTE.replace(") -> (", ") -> (Tensor, Tensor, ")
)


def _fake(shared_x: Tensor, gate_proj: Tensor, up: Tensor | None, shared_gate: Tensor | None, *rest: Any) -> Any:
    h, share = _empty(shared_x, gate_proj, shared_gate)
    return h, share, *routing.fake(*rest[7:])


def _empty(x: Tensor, gate_proj: Tensor, shared_gate: Tensor | None) -> tuple[Tensor, Tensor]:
    share = torch.empty(0 if shared_gate is None else x.shape[0], dtype=torch.float32, device=x.device)
    return x.new_empty(x.shape[0], gate_proj.shape[0]), share


@operator("route_beside", fake=_fake, schema=_SCHEMA)
def triton_route_beside(
    shared_x: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor | None,
    shared_gate: Tensor | None,
    kind: int,
    alpha: float,
    beta: float,
    limit: float | None,
    clamp_after: bool,
    gate_softcap: float | None,
    up_softcap: float | None,
    x: Tensor,
    gate: Tensor,
    gate_bias: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    """`route` from few tokens and the gate, and meanwhile what shared experts hand to their down product.

    Args:
        shared_x: [T, H], what they read. gate_proj, up_proj: [S, H], without up_proj they are ungated. shared_gate: [1, H].
        kind and so on: their activation, as in `triton_experts`. x, gate, gate_bias, rest: of `route`.

    Returns:
        h [T, S] in shared_x's dtype; share [T] float32, sigmoid(shared_x . shared_gate), empty without; and route's results.
    """
    x_TH, first, second, own = (computable(t) for t in (shared_x, gate_proj, up_proj, shared_gate))
    assert x_TH is not None
    assert first is not None
    second = first if second is None else second
    width, hidden = first.shape
    h, share = _empty(x_TH, first, own)
    operands = (
        x_TH, first, second, own, h, share, hidden, width, *x_TH.stride(), *first.stride(), *second.stride(),
        0 if own is None else own.stride(1),
    )  # fmt: skip
    activation = (up_proj is not None, kind, alpha, beta, limit, clamp_after, gate_softcap, up_softcap)
    numbers = (*activation, _COLUMNS, min(_FEATURES, power_of_2(hidden)))
    beside = Beside(_route_beside, _WARPS, blocks(width, _COLUMNS) + (own is not None), operands, numbers)
    learned, (experts, top_k, *rule, rounded) = rest[:6], rest[6:]
    found = run(x, gate, gate_bias, learned, experts, top_k, tuple(rule), rounded, beside)
    return h.to(shared_x.dtype), share, *found


def route_beside(
    shared_x: Tensor,
    gate_proj: Tensor,
    up_proj: Tensor | None,
    shared_gate: Tensor | None,
    activation: ActivationSpec,
    *args: Any,
    scale: bool = False,
    **rest: Any,
) -> tuple[TopK, Tensor, Tensor | None]:
    """`route`, with h and share of `triton_route_beside`."""
    own = (shared_x, gate_proj, up_proj, shared_gate, *numbers_of(activation))
    h, share, *found = triton_route_beside(*own, *routing.arguments(*args, scale=scale, **rest))
    return routing.topk_of(*found, scale=scale), h, None if shared_gate is None else share
