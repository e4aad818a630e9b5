"""Sorting slots by expert and putting rows back: inverse of each other, deterministic, blind to empty slots."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.numerics import assert_close
from tests.support.strategies import SEEDS

from moerunner.ops import permute
from moerunner.ops.permute import rows_by_slot, sort_by_expert, sum_slots, take_rows, weighted_sum

NAN = float("nan")


@st.composite
def slots(draw: st.DrawFn) -> tuple[torch.Tensor, int]:
    """ids [T, K] with empty slots, experts that nobody chose and experts that one token chose twice."""
    experts, tokens, k = draw(st.integers(1, 6)), draw(st.integers(0, 7)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(SEEDS))
    ids = torch.randint(experts, (tokens, k), generator=generator)
    empty = draw(st.sampled_from([0.0, 0.3, 1.0]))
    return torch.where(torch.rand(tokens, k, generator=generator) < empty, -1, ids), experts


@settings(max_examples=150)
@given(slots())
def test_rows_lie_expert_by_expert_in_token_order(problem):
    ids, experts = problem
    order = sort_by_expert(ids, experts)
    slots_in_order = [s for e in range(experts) for s, i in enumerate(ids.flatten().tolist()) if i == e]
    real = len(slots_in_order)
    assert order.slot_R[:real].tolist() == slots_in_order
    assert order.token_R.tolist() == [s // ids.shape[1] for s in order.slot_R.tolist()]
    counts = [(slots_in_order and int((ids == e).sum())) or 0 for e in range(experts)]
    assert order.ends_E.tolist() == torch.tensor(counts).cumsum(0).tolist()
    assert order.slot_R.sort().values.tolist() == list(range(ids.numel())), "every slot once"
    assert torch.equal(order.row_TK.flatten()[order.slot_R], torch.arange(ids.numel())), "the inverse"
    assert torch.equal(order.valid_TK, ids >= 0)
    assert order.row_TK.shape == ids.shape


@settings(max_examples=100)
@given(slots(), st.integers(1, 5), st.booleans(), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_rows_come_back_to_their_slots(problem, width, poisoned, dtype):
    """Rows behind the last expert's end may hold anything, or be missing altogether."""
    ids, experts = problem
    order = sort_by_expert(ids, experts)
    y = torch.randn(ids.numel(), width).to(dtype)
    real = int((ids >= 0).sum())
    y[real:] = NAN
    rows = y if poisoned else y[:real]
    got = rows_by_slot(rows, order)
    wanted = torch.zeros(*ids.shape, width, dtype=dtype)
    for row, slot in enumerate(order.slot_R.tolist()[:real]):
        wanted[slot // ids.shape[1], slot % ids.shape[1]] = y[row]
    assert got.dtype == dtype
    assert torch.equal(got, wanted)


@settings(max_examples=100)
@given(slots(), st.booleans(), st.booleans(), st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_the_weighted_sum_of_the_valid_slots(problem, weighted, poisoned, dtype):
    ids, experts = problem
    order, width = sort_by_expert(ids, experts), 5
    y = torch.randn(ids.numel(), width).to(dtype)
    real = int((ids >= 0).sum())
    y[real:] = NAN
    exact_w = torch.rand(ids.shape, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    w = torch.where(ids < 0, NAN, exact_w) if weighted else None
    total = weighted_sum(y if poisoned else y[:real], w, order)
    per_slot = rows_by_slot(y[:real], order).double()
    wanted = (per_slot * (exact_w.double().unsqueeze(-1) if weighted else 1.0)).sum(1)
    assert total.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert total.shape == (ids.shape[0], width)
    assert_close(total, wanted, 1e-13 if dtype == torch.float64 else 2e-6)
    in_slots = rows_by_slot(y, order)
    in_slots[ids < 0] = NAN
    assert_close(sum_slots(in_slots, w, ids >= 0), wanted, 1e-13 if dtype == torch.float64 else 2e-6)


@settings(max_examples=60)
@given(slots().filter(lambda p: p[0].shape[0] > 0), st.booleans())
def test_gradients_pass_the_valid_slots_only(problem, poisoned):
    """NaN in an empty slot's row or weight reaches no gradient, not even by way of the row it is clamped to."""
    ids, experts = problem
    order, real = sort_by_expert(ids, experts), int((ids >= 0).sum())
    base, base_w = torch.randn(ids.numel(), 3, dtype=torch.float64), torch.rand(ids.shape, dtype=torch.float64)
    y, w = base.clone(), torch.where(ids < 0, NAN, base_w)
    y[real:] = NAN
    y = (y if poisoned else y[:real]).requires_grad_()
    w.requires_grad_()
    out = torch.randn(ids.shape[0], 3, dtype=torch.float64)
    total = weighted_sum(y, w, order)
    if not total.requires_grad:
        assert real == 0
        return
    grad_y, grad_w = torch.autograd.grad(total, (y, w), out, allow_unused=True)
    if grad_w is None:
        assert real == 0
        grad_w = torch.zeros_like(w)
    wanted_y = torch.zeros_like(base)
    wanted_w = torch.zeros_like(base_w)
    for row, slot in enumerate(order.slot_R.tolist()[:real]):
        t, k = divmod(slot, ids.shape[1])
        wanted_y[row], wanted_w[t, k] = base_w[t, k] * out[t], base[row] @ out[t]
    assert_close(grad_y, wanted_y[: y.shape[0]], 1e-12)
    assert_close(grad_w, wanted_w, 1e-12)


def test_a_long_sum_in_pieces_is_the_same_sum(monkeypatch):
    ids = torch.stack([torch.randperm(6)[:3] for _ in range(50)])
    ids[7, 1] = ids[33, 0] = -1
    order, w = sort_by_expert(ids, 6), torch.rand(50, 3)
    y = torch.randn(148, 8)
    whole = weighted_sum(y, w, order)
    for chunk in (1, 24, 100, 24 * 49):
        monkeypatch.setattr(permute, "_CHUNK", chunk)
        assert_close(weighted_sum(y, w, order), whole.double(), 1e-6)


def test_the_sum_is_accumulated_wider_than_the_rows():
    """4096 + 1 + 1 + 1 in bfloat16 or float16 steps would stay 4096 or lose two."""
    y, valid = torch.tensor([[[4096.0]], [[1.0]], [[1.0]], [[1.0]]]).transpose(0, 1), torch.ones(1, 4, dtype=torch.bool)
    for dtype in (torch.bfloat16, torch.float16):
        total = sum_slots(y.to(dtype).contiguous(), torch.ones(1, 4), valid)
        assert total.dtype == torch.float32
        assert float(total) == 4099.0


def test_sums_have_the_same_bits_every_time():
    ids = torch.randint(-1, 5, (40, 4))
    order, y, w = sort_by_expert(ids, 5), torch.randn(160, 16), torch.rand(40, 4)
    first = weighted_sum(y, w, order)
    assert all(torch.equal(weighted_sum(y, w, sort_by_expert(ids, 5)), first) for _ in range(3))


@pytest.mark.parametrize("bad", [NAN, math.inf])
def test_a_bad_row_stays_in_its_token(bad):
    ids = torch.tensor([[0, 1], [1, 2], [0, 2]])
    order = sort_by_expert(ids, 3)
    y, w = torch.randn(6, 4), torch.rand(3, 2)
    clean = weighted_sum(y, w, order)
    y[order.row_TK[1, 0]] = bad
    total = weighted_sum(y, w, order)
    assert torch.equal(total[[0, 2]], clean[[0, 2]])
    assert not torch.isfinite(total[1]).any()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("shape", [(0,), (4,), (2, 3), (0, 3)])
def test_rows_are_taken_by_any_index(shape, grad):
    x = torch.randn(5, 3, requires_grad=grad)
    index = torch.randint(5, shape)
    taken = take_rows(x, index)
    assert taken.shape == (*shape, 3)
    assert torch.equal(taken, x[index])
    if grad and index.numel():
        taken.sum().backward()
        assert torch.equal(x.grad, index.flatten().bincount(minlength=5).float().unsqueeze(1).expand(5, 3))
