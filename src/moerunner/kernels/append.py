"""New keys and values into a static cache, and its count of tokens forward, in one launch.

The place of the first new token is read on the device, as a CUDA graph needs it. Whichever program is done last counts.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moerunner.kernels.common import blocks, launch, power_of_2

_TILE = 2048  # numbers that a program copies at most of keys, and as many of values


@triton.jit
def _copy(
    cache, new, new_batch, new_head, new_token, heads, T, L, first,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    token = (tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    here = (token < T) & (first + token < L) & (column < WIDTH)  # beyond the last place nothing is written
    x = tl.load(new + row // heads * new_batch + row % heads * new_head + token * new_token + column, mask=here)
    tl.store(cache + (row * L + first + token) * WIDTH + column, x, mask=here)


@triton.jit(do_not_specialize=["T", "L", "heads"])
def _append(
    keys, values, new_keys, new_values, count, done, T, L, heads,
    k_batch, k_head, k_token, v_batch, v_head, v_token,
    K_WIDTH: tl.constexpr, V_WIDTH: tl.constexpr, K_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, TOKENS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    first = tl.load(count)
    _copy(keys, new_keys, k_batch, k_head, k_token, heads, T, L, first, K_WIDTH, K_BLOCK, TOKENS)
    _copy(values, new_values, v_batch, v_head, v_token, heads, T, L, first, V_WIDTH, V_BLOCK, TOKENS)
    tl.debug_barrier()  # all threads of this program have read the count
    before = tl.atomic_add(done, 1)
    if before == tl.num_programs(0) * tl.num_programs(1) - 1:
        tl.store(count, first + T)
        tl.store(done, 0)


def append(keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor, count: Tensor, done: Tensor) -> None:
    """Writes new tokens behind those that a cache has, and counts them.

    keys, values: [B, heads, L, width], contiguous, each with its own width. new_keys, new_values: [B, heads, T, width], in the
    same dtype, any strides. count: the tokens that are there, int64. done: an int32 of 0, which it is again afterwards.
    """
    new_keys, new_values = (x if x.stride(3) == 1 else x.contiguous() for x in (new_keys, new_values))
    batch, heads, tokens, _ = new_keys.shape
    wide, wide_values = power_of_2(keys.shape[3]), power_of_2(values.shape[3])
    together = min(max(1, _TILE // max(wide, wide_values)), power_of_2(tokens))
    if batch * heads * tokens:
        launch(
            _append, (batch * heads, blocks(tokens, together)), keys, values, new_keys, new_values, count, done, tokens,
            keys.shape[2], heads, *new_keys.stride()[:3], *new_values.stride()[:3], keys.shape[3], values.shape[3],
            wide, wide_values, together,
            device=keys.device, warps=min(4, max(1, together * wide // 256)), first=True,
        )  # fmt: skip
