"""What this machine and installation can run: versions, devices, backends with their reasons, and a short trial."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

import moerunner
from moerunner.experts import registry
from moerunner.kernels.cpu import library, nodes
from moerunner.ops.reference import reference
from moerunner.runner import MoERunner
from moerunner.spec import ExpertsSpec, MoESpec, RoutingSpec
from moerunner.values import LayerWeights

PACKAGES = ("torch", "transformers", "safetensors", "tokenizers", "accelerate", "triton")


def collect() -> dict[str, Any]:
    """Plain data, good for a bug report: no paths, no host or user names."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backends = [{"name": n, "available": ok, "reason": reason} for n, ok, reason in registry.available(device)]
    return {
        "versions": {"moerunner": moerunner.__version__, "python": platform.python_version()}
        | {name: _version(name) for name in PACKAGES},
        "system": {"os": platform.system(), "release": platform.release(), "machine": platform.machine()},
        "cpu": {
            "model": _cpu_model(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "kernels": library.chosen()[0],
            "memory_nodes": len(nodes.ours()) or 1,
        },
        "gpus": [_gpu(i) for i in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "device": device,
        "backends": backends,
        "smoke": smoke(device),
    }


def smoke(device: str) -> dict[str, Any]:
    """Runs a small layer and holds it against the float64 oracle."""
    spec = MoESpec(
        hidden_size=64,
        num_experts=8,
        top_k=2,
        routing=RoutingSpec(score="softmax", renormalise="sum"),
        experts=ExpertsSpec(intermediate_size=32),
        apply_routed_scale_to_output=False,
    )
    draw = torch.Generator().manual_seed(0)
    weights = {n: torch.randn(shape, generator=draw) / shape[-1] ** 0.5 for n, shape in spec.weight_shapes().items()}
    x = torch.randn(16, spec.hidden_size, generator=draw)
    expected = reference(spec, LayerWeights.of(spec, weights), x)
    start = time.perf_counter()
    with torch.no_grad():
        y = MoERunner(spec, {n: w.to(device) for n, w in weights.items()})(x.to(device)).double().cpu()
    error = float((y - expected).abs().max() / expected.abs().max())
    return {"error": error, "ok": error < 1e-5, "seconds": time.perf_counter() - start}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or "unknown"


def _gpu(index: int) -> dict[str, Any]:
    p = torch.cuda.get_device_properties(index)
    facts = {"name": p.name, "memory_gib": round(p.total_memory / 2**30, 1), "capability": f"{p.major}.{p.minor}"}
    return facts | {"no_hopper_kernel": _no_hopper_kernel(torch.device("cuda", index))}


def _no_hopper_kernel(device: torch.device) -> str:
    """Why many tokens go through the Triton tiles there, and not through the kernel in CUDA C++; nothing where they do not."""
    try:
        from moerunner.kernels import hopper
    except ImportError:
        return "Triton is not installed"
    return hopper.why_not(device)
