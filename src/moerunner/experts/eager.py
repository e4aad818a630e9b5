"""A loop over the experts that were hit, on contiguous slices of the sorted tokens.

Plain matrix products, so it runs wherever PyTorch does and differentiates. It reads the counts on the host, which on a GPU
is a synchronisation: right first, and the yardstick for the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moerunner.experts.base import BackendInfo, ExpertsCall
from moerunner.ops.activation import activate
from moerunner.ops.permute import rows_by_slot, sort_by_expert, take_rows, weighted_sum
from moerunner.ops.precision import linear, wide
from moerunner.values import ExpertWeights, TopK

_DTYPES = frozenset({"float64", "float32", "bfloat16", "float16"})

INFO = BackendInfo(
    name="eager",
    dtypes={"cpu": _DTYPES, "cuda": _DTYPES},
    bias=True,
    input_weighting=True,
    id_minus_one=True,
    row_output=True,
    backward=True,
    deterministic=True,
    host_sync=True,
    priority={"cpu": 10, "cuda": 10, "cpu/float16": 30},
    few_tokens={"cpu": 1},
)


def run(x_TH: Tensor, topk: TopK, weights: ExpertWeights, call: ExpertsCall) -> Tensor:
    """[T, H] float32 weighted sums, or [T, K, H] rows; see `ExpertsCall`."""
    if topk.ids.shape[0] == 1 and call.output == "summed":
        return _one_token(x_TH, topk, weights, call)
    order = sort_by_expert(topk.ids, weights.num_experts)
    weights_R = topk.weights.reshape(-1)[order.slot_R]
    rows, start = [], 0
    for e, stop in enumerate(order.ends_E.tolist()):
        if stop == start:
            continue
        x_RH = take_rows(x_TH, order.token_R[start:stop])
        if call.input_weighting:
            x_RH = (x_RH * weights_R[start:stop, None].to(x_RH.dtype)).to(x_TH.dtype)
        rows.append(_expert(x_RH, e, weights, call))
        start = stop
    y_RH = torch.cat(rows) if rows else _expert(x_TH[:0], 0, weights, call)  # no row, but gradients of zero
    if call.output == "rows":
        return rows_by_slot(y_RH, order)
    return weighted_sum(y_RH, None if call.input_weighting else topk.weights, order)


def _one_token(x_1H: Tensor, topk: TopK, weights: ExpertWeights, call: ExpertsCall) -> Tensor:
    """One token needs no sort: its experts in slot order, and one product with its weights."""
    slots = [(k, e) for k, e in enumerate(topk.ids[0].tolist()) if e >= 0]
    if not slots:
        return wide(_expert(x_1H[:0], 0, weights, call)).sum(0, keepdim=True)
    w_K = topk.weights[0] if len(slots) == topk.ids.shape[1] else topk.weights[0, [k for k, _ in slots]]
    if call.input_weighting:
        rows = [_expert((x_1H * w.to(x_1H.dtype)), e, weights, call) for w, (_, e) in zip(w_K, slots, strict=True)]
        return wide(torch.cat(rows)).sum(0, keepdim=True)
    y_KH = wide(torch.cat([_expert(x_1H, e, weights, call) for _, e in slots]))
    return w_K.to(y_KH.dtype).unsqueeze(0) @ y_KH


def _expert(x_RH: Tensor, e: int, weights: ExpertWeights, call: ExpertsCall) -> Tensor:
    b13, b2 = weights.get("b13"), weights.get("b2") if call.down_bias else None
    h = linear(x_RH, weights.w13[e], None if b13 is None else b13[e])
    h = activate(h, call.activation, gate_up=weights.gate_up)
    return linear(h, weights.w2[e], None if b2 is None else b2[e])
