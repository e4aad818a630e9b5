"""A loop over the experts that were hit, on contiguous slices of the sorted tokens.

Plain matrix products, so it runs wherever PyTorch does and differentiates. It reads the counts on the host, which on a GPU
is a synchronisation: right first, and the yardstick for the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moerunner.experts.base import BackendInfo, ExpertsCall
from moerunner.ops.activation import activate
from moerunner.ops.permute import rows_by_slot, sort_by_expert, weighted_sum
from moerunner.ops.precision import linear
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
    priority={"cpu": 20, "cuda": 10},
)


def run(x_TH: Tensor, topk: TopK, weights: ExpertWeights, call: ExpertsCall) -> Tensor:
    """[T, H] float32 weighted sums, or [T, K, H] rows; see `ExpertsCall`."""
    order = sort_by_expert(topk.ids, weights.num_experts)
    weights_R = topk.weights.reshape(-1)[order.slot_R]
    b13, b2 = weights.get("b13"), weights.get("b2") if call.down_bias else None
    rows, start = [], 0
    for e, stop in enumerate(order.ends_E.tolist()):
        if stop == start:
            continue
        x_RH = x_TH[order.token_R[start:stop]]
        if call.input_weighting:
            x_RH = (x_RH * weights_R[start:stop, None].to(x_RH.dtype)).to(x_TH.dtype)
        h = linear(x_RH, weights.w13[e], None if b13 is None else b13[e])
        h = activate(h, call.activation, gate_up=weights.gate_up)
        rows.append(linear(h, weights.w2[e], None if b2 is None else b2[e]))
        start = stop
    y_RH = torch.cat(rows) if rows else linear(x_TH.new_zeros(0, weights.w2.shape[2]), weights.w2[0])
    if call.output == "rows":
        return rows_by_slot(y_RH, order)
    return weighted_sum(y_RH, None if call.input_weighting else topk.weights, order)
