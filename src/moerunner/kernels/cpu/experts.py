"""The custom op `moerunner::cpu_experts`: from tokens and top-k ids to weighted sums, in one call of native code.

Shape suffixes: T tokens, K chosen experts, S = T * K slots, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

import ctypes
import math

import torch
from torch import Tensor

from moerunner.errors import UnsupportedError
from moerunner.kernels.cpu import library, nodes
from moerunner.kernels.operators import operator

LAYOUTS = ("concat", "interleaved", "none")
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}
_SCHEMA = (
    "(Tensor x, Tensor ids, Tensor weights, Tensor w13, Tensor w2, Tensor? b13, Tensor? b2, Tensor? w13_scale, "
    "Tensor? w2_scale, int layout, int kind, float alpha, float beta, float? limit, bool clamp_after, float? gate_softcap, "
    "float? up_softcap, bool input_weighting, bool rows, bool invariant) -> Tensor"
)


def run(
    path: str,
    x_TH: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    w13: Tensor,
    w2: Tensor,
    b13: Tensor | None,
    b2: Tensor | None,
    w13_scale: Tensor | None,
    w2_scale: Tensor | None,
    layout: int,
    kind: int,
    alpha: float,
    beta: float,
    limit: float | None,
    clamp_after: bool,
    gate_softcap: float | None,
    up_softcap: float | None,
    input_weighting: bool,
    rows: bool,
    invariant: bool,
    *,
    own_threads: bool = False,
    cpus_of_nodes: tuple[tuple[int, ...], ...] | None = None,
) -> Tensor:
    """`cpu_experts` by the path of this name.

    Args:
        x_TH: float32, bfloat16 or float16. w13 [E, 2I, H] ([E, I, H] ungated), w2 [E, H, I]: any strides; in x's dtype, or int8
            with float32 scales w13_scale [E, 2I, 1] and w2_scale [E, H, 1]. b13 [E, 2I], b2 [E, H]: x's dtype.
        ids_TK: int64, any outside 0..E-1 is no expert. weights_TK: float32.
        layout: index into `LAYOUTS`, of w13's rows. kind: index into `KINDS`.
        rows: [T, K, H] unweighted rows in x's dtype instead of [T, H] weighted sums in float32.
        invariant: a token's bits do not depend on the batch, nor on the nodes of memory: neither AMX nor outer products.
        own_threads: not those of PyTorch's pool.
        cpus_of_nodes: the processors of each node of memory, by default what there is; the weights are spread over them.
    """
    (tokens, k), (experts, hidden, inter) = ids_TK.shape, w2.shape
    out = torch.empty((tokens, k, hidden) if rows else (tokens, hidden), dtype=torch.float32)
    if not out.numel():
        return out.to(x_TH.dtype) if rows else out
    if cpus_of_nodes is None:
        cpus_of_nodes = nodes.ours()
        for held in (w13, w2) if cpus_of_nodes else ():  # not a copy in another dtype, which lives for one call
            nodes.spread(held)
    ids_TK, weights_TK = ids_TK.contiguous(), weights_TK.contiguous()
    if input_weighting:
        w_T1K = torch.where(ids_TK >= 0, weights_TK, 0).unsqueeze(-1)
        x_TH = (x_TH.unsqueeze(1) * w_T1K.to(torch.float32)).to(x_TH.dtype).reshape(tokens * k, hidden)
    if x_TH.stride(1) != 1:
        x_TH = x_TH.contiguous()
    if w13.dtype != torch.int8:
        w13, w2 = w13.to(x_TH.dtype), w2.to(x_TH.dtype)
    b13, b2 = (None if b is None else b.to(x_TH.dtype).contiguous() for b in (b13, b2))
    w13_scale, w2_scale = (None if s is None else s.contiguous() for s in (w13_scale, w2_scale))
    node_of_cpu = nodes.of_cpus(cpus_of_nodes)
    call = library.Call(
        x_TH.data_ptr(), ids_TK.data_ptr(), None if input_weighting or rows else weights_TK.data_ptr(),
        w13.data_ptr(), w2.data_ptr(), _pointer(b13), _pointer(b2), _pointer(w13_scale), _pointer(w2_scale), out.data_ptr(),
        tokens, k, experts, hidden, inter, x_TH.stride(0), *w13.stride(), *w2.stride(),
        _DTYPES[x_TH.dtype], _DTYPES[w13.dtype], layout, kind, input_weighting, rows, invariant,
        alpha, beta, math.inf if limit is None else limit, gate_softcap or 0.0, up_softcap or 0.0,
        clamp_after, torch.get_num_threads(), None if own_threads else library.torch_threads(),
        ctypes.addressof(node_of_cpu), len(node_of_cpu), len(cpus_of_nodes),
    )  # fmt: skip
    status = library.load(path).moerunner_experts(ctypes.byref(call))
    if status:
        raise {1: MemoryError("no memory for the experts' rows")}.get(status, UnsupportedError(f"status {status}", where="cpu"))
    return out.to(x_TH.dtype) if rows else out


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _fake(x_TH, ids_TK, weights_TK, w13, w2, *rest):
    tokens, k = ids_TK.shape
    rows = rest[-2]
    shape = (tokens, k, w2.shape[1]) if rows else (tokens, w2.shape[1])
    return torch.empty(shape, dtype=x_TH.dtype if rows else torch.float32, device=x_TH.device)


@operator("cpu_experts", device="CPU", schema=_SCHEMA, fake=_fake)
def cpu_experts(*args) -> Tensor:
    return run(library.chosen()[0], *args)
