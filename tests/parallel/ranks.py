"""What each process of a test runs; in a module of its own, so that spawned processes can import it."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
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
