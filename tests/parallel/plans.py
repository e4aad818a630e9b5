"""What each rank does with a model that Transformers spreads over the ranks by its own plan; see test_transformers_plans.py."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

import moerunner
from moerunner.models.adapt import runners


class Collectives(TorchDispatchMode):
    """Counts what is issued, by whichever of PyTorch's two ways."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace in ("c10d", "_c10d_functional") and name not in ("wait_tensor", "barrier"):
            self.counts[name.strip("_").replace("_", "")] += 1
        return func(*args, **(kwargs or {}))


def loaded(folder: str, sizes: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**sizes)).eval()


@torch.no_grad()
def run(model: nn.Module, ids: Tensor, blocks: list[str]) -> tuple[Tensor, list[dict[str, int]]]:
    """Logits, and what each of the blocks issued."""
    counting, issued, hooks = Collectives(), [], []
    for name in blocks:
        block = model.get_submodule(name)
        hooks.append(block.register_forward_pre_hook(lambda *_: issued.append(Counter(counting.counts))))
        hooks.append(block.register_forward_hook(lambda *_: issued.append(counting.counts - issued.pop())))
    with counting:
        logits = model(input_ids=ids).logits
    for hook in hooks:
        hook.remove()
    return logits, [dict(counts) for counts in issued]


def before_and_after(folder: str, sizes: dict[str, Any], ids: Tensor) -> dict[str, Any]:
    """The model as it is, patched, and unpatched again."""
    model = loaded(folder, sizes)
    names = list(model.state_dict())
    report = moerunner.patch(model)
    moerunner.unpatch(model)
    blocks = [replaced.name for replaced in report.replaced]
    before, issued_before = run(model, ids, blocks)
    moerunner.patch(model)
    run(model, ids, blocks)  # the first call also asks whether all ranks agree
    patched = runners(model)
    for runner in patched.values():
        runner._comm.log.clear()
    after, issued = run(model, ids, blocks)
    assert list(model.state_dict()) == names
    planned = [runner.plan.collectives for runner in patched.values()]
    logs = [tuple(runner._comm.log) for runner in patched.values()]
    layouts = {(r.plan.layout.ep, r.plan.layout.tp, r.plan.layout.shared) for r in patched.values()}
    moerunner.unpatch(model)
    again, _ = run(model, ids, blocks)
    return {
        "skipped": [(s.name, s.reason) for s in report.skipped],
        "copied": sum(r.copied_bytes for r in report.replaced),
        "before": before, "after": after, "again": again,
        "issued before": issued_before, "issued": issued,
        "planned": planned, "logs": logs, "layouts": layouts,
    }  # fmt: skip


@torch.no_grad()
def router_logits(folder: str, sizes: dict[str, Any], ids: Tensor) -> list[bool]:
    """Whether each block's are the same after the patch."""
    model = loaded(folder, sizes)
    before = model(input_ids=ids, output_router_logits=True).router_logits
    assert not moerunner.patch(model).skipped
    after = model(input_ids=ids, output_router_logits=True).router_logits
    return [bool((b - a).abs().max() < 1e-4) for b, a in zip(before, after, strict=True)]


def refusals(folder: str, sizes: dict[str, Any]) -> dict[str, str]:
    """Why the blocks are left as they are, after each of some changes."""
    model = loaded(folder, sizes)
    block = next(m for m in model.modules() if type(m).__name__ == "DeepseekV3MoE")
    mesh = block.experts.down_proj.device_mesh
    told = {}

    def reason(layout: moerunner.Layout | None = None) -> str:
        report = moerunner.patch(model, layout)
        moerunner.unpatch(model)
        assert block.__dict__.get("forward") is None
        return report.skipped[0].reason if report.skipped else ""

    def otherwise(module: Any, name: str, mesh: DeviceMesh, *placements: Any) -> str:
        original = module._parameters[name]
        whole = original.full_tensor() if isinstance(original, DTensor) else original
        module._parameters[name] = nn.Parameter(distribute_tensor(whole.detach(), mesh, placements, src_data_rank=None))
        try:
            return reason()
        finally:
            module._parameters[name] = original

    told["nothing"] = reason()
    told["rows of gate and up mixed"] = otherwise(block.experts, "gate_up_proj", mesh, Shard(1))
    told["half of the experts spread"] = otherwise(block.experts, "down_proj", mesh, Replicate())
    told["router spread"] = otherwise(block.gate, "weight", mesh, Shard(0))
    fsdp = init_device_mesh("cpu", (2,), mesh_dim_names=("fsdp",))
    told["gathered for each call"] = otherwise(block.experts, "down_proj", fsdp, Shard(0))
    two = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    told["over two axes"] = otherwise(block.experts, "gate_up_proj", two, Replicate(), Shard(0))
    told["another layout"] = reason(moerunner.Layout(tp=2))
    hook = block.experts.register_forward_hook(lambda *_: None)
    told["a hook on the experts"] = reason()
    hook.remove()
    model.config.distributed_config.tp_size = 1
    told["ranks with tokens of their own"] = reason()
    return told


@torch.no_grad()
def gathered_later(folder: str, sizes: dict[str, Any], ids: Tensor) -> tuple[Tensor, str]:
    model = loaded(folder, sizes)
    assert not moerunner.patch(model).skipped
    mlp = next(m for m in model.modules() if type(m).__name__ == "DeepseekV3MoE").shared_experts
    for linear in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
        linear.weight = nn.Parameter(linear.weight.full_tensor())
        del linear.forward
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        logits = model(input_ids=ids).logits
    return logits, " ".join(str(warning.message) for warning in told)


def in_two_copies(folder: str, ids: Tensor) -> tuple[Tensor, list[dict[str, int]]]:
    """The logits of the copy that this rank belongs to, and what its blocks issued."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("tp", "copies"))["tp"]
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = DistributedConfig(tp_size=2)
    apply_tensor_parallelism(model, mesh, model._resolve_parallel_plans(config)[0])
    assert set(whole) == set(model.state_dict())
    report = moerunner.patch(model)
    assert not report.skipped
    blocks = [replaced.name for replaced in report.replaced]
    run(model, ids, blocks)
    return run(model, ids, blocks)
