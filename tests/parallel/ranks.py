"""What each process of a test runs; in a module of its own, so that spawned processes can import it."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from tests.support.running import Answer, drawn_tokens
from tests.support.strategies import make_weights
from torch.distributed.device_mesh import init_device_mesh

from moerunner import ExpertsSpec, GroupSpec, Layout, MoERunner, MoESpec, Options, RoutingSpec, SharedSpec

SPEC = MoESpec(
    hidden_size=48,
    num_experts=8,
    top_k=3,
    routing=RoutingSpec(score="sigmoid", selection_bias=True, groups=GroupSpec(count=4, kept=2), renormalise="sum", eps=1e-20),
    experts=ExpertsSpec(intermediate_size=20, bias=True),
    shared=SharedSpec(width=28, gate="sigmoid", bias=True),
    routed_scaling_factor=2.5,
    apply_routed_scale_to_output=True,
)


def weights(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in SPEC.weight_shapes().items()}


def rows_of(layout: Layout, counts: list[int], seed: int) -> list[torch.Tensor]:
    """Tokens of each rank: its own, or those of its copy."""
    of = [r if layout.tokens == "sharded" else r // (layout.ep * layout.tp) for r in range(layout.world)]
    generators = [torch.Generator().manual_seed(seed + i) for i in of]
    return [torch.randn(n, SPEC.hidden_size, generator=g) for n, g in zip(counts, generators, strict=True)]


def gradients_of(layout: Layout, options: Options, counts: list[int], seed: int) -> Any:
    """Two training steps: the gradients of the second, of tokens and parameters, and what was issued and planned."""
    bound = layout.bind()
    runner = MoERunner(SPEC, {n: torch.nn.Parameter(t) for n, t in weights(seed).items()}, bound, options)
    x = rows_of(layout, counts, seed)[bound.comm.rank].requires_grad_()
    out = x.detach()
    if options.output == "shard" and layout.tokens == "replicated":
        out = out.split(layout.token_counts(len(out)))[bound.comm.index(("ep", "tp"))]
    for _ in range(2):
        runner.zero_grad()
        x.grad = None
        bound.comm.log.clear()
        (runner(x) * out).sum().backward()
    plan = next(v.plan for (_, _, grad), v in runner._verbs.items() if grad)
    grads = {n: p.grad.numpy() for n, p in runner.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return x.grad.numpy(), grads, list(bound.comm.log), [*plan.collectives, *plan.backward_collectives]


def forward(
    spec: MoESpec, layout: Layout, options: Options, seed: int, storage: Any, rows: list[int], dtype: torch.dtype
) -> Answer:
    """This rank's answer to a problem that is made of numbers."""
    weights, bound = make_weights(spec, seed, dtype, storage), layout.bind()
    mine = drawn_tokens(spec, weights, layout, seed, rows, dtype)[bound.comm.rank]
    runner = MoERunner(spec, weights, bound, options)
    with torch.no_grad():
        y = runner(mine.x, **mine.inputs)
    return Answer(y, tuple(bound.comm.log), runner.plan)


def rank_main(
    rank: int, port: int, layout: Layout, options: Options, seed: int, rows: list[torch.Tensor], results: Any
) -> None:
    """Runs one layer on this rank's tokens and puts the result, the collectives issued and those planned into the queue."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(layout.world)}
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (layout.dp, layout.ep, layout.tp), mesh_dim_names=("dp", "ep", "tp"))
    bound = layout.bind(mesh)
    runner = MoERunner(SPEC, weights(seed), bound, options)
    with torch.no_grad():
        y = runner(rows[rank])
    results.put((rank, y.numpy(), list(bound.comm.log), runner.plan.collectives))
    dist.destroy_process_group()
