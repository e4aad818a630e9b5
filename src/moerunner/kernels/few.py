"""The experts for a handful of tokens: no sort, no tiles of tokens, every program reads a few whole rows of weights.

Time is the reading of the weights of the chosen experts, so programs are cut along the weights' rows, loads are as wide as they
can be, and products are plain multiplications that are summed once at the end. `few_down` owns a piece of the output and adds a
token's experts itself, in slot order; `few_down_each` takes one expert after the other, so that a number of experts that is no
power of two, or a width that its blocks do not divide, wastes less.

Shape suffixes: T tokens, K chosen experts, S = T * K slots, H hidden, I intermediate.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moerunner.kernels.activation import act, gate_by
from moerunner.kernels.addend import addend
from moerunner.kernels.common import lead, prefetch


@triton.jit
def two_products(
    x_H, g_N, u_N, hidden, stride_x, stride_g, stride_u, GATED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """x with BLOCK_N rows of the gate's weight and as many of the up weight, pointers to which are given; ungated, with g's.

    Fit for reading x before a wait, see `lead`.
    """
    g = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    u = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for start in range(0, hidden, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        rest = k < hidden
        x = tl.load(x_H + k * stride_x, mask=rest, other=0.0, cache_modifier=".cg").to(tl.float32)[None, :]
        k = k.to(tl.int64)[None, :]
        g += x * tl.load(g_N[:, None] + k * stride_g, mask=rest[None, :], other=0.0).to(tl.float32)
        if GATED:
            u += x * tl.load(u_N[:, None] + k * stride_u, mask=rest[None, :], other=0.0).to(tl.float32)
    return tl.sum(g, 1), tl.sum(u, 1)


@triton.jit
def few_gate_up(
    x_TH,
    ids_S,
    w13,
    b13,
    weights_S,
    h_SI,
    K,
    E,
    hidden,
    inter,
    stride_xt,
    stride_xh,
    stride_we,
    stride_wn,
    stride_wh,
    stride_be,
    stride_bn,
    INPUT_WEIGHTING: tl.constexpr,
    GATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    KIND: tl.constexpr,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    LIMIT: tl.constexpr,
    CLAMP_AFTER: tl.constexpr,
    GATE_SOFTCAP: tl.constexpr,
    UP_SOFTCAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_N columns of h[s] = act(x[token of s] w13[e]^T + b13[e])."""
    lead(PDL)
    slot = tl.program_id(1)
    expert = tl.load(ids_S + slot).to(tl.int64)
    if (expert < 0) | (expert >= E):
        return
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < inter
    safe = tl.where(inside, column, 0).to(tl.int64)
    if GATED:
        g_row, u_row = (2 * safe, 2 * safe + 1) if INTERLEAVED else (safe, safe + inter)
    else:
        g_row, u_row = safe, safe
    w13 += expert * stride_we
    x_TH += (slot // K).to(tl.int64) * stride_xt
    g_N, u_N = two_products(
        x_TH, w13 + g_row * stride_wn, w13 + u_row * stride_wn, hidden, stride_xh, stride_wh, stride_wh, GATED, BLOCK_N, BLOCK_K
    )  # fmt: skip
    if INPUT_WEIGHTING:
        weight = tl.load(weights_S + slot)
        g_N, u_N = g_N * weight, u_N * weight
    if b13 is not None:
        b13 += expert * stride_be
        g_N += tl.load(b13 + g_row * stride_bn).to(tl.float32)
        u_N += tl.load(b13 + u_row * stride_bn).to(tl.float32)
    y = act(g_N, KIND, ALPHA, LIMIT, CLAMP_AFTER, GATE_SOFTCAP)
    if GATED:
        y = gate_by(y, u_N, BETA, LIMIT, UP_SOFTCAP)
    tl.store(h_SI + slot.to(tl.int64) * inter + column, y.to(h_SI.dtype.element_ty), mask=inside)


@triton.jit
def few_down(
    h_SI,
    ids_S,
    w2,
    b2,
    weights_S,
    shared,
    shared_down,
    share_T,
    out,
    K,
    E,
    hidden,
    inter,
    shared_width,
    scale,
    stride_we,
    stride_wh,
    stride_wi,
    stride_be,
    stride_bh,
    stride_sh,
    stride_ss,
    WEIGHTED: tl.constexpr,
    SUMMED: tl.constexpr,
    KP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_N features of a token: its K experts at once, one product per slot, then their weighted sum (or the K rows).

    out: [T, H] for SUMMED, else [T, K, H], where slots without an expert become 0. KP: K rounded up to a power of two.
    AHEAD: rows of the weights, each of AHEAD runs of 128 bytes (the last ones may repeat), are fetched into the cache while
    `few_gate_up` still runs; 0 for none. Ids and weights are older than it, and so is shared, see `addend`, added to sums.
    """
    if PDL:
        gdc_launch_dependents()
    token = tl.program_id(1)
    k = tl.arange(0, KP)
    slot = token * K + k
    expert = tl.load(ids_S + slot, mask=k < K, other=-1, cache_modifier=".cg").to(tl.int64)
    taken = (expert >= 0) & (expert < E)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < hidden
    w_row = tl.where(inside, column, 0).to(tl.int64)
    w_ptr = w2 + tl.where(taken, expert, 0)[:, None] * stride_we + w_row[None, :] * stride_wh
    if shared is not None:
        more = addend(
            shared, shared_down, share_T, token, column, inside, shared_width, stride_sh, stride_ss, BLOCK_N, BLOCK_K
        )  # fmt: skip
    if PDL:
        if AHEAD > 0:
            run = tl.arange(0, AHEAD) * (128 // (w2.dtype.element_ty.primitive_bitwidth // 8))
            prefetch(w_ptr[:, :, None] + tl.minimum(run, inter - 1).to(tl.int64)[None, None, :] * stride_wi)
        gdc_wait()
    h_ptr = h_SI + slot.to(tl.int64) * inter
    acc = tl.zeros([KP, BLOCK_N, BLOCK_K], tl.float32)
    for start in range(0, inter, BLOCK_K):
        i = start + tl.arange(0, BLOCK_K)
        rest = taken[:, None] & (i < inter)[None, :]
        h = tl.load(h_ptr[:, None] + i[None, :], mask=rest, other=0.0).to(tl.float32)
        at = i.to(tl.int64)[None, None, :] * stride_wi
        acc += h[:, None, :] * tl.load(w_ptr[:, :, None] + at, mask=rest[:, None, :], other=0.0).to(tl.float32)
    y = tl.sum(acc, 2)
    if b2 is not None:
        b_ptr = b2 + tl.where(taken, expert, 0)[:, None] * stride_be + w_row[None, :] * stride_bh
        y += tl.load(b_ptr, mask=taken[:, None], other=0.0).to(tl.float32)
    if WEIGHTED:
        y *= tl.load(weights_S + slot, mask=taken, other=0.0)[:, None]
    if SUMMED:
        total = tl.sum(y, 0) * scale
        if shared is not None:
            total += more
        tl.store(out + token.to(tl.int64) * hidden + column, total.to(out.dtype.element_ty), mask=inside)
    else:
        at = slot.to(tl.int64)[:, None] * hidden + column[None, :]
        tl.store(out + at, y.to(out.dtype.element_ty), mask=(k < K)[:, None] & inside[None, :])


@triton.jit
def few_down_each(
    h_SI,
    ids_S,
    w2,
    b2,
    weights_S,
    shared,
    shared_down,
    share_T,
    out,
    E,
    hidden,
    inter,
    shared_width,
    scale,
    stride_we,
    stride_wh,
    stride_wi,
    stride_be,
    stride_bh,
    stride_sh,
    stride_ss,
    WEIGHTED: tl.constexpr,
    K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_N features of a token, [T, H]: the weighted products of its K experts in one sum, which is reduced once.

    shared: see `addend`; it is older than `few_gate_up`.
    """
    if PDL:
        gdc_launch_dependents()
    token = tl.program_id(1)
    column = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < hidden
    w_row = tl.where(inside, column, 0).to(tl.int64)
    if shared is not None:
        more = addend(
            shared, shared_down, share_T, token, column, inside, shared_width, stride_sh, stride_ss, BLOCK_N, BLOCK_K
        )  # fmt: skip
    if PDL:
        gdc_wait()
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    bias = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, inter, BLOCK_K):
        i = start + tl.arange(0, BLOCK_K)
        at = w_row[:, None] * stride_wh + i.to(tl.int64)[None, :] * stride_wi
        for k in tl.static_range(K):  # unrolled: the loads of all experts are under way together
            slot = token.to(tl.int64) * K + k
            expert = tl.load(ids_S + slot).to(tl.int64)
            taken = (expert >= 0) & (expert < E)
            safe, weight = tl.where(taken, expert, 0), 1.0
            if WEIGHTED:
                weight = tl.load(weights_S + slot, mask=taken, other=0.0)
            rest = taken & (i < inter)
            h = tl.load(h_SI + slot * inter + i, mask=rest, other=0.0).to(tl.float32) * weight
            acc += h[None, :] * tl.load(w2 + safe * stride_we + at, mask=rest[None, :], other=0.0).to(tl.float32)
            if b2 is not None:
                once = inside & taken & (start == 0)
                bias += tl.load(b2 + safe * stride_be + w_row * stride_bh, mask=once, other=0.0).to(tl.float32) * weight
    total = (tl.sum(acc, 1) + bias) * scale
    if shared is not None:
        total += more
    tl.store(out + token.to(tl.int64) * hidden + column, total.to(out.dtype.element_ty), mask=inside)
