"""The custom op `moerunner::triton_experts`: from tokens and top-k ids to weighted sums, in two to six launches.

Shape suffixes: T tokens, K chosen experts, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from moerunner.kernels import hopper, tables
from moerunner.kernels import tiles as tile_choice
from moerunner.kernels.common import blocks, computable, has_tma, launch, power_of_2
from moerunner.kernels.few import few_down, few_down_each, few_gate_up
from moerunner.kernels.grouped import copy_rows, down, gate_up, sum_slots
from moerunner.kernels.operators import operator
from moerunner.kernels.order import Tiled, order_slots
from moerunner.kernels.tiles import Few, Grouped, Product, Specialised, Tiles, Transposed

LAYOUTS = ("concat", "interleaved", "none")
ROWS, SUMMED, FINAL = 0, 1, 2
"""Outputs: [T, K, H] unweighted rows in x's dtype; [T, H] sums in float32; [T, H] sums in x's dtype."""
OUTPUTS = ("rows", "summed", "final")
"""Their names."""


def _empty_output(x_TH: Tensor, ids_TK: Tensor, w2: Tensor, output: int) -> Tensor:
    tokens, k = ids_TK.shape
    shape = (tokens, k, w2.shape[1]) if output == ROWS else (tokens, w2.shape[1])
    return torch.empty(shape, dtype=torch.float32 if output == SUMMED else x_TH.dtype, device=x_TH.device)


def _fake(x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, w13: Tensor, w2: Tensor, *rest: Any) -> Tensor:
    return _empty_output(x_TH, ids_TK, w2, rest[11])


@operator("triton_experts", fake=_fake)
def triton_experts(
    x_TH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    w13: Tensor,
    w2: Tensor,
    b13: Tensor | None,
    b2: Tensor | None,
    layout: int,
    kind: int,
    alpha: float,
    beta: float,
    limit: float | None,
    clamp_after: bool,
    gate_softcap: float | None,
    up_softcap: float | None,
    input_weighting: bool,
    output: int,
    scale: float,
    batch_invariant: bool,
    shared: Tensor | None = None,
    shared_down: Tensor | None = None,
    share: Tensor | None = None,
) -> Tensor:
    """The chosen experts of every token.

    Args:
        x_TH, w13 [E, 2I, H] ([E, I, H] ungated), w2 [E, H, I], b13 [E, 2I], b2 [E, H]: any strides. ids: any outside 0..E-1 is
            no expert. weights: float32.
        layout: index into `LAYOUTS`, of w13's rows. kind: index into `operators.KINDS`. output: ROWS, SUMMED or FINAL.
        scale: factor on the sums. batch_invariant: a token's bits do not depend on the others, nor on how many there are.
        shared: [T, H], added to the sums; or [T, S] of which shared_down [H, S] makes that. share: [T] float32, its weights.
    """
    return run(
        x_TH, ids_TK, weights_TK, w13, w2, b13, b2, layout, kind, alpha, beta, limit, clamp_after, gate_softcap, up_softcap,
        input_weighting, output, scale, tile_choice.invariant(x_TH.element_size()) if batch_invariant else None,
        shared, shared_down, share,
    )  # fmt: skip


def run(
    x_TH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    w13: Tensor,
    w2: Tensor,
    b13: Tensor | None,
    b2: Tensor | None,
    layout: int,
    kind: int,
    alpha: float,
    beta: float,
    limit: float | None,
    clamp_after: bool,
    gate_softcap: float | None,
    up_softcap: float | None,
    input_weighting: bool,
    output: int,
    scale: float,
    tiles: Tiles | None,
    shared: Tensor | None = None,
    shared_down: Tensor | None = None,
    share: Tensor | None = None,
) -> Tensor:
    """`triton_experts` with tiles of the caller's choice; None chooses them from the shape."""
    if ids_TK.numel() == 0:
        return _empty_output(x_TH, ids_TK, w2, output).zero_()
    dtype = x_TH.dtype
    x_TH, w13, w2, b13, b2 = (computable(t) for t in (x_TH, w13, w2, b13, b2))  # type: ignore[assignment]
    ids_TK, weights_TK = ids_TK.contiguous(), weights_TK.contiguous()
    (tokens, k), (experts, hidden, inter) = ids_TK.shape, w2.shape
    if tiles is None:
        tiles = tables.choose(tokens, k, experts, hidden, inter, gated=layout != 2, dtype=x_TH.dtype, device=x_TH.device)
        if isinstance(tiles, Few) and any(_turned_both(w13, w2, layout)):
            tiles = tile_choice.choose(tokens, k, experts, hidden, inter, itemsize=x_TH.element_size(), rows=False)
    if isinstance(tiles, Specialised | Transposed) and not _specialisable(x_TH, w13, w2, tiles):
        tiles = tile_choice.choose(tokens, k, experts, hidden, inter, itemsize=x_TH.element_size())
    activation = (kind, alpha, beta, limit, clamp_after, gate_softcap, up_softcap)
    if shared is not None and shared_down is not None and not isinstance(tiles, Few):
        shared, shared_down = F.linear(shared, shared_down.to(shared.dtype)), None
    beside = (None if shared is None else computable(shared.contiguous()), computable(shared_down), share)
    call = (x_TH, ids_TK, weights_TK, w13, w2, b13, b2, layout, activation, input_weighting, output, scale, beside)
    out = _few(*call, tiles) if isinstance(tiles, Few) else _grouped(*call, tiles)
    return out if output == SUMMED else out.to(dtype)


def _few(x, ids, weights, w13, w2, b13, b2, layout, activation, input_weighting, output, scale, beside, tiles: Few) -> Tensor:
    (tokens, k), (experts, hidden, inter) = ids.shape, w2.shape
    h_SI = x.new_empty(tokens * k, inter)
    up, dn = tiles.up, tiles.down
    ahead = power_of_2(blocks(inter * w2.element_size(), 128)) if tiles.prefetch and w2.stride(2) == 1 else 0
    launch(
        few_gate_up, (blocks(inter, up.block_n), tokens * k),
        x, ids, w13, b13, weights, h_SI, k, experts, hidden, inter, *_strides((x, 2), (w13, 3), (b13, 2)),
        input_weighting, layout != 2, layout == 1, *activation, up.block_n, up.block_k,
        device=x.device, warps=up.warps,
    )  # fmt: skip
    out = _empty_output(x, ids, w2, output)
    width = 0 if beside[0] is None else beside[0].shape[1]
    if output != ROWS and (each := tiles.each) is not None:
        launch(
            few_down_each, (blocks(hidden, each.block_n), tokens),
            h_SI, ids, w2, b2, weights, *beside, out, experts, hidden, inter, width, scale,
            *_strides((w2, 3), (b2, 2), (beside[1], 2)), not input_weighting, k, each.block_n, each.block_k,
            device=x.device, warps=each.warps,
        )  # fmt: skip
        return out
    launch(
        few_down, (blocks(hidden, dn.block_n), tokens),
        h_SI, ids, w2, b2, weights, *beside, out, k, experts, hidden, inter, width, scale,
        *_strides((w2, 3), (b2, 2), (beside[1], 2)), output != ROWS and not input_weighting, output != ROWS,
        power_of_2(k), dn.block_n, dn.block_k, ahead,
        device=x.device, warps=dn.warps,
    )  # fmt: skip
    return out


def _grouped(
    x,
    ids,
    weights,
    w13,
    w2,
    b13,
    b2,
    layout,
    activation,
    input_weighting,
    output,
    scale,
    beside,
    tiles: Grouped | Specialised | Transposed,
) -> Tensor:
    (tokens, k), (experts, hidden, inter) = ids.shape, w2.shape
    # Rows are returned as they are, so those without an expert must be zero; a sum does not read them.
    y_SH = x.new_zeros(tokens * k, hidden) if output == ROWS else x.new_empty(tokens * k, hidden)
    h_RI = x.new_empty(tokens * k, inter)
    weighted = output != ROWS and not input_weighting
    operands = (x, w13, w2, b13, b2, weights, h_RI, y_SH)
    how = (k, layout, activation, input_weighting, weighted)
    if isinstance(tiles, Grouped):
        _tiled(*operands, *how, tiles, order_slots(ids, experts, tiles.block_m))
    else:
        _specialised(*operands, *how, tiles, order_slots(ids, experts, hopper.rows_of(tiles)))
    if output == ROWS:
        return y_SH.view(tokens, k, hidden)
    out = _empty_output(x, ids, w2, output)
    block_h = min(2048, power_of_2(hidden))
    launch(
        sum_slots, (tokens, blocks(hidden, block_h)), y_SH, ids, beside[0], beside[2], out, hidden, experts, scale, k, block_h,
        device=x.device, warps=max(1, block_h // 256),
    )  # fmt: skip
    return out


def _tiled(
    x, w13, w2, b13, b2, weights, h_RI, y_SH, k, layout, activation, input_weighting, weighted, tiles: Grouped, order: Tiled
) -> None:
    """The two products by `grouped.py`."""
    (_, hidden, inter), up, dn, block_m = w2.shape, tiles.up, tiles.down, tiles.block_m
    precision = "tf32x3" if x.dtype == torch.float32 else "ieee"
    count = order.tiles_4N.shape[1]
    gated, interleaved = layout != 2, layout == 1
    turned, down_turned = _turned_both(w13, w2, layout)
    up_tma, down_tma = up.tma and _describable(w13, turned), dn.tma and _describable(w2, down_turned)
    paired = interleaved or (not turned and w13.stride(2) == 1 and not up_tma)
    launch(
        gate_up, (count * blocks(inter, up.block_n // 2 if gated else up.block_n),),
        x, _described(w13, up, turned, halves=gated and not paired) if up_tma else w13,
        b13, weights, order.slot_R, order.tiles_4N, h_RI, k, hidden, inter, count,
        *_strides((x, 2), (w13, 3), (b13, 2)), input_weighting, gated, interleaved, paired,
        *activation, precision, block_m, up.block_n, up.block_k, hidden % up.block_k == 0, up_tma, turned,
        device=x.device, warps=up.warps, stages=up.stages,
    )  # fmt: skip
    launch(
        down, (count * blocks(hidden, dn.block_n),),
        h_RI, _described(w2, dn, down_turned) if down_tma else w2, b2, weights, order.slot_R, order.tiles_4N, y_SH,
        hidden, inter, count, *_strides((w2, 3), (b2, 2)), weighted, precision,
        block_m, dn.block_n, dn.block_k, inter % dn.block_k == 0, down_tma, down_turned,
        device=x.device, warps=dn.warps, stages=dn.stages,
    )  # fmt: skip


def _specialised(
    x, w13, w2, b13, b2, weights, h_RI, y_SH, k, layout, activation, input_weighting, weighted,
    tiles: Specialised | Transposed, order: Tiled,
) -> None:  # fmt: skip
    """The two products by `hopper.py`."""
    rest = (layout, activation, k, tiles)
    if isinstance(tiles, Specialised) and tiles.copied:
        (rows, hidden), tokens = y_SH.shape, x
        x = x.new_empty(rows, hidden)
        launch(
            copy_rows, (rows,), tokens, order.slot_R, x, k, hidden, tokens.stride(0), power_of_2(hidden),
            device=x.device, warps=4,
        )  # fmt: skip
    hopper.product(x, w13, b13, weights, order, h_RI, *rest, up=True, weighted=input_weighting)
    hopper.product(h_RI, w2, b2, weights, order, y_SH, *rest, up=False, weighted=weighted)


def _specialisable(x: Tensor, w13: Tensor, w2: Tensor, tiles: Specialised | Transposed) -> bool:
    """Whether `hopper.py` can run it: on Hopper, 16-bit dtypes, rows of whole 16 bytes, weights that TMA can read."""
    eights = (w13.shape[1] // 8, w2.shape[1] // 8)  # rows of weights, which `Transposed` takes in pairs
    whole = x.element_size() == 2 and all(n % 8 == 0 for n in w2.shape[1:])
    whole = whole and not (isinstance(tiles, Transposed) and any(n % 2 for n in eights))
    rows = x.stride(1) == 1 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0
    return whole and rows and not hopper.why_not(x.device) and _describable(w13) and _describable(w2)


def _turned(w: Tensor, part: int = 1) -> bool:
    """Whether an [E, rows, columns] weight lies as [E, columns, rows], as some checkpoints have it. part: rows of a half."""
    eights = w.shape[1] % 8 == 0 and (part == 1 or part % 8 == 0) and all(n % 8 == 0 for n in (w.stride(0), w.stride(2)))
    return w.stride(1) == 1 and w.stride(2) != 1 and eights and w.data_ptr() % 16 == 0


def _turned_both(w13: Tensor, w2: Tensor, layout: int) -> tuple[bool, bool]:
    return _turned(w13, w2.shape[2] if layout == 0 else 1), _turned(w2)


def _describable(w: Tensor, turned: bool = False) -> bool:
    """Whether TMA can read an [E, rows, columns] weight as one matrix: 16-byte aligned rows, experts one after the other.

    turned: or each expert's as it lies, see `_turned`.
    """
    if turned:
        return has_tma(w.device)
    aligned = w.data_ptr() % 16 == 0 and w.stride(1) * w.element_size() % 16 == 0
    return aligned and w.stride(2) == 1 and w.stride(0) == w.shape[1] * w.stride(1) and has_tma(w.device)


def _described(w: Tensor, product: Product, turned: bool, *, halves: bool = False) -> TensorDescriptor:
    """A descriptor of [E * rows, columns]; halves: of [2E, rows / 2, columns], in boxes of both halves of one expert.

    turned: of [E, columns, rows] and of [E, columns, 2, rows / 2].
    """
    experts, rows, columns = w.shape
    step = w.stride(1)
    if turned:
        first, block_n = [w.stride(0), w.stride(2)], product.block_n
        if halves:
            shape, strides, box = [columns, 2, rows // 2], [*first, rows // 2, 1], [2, block_n // 2]
        else:
            shape, strides, box = [columns, rows], [*first, 1], [block_n]
        return TensorDescriptor(w, [experts, *shape], strides, [1, product.block_k, *box])
    if halves:
        shape, strides, box = [2 * experts, rows // 2, columns], [rows // 2 * step, step, 1], [2, product.block_n // 2]
    else:
        shape, strides, box = [experts * rows, columns], [step, 1], [product.block_n]
    return TensorDescriptor(w, shape, strides, [*box, product.block_k])


def _strides(*tensors: tuple[Tensor | None, int]) -> list[int]:
    return [s for t, n in tensors for s in (t.stride() if t is not None else (0,) * n)]
