"""The same layer on real processes over gloo gives what one rank gives, with the collectives that the plan names."""

from __future__ import annotations

import socket

import pytest
import torch
import torch.multiprocessing as mp
from tests.parallel.ranks import SPEC, rank_main, weights

from moerunner import LayerWeights, Layout, Options
from moerunner.ops.reference import reference

CASES = [
    pytest.param(Layout(tp=2), Options(), [5, 5], id="tp2"),
    pytest.param(Layout(ep=2, tokens="sharded"), Options(dispatch="alltoall"), [7, 2], id="ep2-alltoall"),
    pytest.param(Layout(ep=2, tp=2), Options(), [5] * 4, id="ep2-tp2", marks=pytest.mark.slow),
    pytest.param(Layout(dp=2, tp=2), Options(output="shard"), [5, 5, 4, 4], id="dp2-tp2-shard", marks=pytest.mark.slow),
    pytest.param(Layout(ep=2, tokens="sharded"), Options(dispatch="allgather"), [3, 0], id="ag", marks=pytest.mark.slow),
    pytest.param(
        Layout(ep=2, tp=2, tokens="sharded"),
        Options(dispatch="alltoall"),
        [3, 0, 6, 1],
        id="ep2-tp2-a2a",
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.parametrize(("layout", "options", "counts"), CASES)
def test_processes_equal_the_oracle(layout: Layout, options: Options, counts: list[int]) -> None:
    seed = int(torch.randint(1 << 30, ()))
    tokens = [torch.randn(max(counts), SPEC.hidden_size) for _ in range(layout.dp)]
    per_copy = layout.ep * layout.tp
    rows = [
        torch.randn(n, SPEC.hidden_size) if layout.tokens == "sharded" else tokens[r // per_copy][:n]
        for r, n in enumerate(counts)
    ]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    results = context.Queue()
    group = mp.spawn(rank_main, (port, layout, options, seed, rows, results), nprocs=layout.world, join=False)
    answers = {rank: answer for rank, *answer in (results.get(timeout=120) for _ in range(layout.world))}
    while not group.join(60):
        pass
    full = LayerWeights.of(SPEC, weights(seed))
    for rank, (y, issued, planned) in answers.items():
        assert tuple(issued) == tuple(planned)
        expected = reference(SPEC, full, rows[rank])
        if options.output == "shard":
            expected = expected.split(layout.token_counts(rows[rank].shape[0]))[rank % per_copy]
        assert y.shape == tuple(expected.shape)
        if expected.numel():
            assert float((torch.from_numpy(y) - expected).abs().max() / expected.abs().max()) <= 2e-6
