"""Sorting token slots by expert, and putting the experts' rows back.

Shape suffixes: T tokens, K chosen experts, E experts, R = T * K rows sorted by expert, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moerunner.ops.precision import wide

_CHUNK = 1 << 24  # numbers that are gathered at a time to be summed


@dataclass(frozen=True)
class Order:
    """Rows in expert order. Slots without an expert (id -1) come last, behind ends_E[-1].

    slot_R: the flat slot t * K + k of each row. token_R: its token. ends_E: where each expert's rows end.
    row_TK: the row of each slot, the inverse of slot_R. valid_TK: whether the slot has an expert.
    """

    slot_R: Tensor
    token_R: Tensor
    ends_E: Tensor
    row_TK: Tensor
    valid_TK: Tensor


def sort_by_expert(ids_TK: Tensor, num_experts: int) -> Order:
    """Stable order of all slots by expert id, without a host synchronisation."""
    valid = ids_TK >= 0
    key = torch.where(valid, ids_TK, num_experts).reshape(-1)
    sorted_key, slot = key.sort(stable=True)
    ends = torch.searchsorted(sorted_key, torch.arange(num_experts, device=key.device), right=True)
    row = torch.empty_like(slot).scatter_(0, slot, torch.arange(slot.numel(), device=slot.device))
    return Order(slot, slot // ids_TK.shape[1], ends, row.view_as(ids_TK), valid)


def take_rows(x_NH: Tensor, index: Tensor) -> Tensor:
    """Rows of x, [*index.shape, H]. With a gradient on a GPU by indexing, whose backward adds in a fixed order."""
    if x_NH.requires_grad and x_NH.is_cuda:
        return x_NH[index]
    return x_NH.index_select(0, index.reshape(-1)).view(*index.shape, x_NH.shape[1])


def rows_by_slot(y_RH: Tensor, order: Order) -> Tensor:
    """[T, K, H]: the experts' rows in slot order; slots without an expert are zero whatever their row holds."""
    if not y_RH.shape[0]:
        return y_RH.new_zeros(*order.row_TK.shape, y_RH.shape[1]) + y_RH.sum(0)  # zeros that depend on the experts
    rows = take_rows(y_RH, order.row_TK.clamp(max=y_RH.shape[0] - 1))
    return torch.where(order.valid_TK.unsqueeze(-1), rows, 0)


def weighted_sum(y_RH: Tensor, weights_TK: Tensor | None, order: Order) -> Tensor:
    """sum_k w_k y_k in float32, [T, H], the same bits every run; None weighs every slot with 1.

    A slot without an expert is left out by select, row and weight alike, so that no NaN in it reaches the sum or a gradient.
    """
    if not y_RH.shape[0]:
        return wide(y_RH.new_zeros(order.row_TK.shape[0], y_RH.shape[1]) + y_RH.sum(0))
    row_TK, valid_TK = order.row_TK.clamp(max=y_RH.shape[0] - 1), order.valid_TK
    step = max(1, _CHUNK // (row_TK.shape[1] * y_RH.shape[1]))
    parts = []
    for t in range(0, row_TK.shape[0], step):
        weights = None if weights_TK is None else weights_TK[t : t + step]
        parts.append(sum_slots(take_rows(y_RH, row_TK[t : t + step]), weights, valid_TK[t : t + step]))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def sum_slots(y_TKH: Tensor, weights_TK: Tensor | None, valid_TK: Tensor) -> Tensor:
    """The same sum for rows that are already in slot order."""
    y = wide(y_TKH)
    if y.is_cuda or not valid_TK.all():  # looking costs nothing on a CPU and waits for a GPU
        y = torch.where(valid_TK.unsqueeze(-1), y, 0)
        weights_TK = None if weights_TK is None else torch.where(valid_TK, weights_TK, 0)
    if weights_TK is None:
        return y.sum(1)
    return torch.bmm(weights_TK.to(y.dtype).unsqueeze(1), y).squeeze(1)
