"""The two products of the experts on Hopper: one warp group loads, two multiply, and each of the two stores while the other
still multiplies.

A program stays on its multiprocessor and goes through tiles of 128 rows by 256 weight rows, as `grouped.py` numbers them. The
loader runs ahead through a ring of shared-memory stages: weights by TMA, rows gathered from the tokens by asynchronous copies
(or rows in expert order by TMA), so no permuted copy of the tokens exists. Each consumer owns 64 of the 128 rows, waits for
no one but the loader, and skips its half where an expert's last tile does not reach it.

Shape suffixes: as in `grouped.py`.
"""

# Kernel code is Gluon, not Python: its names and operators have other types than pyright believes.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportOperatorIssue=false, reportPossiblyUnboundVariable=false

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
from moerunner.kernels.common import INTERPRETING, blocks, current
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
def _activate(
    acc,
    expert,
    n,
    b13,
    weight,
    width,
    stride_be,
    stride_bn,
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
):
    """Weight, bias and activation of 64 x 256 values: 128 or 256 columns of h. width: I."""
    mma: gl.constexpr = acc.type.layout
    if INPUT_WEIGHTING:
        acc *= gl.expand_dims(weight, 1)
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
    else:
        y = act(acc, KIND, ALPHA, LIMIT, CLAMP_AFTER, GATE_SOFTCAP)
    return y


@gluon.jit
def _weigh(acc, expert, n, b2, weight, width, stride_be, stride_bn, WEIGHTED: gl.constexpr):
    """Bias and routing weight of 64 x 256 values. width: H."""
    if b2 is not None:
        at = n * 256 + gl.arange(0, 256, layout=gl.SliceLayout(0, acc.type.layout))
        bias = gl.load(b2 + expert.to(gl.int64) * stride_be + at * stride_bn, mask=at < width, other=0.0)
        acc += gl.expand_dims(bias.to(gl.float32), 0)
    if WEIGHTED:
        acc *= gl.expand_dims(weight, 1)
    return acc


@gluon.jit
def _store(y, out, place, live, column, width, wide: gl.constexpr):
    """64 rows of 128 columns, each row at its place, 16 bytes a thread."""
    y = gl.convert_layout(y.to(out.dtype.element_ty), wide)
    c = column + gl.arange(0, 128, layout=gl.SliceLayout(0, wide))
    inside = gl.expand_dims(live, 1) & gl.expand_dims(c < width, 0)
    gl.store(out + gl.expand_dims(place.to(gl.int64), 1) * width + gl.expand_dims(c, 0), y, mask=inside)


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
    LAG: gl.constexpr,
):
    """Rows PART * 64 .. + 64 of every tile. What the end of a tile needs is loaded before its products, and the next tile is
    looked up before this one's. LAG: products that may still run when the next is issued."""
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    count = 0
    expert, row, end, n = _tile(tiles_4N, N, columns, gl.program_id(0))
    for pid in range(gl.program_id(0), programs, gl.num_programs(0)):
        expert_next, row_next, end_next, n_next = _tile(
            tiles_4N, N, columns, gl.minimum(pid + gl.num_programs(0), programs - 1)
        )
        row += PART * 64
        if expert >= 0:
            if row < end:
                place = row + gl.arange(0, 64, layout=gl.SliceLayout(1, wide))
                live = place < end
                if not UP:
                    place = gl.load(slot_R + place, mask=live, other=0)
                r = row + gl.arange(0, 64, layout=gl.SliceLayout(1, mma))
                weight = (r * 0).to(gl.float32)
                if WEIGHTED:
                    slot = gl.load(slot_R + r, mask=r < end, other=0)
                    weight = gl.load(weights_S + slot, mask=r < end, other=0.0)
                acc = gl.zeros([64, 256], gl.float32, mma)
                for start in range(0, depth, 64):
                    stage = count % STAGES
                    mbarrier.wait(full.index(stage), (count // STAGES) & 1)
                    fence_async_shared()
                    part = a_smem.index(stage).slice(PART * 64, 64, 0)
                    acc = warpgroup_mma(part, w_smem.index(stage).permute((1, 0)), acc, is_async=True)
                    acc = warpgroup_mma_wait(LAG, deps=[acc])
                    if LAG == 0:
                        _release(empty.index(stage))
                    elif start > 0:
                        _release(empty.index((count - 1) % STAGES))
                    count += 1
                if LAG == 1:
                    acc = warpgroup_mma_wait(0, deps=[acc])
                    _release(empty.index((count - 1) % STAGES))
                if UP:
                    y = _activate(
                        acc, expert, n, bias, weight, width, stride_be, stride_bn, WEIGHTED, GATED, INTERLEAVED, KIND, ALPHA,
                        BETA, LIMIT, CLAMP_AFTER, GATE_SOFTCAP, UP_SOFTCAP,
                    )  # fmt: skip
                else:
                    y = _weigh(acc, expert, n, bias, weight, width, stride_be, stride_bn, WEIGHTED)
                if UP and GATED:
                    _store(y, out, place, live, n * 128, width, wide)
                else:
                    left, right = gl.permute(gl.reshape(y, [64, 2, 128]), [0, 2, 1]).split()
                    _store(left, out, place, live, n * 256, width, wide)
                    _store(right, out, place, live, n * 256 + 128, width, wide)
            else:
                for _ in range(0, depth, 64):
                    stage = count % STAGES
                    mbarrier.wait(full.index(stage), (count // STAGES) & 1)
                    _release(empty.index(stage))
                    count += 1
        expert, row, end, n = expert_next, row_next, end_next, n_next


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
    depth_8,
    width_8,
    rows_per_expert,
    stride_a_8,
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
    LAG: gl.constexpr,
):
    """UP: h[r] = act(x[token of r] w13[e]^T + b13[e]); else y[slot of r] = (h[r] w2[e]^T + b2[e]) * weight.

    a: tokens [T, H] if UP, else a tensor descriptor of h [R, I] in boxes of 128 x 64. w: one of [E * rows, depth] in boxes of
    128 x 64. programs: tiles of rows times tiles of columns.
    """
    # Rows are whole units of 16 bytes, which makes copies and stores as wide as that.
    width, depth = 8 * width_8, 8 * depth_8
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
            (_multiply, (
                0, out, bias, weights_S, slot_R, tiles_4N, N, columns, programs, depth, width, stride_be, stride_bn, a_smem,
                w_smem, full, empty, UP, WEIGHTED, GATED, INTERLEAVED, KIND, ALPHA, BETA, LIMIT, CLAMP_AFTER, GATE_SOFTCAP,
                UP_SOFTCAP, STAGES, LAG,
            )),
            (_multiply, (
                1, out, bias, weights_S, slot_R, tiles_4N, N, columns, programs, depth, width, stride_be, stride_bn, a_smem,
                w_smem, full, empty, UP, WEIGHTED, GATED, INTERLEAVED, KIND, ALPHA, BETA, LIMIT, CLAMP_AFTER, GATE_SOFTCAP,
                UP_SOFTCAP, STAGES, LAG,
            )),
            (_load, (
                a, w, slot_R, tiles_4N, K, N, columns, programs, depth, rows_per_expert, 8 * stride_a_8, a_smem, w_smem,
                full, empty, UP, HALF, STAGES,
            )),
        ],
        [4, 4],
        [232, 40],
    )  # fmt: skip


def product(
    a: Tensor,
    w: Tensor,
    bias: Tensor | None,
    weights_TK: Tensor,
    order: Tiled,
    out: Tensor,
    layout: int,
    activation: Sequence[Any],
    top_k: int,
    stages: int,
    lag: int,
    *,
    up: bool,
    weighted: bool,
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
    with current(w.device):
        grouped_product[(min(programs, _multiprocessors(w.device)),)](
            a if up else _described(a, a.shape[0]), _described(w, experts * rows), bias, weights_TK, order.slot_R,
            order.tiles_4N, out, top_k, tiles, columns, programs, depth // 8, width // 8, rows, a.stride(0) // 8,
            *(bias.stride() if bias is not None else (0, 0)),
            UP=up, WEIGHTED=weighted, GATED=gated, INTERLEAVED=interleaved, KIND=kind, ALPHA=alpha, BETA=beta, LIMIT=limit,
            CLAMP_AFTER=clamp_after, GATE_SOFTCAP=gate_softcap, UP_SOFTCAP=up_softcap, STAGES=stages, LAG=lag, num_warps=4,
        )  # fmt: skip


def _described(matrix: Tensor, rows: int) -> TensorDescriptor:
    """[rows, depth] in boxes of 128 x 64; a weight's experts lie one after the other."""
    depth, step = matrix.shape[-1], matrix.stride(-2)
    return TensorDescriptor(matrix, [rows, depth], [step, 1], [128, 64], gl.NVMMASharedLayout(128, 16, 2))


@functools.cache
def runs_on(device: torch.device) -> bool:
    """Whether this is a GPU with wgmma, and kernels run on it: these have no interpreter."""
    return not INTERPRETING and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
