"""Gradients on real processes are those of one rank; a rank trains its own part, and tokens travel while it computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.parallel.pool import on_ranks
from tests.parallel.ranks import SPEC, gradients_of, rows_of, weights

from moerunner import ExpertWeights, Layout, MoERunner, Options

EXPERTS = ("w13", "w2", "b13", "b2")
CASES = {
    2: [
        (Layout(tp=2), Options(), [5, 5]),
        (Layout(ep=2), Options(output="shard"), [5, 5]),
        (Layout(ep=2, tokens="sharded"), Options(dispatch="alltoall"), [7, 0]),
        (Layout(tp=2, tokens="sharded"), Options(dispatch="allgather"), [0, 4]),
        (Layout(ep=2, tokens="sharded"), Options(dispatch="allgather"), [0, 0]),
        (Layout(ep=2, tokens="sharded"), Options(dispatch="alltoall"), [0, 0]),
    ],
    4: [
        (Layout(ep=2, tp=2), Options(), [5] * 4),
        (Layout(dp=2, tp=2), Options(output="shard"), [5, 5, 4, 4]),
        (Layout(ep=2, tp=2, tokens="sharded"), Options(dispatch="alltoall"), [3, 0, 6, 1]),
        (Layout(ep=4, tokens="sharded"), Options(dispatch="alltoall"), [0, 9, 0, 0]),
        (Layout(ep=2, tp=2, tokens="sharded"), Options(dispatch="allgather"), [3, 0, 6, 1]),
    ],
}


@pytest.mark.parametrize(
    ("layout", "options", "counts"),
    [
        pytest.param(*case, id=f"{world}-{i}", marks=[pytest.mark.slow] if world > 2 else [])
        for world in CASES
        for i, case in enumerate(CASES[world])
    ],
)
def test_gradients_of_processes_are_those_of_one_rank(layout: Layout, options: Options, counts: list[int]) -> None:
    """Parameters are cut into parameters of the rank, whose gradients are the cuts of the whole ones, at a second step too."""
    seed, per_copy = int(torch.randint(1 << 30, ())), layout.ep * layout.tp
    answers = on_ranks(layout.world, gradients_of, layout, options, counts, seed)
    sharded = layout.tokens == "sharded"
    for rank, (x_grad, grads, issued, planned) in enumerate(answers):
        assert issued == planned
        copy = range(rank // per_copy * per_copy, (rank // per_copy + 1) * per_copy)
        rows, given = rows_of(layout, counts, seed), {n: torch.nn.Parameter(t) for n, t in weights(seed).items()}
        one = MoERunner(SPEC, given)
        for r in copy if sharded else [rank]:
            x = rows[r].requires_grad_()
            (one(x) * x.detach()).sum().backward()
        near(x_grad, rows[rank].grad)
        here, slots = layout.coordinates(rank), layout.slots(SPEC.num_experts)
        whole = ExpertWeights.of({n: given[n].grad for n in EXPERTS})
        cut = whole.shard(list(slots[here["ep"]]), here["tp"], layout.tp)
        for name in EXPERTS:
            near(grads[name], cut.get(name))
        if not sharded:
            cut_shared = layout.shards_shared and ("shared_w13", "shared_w2", "shared_b13")
            for name in set(grads) - {*EXPERTS, *(cut_shared or ())}:
                near(grads[name], given[name].grad)
    if sharded:
        for name in set(given) - {*EXPERTS, "selection_bias"}:
            near(sum(grads[name] for _, grads, *_ in answers), given[name].grad)


def near(got: Any, wanted: torch.Tensor | None) -> None:
    wanted = torch.zeros(got.shape) if wanted is None else wanted  # one rank without a token
    assert got.shape == tuple(wanted.shape)
    error, size = abs(got - wanted.numpy()).max(initial=0), float(wanted.abs().amax()) if wanted.numel() else 0.0
    assert error <= 1e-5 * size + 1e-12, (error, size)
