"""Who can run the experts here: our backends, and what else is installed, each with the reason where it cannot.

Others are called as their own models call them, through their public functions, with weights as they want them. What costs time
once per model (another order of rows, say) happens before the clock starts.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from moerunner.bench.shapes import Shape
from moerunner.experts import registry
from moerunner.experts.base import ExpertsCall, Request, refusals
from moerunner.ops.activation import activate
from moerunner.values import ExpertWeights, TopK

Run = Callable[[Tensor, TopK, ExpertWeights], Tensor]


@dataclass(frozen=True)
class Implementation:
    """run(x, topk, weights). capturable: it waits for nothing, so that a CUDA graph can hold it. gathers: it copies the weights
    of every token's experts."""

    run: Run
    ours: bool = False
    capturable: bool = True
    gathers: bool = False


def implementations(shape: Shape, dtype: torch.dtype, device: str) -> tuple[dict[str, Implementation], dict[str, str]]:
    """Those that can run this shape, and of every other the reason why not."""
    able: dict[str, Implementation] = {}
    absent: dict[str, str] = {}
    for name in registry.names():
        info, request = registry.get(name).INFO, _request(shape, dtype, device)
        why = refusals(info, request)
        if why:
            absent[name] = "; ".join(why)
        else:
            able[name] = Implementation(_ours(name, shape), ours=True, capturable=not info.host_sync)
    for name, make in _OTHERS.items():
        try:
            able[name] = make(shape, device)
        except Exception as error:  # noqa: BLE001 - whatever keeps another library from running is the reason we give
            absent[name] = words(error)
    return able, absent


def versions() -> dict[str, str]:
    """Of the other libraries that are installed."""
    found = {}
    for name in ("triton", "transformers", "kernels", "vllm", "vllm-cpu", "sglang", "flashinfer-python", "scattermoe"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def words(error: BaseException) -> str:
    """One line of at most 200 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def _request(shape: Shape, dtype: torch.dtype, device: str) -> Request:
    e, h, i = shape.experts, shape.hidden, shape.inter
    rows = 2 * i if shape.gated else i
    return Request(
        device=torch.device(device).type,
        dtype=str(dtype).removeprefix("torch."),
        activation=shape.activation,
        gate_up="concat" if shape.gated else "none",
        shapes=((e, rows, h), (e, h, i)),
        strides=((rows * h, h, 1), (h * i, i, 1)),
    )


def _ours(name: str, shape: Shape) -> Run:
    backend = registry.get(name)
    call = ExpertsCall(activation=shape.activation, output="final" if backend.INFO.rounds else "summed")
    return lambda x, topk, w: backend.run(x, topk, w, call)


def _transformers(name: str) -> Callable[[Shape, str], Implementation]:
    """An experts implementation of Transformers, as a model with these experts would choose it."""

    def make(shape: Shape, device: str) -> Implementation:
        from transformers.integrations import moe

        if name == "sonicmoe":
            importlib.import_module("transformers.integrations.sonicmoe").load_sonicmoe_kernel()
        if name == "deepgemm":
            importlib.import_module("transformers.integrations.deepgemm").load_deepgemm_kernel()
        if shape.gated:
            from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts as Experts
        else:
            from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts as Experts
        if name != "eager" and name not in moe.ALL_EXPERTS_FUNCTIONS:
            raise ImportError(f"this Transformers has no experts implementation {name!r}")
        forward: Any = Experts.forward
        layout = "concat" if shape.gated else "none"
        kind = "relu2" if shape.kind == "relu2" else shape.kind

        def act(h: Tensor) -> Tensor:
            return activate(h, shape.activation, gate_up="none")

        def run(x: Tensor, topk: TopK, w: ExpertWeights) -> Tensor:
            experts = SimpleNamespace(
                config=SimpleNamespace(_experts_implementation=name, hidden_act=kind), num_experts=w.num_experts,
                has_gate=shape.gated, has_bias=False, has_post_expert_norm=False, is_transposed=False, is_concatenated=True,
                gate_up_proj=w.w13, up_proj=w.w13, down_proj=w.w2, act_fn=act, _is_expert_parallel=False,
                _apply_gate=lambda h: activate(h, shape.activation, gate_up=layout),
            )  # fmt: skip
            return forward(experts, x, topk.ids, topk.weights)

        return Implementation(run, capturable=name != "eager", gathers=name == "batched_mm")

    return make


def _gated_silu(shape: Shape, device: str) -> None:
    if torch.device(device).type != "cuda":
        raise ImportError("runs on CUDA only")
    if not shape.gated or shape.kind != "silu":
        raise ImportError("is called here for gated SiLU only")


def _vllm(shape: Shape, device: str) -> Implementation:
    from vllm.model_executor.layers.fused_moe import fused_experts  # type: ignore[import-not-found]

    _gated_silu(shape, device)
    return Implementation(lambda x, topk, w: fused_experts(x, w.w13, w.w2, topk.weights, topk.ids.int()))


def _vllm_cpu(shape: Shape, device: str) -> Implementation:
    """Its kernels for CPUs without the package around them, whose import needs all that it depends on."""
    found = importlib.util.find_spec("vllm")
    if torch.device(device).type != "cpu" or not shape.gated or shape.kind != "silu":
        raise ImportError("is called here for gated SiLU on a CPU only")
    if found is None:
        raise ImportError("vllm is not installed")
    build = "_C_AVX2" if torch.backends.cpu.get_cpu_capability() == "AVX2" else "_C"
    torch.ops.load_library(str(Path(next(iter(found.submodule_search_locations or ()))) / f"{build}.abi3.so"))
    packed: dict[int, list[Tensor]] = {}

    def pack(weight: Tensor) -> Tensor:
        out = torch.empty_like(weight)
        torch.ops._C.prepack_moe_weight(weight, out, "vec")
        return out

    def run(x: Tensor, topk: TopK, w: ExpertWeights) -> Tensor:
        if id(w) not in packed:
            packed[id(w)] = [pack(w.w13), pack(w.w2)]
        out = torch.empty_like(x)
        torch.ops._C.cpu_fused_moe(out, x, *packed[id(w)], None, None, topk.weights, topk.ids.int(), False, "silu", "vec")
        return out

    return Implementation(run)


def _sglang(shape: Shape, device: str) -> Implementation:
    from sglang.srt.layers.moe.fused_moe_triton.fused_moe import fused_experts  # type: ignore[import-not-found]
    from sglang.srt.layers.moe.moe_runner import MoeRunnerConfig  # type: ignore[import-not-found]
    from sglang.srt.layers.moe.topk import StandardTopKOutput  # type: ignore[import-not-found]

    _gated_silu(shape, device)
    config = MoeRunnerConfig(inplace=False)

    def run(x: Tensor, topk: TopK, w: ExpertWeights) -> Tensor:
        return fused_experts(x, w.w13, w.w2, StandardTopKOutput(topk.weights, topk.ids.int(), topk.weights), config)

    return Implementation(run)


def _flashinfer(shape: Shape, device: str) -> Implementation:
    from flashinfer.fused_moe import cutlass_fused_moe  # type: ignore[import-not-found]

    _gated_silu(shape, device)
    up_first: dict[int, Tensor] = {}  # its gate rows come second

    def run(x: Tensor, topk: TopK, w: ExpertWeights) -> Tensor:
        w31 = up_first.get(id(w))
        if w31 is None:
            w31 = up_first[id(w)] = w.w13.roll(shape.inter, dims=1)
        out = cutlass_fused_moe(x, topk.ids.int(), topk.weights, w31, w.w2, x.dtype, quant_scales=[])
        return out[0] if isinstance(out, list | tuple) else out

    return Implementation(run)


def _scattermoe(shape: Shape, device: str) -> Implementation:
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear  # type: ignore[import-not-found]

    _gated_silu(shape, device)

    def run(x: Tensor, topk: TopK, w: ExpertWeights) -> Tensor:
        order, slots, ends = flatten_sort_count(topk.ids, num_experts=w.num_experts)
        h = parallel_linear(x, w.w13.mT, topk.ids.shape[1], order, slots, ends, grouped_out=True)
        h = activate(h, shape.activation, gate_up="concat")
        return parallel_linear(h, w.w2.mT, 1, order, slots, ends, grouped_in=True, gates=topk.weights.to(x.dtype))

    return Implementation(run)


_OTHERS: dict[str, Callable[[Shape, str], Implementation]] = {
    **{f"transformers.{n}": _transformers(n) for n in ("eager", "batched_mm", "grouped_mm", "sonicmoe", "deepgemm")},
    "vllm": _vllm,
    "vllm-cpu": _vllm_cpu,
    "sglang": _sglang,
    "flashinfer": _flashinfer,
    "scattermoe": _scattermoe,
}
