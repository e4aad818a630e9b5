"""Sorting slots by expert and cutting experts into tiles, against PyTorch's stable sort."""

import pytest
import torch

order = pytest.importorskip("moerunner.kernels.order", reason="Triton is not installed")
from moerunner.ops.permute import sort_by_expert  # noqa: E402


def _ids(tokens, top_k, experts, how):
    if how == "one":
        return torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)]).index_fill_(1, torch.tensor([0]), 2)
    if how == "none":
        return torch.full((tokens, top_k), -1)
    ids = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens)])
    ids[torch.rand(ids.shape) < 0.1] = -1
    return ids


@pytest.mark.parametrize("launches", ["one", "two", "CUDA C++"])
@pytest.mark.parametrize("how", ["spread", "one", "none"])
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts"),
    [(1, 1, 1), (7, 3, 5), (40, 4, 9), (150, 4, 130), pytest.param(600, 4, 130, marks=pytest.mark.slow)],
)
def test_rows_and_tiles(monkeypatch, device, launches, how, tokens, top_k, experts):
    """Rows are stable in expert order; tiles cover every expert's rows once, and the rest of the map is marked empty."""
    monkeypatch.setattr(order, "_ONE_LAUNCH", 4096 if launches == "one" else 0)
    if launches == "CUDA C++":
        if reason := order.nvrtc.why_not(torch.device(device)):
            pytest.skip(reason)
    else:
        monkeypatch.setattr(order.nvrtc, "why_not", lambda device: "not asked for")
    if how == "one" and experts < 3:
        how = "spread"
    ids = _ids(tokens, top_k, experts, how).to(device, torch.int64 if top_k > 3 else torch.int32)
    got, expected = order.order_slots(ids, experts, 16), sort_by_expert(ids, experts)
    assert torch.equal(got.slot_R.long(), expected.slot_R)
    start, tiles = 0, []
    for e, end in enumerate(expected.ends_E.tolist()):
        tiles += [[e, len(tiles), start, end]] * -(-(end - start) // 16)
        start = end
    assert got.tiles_4N[:, : len(tiles)].T.tolist() == tiles
    assert (got.tiles_4N[0, len(tiles) :] == -1).all()
    assert got.totals.tolist() == [len(tiles), 0, 0, 0]


@pytest.mark.parametrize("tokens", [300, 1200])
def test_many_blocks_of_slots(monkeypatch, device, tokens):
    """More blocks than are added up at once; the last is a partial one."""
    monkeypatch.setattr(order, "_ONE_LAUNCH", 0)
    ids = _ids(tokens, 4, 600, "spread").to(device)
    expected = sort_by_expert(ids, 600)
    got = order.order_slots(ids, 600, 64)
    assert torch.equal(got.slot_R.long(), expected.slot_R)
    ends = got.tiles_4N[3][got.tiles_4N[0] >= 0].unique_consecutive()
    assert ends.tolist() == [end for end in expected.ends_E.unique().tolist() if end]  # an expert may have no row


@pytest.mark.parametrize(("slots", "experts", "block_m"), [(1, 128, 16), (64, 4, 16), (63, 4, 16), (1000, 7, 64), (5, 5, 16)])
def test_room_for_the_worst_case(slots, experts, block_m):
    """No split of the slots over the experts needs more tiles than there is room for, and the worst one fills it."""
    worst = 0
    for hit in range(1, min(slots, experts) + 1):
        spare = slots - hit  # one row each, the rest to one expert
        worst = max(worst, hit - 1 + -(-(1 + spare) // block_m))
    assert worst <= order.most_tiles(slots, experts, block_m) <= worst + 1
