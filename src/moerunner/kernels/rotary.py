"""Rotary embedding of queries and keys in one launch, rounded where Transformers' own code rounds.

Two columns of a head, a pair, turn by the angle of the token and of the pair. Columns behind the last pair stay as they are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moerunner.kernels.common import blocks, launch, power_of_2

_TILE = 1024  # pairs that one program turns at most: two loads of 16 bytes for each of 128 threads


class Form(NamedTuple):
    """Where pairs lie and how their turning is rounded.

    Pairs are (i, i + pairs) or side by side, (2 i, 2 i + 1), as read and as written. half: both columns of a pair turn by the
    cosine i, otherwise each by that of its own column as written. wide: cosines are given for every column that turns,
    otherwise for every pair. rounded: products are rounded to the heads' dtype before they are added.
    """

    beside: bool
    written_beside: bool
    half: bool
    wide: bool
    rounded: bool


_PLACES = (
    (False, False, False, True),  # most
    (False, False, True, False),  # gpt-oss
    (True, False, True, True),  # DeepSeek-V3
    (True, True, True, True),  # ERNIE 4.5, GLM-4
    (True, True, False, True),  # Cohere
)
FORMS = tuple(Form(*places, rounded) for places in _PLACES for rounded in (True, False))
"""Those that Transformers' families have."""


@triton.jit
def _rounded(x, ROUNDED: tl.constexpr, DTYPE: tl.constexpr):
    if ROUNDED:
        return x.to(DTYPE).to(tl.float32)
    else:
        return x


@triton.jit
def _turn(
    x, out, stride, out_stride, heads, head, cos_1, sin_1, cos_2, sin_2,
    PAIRS: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, REST_BLOCK: tl.constexpr,
    BESIDE: tl.constexpr, WRITTEN_BESIDE: tl.constexpr, ROUNDED: tl.constexpr,
):  # fmt: skip
    """Some heads of one token. x, out: its first head."""
    DTYPE: tl.constexpr = out.dtype.element_ty
    head = head + tl.arange(0, HEADS)
    there = (head < heads)[:, None]
    x += head.to(tl.int64)[:, None] * stride
    out += head.to(tl.int64)[:, None] * out_stride
    pair, column = tl.arange(0, BLOCK)[None, :], tl.arange(0, 2 * BLOCK)[None, :]
    if BESIDE:
        both = tl.load(x + column, mask=there & (column < 2 * PAIRS), other=0.0)
        x_1, x_2 = tl.split(tl.reshape(both, (HEADS, BLOCK, 2)))
    else:
        x_1 = tl.load(x + pair, mask=there & (pair < PAIRS), other=0.0)
        x_2 = tl.load(x + PAIRS + pair, mask=there & (pair < PAIRS), other=0.0)
    x_1, x_2 = x_1.to(tl.float32), x_2.to(tl.float32)
    y_1 = _rounded(x_1 * cos_1, ROUNDED, DTYPE) - _rounded(x_2 * sin_1, ROUNDED, DTYPE)
    y_2 = _rounded(x_2 * cos_2, ROUNDED, DTYPE) + _rounded(x_1 * sin_2, ROUNDED, DTYPE)
    if WRITTEN_BESIDE:
        tl.store(out + column, tl.interleave(y_1, y_2).to(DTYPE), mask=there & (column < 2 * PAIRS))
    else:
        tl.store(out + pair, y_1.to(DTYPE), mask=there & (pair < PAIRS))
        tl.store(out + PAIRS + pair, y_2.to(DTYPE), mask=there & (pair < PAIRS))
    if REST:
        rest = tl.arange(0, REST_BLOCK)[None, :]
        at, here = 2 * PAIRS + rest, there & (rest < REST)
        tl.store(out + at, tl.load(x + at, mask=here), mask=here)


@triton.jit(do_not_specialize=["T", "q_heads", "k_heads"])
def _rotary(
    q, k, cos, sin, q_out, k_out, T, q_heads, k_heads,
    q_batch, q_head, q_token, k_batch, k_head, k_token,
    q_out_batch, q_out_head, q_out_token, k_out_batch, k_out_head, k_out_token,
    cos_batch, cos_token, sin_batch, sin_token,
    PAIRS: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, REST_BLOCK: tl.constexpr,
    BESIDE: tl.constexpr, WRITTEN_BESIDE: tl.constexpr, HALF: tl.constexpr, ROUNDED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    batch, token = (tl.program_id(0) // T).to(tl.int64), (tl.program_id(0) % T).to(tl.int64)
    pair = tl.arange(0, BLOCK)
    first, second = pair, pair
    if not HALF:
        first, second = (2 * pair, 2 * pair + 1) if WRITTEN_BESIDE else (pair, PAIRS + pair)
    cos += batch * cos_batch + token * cos_token
    sin += batch * sin_batch + token * sin_token
    cos_1 = tl.load(cos + first, mask=pair < PAIRS, other=0.0).to(tl.float32)[None, :]
    sin_1 = tl.load(sin + first, mask=pair < PAIRS, other=0.0).to(tl.float32)[None, :]
    cos_2 = tl.load(cos + second, mask=pair < PAIRS, other=0.0).to(tl.float32)[None, :]
    sin_2 = tl.load(sin + second, mask=pair < PAIRS, other=0.0).to(tl.float32)[None, :]
    head = tl.program_id(1) * HEADS
    of_q = tl.cdiv(q_heads, HEADS) * HEADS
    if head < of_q:
        _turn(
            q + batch * q_batch + token * q_token, q_out + batch * q_out_batch + token * q_out_token, q_head, q_out_head,
            q_heads, head, cos_1, sin_1, cos_2, sin_2, PAIRS, REST, BLOCK, HEADS, REST_BLOCK, BESIDE, WRITTEN_BESIDE, ROUNDED,
        )  # fmt: skip
    else:
        _turn(
            k + batch * k_batch + token * k_token, k_out + batch * k_out_batch + token * k_out_token, k_head, k_out_head,
            k_heads, head - of_q, cos_1, sin_1, cos_2, sin_2, PAIRS, REST, BLOCK, HEADS, REST_BLOCK, BESIDE, WRITTEN_BESIDE,
            ROUNDED,
        )  # fmt: skip


def rotary(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, form: Form) -> tuple[Tensor, Tensor | None]:
    """Queries and keys turned, in their dtype and with their order of strides.

    q, k: [B, heads, T, D], each with its own number of heads and any strides but the last, which is 1. cos, sin: [B or 1, T,
    columns], the last stride 1, in any dtype.
    """
    batch, heads, tokens, width = q.shape
    cos, sin = cos.expand(batch, -1, -1), sin.expand(batch, -1, -1)
    keys, k_heads = (q, 0) if k is None else (k, k.shape[1])
    q_out, k_out = torch.empty_like(q), None if k is None else torch.empty_like(k)
    keys_out = q_out if k_out is None else k_out
    pairs = cos.shape[-1] // 2 if form.wide else cos.shape[-1]
    rest, block = width - 2 * pairs, power_of_2(pairs)
    together = min(max(1, _TILE // block), power_of_2(max(heads, k_heads)))
    if batch * tokens:
        launch(
            _rotary, (batch * tokens, blocks(heads, together) + blocks(k_heads, together)), q, keys, cos, sin, q_out, keys_out,
            tokens, heads, k_heads, *q.stride()[:3], *keys.stride()[:3], *q_out.stride()[:3], *keys_out.stride()[:3],
            *cos.stride()[:2], *sin.stride()[:2], pairs, rest, block, together, power_of_2(max(1, rest)),
            form.beside, form.written_beside, form.half, form.rounded,
            device=q.device, warps=min(8, max(1, together * block // 256)), first=True, exact=True,
        )  # fmt: skip
    return q_out, k_out
