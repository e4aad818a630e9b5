"""Triton kernels: gathered rows, gate and up in one product with the activation in it, nothing read back to the host.

The kernels are imported on first use, so that this file can say what they need where Triton is absent.
"""

from __future__ import annotations

from torch import Tensor

from moerunner.experts.base import Addend, BackendInfo, ExpertsCall
from moerunner.values import ExpertWeights, TopK

INFO = BackendInfo(
    name="triton",
    dtypes={"cuda": frozenset({"float32", "bfloat16", "float16"})},
    bias=True,
    input_weighting=True,
    id_minus_one=True,
    row_output=True,
    applies_scale=True,
    rounds=True,
    adds=True,
    deterministic=True,
    batch_invariant=True,
    capturable=True,
    host_sync=False,
    priority={"cuda": 30},
    requires="triton",
)


def run(x_TH: Tensor, topk: TopK, weights: ExpertWeights, call: ExpertsCall, addend: Addend | None = None) -> Tensor:
    """[T, H] weighted sums, or [T, K, H] rows; see `ExpertsCall`. addend: joins the sums."""
    from moerunner.kernels import experts as kernels
    from moerunner.kernels.operators import numbers_of

    shared = () if addend is None else (addend.rows, addend.down, addend.share)
    return kernels.triton_experts(
        x_TH,
        topk.ids,
        topk.weights.float(),
        weights.w13,
        weights.w2,
        weights.get("b13"),
        weights.get("b2") if call.down_bias else None,
        kernels.LAYOUTS.index(weights.gate_up),
        *numbers_of(call.activation),
        call.input_weighting,
        kernels.OUTPUTS.index(call.output),
        call.scale,
        call.batch_invariant,
        *shared,
    )
