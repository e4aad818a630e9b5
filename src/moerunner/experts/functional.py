"""The experts as one plain function, for engines that bring their own router, scale and reduction."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from moerunner.errors import SpecError, WeightsError
from moerunner.experts.base import ExpertsCall, Request
from moerunner.experts.registry import choose
from moerunner.ops.precision import wide
from moerunner.spec import ActivationSpec, ExpertsSpec
from moerunner.values import ExpertWeights, GateUp, TopK


def fused_experts(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    b13: Tensor | None = None,
    b2: Tensor | None = None,
    activation: str = "silu",
    limit: float | None = None,
    alpha: float | None = None,
    beta: float | None = None,
    clamp_after: bool = False,
    gate_up: GateUp = "concat",
    input_weighting: bool = False,
    expert_map: Tensor | None = None,
    backend: str = "auto",
    out: Tensor | None = None,
) -> Tensor:
    """sum_k w_k expert_{id_k}(x): the routed part of an MoE layer, without factor, shared experts or reduction.

    Args:
        x: [..., H] tokens. w13: [E, 2I, H] gate and up rows ([E, I, H] for gate_up="none"). w2: [E, H, I].
        topk_weights, topk_ids: [..., K]; an id of -1 is no expert and its weight is not read.
        b13, b2: [E, 2I], [E, H]. activation, limit, alpha, beta, clamp_after: `ActivationSpec`.
        gate_up: `concat`, `interleaved` or `none`. input_weighting: experts read w * x and are not weighted after.
        expert_map: [num_global_experts] the local expert of each global id, -1 where another rank has it.
        backend: a name, or "auto". out: receives the result and is returned.

    Returns:
        [..., H] in x's dtype, accumulated in float32.

    Raises:
        WeightsError: shapes, dtypes or devices disagree. SpecError: ids out of range, or impossible constants.
        UnsupportedError: the backend does not do what is asked.
    """
    weights = ExpertWeights.of({"w13": w13, "w2": w2, "b13": b13, "b2": b2}, gate_up)
    _check(x, weights, topk_weights, topk_ids, gate_up, expert_map)
    act = ActivationSpec(kind=cast("Any", activation), limit=limit, alpha=alpha, beta=beta, clamp_after=clamp_after)
    ExpertsSpec(intermediate_size=w2.shape[2], activation=act, gated=gate_up != "none")  # refuses what needs a gate
    ids = topk_ids.reshape(-1, topk_ids.shape[-1]).to(torch.int64)
    check_ids(ids, w2.shape[0] if expert_map is None else expert_map.shape[0])
    if expert_map is not None:
        check_ids(expert_map, w2.shape[0], "expert_map")
        ids = torch.where(ids >= 0, expert_map.to(torch.int64)[ids.clamp(min=0)], -1)
    grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, w13, w2, b13, b2, topk_weights))
    request = Request(
        device=x.device.type,
        dtype=str(x.dtype).removeprefix("torch."),
        activation=act,
        gate_up=gate_up,
        shapes=(tuple(w13.shape), tuple(w2.shape)),
        strides=(w13.stride(), w2.stride()),
        bias=b13 is not None or b2 is not None,
        input_weighting=input_weighting,
        grad=grad,
    )
    chosen = choose(request, backend).backend
    output = "final" if chosen.INFO.rounds else "summed"
    topk = TopK(ids, wide(topk_weights.reshape(ids.shape)))
    call = ExpertsCall(activation=act, input_weighting=input_weighting, output=output)
    y = chosen.run(x.reshape(-1, x.shape[-1]), topk, weights, call)
    y = y.to(x.dtype).reshape(*x.shape[:-1], y.shape[-1])
    if out is not None and out.shape != y.shape:
        raise WeightsError(f"out has shape {list(out.shape)}, the result {list(y.shape)}", where="fused_experts")
    return y if out is None else out.copy_(y)


def check_ids(ids: Tensor, count: int, where: str = "topk ids", *, lowest: int = -1) -> None:
    """Ids must lie in [lowest, count). Looked at on a CPU; on a GPU a device-side assertion, which waits for nothing."""
    inside = ((ids >= lowest) & (ids < count)).all()
    if ids.device.type != "cpu":
        torch._assert_async(inside, f"{where} outside {lowest} to {count - 1}")
    elif not inside:
        what = f"ids reach from {int(ids.min())} to {int(ids.max())}, allowed are {lowest} to {count - 1}"
        raise SpecError(what, where=where)


def _check(
    x: Tensor, weights: ExpertWeights, topk_weights: Tensor, topk_ids: Tensor, gate_up: str, expert_map: Tensor | None
) -> None:
    where, w13, w2 = "fused_experts", weights.w13, weights.w2
    if w13.ndim != 3 or w2.ndim != 3:
        raise WeightsError(f"w13 and w2 must have 3 dimensions, not {w13.ndim} and {w2.ndim}", where=where)
    experts, hidden, width = w2.shape
    rows = width if gate_up == "none" else 2 * width
    if tuple(w13.shape) != (experts, rows, hidden):
        raise WeightsError(
            f"w13 has shape {list(w13.shape)}, with w2 {list(w2.shape)} it must be {[experts, rows, hidden]}",
            where=where,
        )
    for name, shape in (("b13", (experts, rows)), ("b2", (experts, hidden))):
        bias = weights.get(name)
        if bias is not None and tuple(bias.shape) != shape:
            raise WeightsError(f"{name} has shape {list(bias.shape)}, it must be {list(shape)}", where=where)
    if x.shape[-1] != hidden:
        raise WeightsError(f"x has width {x.shape[-1]}, the experts {hidden}", where=where)
    if topk_ids.shape != topk_weights.shape or topk_ids.shape[:-1] != x.shape[:-1]:
        raise WeightsError(
            f"topk_ids {list(topk_ids.shape)} and topk_weights {list(topk_weights.shape)} do not fit x {list(x.shape)}",
            where=where,
        )
    for name, index in (("topk_ids", topk_ids), ("expert_map", expert_map)):
        if index is not None and (index.is_floating_point() or index.dtype == torch.bool):
            raise WeightsError(f"{name} must be whole numbers, not {index.dtype}", where=where)
    for name, entry in weights.tensors.items():
        if entry.tensor.dtype != x.dtype or entry.tensor.device != x.device:
            raise WeightsError(
                f"{name} is {entry.tensor.dtype} on {entry.tensor.device}, x is {x.dtype} on {x.device}", where=where
            )
