"""The two products of the experts on Hopper: one warp group loads, two multiply, and each of the two stores while the other
still multiplies.

A program stays on its multiprocessor and goes through tiles of 128 rows by 256 weight rows, as `grouped.py` numbers them. The
loader runs ahead through a ring of shared-memory stages: weights by TMA, rows gathered from the tokens by asynchronous copies
(or rows in expert order by TMA), so no permuted copy of the tokens exists. Each consumer owns 64 of the 128 rows, waits for
no one but the loader, and skips its half where an expert's last tile does not reach it.

Shape suffixes: as in `grouped.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from moerunner.kernels.activation import act, gate_by
from moerunner.kernels.common import blocks
from moerunner.kernels.order import Tiled

_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier  # its name until Triton 3.6


@gluon.jit
def _tile(tiles_4N, N, columns, pid):
    """(expert or -1, first row, end row, tile of columns) of a virtual program, see `grouped._tile`."""
    some = tiles_4N + pid // columns
    expert = gl.load(some)
    first = gl.load(some + N)
    start = gl.load(some + 2 * N)
    end = gl.load(some + 3 * N)
    place = pid - first * columns
    group = place // (16 * columns) * 16
    size = gl.maximum(gl.minimum((end - start + 127) // 128 - group, 16), 1)
    within = place % (16 * columns)
    return expert, start + (group + within % size) * 128, end, within // size


@gluon.jit
def _load(
    a,
    w,
    slot_R,
    tiles_4N,
    K,
    N,
    columns,
    programs,
    depth,
    rows_per_expert,
    stride_a,
    a_smem,
    w_smem,
    full,
    empty,
    GATHER: gl.constexpr,
    HALF: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Fills the ring. HALF: rows of w between the two boxes of a tile are a tile's own (0) or half an expert's (1)."""
    by_row: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    count = 0
    for pid in range(gl.program_id(0), programs, gl.num_programs(0)):
        expert, row, end, n = _tile(tiles_4N, N, columns, pid)
        if expert >= 0:
            base = expert * rows_per_expert
            if HALF:
                first = base + n * 128
                second = first + rows_per_expert // 2
            else:
                first = base + n * 256
                second = first + 128
            if GATHER:
                r = row + gl.arange(0, 128, layout=gl.SliceLayout(1, by_row))
                slot = gl.load(slot_R + r, mask=r < end, other=0)
                k = gl.arange(0, 64, layout=gl.SliceLayout(0, by_row))
                live = gl.expand_dims(r < end, 1)
                pointer = a + gl.expand_dims((slot // K).to(gl.int64), 1) * stride_a + gl.expand_dims(k, 0)
            for start in range(0, depth, 64):
                stage = count % STAGES
                mbarrier.wait(empty.index(stage), ((count // STAGES) & 1) ^ 1)
                bar = full.index(stage)
                w_stage = w_smem.index(stage)
                if GATHER:
                    mbarrier.expect(bar, 256 * 64 * 2)
                else:
                    mbarrier.expect(bar, (256 + 128) * 64 * 2)
                    tma.async_copy_global_to_shared(a, [row, start], bar, a_smem.index(stage))
                tma.async_copy_global_to_shared(w, [first, start], bar, w_stage.slice(0, 128, 0))
                tma.async_copy_global_to_shared(w, [second, start], bar, w_stage.slice(128, 128, 0))
                if GATHER:
                    inside = live & gl.expand_dims(k < depth - start, 0)
                    async_copy.async_copy_global_to_shared(a_smem.index(stage), pointer + start, mask=inside)
                    async_copy.mbarrier_arrive(bar, increment_count=False)
                count += 1


@gluon.jit
def _up(
    acc,
    expert,
    row,
    end,
    n,
    h_RI,
    b13,
    weights_S,
    slot_R,
    width,
    INPUT_WEIGHTING: gl.constexpr,
    GATED: gl.constexpr,
    INTERLEAVED: gl.constexpr,
    KIND: gl.constexpr,
    ALPHA: gl.constexpr,
    BETA: gl.constexpr,
    LIMIT: gl.constexpr,
    CLAMP_AFTER: gl.constexpr,
    GATE_SOFTCAP: gl.constexpr,
    UP_SOFTCAP: gl.constexpr,
    stride_be,
    stride_bn,
):
    """Weighs, adds the bias, applies the activation and stores rows of h. width: I."""
    mma: gl.constexpr = acc.type.layout
    r = row + gl.arange(0, 64, layout=gl.SliceLayout(1, mma))
    if INPUT_WEIGHTING:
        slot = gl.load(slot_R + r, mask=r < end, other=0)
        acc *= gl.expand_dims(gl.load(weights_S + slot, mask=r < end, other=0.0), 1)
    if b13 is not None:
        j = gl.arange(0, 256, layout=gl.SliceLayout(0, mma))
        if INTERLEAVED or not GATED:
            at = n * 256 + j
            inside = at < (2 * width if GATED else width)
        else:
            at = n * 128 + j % 128
            inside = at < width
            at += j // 128 * width
        bias = gl.load(b13 + expert.to(gl.int64) * stride_be + at * stride_bn, mask=inside, other=0.0)
        acc += gl.expand_dims(bias.to(gl.float32), 0)
    if GATED:
        if INTERLEAVED:
            g, u = gl.reshape(acc, [64, 128, 2]).split()
        else:
            g, u = gl.permute(gl.reshape(acc, [64, 2, 128]), [0, 2, 1]).split()
        y = gate_by(act(g, KIND, ALPHA, LIMIT, CLAMP_AFTER, GATE_SOFTCAP), u, BETA, LIMIT, UP_SOFTCAP)
        _store(y, h_RI, slot_R, row, end, n * 128, width, False)
    else:
        y = act(acc, KIND, ALPHA, LIMIT, CLAMP_AFTER, GATE_SOFTCAP)
        left, right = gl.permute(gl.reshape(y, [64, 2, 128]), [0, 2, 1]).split()
        _store(left, h_RI, slot_R, row, end, n * 256, width, False)
        _store(right, h_RI, slot_R, row, end, n * 256 + 128, width, False)


@gluon.jit
def _down(acc, expert, row, end, n, y_SH, b2, weights_S, slot_R, width, WEIGHTED: gl.constexpr, stride_be, stride_bn):
    """Adds the bias, weighs and stores each row at its slot. width: H."""
    mma: gl.constexpr = acc.type.layout
    r = row + gl.arange(0, 64, layout=gl.SliceLayout(1, mma))
    if b2 is not None:
        at = n * 256 + gl.arange(0, 256, layout=gl.SliceLayout(0, mma))
        bias = gl.load(b2 + expert.to(gl.int64) * stride_be + at * stride_bn, mask=at < width, other=0.0)
        acc += gl.expand_dims(bias.to(gl.float32), 0)
    if WEIGHTED:
        slot = gl.load(slot_R + r, mask=r < end, other=0)
        acc *= gl.expand_dims(gl.load(weights_S + slot, mask=r < end, other=0.0), 1)
    left, right = gl.permute(gl.reshape(acc, [64, 2, 128]), [0, 2, 1]).split()
    _store(left, y_SH, slot_R, row, end, n * 256, width, True)
    _store(right, y_SH, slot_R, row, end, n * 256 + 128, width, True)


@gluon.jit
def _store(y, out, slot_R, row, end, column, width, SCATTERED: gl.constexpr):
    """64 rows of 128 columns, 16 bytes a thread."""
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    y = gl.convert_layout(y.to(out.dtype.element_ty), wide)
    r = row + gl.arange(0, 64, layout=gl.SliceLayout(1, wide))
    c = column + gl.arange(0, 128, layout=gl.SliceLayout(0, wide))
    inside = gl.expand_dims(r < end, 1) & gl.expand_dims(c < width, 0)
    if SCATTERED:
        r = gl.load(slot_R + r, mask=r < end, other=0)
    gl.store(out + gl.expand_dims(r.to(gl.int64), 1) * width + gl.expand_dims(c, 0), y, mask=inside)


@gluon.jit
def _multiply(
    PART: gl.constexpr,
    out,
    bias,
    weights_S,
    slot_R,
    tiles_4N,
    N,
    columns,
    programs,
    depth,
    width,
    stride_be,
    stride_bn,
    a_smem,
    w_smem,
    full,
    empty,
    UP: gl.constexpr,
    WEIGHTED: gl.constexpr,
    GATED: gl.constexpr,
    INTERLEAVED: gl.constexpr,
    KIND: gl.constexpr,
    ALPHA: gl.constexpr,
    BETA: gl.constexpr,
    LIMIT: gl.constexpr,
    CLAMP_AFTER: gl.constexpr,
    GATE_SOFTCAP: gl.constexpr,
    UP_SOFTCAP: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Rows PART * 64 .. + 64 of every tile."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    count = 0
    for pid in range(gl.program_id(0), programs, gl.num_programs(0)):
        expert, row, end, n = _tile(tiles_4N, N, columns, pid)
        if expert >= 0:
            row += PART * 64
            if row < end:
                acc = gl.zeros([64, 256], gl.float32, mma)
                for start in range(0, depth, 64):
                    stage = count % STAGES
                    mbarrier.wait(full.index(stage), (count // STAGES) & 1)
                    fence_async_shared()
                    part = a_smem.index(stage).slice(PART * 64, 64, 0)
                    acc = warpgroup_mma(part, w_smem.index(stage).permute((1, 0)), acc, is_async=True)
                    acc = warpgroup_mma_wait(1, deps=[acc])
                    if start > 0:  # the product before this one is done, in every warp
                        _release(empty.index((count - 1) % STAGES))
                    count += 1
                acc = warpgroup_mma_wait(0, deps=[acc])
                _release(empty.index((count - 1) % STAGES))
                if UP:
                    _up(
                        acc,
                        expert,
                        row,
                        end,
                        n,
                        out,
                        bias,
                        weights_S,
                        slot_R,
                        width,
                        WEIGHTED,
                        GATED,
                        INTERLEAVED,
                        KIND,
                        ALPHA,
                        BETA,
                        LIMIT,
                        CLAMP_AFTER,
                        GATE_SOFTCAP,
                        UP_SOFTCAP,
                        stride_be,
                        stride_bn,
                    )
                else:
                    _down(acc, expert, row, end, n, out, bias, weights_S, slot_R, width, WEIGHTED, stride_be, stride_bn)
            else:
                for _ in range(0, depth, 64):
                    stage = count % STAGES
                    mbarrier.wait(full.index(stage), (count // STAGES) & 1)
                    _release(empty.index(stage))
                    count += 1


@gluon.jit
def _release(bar):
    _barrier()  # one thread signals for all four warps
    mbarrier.arrive(bar, count=1)


@gluon.jit
def grouped_product(
    a,
    w,
    bias,
    weights_S,
    slot_R,
    tiles_4N,
    out,
    K,
    N,
    columns,
    programs,
    depth,
    width,
    rows_per_expert,
    stride_a,
    stride_be,
    stride_bn,
    UP: gl.constexpr,
    WEIGHTED: gl.constexpr,
    GATED: gl.constexpr,
    INTERLEAVED: gl.constexpr,
    KIND: gl.constexpr,
    ALPHA: gl.constexpr,
    BETA: gl.constexpr,
    LIMIT: gl.constexpr,
    CLAMP_AFTER: gl.constexpr,
    GATE_SOFTCAP: gl.constexpr,
    UP_SOFTCAP: gl.constexpr,
    STAGES: gl.constexpr,
):
    """UP: h[r] = act(x[token of r] w13[e]^T + b13[e]); else y[slot of r] = (h[r] w2[e]^T + b2[e]) * weight.

    a: tokens [T, H] if UP, else a tensor descriptor of h [R, I] in boxes of 128 x 64. w: one of [E * rows, depth] in boxes of
    128 x 64. programs: tiles of rows times tiles of columns.
    """
    dtype: gl.constexpr = w.dtype
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    a_smem = gl.allocate_shared_memory(dtype, [STAGES, 128, 64], layout)
    w_smem = gl.allocate_shared_memory(dtype, [STAGES, 256, 64], layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=129 if UP else 1)
        mbarrier.init(empty.index(stage), count=2)
    fence_async_shared()
    _barrier()
    HALF: gl.constexpr = UP and GATED and not INTERLEAVED
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    0,
                    out,
                    bias,
                    weights_S,
                    slot_R,
                    tiles_4N,
                    N,
                    columns,
                    programs,
                    depth,
                    width,
                    stride_be,
                    stride_bn,
                    a_smem,
                    w_smem,
                    full,
                    empty,
                    UP,
                    WEIGHTED,
                    GATED,
                    INTERLEAVED,
                    KIND,
                    ALPHA,
                    BETA,
                    LIMIT,
                    CLAMP_AFTER,
                    GATE_SOFTCAP,
                    UP_SOFTCAP,
                    STAGES,
                ),
            ),
            (
                _multiply,
                (
                    1,
                    out,
                    bias,
                    weights_S,
                    slot_R,
                    tiles_4N,
                    N,
                    columns,
                    programs,
                    depth,
                    width,
                    stride_be,
                    stride_bn,
                    a_smem,
                    w_smem,
                    full,
                    empty,
                    UP,
                    WEIGHTED,
                    GATED,
                    INTERLEAVED,
                    KIND,
                    ALPHA,
                    BETA,
                    LIMIT,
                    CLAMP_AFTER,
                    GATE_SOFTCAP,
                    UP_SOFTCAP,
                    STAGES,
                ),
            ),
            (
                _load,
                (
                    a,
                    w,
                    slot_R,
                    tiles_4N,
                    K,
                    N,
                    columns,
                    programs,
                    depth,
                    rows_per_expert,
                    stride_a,
                    a_smem,
                    w_smem,
                    full,
                    empty,
                    UP,
                    HALF,
                    STAGES,
                ),
            ),
        ],
        [4, 4],
        [232, 40],
    )


def product(
    a: Tensor,
    w: Tensor,
    bias: Tensor | None,
    weights_TK: Tensor,
    order: Tiled,
    out: Tensor,
    *,
    up: bool,
    weighted: bool,
    layout: int,
    activation: Sequence[Any],
    top_k: int,
    stages: int = 4,
) -> None:
    """One of the two products over all tiles. w: [E, rows, depth] as `describable` wants it. layout: of w13's rows, see
    `experts.LAYOUTS`; activation: (kind, alpha, beta, limit, clamp_after, gate_softcap, up_softcap)."""
    experts, rows, depth = w.shape
    gated, interleaved = up and layout != 2, layout == 1
    width = out.shape[-1]
    columns = blocks(width, 128 if gated else 256)
    tiles = order.tiles_4N.shape[1]
    programs = tiles * columns
    kind, alpha, beta, limit, clamp_after, gate_softcap, up_softcap = activation
    grouped_product[(min(programs, _multiprocessors(w.device)),)](
        a if up else _described(a, a.shape[0]), _described(w, experts * rows), bias, weights_TK, order.slot_R, order.tiles_4N, out,
        top_k, tiles, columns, programs, depth, width, rows, a.stride(0), *(bias.stride() if bias is not None else (0, 0)),
        UP=up, WEIGHTED=weighted, GATED=gated, INTERLEAVED=interleaved, KIND=kind, ALPHA=alpha, BETA=beta, LIMIT=limit,
        CLAMP_AFTER=clamp_after, GATE_SOFTCAP=gate_softcap, UP_SOFTCAP=up_softcap, STAGES=stages, num_warps=4,
    )  # fmt: skip


def _described(matrix: Tensor, rows: int) -> TensorDescriptor:
    """[rows, depth] in boxes of 128 x 64; a weight's experts lie one after the other."""
    depth, step = matrix.shape[-1], matrix.stride(-2)
    return TensorDescriptor(matrix, [rows, depth], [step, 1], [128, 64], gl.NVMMASharedLayout(128, 16, 2))


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
