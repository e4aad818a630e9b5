"""Sorting token slots by expert, and putting the experts' rows back.

Shape suffixes: T tokens, K chosen experts, E experts, R = T * K rows sorted by expert, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moerunner.ops.precision import wide


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


def rows_by_slot(y_RH: Tensor, order: Order) -> Tensor:
    """[T, K, H]: the experts' rows in slot order; slots without an expert are zero whatever their row holds."""
    if not y_RH.shape[0]:
        return y_RH.new_zeros(*order.row_TK.shape, y_RH.shape[1])
    rows = y_RH[order.row_TK.clamp(max=y_RH.shape[0] - 1)]
    return torch.where(order.valid_TK.unsqueeze(-1), rows, 0)


def weighted_sum(y_RH: Tensor, weights_TK: Tensor | None, order: Order) -> Tensor:
    """sum_k w_k y_k in float32, slots in ascending order: deterministic. [T, H]; None weighs every slot with 1.

    A slot without an expert is left out by select, row and weight alike, so that no NaN in it reaches the sum or a gradient.
    """
    tokens, k = order.row_TK.shape
    total = wide(y_RH.new_zeros(tokens, y_RH.shape[1]))
    if not y_RH.shape[0]:
        return total
    row_TK = order.row_TK.clamp(max=y_RH.shape[0] - 1)
    for j in range(k):
        total = total + _weighted(y_RH[row_TK[:, j]], weights_TK, order.valid_TK, j)
    return total


def sum_slots(y_TKH: Tensor, weights_TK: Tensor | None, valid_TK: Tensor) -> Tensor:
    """The same sum for rows that are already in slot order."""
    total = wide(y_TKH.new_zeros(y_TKH.shape[0], y_TKH.shape[2]))
    for j in range(y_TKH.shape[1]):
        total = total + _weighted(y_TKH[:, j], weights_TK, valid_TK, j)
    return total


def _weighted(y_TH: Tensor, weights_TK: Tensor | None, valid_TK: Tensor, j: int) -> Tensor:
    valid = valid_TK[:, j, None]
    y = torch.where(valid, wide(y_TH), 0)
    return y if weights_TK is None else y * torch.where(valid, weights_TK[:, j, None], 0).to(y.dtype)
