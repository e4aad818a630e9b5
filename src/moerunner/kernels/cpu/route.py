"""The custom op `moerunner::cpu_route`: `moerunner::route` of `kernels/route.py` in native code, for any number of experts.

Shape suffixes: T tokens, E experts that can be chosen, K chosen, L logits.
"""

from __future__ import annotations

import ctypes
from functools import partial

import torch
from torch import Tensor

from moerunner.errors import SpecError
from moerunner.kernels import routing
from moerunner.kernels.cpu import library
from moerunner.kernels.operators import operator

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_SCHEMA = (
    "(Tensor x, Tensor? gate, Tensor? gate_bias, Tensor? selection_bias, Tensor? per_expert_scale, "
    "Tensor? global_scale, Tensor? hash_table, Tensor? input_ids, Tensor? token_types, int experts, int top_k, int score, "
    "bool by_logit, float logit_scale, float? logit_softcap, int groups, int kept, bool best_two, float fill, "
    "int renormalise, float eps, float p, float jitter, int modalities, float factor, "
    "bool rounded=False) -> (Tensor, Tensor, Tensor)"
)


def run(
    path: str,
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
    """`cpu_route` by the path of this name; arguments and results are those of `kernels.route.triton_route`.

    Raises NotImplementedError for a gate with rounded logits, which a plan for a CPU leaves to PyTorch.
    """
    if rounded and gate is not None:
        raise NotImplementedError("native routing rounds no logits; pass them")
    ids, weights, shared = routing.empty(x, gate, experts, top_k)
    tokens = x.shape[0]
    if tokens == 0:
        return ids, weights, shared
    if gate is not None:
        x, gate = _rows(x), _rows(gate)
    given = None
    if hash_table is not None and input_ids is not None:
        given = hash_table[input_ids].to(torch.int64).contiguous()
    types = None if token_types is None or modalities == 1 else token_types.to(torch.int64).contiguous()
    learned = [
        None if t is None else t.float().contiguous() for t in (gate_bias, selection_bias, per_expert_scale, global_scale)
    ]
    call = library.RouteCall(
        x.data_ptr(), _pointer(gate), *map(_pointer, (*learned, given, types)),
        ids.data_ptr(), weights.data_ptr(), shared.data_ptr(),
        tokens, experts + shared.shape[1], experts, top_k, x.shape[1], *x.stride(), 0 if gate is None else gate.stride(0),
        _DTYPES[x.dtype], 0 if gate is None else _DTYPES[gate.dtype],
        score, by_logit, groups, kept, best_two, renormalise, modalities,
        logit_scale, logit_softcap or 0.0, fill, eps, p, jitter, factor,
        torch.get_num_threads(), library.torch_threads(),
    )  # fmt: skip
    status = library.load(path).moerunner_route(ctypes.byref(call))
    if status == 3:
        raise SpecError(f"holds ids outside 0..{experts - 1}", where="hash_table")
    if status:
        raise MemoryError("no memory for the router's logits")
    return ids, weights, shared


def _rows(tensor: Tensor) -> Tensor:
    """With rows whose numbers lie side by side."""
    tensor = tensor if tensor.dtype in _DTYPES else tensor.float()
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


@operator("cpu_route", device="CPU", schema=_SCHEMA, fake=routing.fake)
def cpu_route(*args) -> tuple[Tensor, Tensor, Tensor]:
    return run(library.chosen()[0], *args)


route = partial(routing.route, cpu_route)
"""See `routing.route`."""
