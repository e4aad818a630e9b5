"""Tokens are sharded: DeepEP's kernels send each token once to every rank that has one of its experts, and sum what comes back.

The normal (high-throughput) kernels of the `deep_ep` package, over NVLink within a machine and RDMA between machines. A rank
receives [R, H] tokens with the ids of its own experts, -1 for those of others, and returns one weighted sum per token; sums
travel in bfloat16. Only asked for by name: `Options(dispatch="deepep")`.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

import torch
from torch import Tensor

from moerunner.ops.permute import sum_slots
from moerunner.parallel.comm import Comm
from moerunner.parallel.layout import Layout
from moerunner.parallel.pairs import PairInfo, SlotMap, Trip
from moerunner.parallel.rows import Work
from moerunner.values import TopK

INFO = PairInfo(name="deepep", tokens="sharded", reduces=True, experts_return="any", overlaps=True, host_sync=True)
RANKS = (2, 4, 8, 16, 24, 32, 64, 128, 144, 160)
"""Group sizes that DeepEP has a configuration for."""
_WIDTH = 8  # bfloat16 numbers in the 16 bytes that its kernels copy at once
_buffers: dict[tuple[Any, int], Any] = {}


def refusal(layout: Layout, *, device: str, dtype: str, travels: str, width: int, grad: bool) -> str:
    """Why DeepEP cannot carry tokens of this width between these ranks; empty when it can."""
    if importlib.util.find_spec("deep_ep") is None:
        return "needs the package deep_ep, which is not installed"
    if device != "cuda":
        return f"runs on cuda, not on {device}"
    if dtype != "bfloat16" or travels != "bfloat16":
        return f"carries bfloat16, the tokens are {dtype} and partial sums {travels}"
    if grad:
        return "has no backward here"
    if layout.tp > 1 or layout.ep not in RANKS:
        return f"needs tp=1 and ep of {', '.join(map(str, RANKS))}, not ep={layout.ep} and tp={layout.tp}"
    return f"carries widths that are a multiple of {_WIDTH}, not {width}" if width % _WIDTH else ""


def dispatch(x_TH: Tensor, topk: TopK, slots: SlotMap, comm: Comm, *, dtype: torch.dtype) -> Work[tuple[Tensor, Trip]]:
    """Every token that other ranks have for an expert of this one, once."""
    buffer, ids = _buffer(comm, x_TH), slots.physical(topk)
    per_rank, per_node, per_expert, in_rank, _ = buffer.get_dispatch_layout(ids, slots.per_rank * comm.layout.ep)
    comm.log.append(("all_to_all", ("ep",)))
    rows, local, weights, _, handle, event = buffer.dispatch(
        x_TH.contiguous(),
        num_tokens_per_rank=per_rank,
        num_tokens_per_rdma_rank=per_node,
        is_token_in_rank=in_rank,
        num_tokens_per_expert=per_expert,
        topk_idx=ids,
        topk_weights=topk.weights.float(),
        async_finish=True,
    )

    def arrive() -> tuple[Tensor, Trip]:
        event.current_stream_wait()
        here = dataclasses.replace(topk, ids=local, weights=weights, space="physical", shared_weights=None)
        return rows, Trip(here, handle=handle)

    return Work(arrive)


def combine(y: Tensor, trip: Trip, comm: Comm, *, weigh: bool, dtype: torch.dtype) -> Tensor:
    """This rank's tokens, summed over the ranks that had them."""
    if y.ndim == 3:
        y = sum_slots(y, trip.topk.weights if weigh else None, trip.topk.ids >= 0)
    comm.log.append(("all_to_all", ("ep",)))
    out, _, event = _buffer(comm, y).combine(y.to(torch.bfloat16).contiguous(), trip.handle, async_finish=True)
    event.current_stream_wait()
    return out


def _buffer(comm: Comm, x_TH: Tensor) -> Any:
    """DeepEP's memory for tokens of this width, made once for a group; every rank comes here alike."""
    from deep_ep import Buffer  # pyright: ignore[reportMissingImports]

    group, width = comm.process_group(("ep",)), x_TH.shape[1]
    if (group, width) not in _buffers:
        ranks, row = comm.layout.ep, width * torch.bfloat16.itemsize
        configs = (Buffer.get_dispatch_config(ranks), Buffer.get_combine_config(ranks))
        nvlink = max(config.get_nvl_buffer_size_hint(row, ranks) for config in configs)
        rdma = max(config.get_rdma_buffer_size_hint(row, ranks) for config in configs)
        _buffers[group, width] = Buffer(group, nvlink, rdma)
    return _buffers[group, width]
