"""The two products of the experts over tiles of rows in expert order, for many tokens.

`gate_up` gathers its rows from the tokens, so that no permuted copy of them exists, forms gate and up in one product and
applies the activation to the accumulator. `down` adds the bias and the routing weight in float32 and puts each row at its
slot, where a sum in fixed order finds it.

Shape suffixes: T tokens, K chosen experts, R = T * K rows in expert order, E experts, H hidden, I intermediate, N tiles.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moerunner.kernels.activation import act, gate_by
from moerunner.kernels.addend import addend
from moerunner.kernels.common import follow, in_eights

_HALVED = tl.constexpr(128)
"""A tile of so many rows of which an expert fills at most half is multiplied as half a tile; wgmma takes no fewer than 64."""


@triton.jit
def _tile(tiles_4N, N, columns, BLOCK_M: tl.constexpr):
    """(expert or -1, first row, end row, tile of columns) of this program.

    Experts come one after the other. Within one, up to 16 row tiles share a column tile of the weights, so that a weight is
    read from memory once and both operands stay in the cache.
    """
    pid = tl.program_id(0)
    some = tiles_4N + pid // columns  # a tile of this program's expert, though not always its own
    expert, first, start, end = tl.load(some), tl.load(some + N), tl.load(some + 2 * N), tl.load(some + 3 * N)
    place = pid - first * columns
    group = place // (16 * columns) * 16
    size = tl.maximum(tl.minimum(tl.cdiv(end - start, BLOCK_M) - group, 16), 1)  # 1: a tile without an expert holds no numbers
    within = place % (16 * columns)
    return expert, start + (group + within % size) * BLOCK_M, end, within // size


@triton.jit
def _gate_up_tile(
    expert, start_row, end_row, n, x_TH, w13, b13, weights_S, slot_R, h_RI, K, hidden, inter, stride_xt, stride_xh, stride_we,
    stride_wn, stride_wh, stride_be, stride_bn, INPUT_WEIGHTING: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    PAIRED: tl.constexpr, KIND: tl.constexpr, ALPHA: tl.constexpr, BETA: tl.constexpr, LIMIT: tl.constexpr,
    CLAMP_AFTER: tl.constexpr, GATE_SOFTCAP: tl.constexpr, UP_SOFTCAP: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WHOLE: tl.constexpr, TMA: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    WIDTH: tl.constexpr = BLOCK_N // 2 if GATED else BLOCK_N
    row = start_row + tl.arange(0, BLOCK_M)
    live = row < end_row
    slot = tl.load(slot_R + row, mask=live, other=0)

    j = tl.arange(0, BLOCK_N)
    if GATED:
        if PAIRED:
            column, half = n * WIDTH + j // 2, j % 2
        else:
            column, half = n * WIDTH + j % WIDTH, j // WIDTH
        if INTERLEAVED:
            w_row = 2 * column + half
            if PAIRED:
                w_row = n * BLOCK_N + j
        else:
            w_row = column + half * inter
    else:
        column = n * BLOCK_N + j
        w_row = column
    inside = column < inter
    w_row = in_eights(tl.where(inside, w_row, 0), TRANSPOSED)

    k = tl.arange(0, BLOCK_K)
    x_ptr = x_TH + (slot // K).to(tl.int64)[:, None] * stride_xt + k[None, :] * stride_xh
    if not TMA:
        w_ptr = w13 + expert.to(tl.int64) * stride_we + k[:, None] * stride_wh + w_row.to(tl.int64)[None, :] * stride_wn
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, hidden, BLOCK_K):
        rest = k < hidden - start
        if WHOLE:
            a = tl.load(x_ptr, mask=live[:, None], other=0.0)
        else:
            a = tl.load(x_ptr, mask=live[:, None] & rest[None, :], other=0.0)
        x_ptr += BLOCK_K * stride_xh
        if TMA and TRANSPOSED:
            if GATED and not PAIRED:
                b = tl.reshape(w13.load([expert, start, 0, n * WIDTH]), [BLOCK_K, BLOCK_N])
            else:
                b = tl.reshape(w13.load([expert, start, n * BLOCK_N]), [BLOCK_K, BLOCK_N])
        elif TMA:
            if GATED and not PAIRED:
                b = tl.reshape(w13.load([2 * expert, n * WIDTH, start]), [BLOCK_N, BLOCK_K]).T
            else:
                b = w13.load([expert * (2 * inter if GATED else inter) + n * BLOCK_N, start]).T
        else:
            b = tl.load(w_ptr) if WHOLE else tl.load(w_ptr, mask=rest[:, None], other=0.0)
            w_ptr += BLOCK_K * stride_wh
        acc = tl.dot(a, b.to(a.dtype), acc, input_precision=PRECISION)

    if INPUT_WEIGHTING:
        acc *= tl.load(weights_S + slot, mask=live, other=0.0)[:, None]
    if b13 is not None:
        acc += tl.load(b13 + expert.to(tl.int64) * stride_be + w_row * stride_bn).to(tl.float32)[None, :]
    if GATED:
        if PAIRED:
            g, u = tl.reshape(acc, [BLOCK_M, WIDTH, 2]).split()
        else:
            g, u = tl.permute(tl.reshape(acc, [BLOCK_M, 2, WIDTH]), [0, 2, 1]).split()
        y = gate_by(act(g, KIND, ALPHA, LIMIT, CLAMP_AFTER, GATE_SOFTCAP), u, BETA, LIMIT, UP_SOFTCAP)
    else:
        y = act(acc, KIND, ALPHA, LIMIT, CLAMP_AFTER, GATE_SOFTCAP)
    out = n * WIDTH + tl.arange(0, WIDTH)
    h_ptr = h_RI + row.to(tl.int64)[:, None] * inter + out[None, :]
    tl.store(h_ptr, y.to(h_RI.dtype.element_ty), mask=live[:, None] & (out < inter)[None, :])


@triton.jit(do_not_specialize=["N"])
def gate_up(
    x_TH,
    w13,
    b13,
    weights_S,
    slot_R,
    tiles_4N,
    h_RI,
    K,
    hidden,
    inter,
    N,
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
    PAIRED: tl.constexpr,
    KIND: tl.constexpr,
    ALPHA: tl.constexpr,
    BETA: tl.constexpr,
    LIMIT: tl.constexpr,
    CLAMP_AFTER: tl.constexpr,
    GATE_SOFTCAP: tl.constexpr,
    UP_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE: tl.constexpr,
    TMA: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PDL: tl.constexpr,
):
    """h[r] = act(x[token of r] w13[e]^T + b13[e]) for one tile of BLOCK_M rows and BLOCK_N rows of w13.

    PAIRED: gate and up columns alternate in the product, else they are its two halves. Either way both belong to the same
    columns of h; which of the two reads memory in long runs depends on the strides. WHOLE: BLOCK_K divides H.
    TMA: w13 is a tensor descriptor: of [E * 2I, H] when PAIRED or ungated, else of [2E, I, H] in boxes of both halves.
    TRANSPOSED: w13 lies as [E, H, 2I], of which it is a descriptor; in boxes of both halves of [E, H, 2, I].
    """
    follow(PDL)
    expert, start_row, end_row, n = _tile(tiles_4N, N, tl.cdiv(inter, BLOCK_N // 2 if GATED else BLOCK_N), BLOCK_M)
    if expert < 0:
        return
    if BLOCK_M == _HALVED and end_row - start_row <= BLOCK_M // 2:
        _gate_up_tile(
            expert, start_row, end_row, n, x_TH, w13, b13, weights_S, slot_R, h_RI, K, hidden, inter, stride_xt, stride_xh,
            stride_we, stride_wn, stride_wh, stride_be, stride_bn, INPUT_WEIGHTING, GATED, INTERLEAVED, PAIRED, KIND, ALPHA,
            BETA, LIMIT, CLAMP_AFTER, GATE_SOFTCAP, UP_SOFTCAP, PRECISION, BLOCK_M // 2, BLOCK_N, BLOCK_K, WHOLE, TMA,
            TRANSPOSED,
        )  # fmt: skip
    else:
        _gate_up_tile(
            expert, start_row, end_row, n, x_TH, w13, b13, weights_S, slot_R, h_RI, K, hidden, inter, stride_xt, stride_xh,
            stride_we, stride_wn, stride_wh, stride_be, stride_bn, INPUT_WEIGHTING, GATED, INTERLEAVED, PAIRED, KIND, ALPHA,
            BETA, LIMIT, CLAMP_AFTER, GATE_SOFTCAP, UP_SOFTCAP, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, WHOLE, TMA, TRANSPOSED,
        )  # fmt: skip


@triton.jit
def _down_tile(
    expert, start_row, end_row, n, h_RI, w2, b2, weights_S, slot_R, y_SH, hidden, inter, stride_we, stride_wh, stride_wi,
    stride_be, stride_bh, WEIGHTED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, WHOLE: tl.constexpr, TMA: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    row = start_row + tl.arange(0, BLOCK_M)
    live = row < end_row
    slot = tl.load(slot_R + row, mask=live, other=0)
    column = n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < hidden
    w_row = in_eights(tl.where(inside, column, 0), TRANSPOSED)

    k = tl.arange(0, BLOCK_K)
    h_ptr = h_RI + row.to(tl.int64)[:, None] * inter + k[None, :]
    if not TMA:
        w_ptr = w2 + expert.to(tl.int64) * stride_we + k[:, None] * stride_wi + w_row.to(tl.int64)[None, :] * stride_wh
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, inter, BLOCK_K):
        rest = k < inter - start
        if WHOLE:
            a = tl.load(h_ptr, mask=live[:, None], other=0.0)
        else:
            a = tl.load(h_ptr, mask=live[:, None] & rest[None, :], other=0.0)
        h_ptr += BLOCK_K
        if TMA and TRANSPOSED:
            b = tl.reshape(w2.load([expert, start, n * BLOCK_N]), [BLOCK_K, BLOCK_N])
        elif TMA:
            b = w2.load([expert * hidden + n * BLOCK_N, start]).T
        else:
            b = tl.load(w_ptr) if WHOLE else tl.load(w_ptr, mask=rest[:, None], other=0.0)
            w_ptr += BLOCK_K * stride_wi
        acc = tl.dot(a, b.to(a.dtype), acc, input_precision=PRECISION)

    if b2 is not None:
        acc += tl.load(b2 + expert.to(tl.int64) * stride_be + w_row * stride_bh).to(tl.float32)[None, :]
    if WEIGHTED:
        acc *= tl.load(weights_S + slot, mask=live, other=0.0)[:, None]
    y_ptr = y_SH + slot.to(tl.int64)[:, None] * hidden + column[None, :]
    tl.store(y_ptr, acc.to(y_SH.dtype.element_ty), mask=live[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["N"])
def down(
    h_RI,
    w2,
    b2,
    weights_S,
    slot_R,
    tiles_4N,
    y_SH,
    hidden,
    inter,
    N,
    stride_we,
    stride_wh,
    stride_wi,
    stride_be,
    stride_bh,
    WEIGHTED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WHOLE: tl.constexpr,
    TMA: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PDL: tl.constexpr,
):
    """y[slot of r] = (h[r] w2[e]^T + b2[e]) * weight, for one tile of BLOCK_M rows and BLOCK_N of H.

    WHOLE: BLOCK_K divides I. TMA: w2 is a tensor descriptor of [E * H, I]; TRANSPOSED: of [E, I, H], as it lies.
    """
    follow(PDL)
    expert, start_row, end_row, n = _tile(tiles_4N, N, tl.cdiv(hidden, BLOCK_N), BLOCK_M)
    if expert < 0:
        return
    if BLOCK_M == _HALVED and end_row - start_row <= BLOCK_M // 2:
        _down_tile(
            expert, start_row, end_row, n, h_RI, w2, b2, weights_S, slot_R, y_SH, hidden, inter, stride_we, stride_wh,
            stride_wi, stride_be, stride_bh, WEIGHTED, PRECISION, BLOCK_M // 2, BLOCK_N, BLOCK_K, WHOLE, TMA, TRANSPOSED,
        )  # fmt: skip
    else:
        _down_tile(
            expert, start_row, end_row, n, h_RI, w2, b2, weights_S, slot_R, y_SH, hidden, inter, stride_we, stride_wh,
            stride_wi, stride_be, stride_bh, WEIGHTED, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, WHOLE, TMA, TRANSPOSED,
        )  # fmt: skip


@triton.jit
def copy_rows(x_TH, slot_R, rows_RH, K, hidden, stride_xt, BLOCK_H: tl.constexpr, PDL: tl.constexpr):
    """rows[r] = x[token of r]."""
    follow(PDL)
    row = tl.program_id(0).to(tl.int64)
    token = (tl.load(slot_R + row) // K).to(tl.int64)
    column = tl.arange(0, BLOCK_H)
    inside = column < hidden
    tl.store(rows_RH + row * hidden + column, tl.load(x_TH + token * stride_xt + column, mask=inside), mask=inside)


@triton.jit
def sum_slots(
    y_SH,
    ids_S,
    shared_TH,
    share_T,
    out_TH,
    hidden,
    E,
    scale,
    K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PDL: tl.constexpr,
):
    """out[t] = scale * sum_k y[t, k] + share[t] * shared[t], slots in ascending order; either may be missing.

    A slot without an expert was never written and is not read.
    """
    follow(PDL)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = column < hidden
    total = tl.zeros([BLOCK_H], tl.float32)
    for k in tl.static_range(K):
        expert = tl.load(ids_S + token * K + k)
        taken = (expert >= 0) & (expert < E)
        total += tl.load(y_SH + (token * K + k) * hidden + column, mask=inside & taken, other=0.0).to(tl.float32)
    total *= scale
    if shared_TH is not None:
        total += addend(shared_TH, None, share_T, token, column, inside, hidden, 0, 0, BLOCK_H, 1)
    tl.store(out_TH + token * hidden + column, total.to(out_TH.dtype.element_ty), mask=inside)
