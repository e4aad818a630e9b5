"""PyTorch's own grouped product: two calls for all experts, no loop and on a GPU no host synchronisation in bfloat16.

Rows behind the last expert's end are never written by it, forward or backward. They are masked by select: on the way out when
the slots are put back, on the way in so that their undefined gradient reaches no token.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from moerunner.experts.base import BackendInfo, ExpertsCall
from moerunner.ops.activation import activate
from moerunner.ops.permute import rows_by_slot, sort_by_expert, take_rows, weighted_sum
from moerunner.ops.precision import wide
from moerunner.values import ExpertWeights, TopK

_DTYPES = frozenset({"float32", "bfloat16", "float16"})

INFO = BackendInfo(
    name="grouped_mm",
    dtypes={"cpu": _DTYPES, "cuda": _DTYPES},
    stride_bytes=16,
    bias=True,
    input_weighting=True,
    id_minus_one=True,
    row_output=True,
    backward=True,
    deterministic=True,
    host_sync=True,
    priority={"cpu": 20, "cuda": 20},
)


def run(x_TH: Tensor, topk: TopK, weights: ExpertWeights, call: ExpertsCall) -> Tensor:
    """[T, H] float32 weighted sums, or [T, K, H] rows; see `ExpertsCall`."""
    order = sort_by_expert(topk.ids, weights.num_experts)
    ends = order.ends_E.to(torch.int32)
    slot_valid_R1 = order.valid_TK.reshape(-1)[order.slot_R].unsqueeze(1)
    expert_R = topk.ids.reshape(-1)[order.slot_R].clamp(min=0)
    b13, b2 = weights.get("b13"), weights.get("b2") if call.down_bias else None
    x_RH = take_rows(x_TH, order.token_R)
    if call.input_weighting:
        w_R1 = torch.where(slot_valid_R1, topk.weights.reshape(-1)[order.slot_R, None], 0)  # 0 * NaN would be x's gradient
        x_RH = (x_RH * w_R1.to(x_RH.dtype)).to(x_TH.dtype)
    if torch.is_grad_enabled():
        x_RH = torch.where(slot_valid_R1, x_RH, 0)
    h_RI = grouped_mm(x_RH, weights.w13.to(x_TH.dtype).transpose(1, 2), offs=ends)
    if b13 is not None:  # in float32, so that product and bias are not rounded apart
        h_RI = wide(h_RI) + wide(b13)[expert_R]
    if torch.is_grad_enabled():
        h_RI = torch.where(slot_valid_R1, h_RI, 0)
    h_RI = activate(h_RI, call.activation, gate_up=weights.gate_up).to(x_TH.dtype)
    y_RH = grouped_mm(h_RI, weights.w2.to(x_TH.dtype).transpose(1, 2), offs=ends)
    if b2 is not None:
        y_RH = wide(y_RH) + wide(b2)[expert_R]
    if call.output == "rows":
        return rows_by_slot(y_RH, order)
    return weighted_sum(y_RH, None if call.input_weighting else topk.weights, order)
