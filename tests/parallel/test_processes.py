"""The same layer on real processes over gloo gives what one rank gives, with the collectives that the plan names."""

from __future__ import annotations

import socket

import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from tests.parallel.pool import end, forks, on_ranks
from tests.parallel.ranks import SPEC, forward, rank_main, weights
from tests.support.running import check
from tests.support.strategies import problems

from moerunner import LayerWeights, Layout, Options
from moerunner.ops.reference import reference

CASES = [
    pytest.param(Layout(tp=2), Options(), [5, 5], id="tp2", marks=pytest.mark.slow),
    pytest.param(Layout(ep=2, tokens="sharded"), Options(dispatch="alltoall"), [7, 2], id="ep2-alltoall"),
]


@pytest.mark.parametrize(("layout", "options", "counts"), CASES)
def test_processes_with_a_mesh_of_their_own_equal_the_oracle(layout: Layout, options: Options, counts: list[int]) -> None:
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
    results = forks().Queue()
    arguments = (port, layout, options, seed, rows, results)
    group = mp.start_processes(rank_main, arguments, nprocs=layout.world, join=False, start_method="forkserver")
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


def on_processes(spec, layout, *rest):
    """`simulated` on real ranks."""
    return on_ranks(layout.world, forward, spec, layout, *rest)


DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
NO_SHRINKING = settings(
    suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.reuse, Phase.generate]
)  # processes that failed are made anew


@settings(NO_SHRINKING, max_examples=20)
@given(problems(2), DTYPES)
def test_every_layer_on_two_ranks(problem, dtype):
    check(*problem, dtype, on_processes)


@settings(NO_SHRINKING, max_examples=12)
@given(problems(4, least=4), DTYPES)
def test_every_layer_on_four_ranks(problem, dtype):
    check(*problem, dtype, on_processes)


@pytest.fixture
def eight():
    yield
    end(8)  # their groups' threads would go on looking for work beside all other tests


@pytest.mark.slow
@pytest.mark.timeout(1800)
@settings(NO_SHRINKING, max_examples=40)
@given(problems(8, least=8), DTYPES)
def test_every_layer_on_eight_ranks(eight, problem, dtype):
    check(*problem, dtype, on_processes)
