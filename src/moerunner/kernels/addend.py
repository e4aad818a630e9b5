"""What the launch that sums a token's experts adds to the sum: the token's shared experts.

Shape suffixes: T tokens, H hidden, S intermediate of the shared experts.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def addend(
    rows, down_HS, share_T, token, column, inside, width, stride_h, stride_s, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """[BLOCK_N] features of a token in float32: of rows [T, H] or, with down, of rows [T, S] down^T; times share.

    width: of the rows, which are contiguous. share: None for 1. Fit for reading before a wait, see `lead`.
    """
    row = rows + token.to(tl.int64) * width
    if down_HS is None:
        y = tl.load(row + column, mask=inside, other=0.0, cache_modifier=".cg").to(tl.float32)
    else:
        w_ptr = down_HS + tl.where(inside, column, 0).to(tl.int64) * stride_h
        acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for start in range(0, width, BLOCK_K):
            s = start + tl.arange(0, BLOCK_K)
            rest = s < width
            h = tl.load(row + s, mask=rest, other=0.0, cache_modifier=".cg").to(tl.float32)
            w = tl.load(w_ptr[:, None] + s.to(tl.int64)[None, :] * stride_s, mask=rest[None, :], other=0.0)
            acc += h[None, :] * w.to(tl.float32)
        y = tl.sum(acc, 1)
    if share_T is not None:
        y *= tl.load(share_T + token, cache_modifier=".cg")
    return y
