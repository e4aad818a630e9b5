"""Native kernels for CPUs: every chosen expert's weights are read once, gate and up in one pass with the activation in it.

A token's result does not depend on the number of threads, nor, if that is asked for, on the batch: AMX's tiles and the outer
products, which many tokens of an expert are multiplied by, are left out then. The custom op is imported on first use.
"""

from __future__ import annotations

from torch import Tensor

from moerunner.experts.base import BackendInfo, ExpertsCall
from moerunner.kernels.cpu import library
from moerunner.values import ExpertWeights, TopK

INFO = BackendInfo(
    name="cpu",
    dtypes={"cpu": frozenset({"float32", "bfloat16", "float16"})},
    formats=frozenset({"none", "int8"}),
    bias=True,
    input_weighting=True,
    id_minus_one=True,
    row_output=True,
    deterministic=True,
    batch_invariant=True,
    host_sync=False,
    priority={"cpu": 40},
    few_tokens={"cpu": 1},
    unavailable=library.why_not,
)


def run(x_TH: Tensor, topk: TopK, weights: ExpertWeights, call: ExpertsCall) -> Tensor:
    """[T, H] float32 weighted sums, or [T, K, H] rows; see `ExpertsCall`."""
    from moerunner.kernels.cpu import experts as kernels
    from moerunner.kernels.operators import numbers_of

    return kernels.cpu_experts(
        x_TH,
        topk.ids,
        topk.weights,
        weights.w13,
        weights.w2,
        weights.get("b13"),
        weights.get("b2") if call.down_bias else None,
        weights.get("w13_scale"),
        weights.get("w2_scale"),
        kernels.LAYOUTS.index(weights.gate_up),
        *numbers_of(call.activation),
        call.input_weighting,
        call.output == "rows",
        call.batch_invariant,
    )
