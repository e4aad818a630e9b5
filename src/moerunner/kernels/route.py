"""Routing in one launch: the custom op `moerunner::route`, from logits (or few tokens and the gate) to ids and weights.

The rules are those of `ops/route.py`, in float32, with the same roundings: scores are the same bits wherever PyTorch computes
them element by element, so that the same experts win. A row of logits lies in the registers of one warp, or of four. The best
key is taken K times; a key that was taken holds its place from then on, so ids and weights are stored from where their logits
lie.

Shape suffixes: T tokens, E experts that can be chosen (zero experts too), K chosen, S router-weighted shared experts, L = E + S
logits, H hidden.
"""

# Of branches that a constant decides, what one assigns is read by another that the same constant decides.
# pyright: reportPossiblyUnboundVariable=false, reportUnboundVariable=false, reportOperatorIssue=false
from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

from moerunner.kernels import routing
from moerunner.kernels.common import INTERPRETING, blocks, computable, follow, launch, lead, power_of_2, prefetch
from moerunner.kernels.operators import operator

_PLAIN = tl.constexpr(INTERPRETING)
_SOFTMAX, _SIGMOID, _SQRTSOFTPLUS, _SOFTMAX_TOPK, _SIGMOID_TOPK, _SPARSEMIXER = (tl.constexpr(i) for i in range(6))
_SUM, _MAX_SUM, _P_NORM = (tl.constexpr(i) for i in range(1, 4))
_NEG = tl.constexpr(float("-inf"))
_TAKEN = tl.constexpr(-(2**31))
"""Keys are ordered as int32 above -2139095041, which is -inf; below is room for the places of those that were taken."""


@triton.jit
def _exp(x):
    """PyTorch's, to the bit: `tl.exp` rounds x * log2(e) first. The interpreter has none of these functions."""
    if _PLAIN:
        return tl.exp(x)
    else:
        return libdevice.exp(x)


@triton.jit
def _tanh(x):
    if _PLAIN:
        return (1.0 - 2.0 / (tl.exp(2.0 * x.to(tl.float64)) + 1.0)).to(tl.float32)
    else:
        return libdevice.tanh(x)


@triton.jit
def _log1p(x):
    if _PLAIN:
        wide = x.to(tl.float64)
        return tl.where(wide < 1e-4, wide - wide * wide / 2.0, tl.log(1.0 + wide)).to(tl.float32)
    else:
        return libdevice.log1p(x)


@triton.jit
def sigmoid(z):
    return tl.div_rn(1.0, 1.0 + _exp(-z))


@triton.jit
def _logits(at, inside, SCALE: tl.constexpr, SOFTCAP: tl.constexpr):
    """Logits, scaled and capped; -inf outside."""
    z = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if SCALE != 1.0:
        z = z * SCALE
    if SOFTCAP is not None:
        z = SOFTCAP * _tanh(z * (1.0 / SOFTCAP))  # how PyTorch divides by a number on a GPU
    return tl.where(inside, z, _NEG)


@triton.jit
def _ordered(key):
    """int32 that sort as the float32 keys do: NaN equals -inf, -0 equals 0."""
    key = tl.where(key != key, _NEG, key)
    bits = key.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


@triton.jit
def _take(order, K: tl.constexpr):
    """The K largest of each row [.., L], the first of equals first, become `_TAKEN` + their place.

    Two reductions of whole numbers, each one instruction of a warp; a reduction of pairs would be ten.
    """
    L: tl.constexpr = order.shape[1]
    lane = tl.arange(0, L)[None, :]
    for place in range(K):
        best = tl.max(order, 1, keep_dims=True)
        first = tl.min(tl.where(order == best, lane, L), 1, keep_dims=True)
        order = tl.where(lane == first, _TAKEN + place, order)
    return order


@triton.jit
def _keep_groups(key, GROUPS: tl.constexpr, KEPT: tl.constexpr, BEST_TWO: tl.constexpr, FILL: tl.constexpr, GP: tl.constexpr):
    """Keys with those of the groups that lose replaced by FILL. Lanes [G, M] per row, both rounded up."""
    ROWS: tl.constexpr = key.shape[0]
    MP: tl.constexpr = key.shape[1] // GP
    of = tl.reshape(tl.where(key != key, _NEG, key), (ROWS, GP, MP))
    best = tl.max(of, 2)
    if BEST_TWO:
        member = tl.arange(0, MP)[None, None, :]
        first = tl.min(tl.where(of == best[:, :, None], member, MP), 2)
        best += tl.max(tl.where(member == first[:, :, None], _NEG, of), 2)
    order = tl.where(tl.arange(0, GP)[None, :] < GROUPS, _ordered(best), _TAKEN + KEPT)
    kept = (_take(order, KEPT) < _TAKEN + KEPT)[:, :, None]
    return tl.where(tl.reshape(tl.broadcast_to(kept, (ROWS, GP, MP)), (ROWS, GP * MP)), key, FILL)


@triton.jit
def _close_to(top, z, left, JITTER: tl.constexpr):
    """Sparsemixer's weight of the expert with logit `top`: a softmax over what is left and lies close to it."""
    far = tl.div_rn(top - z, tl.maximum(tl.abs(z), top)) > 2.0 * JITTER
    near = tl.where(far, _NEG, left)
    peak = tl.max(near, 1, keep_dims=True)
    return tl.div_rn(_exp(top - peak), tl.sum(_exp(near - peak), 1, keep_dims=True))


@triton.jit(do_not_specialize=["T"])
def _gate(
    x_TH,
    gate_LH,
    bias_L,
    logits_TL,
    T,
    L,
    hidden,
    stride_xt,
    stride_xh,
    stride_gl,
    stride_gh,
    TOKENS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    AHEAD: tl.constexpr,
    PDL: tl.constexpr,
):
    """One logit of TOKENS tokens: float32 products of what is stored in any dtype, summed once at the end.

    AHEAD: so many runs of 128 bytes of its weights are fetched into the cache while the kernel before still runs.
    """
    row = tl.program_id(0).to(tl.int64)
    if PDL and AHEAD > 0:  # of the weights, which lie there already
        run = tl.arange(0, AHEAD).to(tl.int64) * (128 // (gate_LH.dtype.element_ty.primitive_bitwidth // 8))
        prefetch(gate_LH + row * stride_gl + tl.minimum(run, hidden - 1))
    lead(PDL)
    t = tl.program_id(1).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    inside = t < T
    acc = tl.zeros([TOKENS, BLOCK_K], tl.float32)
    for start in range(0, hidden, BLOCK_K):
        h = start + tl.arange(0, BLOCK_K)
        rest = h < hidden
        g = tl.load(gate_LH + row * stride_gl + h.to(tl.int64) * stride_gh, mask=rest, other=0.0).to(tl.float32)
        at = t[:, None] * stride_xt + h.to(tl.int64)[None, :] * stride_xh
        acc += tl.load(x_TH + at, mask=inside[:, None] & rest[None, :], other=0.0).to(tl.float32) * g[None, :]
    z = tl.sum(acc, 1)
    if bias_L is not None:
        z += tl.load(bias_L + row).to(tl.float32)
    tl.store(logits_TL + t * L + row, z.to(logits_TL.dtype.element_ty), mask=inside)


# Loads of several logits at once would give a thread neighbours. One at a time, a thread has every 32nd, which is how PyTorch
# sums a softmax (so those sums are the same bits), and ids need not change threads before they are stored.
@triton.jit
def decide(
    program,
    logits, selection_bias, per_expert_scale, global_scale, hash_table, input_ids, token_types, ids_TK, weights_TK, shared_TS,
    T, stride_t, stride_e, E: tl.constexpr, K: tl.constexpr, S: tl.constexpr, SCORE: tl.constexpr, BY_LOGIT: tl.constexpr,
    LOGIT_SCALE: tl.constexpr, SOFTCAP: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, BEST_TWO: tl.constexpr,
    FILL: tl.constexpr, RENORMALISE: tl.constexpr, EPS: tl.constexpr, P: tl.constexpr, JITTER: tl.constexpr,
    SETS: tl.constexpr, FACTOR: tl.constexpr, GP: tl.constexpr, MP: tl.constexpr, KP: tl.constexpr, SP: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS tokens, each [GP * MP] lanes: GROUPS groups of E // GROUPS experts, both rounded up to powers of two."""
    t = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    inside = t < T
    row = logits + t * stride_t
    lane = tl.arange(0, GP * MP)[None, :]
    if (GROUPS == 1) or (E // GROUPS == MP):
        e, real = lane, lane < E
    else:
        M: tl.constexpr = E // GROUPS
        e, real = lane // MP * M + lane % MP, (lane // MP < GROUPS) & (lane % MP < M)
    if (hash_table is None) or (SCORE == _SOFTMAX):
        z = _logits(row + e.to(tl.int64) * stride_e, inside & real, LOGIT_SCALE, SOFTCAP)
        if SETS > 1:
            own = e // (E // SETS) == tl.load(token_types + t, mask=inside, other=0)
            z = tl.where(own, z, _NEG)
        if SCORE == _SOFTMAX:
            peak = tl.max(z, 1, keep_dims=True)
            total = tl.sum(_exp(z - peak), 1, keep_dims=True)
    if hash_table is not None:
        place = tl.arange(0, KP)[None, :]
        chosen = inside & (place < K)
        word = tl.load(input_ids + t, mask=inside, other=0).to(tl.int64)
        e = tl.load(hash_table + word * K + place, mask=chosen, other=-1).to(tl.int64)
        z = _logits(row + e * stride_e, chosen & (e >= 0) & (e < E), LOGIT_SCALE, SOFTCAP)

    if SCORE == _SOFTMAX:
        w = tl.div_rn(_exp(z - peak), total)
    elif SCORE == _SQRTSOFTPLUS:
        w = tl.sqrt_rn(tl.where(z > 20.0, z, _log1p(_exp(z))))
    elif (SCORE == _SIGMOID) or (SCORE == _SIGMOID_TOPK):  # noqa: SIM109 - Triton has no `in`
        w = sigmoid(z)

    if hash_table is None:
        if BY_LOGIT:
            key = z
        else:
            key = w
        if selection_bias is not None:
            key += tl.load(selection_bias + e, mask=real, other=0.0).to(tl.float32)
        if SETS > 1:
            key = tl.where(own, key, _NEG)
        if GROUPS > 1:
            key = _keep_groups(tl.where(real, key, _NEG), GROUPS, KEPT, BEST_TWO, FILL, GP)
        order = _take(tl.where(real, _ordered(key), _TAKEN + K), K)
        chosen = inside & (order < _TAKEN + K)
        place = tl.where(chosen, order & 0x7FFFFFFF, K)

    if SCORE == _SOFTMAX_TOPK:
        peak = tl.max(tl.where(chosen, z, _NEG), 1, keep_dims=True)
        w = tl.where(chosen, _exp(z - peak), 0.0)
        w = tl.div_rn(w, tl.sum(w, 1, keep_dims=True))
    elif SCORE == _SPARSEMIXER:
        top = tl.sum(tl.where(place == 0, z, 0.0), 1, keep_dims=True)
        second = tl.sum(tl.where(place == 1, z, 0.0), 1, keep_dims=True)
        left = tl.where(place == 0, _NEG, z)
        w = tl.where(place == 0, _close_to(top, z, z, JITTER), _close_to(second, z, left, JITTER))
    w = tl.where(chosen, w, 0.0)
    if S > 0:
        s = tl.arange(0, SP)[None, :]
        has = inside & (s < S)
        shared = tl.where(has, sigmoid(_logits(row + (E + s).to(tl.int64) * stride_e, has, LOGIT_SCALE, SOFTCAP)), 0.0)

    if RENORMALISE != 0:
        if RENORMALISE == _P_NORM:
            size = tl.sum(tl.exp(tl.log(w.to(tl.float64)) * P), 1, keep_dims=True)
            if S > 0:
                size += tl.sum(tl.exp(tl.log(shared.to(tl.float64)) * P), 1, keep_dims=True)
            size = tl.exp(tl.log(size) / P).to(tl.float32)
        else:
            size = tl.sum(w, 1, keep_dims=True)
            if S > 0:
                size += tl.sum(shared, 1, keep_dims=True)
            if RENORMALISE == _SUM:
                size += EPS
            else:
                size = tl.where(size < EPS, EPS, size)  # a select, so that NaN stays NaN
        w = tl.div_rn(w, size)
        if S > 0:
            shared = tl.div_rn(shared, size)
    if per_expert_scale is not None:
        w *= tl.load(per_expert_scale + e, mask=chosen, other=0.0).to(tl.float32)
    if global_scale is not None:
        factor = tl.load(global_scale).to(tl.float32)
        w *= factor
        if S > 0:
            shared *= factor
    if FACTOR != 1.0:
        w *= FACTOR
        if S > 0:
            shared *= FACTOR
    tl.store(ids_TK + t * K + place, e.to(tl.int64), mask=chosen)
    tl.store(weights_TK + t * K + place, w, mask=chosen)
    if S > 0:
        tl.store(shared_TS + t * S + s, shared, mask=has)


@triton.jit(do_not_specialize=["T"], do_not_specialize_on_alignment=["logits"])
def _route(
    logits, selection_bias, per_expert_scale, global_scale, hash_table, input_ids, token_types, ids_TK, weights_TK, shared_TS,
    T, stride_t, stride_e, E: tl.constexpr, K: tl.constexpr, S: tl.constexpr, SCORE: tl.constexpr, BY_LOGIT: tl.constexpr,
    LOGIT_SCALE: tl.constexpr, SOFTCAP: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, BEST_TWO: tl.constexpr,
    FILL: tl.constexpr, RENORMALISE: tl.constexpr, EPS: tl.constexpr, P: tl.constexpr, JITTER: tl.constexpr,
    SETS: tl.constexpr, FACTOR: tl.constexpr, GP: tl.constexpr, MP: tl.constexpr, KP: tl.constexpr, SP: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """`decide`, and nothing beside it."""
    follow(PDL)
    decide(
        tl.program_id(0),
        logits, selection_bias, per_expert_scale, global_scale, hash_table, input_ids, token_types, ids_TK, weights_TK,
        shared_TS, T, stride_t, stride_e, E, K, S, SCORE, BY_LOGIT, LOGIT_SCALE, SOFTCAP, GROUPS, KEPT, BEST_TWO, FILL,
        RENORMALISE, EPS, P, JITTER, SETS, FACTOR, GP, MP, KP, SP, ROWS,
    )  # fmt: skip


def routed(
    x: Tensor,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    selection_bias: Tensor | None,
    per_expert_scale: Tensor | None,
    global_scale: Tensor | None,
    hash_table: Tensor | None,
    input_ids: Tensor | None,
    token_types: Tensor | None,
    experts: int,
    top_k: int,
    score: int,
    by_logit: bool,
    logit_scale: float,
    logit_softcap: float | None,
    groups: int,
    kept: int,
    best_two: bool,
    fill: float,
    renormalise: int,
    eps: float,
    p: float,
    jitter: float,
    modalities: int,
    factor: float,
    rounded: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """ids [T, K] int64, weights [T, K] and weights of shared experts [T, S], both float32.

    Args:
        x: logits [T, L], or tokens [T, H] with gate [L, H] and gate_bias [L]; any strides, float32 or narrower. A second kernel
            then follows the gate's; it is meant for few tokens.
        selection_bias, per_expert_scale: [experts]; global_scale: [1].
        hash_table: [vocab, K], with input_ids [T] in place of a choice by key. token_types: [T], with modalities above 1.
        score: index into `routing.SCORES`; by_logit: the key is the logit. fill: the key in groups that lose, -inf or 0;
            groups=1 is none. renormalise: index into `routing.RENORMALISE`. factor: on all weights.
        rounded: the gate's logits are rounded to x's dtype.
    """
    learned = (selection_bias, per_expert_scale, global_scale, hash_table, input_ids, token_types)
    rule = (score, by_logit, logit_scale, logit_softcap, groups, kept, best_two, fill, renormalise, eps, p, jitter, modalities)
    return run(x, gate, gate_bias, learned, experts, top_k, (*rule, factor), rounded)


triton_route = operator("route", fake=routing.fake)(routed)


def run(
    x: Tensor,
    gate: Tensor | None,
    gate_bias: Tensor | None,
    learned: tuple[Tensor | None, ...],
    experts: int,
    top_k: int,
    rule: tuple[Any, ...],
    rounded: bool,
    beside: Beside | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`routed`, with the tensors and the numbers around `experts` and `top_k` as they come; or with a kernel that does more."""
    tokens, device = x.shape[0], x.device
    ids, weights, shared = routing.empty(x, gate, experts, top_k)
    if tokens == 0:
        return ids, weights, shared
    z: Tensor = computable(x if gate is None else _logits_of_few(x, gate, gate_bias, rounded))  # type: ignore[assignment]
    groups = rule[4]
    gp, mp = power_of_2(groups), power_of_2(experts // groups)
    rows, warps = tile(tokens, gp * mp)
    kernel, programs, first, last = _route, blocks(tokens, rows), (), ()
    if beside is not None:
        rows, warps = 1, beside.warps
        kernel, programs, first, last = beside.kernel, tokens * (1 + beside.programs), beside.first, beside.last
    launch(
        kernel, (programs,), *first, z,
        *(None if t is None else computable(t.contiguous()) for t in learned), ids, weights, shared,
        tokens, *z.stride(), experts, top_k, shared.shape[1], *rule,
        gp, mp, power_of_2(top_k), power_of_2(max(1, shared.shape[1])), rows, *last,
        device=device, warps=warps, first=gate is None, exact=True,
    )  # fmt: skip
    return ids, weights, shared


class Beside(NamedTuple):
    """A kernel that has other programs beside the one that routes a token: how many, and its arguments around the rule's."""

    kernel: Any
    warps: int
    programs: int
    first: tuple[Any, ...]
    last: tuple[Any, ...]


def _logits_of_few(x: Tensor, gate: Tensor, bias: Tensor | None, rounded: bool) -> Tensor:
    """[T, L] in float32, or rounded to x's dtype.

    Tiles as measured on an H200: one read of a row of the gate serves up to four tokens.
    """
    dtype = x.dtype if rounded else torch.float32
    x, gate = computable(x), computable(gate)  # type: ignore[assignment]
    (tokens, hidden), count = x.shape, gate.shape[0]
    at_once, block, warps = (1, 8192, 4) if tokens == 1 else (2, 2048, 8) if tokens == 2 else (4, 1024, 4)
    ahead = power_of_2(blocks(hidden * gate.element_size(), 128)) if gate.stride(1) == 1 else 0
    z: Tensor = computable(torch.empty(tokens, count, dtype=dtype, device=x.device))  # type: ignore[assignment]
    launch(
        _gate, (count, blocks(tokens, at_once)),
        x, gate, None if bias is None else computable(bias.contiguous()), z, tokens, count, hidden,
        *x.stride(), *gate.stride(), at_once, min(block, power_of_2(hidden)), ahead,
        device=x.device, warps=warps,
    )  # fmt: skip
    return z.to(dtype)


def tile(tokens: int, lanes: int) -> tuple[int, int]:
    """Tokens and warps of a program, as measured on an H200. A warp holds a token's row, or four tokens' short rows while there
    are many (starting programs takes time too); four warps hold a long row while tokens are few.
    """
    if tokens > 1024 and lanes <= 64:
        return (4, 4) if lanes <= 32 else (2, 1)
    return 1, 4 if tokens <= 1024 and lanes >= 512 else max(1, lanes // 512)


route = partial(routing.route, triton_route)
"""See `routing.route`."""
