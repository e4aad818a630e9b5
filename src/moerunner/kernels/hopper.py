"""The two products of the experts on Hopper, in CUDA C++, for many tokens, as rows (`hopper.cu`) or columns (`transposed.cu`).

Where `why_not` gives a reason the Triton tiles of `grouped.py` serve.

Shape suffixes: as in `grouped.py`.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moerunner.kernels import nvrtc
from moerunner.kernels.common import blocks
from moerunner.kernels.order import Tiled
from moerunner.kernels.tiles import Specialised, Transposed

COLUMNS = {128: 256, 192: 192}
"""Weight rows of a tile, by its rows: 64 for each warp group that multiplies, whose sums fill its registers."""
LINES, MOST = 256, 160
"""Weight rows of a tile with tokens as columns, and the most of these."""
_SHARED = 4 * 48 * 1024 + 1024 + 128
"""Bytes: the ring of four stages, room to align it, and what the warp groups signal by."""
_SHARED_TRANSPOSED = 4 * (LINES + MOST) * 128 + 1024 + 128 + 2 * 8 * MOST
"""The same, and each warp group's slots and weights."""


class Args(ctypes.Structure):
    """As in `hopper.h`. Strides in elements, of x in units of 16 bytes."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "bias", "weights", "slots", "tiles", "totals", "turn", "out")),
        *((name, ctypes.c_uint64) for name in ("stride_bias_expert", "stride_bias", "stride_bias_half")),
        ("stride_x_8", ctypes.c_uint32),
        *((name, ctypes.c_int) for name in ("top_k", "most_tiles", "columns", "depth", "width")),
        *((name, ctypes.c_float) for name in ("alpha", "beta", "limit", "gate_softcap", "up_softcap")),
    ]


def rows_of(tiles: Specialised | Transposed) -> int:
    """By how many rows the map of tiles is to be made, see `order.order_slots`."""
    return MOST if isinstance(tiles, Transposed) else 2 * tiles.rows


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
    tiles: Specialised | Transposed,
    *,
    up: bool,
    weighted: bool,
) -> None:
    """One of the two products over all tiles.

    Args:
        a: tokens [T, H], or rows [R, H] in expert order if tiles.copied; h [R, I] if not up. Rows are of whole 16 bytes.
        w: [E, rows, depth], as TMA can read it; for `Transposed` an even number of eights of rows. order: by `rows_of(tiles)`,
            made anew for every layer, since the kernel counts its turns in it. layout: of w13's rows, see `experts.LAYOUTS`.
        activation: (kind, alpha, beta, limit, clamp_after, gate_softcap, up_softcap).

    Raises RuntimeError if CUDA or its compiler refuses.
    """
    experts, rows, depth = w.shape
    gated, interleaved = up and layout != 2, layout == 1
    copied = isinstance(tiles, Specialised) and tiles.copied
    kind, alpha, beta, limit, clamp_after, gate_softcap, up_softcap = activation
    width = out.shape[-1]
    flags = {"COPIED": copied, "UP": up, "WEIGHTED": weighted, "GATED": gated, "BIAS": bias is not None}
    flags |= {"HALF": w.dtype == torch.float16, "KIND": kind if up else 0}
    flags |= {"LIMITED": up and limit is not None, "CLAMP_AFTER": up and clamp_after}
    flags |= {"GATE_CAPPED": up and gate_softcap is not None, "UP_CAPPED": up and up_softcap is not None}
    lines_of_tile = LINES if isinstance(tiles, Transposed) else COLUMNS[tiles.rows]
    args = Args(
        x=a.data_ptr(), bias=None if bias is None else bias.data_ptr(), weights=weights_TK.data_ptr(),
        slots=order.slot_R.data_ptr(), tiles=order.tiles_4N.data_ptr(), totals=order.totals.data_ptr(),
        turn=order.totals.data_ptr() + (4 if up else 8), out=out.data_ptr(), stride_x_8=a.stride(0) // 8, top_k=top_k,
        most_tiles=order.tiles_4N.shape[1], columns=blocks(width, lines_of_tile // (2 if gated else 1)), depth=depth,
        width=width, alpha=alpha, beta=beta, limit=limit or 0.0, gate_softcap=gate_softcap or 0.0,
        up_softcap=up_softcap or 0.0,
    )  # fmt: skip
    if bias is not None:
        of_row = bias.stride(1)
        args.stride_bias_expert, args.stride_bias = bias.stride(0), of_row * (2 if interleaved and gated else 1)
        args.stride_bias_half = of_row * (1 if interleaved else width)
    step, halves = w.stride(1), 2 if gated else 1
    row, half = (2 * step, step) if interleaved and gated else (step, rows // halves * step)  # to the next, and from gate to up
    by_rows, many = copied or not up, _multiprocessors(w.device)
    if isinstance(tiles, Transposed):
        half, group = (half, 8 * row) if gated else (8 * row, 16 * row)
        sizes, strides = (depth, 8, 2, rows // 16, experts), (row, half, group, rows * step)
        w_map = _tensor_map(w.data_ptr(), w.dtype, sizes, strides, (64, 8, 2, 8, 1), (1, 1, 1, 2, 1))
        a_map = _tensor_map(a.data_ptr(), a.dtype, (depth, len(a)), (a.stride(0),), (64, 32)) if by_rows else w_map
        file, grid, threads, shared, shape = "transposed.cu", many, 384, _SHARED_TRANSPOSED, {"MOST": MOST}
    else:
        sizes, strides = (depth, rows // halves, halves, experts), (row, half, max(rows, 1) * step)
        w_map = _tensor_map(w.data_ptr(), w.dtype, sizes, strides, (64, lines_of_tile // 2, 1, 1))
        a_map = _tensor_map(a.data_ptr(), a.dtype, (depth, len(a)), (a.stride(0),), (64, 64)) if by_rows else w_map
        file, grid, threads, shared = "hopper.cu", many // 2 * 2, 128 + 2 * tiles.rows, _SHARED  # clusters of two
        shape = {"PARTS": tiles.rows // 64, "COLUMNS": lines_of_tile}
    nvrtc.launch(
        "grouped_product", grid, threads, w_map, a_map, args, device=w.device, file=file, shared=shared,
        defines=[f"{name}={int(value)}" for name, value in (shape | flags).items()],
    )  # fmt: skip


@functools.cache
def why_not(device: torch.device) -> str:
    """Nothing if the kernel runs on this device, else the reason."""
    if reason := nvrtc.why_not(device):
        return reason
    major, minor = torch.cuda.get_device_capability(device)
    return "" if major == 9 else f"it is for compute capability 9.0, not {major}.{minor}"


@functools.lru_cache(4096)
def _tensor_map(
    pointer: int,
    dtype: torch.dtype,
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
    steps: tuple[int, ...] | None = None,
) -> Any:
    """How TMA reads a tensor, the innermost dimension first; strides of the others in elements. Beyond the end: 0.

    steps: of each dimension of a box only every so-many-th.
    """
    driver, _ = nvrtc.bindings()
    half = dtype == torch.float16
    kinds, no, wide = driver.CUtensorMapDataType, driver.CUtensorMapInterleave, driver.CUtensorMapSwizzle
    return nvrtc.checked(
        driver.cuTensorMapEncodeTiled(
            kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16 if half else kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            len(sizes),
            pointer,
            [driver.cuuint64_t(n) for n in sizes],
            [driver.cuuint64_t(2 * n) for n in strides],
            [driver.cuuint32_t(n) for n in box],
            [driver.cuuint32_t(n) for n in steps or [1] * len(sizes)],
            no.CU_TENSOR_MAP_INTERLEAVE_NONE,
            wide.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        ),
        f"describe a matrix of {sizes} to the copy engine",
    )


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count
