"""Sorting token slots by expert without a host synchronisation, and the map from tiles to experts.

Rows are slots in expert order, stable, those without an expert last. Each expert's rows are cut into tiles of BLOCK_M rows; no
tile holds rows of two experts. The number of tiles is known on the device only, so the map has room for the most there can be
and marks the rest with expert -1.

Positions are counted, not won by atomics: the order is the same every run.

Shape suffixes: S slots (token * K + k), R rows, E experts, N tiles, B blocks of slots.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from moerunner.kernels import nvrtc
from moerunner.kernels.common import blocks, follow, launch, power_of_2

_ONE_LAUNCH = 4096
"""Up to this many slots each is compared with every other, in one launch; beyond, blocks are counted first."""
_C_TYPES = {
    torch.int64: "long long",
    torch.int32: "int",
    torch.int16: "short",
    torch.uint8: "unsigned char",
    torch.int8: "char",
}


@dataclass(frozen=True)
class Tiled:
    """slot_R: the slot of each row. tiles_4N: of each tile its expert (-1: none) and that expert's first tile, first row and
    end row. totals: how many tiles have an expert, then zeros, for kernels to count in. All int32."""

    slot_R: Tensor
    tiles_4N: Tensor
    totals: Tensor
    block_m: int


@triton.jit
def _keys(ids_S, at, S, E):
    """Expert ids as sort keys: slots without an expert, and places behind the last slot, are E."""
    key = tl.load(ids_S + at, mask=at < S, other=-1).to(tl.int32)
    return tl.where((key < 0) | (key >= E), E, key)


@triton.jit
def _write_tiles(count, tiles_4N, N, E, BLOCK_M: tl.constexpr, EP: tl.constexpr):
    """The tile map and its totals from the number of rows of each expert (count [EP])."""
    e = tl.arange(0, EP)
    count = tl.where(e < E, count, 0)
    end = tl.cumsum(count, 0)
    tiles = (count + BLOCK_M - 1) // BLOCK_M
    first = tl.cumsum(tiles, 0) - tiles
    for j in range(tl.max(tiles, 0)):
        at, mine = first + j, j < tiles
        tl.store(tiles_4N + at, e, mask=mine)
        tl.store(tiles_4N + N + at, first, mask=mine)
        tl.store(tiles_4N + 2 * N + at, end - count, mask=mine)
        tl.store(tiles_4N + 3 * N + at, end, mask=mine)
    total = tl.sum(tiles, 0)
    for start in range(total, N, EP):
        tl.store(tiles_4N + start + e, -1, mask=start + e < N)
    four = tl.arange(0, 4)
    tl.store(tiles_4N + 4 * N + four, tl.where(four == 0, total, 0))


@triton.jit(do_not_specialize=["S", "N"])
def _order_few(
    ids_S,
    slot_R,
    tiles_4N,
    S,
    E,
    N,
    BLOCK_M: tl.constexpr,
    EP: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program 0 writes the tile map, each other places BLOCK slots by comparing them with all, CHUNK at a time."""
    follow(PDL)
    if tl.program_id(0) == 0:
        count = tl.zeros([EP], tl.int32)
        for start in range(0, S, 1024):
            count += tl.histogram(_keys(ids_S, start + tl.arange(0, 1024), S, E), EP)
        _write_tiles(count, tiles_4N, N, E, BLOCK_M, EP)
    else:
        at = (tl.program_id(0) - 1) * BLOCK + tl.arange(0, BLOCK)
        key = _keys(ids_S, at, S, E)
        ahead = tl.zeros([BLOCK, CHUNK], tl.int32)  # summed once, since a sum over threads costs more than a comparison
        for start in range(0, S, CHUNK):
            other_at = start + tl.arange(0, CHUNK)
            other = _keys(ids_S, other_at, S, E)
            earlier = (other[None, :] == key[:, None]) & (other_at[None, :] < at[:, None])
            ahead += ((other[None, :] < key[:, None]) | earlier).to(tl.int32)
        tl.store(slot_R + tl.sum(ahead, 1), at, mask=at < S)


@triton.jit(do_not_specialize=["S"])
def _count_blocks(ids_S, count_BE, S, E, EP: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """How often each expert occurs in one block of slots."""
    follow(PDL)
    count = tl.zeros([EP], tl.int32)
    for start in range(0, BLOCK, 512):
        at = tl.program_id(0) * BLOCK + start + tl.arange(0, 512)
        count += tl.histogram(_keys(ids_S, at, S, E), EP)
    tl.store(count_BE + tl.program_id(0) * EP + tl.arange(0, EP), count)


@triton.jit(do_not_specialize=["S", "N", "B"])
def _place_blocks(
    ids_S,
    count_BE,
    slot_R,
    tiles_4N,
    S,
    E,
    N,
    B,
    BLOCK_M: tl.constexpr,
    EP: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):
    """Program B writes the tile map, each other places the slots of its block behind those of the blocks before."""
    follow(PDL)
    AT_ONCE: tl.constexpr = 8192 // EP
    block = tl.program_id(0)
    total = tl.zeros([AT_ONCE, EP], tl.int32)
    before = tl.zeros([AT_ONCE, EP], tl.int32)
    for start in range(0, B, AT_ONCE):
        b = start + tl.arange(0, AT_ONCE)
        part = tl.load(count_BE + b[:, None] * EP + tl.arange(0, EP)[None, :], mask=b[:, None] < B, other=0)
        total += part
        before += tl.where(b[:, None] < block, part, 0)
    total_E = tl.sum(total, 0)
    if block == B:
        _write_tiles(total_E, tiles_4N, N, E, BLOCK_M, EP)
    else:
        base_E = tl.cumsum(total_E, 0) - total_E + tl.sum(before, 0)
        at = block * BLOCK + tl.arange(0, BLOCK)
        key = _keys(ids_S, at, S, E)
        same = tl.zeros([BLOCK, CHUNK], tl.int32)  # earlier slots of the block with this key; smaller keys are in base_E
        for start in range(block * BLOCK, tl.minimum(block * BLOCK + BLOCK, S), CHUNK):
            other_at = start + tl.arange(0, CHUNK)
            other = _keys(ids_S, other_at, S, E)
            same += ((other[None, :] == key[:, None]) & (other_at[None, :] < at[:, None])).to(tl.int32)
        tl.store(slot_R + tl.gather(base_E, key, 0) + tl.sum(same, 1), at, mask=at < S)


def most_tiles(slots: int, experts: int, block_m: int) -> int:
    """How many tiles there can be: every expert that was hit may end in a partial one."""
    return min(slots, slots // block_m + min(slots, experts))


def order_slots(ids_TK: Tensor, experts: int, block_m: int) -> Tiled:
    """Rows in expert order and their tiles. ids: whole numbers, any outside 0..experts-1 is no expert."""
    slots, device = ids_TK.numel(), ids_TK.device
    tiles = most_tiles(slots, experts, block_m)
    slot_R = torch.empty(slots, dtype=torch.int32, device=device)
    tiles_4N, totals = torch.empty(4 * tiles + 4, dtype=torch.int32, device=device).split([4 * tiles, 4])
    ep = power_of_2(experts + 1)
    if slots <= _ONE_LAUNCH:
        launch(
            _order_few, (1 + blocks(slots, 8),), ids_TK, slot_R, tiles_4N, slots, experts, tiles, block_m, ep, 8, 512,
            device=device, warps=8, first=True,
        )  # fmt: skip
    elif experts < 1024 and ids_TK.dtype in _C_TYPES and not nvrtc.why_not(device):
        _order_many(ids_TK, slot_R, tiles_4N, slots, experts, tiles, block_m)
    else:
        block = 512 if slots <= 131072 else 2048
        count = blocks(slots, block)
        count_BE = torch.empty(count, ep, dtype=torch.int32, device=device)
        launch(_count_blocks, (count,), ids_TK, count_BE, slots, experts, ep, block, device=device, warps=4, first=True)
        launch(
            _place_blocks, (count + 1,), ids_TK, count_BE, slot_R, tiles_4N, slots, experts, tiles, count,
            block_m, ep, block, 8192 // block, device=device, warps=8,
        )  # fmt: skip
    return Tiled(slot_R, tiles_4N.view(4, tiles), totals, block_m)


def _order_many(ids_TK: Tensor, slot_R: Tensor, tiles_4N: Tensor, slots: int, experts: int, tiles: int, block_m: int) -> None:
    """By `order.cu`, which is three times as fast as the two launches in Triton."""
    count = blocks(slots, 1024)
    counts_BE = torch.empty(count, experts + 1, dtype=torch.int32, device=ids_TK.device)
    ids, counts, rows, map_4N = (ctypes.c_void_p(t.data_ptr()) for t in (ids_TK, counts_BE, slot_R, tiles_4N))
    numbers = [ctypes.c_int(n) for n in (slots, experts, tiles, block_m)]
    run = functools.partial(nvrtc.launch, device=ids_TK.device, file="order.cu", defines=[f"ID={_C_TYPES[ids_TK.dtype]}"])
    keys = 4 * (experts + 1)
    run("count_experts", count, 1024, ids, counts, *numbers[:2], shared=keys)
    run("place_slots", count + 1, 1024, ids, counts, rows, map_4N, *numbers, shared=2 * keys + 128 + 16 * keys)
