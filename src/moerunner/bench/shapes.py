"""The layers that are measured, and the time below which no implementation of them can fall."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from moerunner.spec import ActivationSpec


@dataclass(frozen=True)
class Shape:
    """The routed experts of one layer. kind: of the activation; without biases."""

    experts: int
    top_k: int
    hidden: int
    inter: int
    kind: str = "silu"
    gated: bool = True

    @property
    def expert_size(self) -> int:
        """Parameters of one expert."""
        return (3 if self.gated else 2) * self.hidden * self.inter

    @property
    def activation(self) -> ActivationSpec:
        return ActivationSpec(kind=self.kind)  # type: ignore[arg-type]


SHAPES = {
    "mixtral-8x7b": Shape(8, 2, 4096, 14336),
    "qwen3-30b": Shape(128, 8, 2048, 768),
    "qwen3-next": Shape(512, 10, 2048, 512),
    "olmoe": Shape(64, 8, 2048, 1024),
    "glm-4.5-air": Shape(128, 8, 4096, 1408),
    "gpt-oss-120b": Shape(128, 4, 2880, 2880),
    "deepseek-v3-tp8": Shape(256, 8, 7168, 256),
    "32-experts-k8": Shape(32, 8, 7168, 2048),
    "nemotron-3-nano": Shape(128, 6, 2688, 1856, kind="relu2", gated=False),
    "small": Shape(64, 8, 1024, 512),
}
GPU_SHAPES = [name for name in SHAPES if name != "small"]
CPU_SHAPES = ["small"]
GPU_TOKENS = [1, 8, 32, 128, 512, 2048, 8192]
CPU_TOKENS = [1, 16, 256]


@dataclass(frozen=True)
class Peaks:
    """What a device reaches: bytes read and written per second, and operations per second of large products."""

    bytes_per_second: float
    flops: float


def measure_peaks(device: str, dtype: torch.dtype) -> Peaks:
    """Of this device now: large copies (on a CPU reads too, where a cache line that is written is read first), large products.

    Random data: products of zeros run faster. On a CPU those of half precision may be slower than of float32 in their place.
    """
    cuda = torch.device(device).type == "cuda"
    size, width = (2**30, 8192 if dtype.itemsize == 2 else 4096) if cuda else (2**28, 1024)
    rates = _memory_rates(size, device, cuda)
    products = []
    for kind in (dtype,) if cuda else {dtype, torch.float32}:
        a, b = (torch.randn(width, width, device=device).to(kind) for _ in range(2))
        b = b if cuda else b.T  # rows by rows, as in a linear layer: PyTorch may have no other fast product
        products.append(_seconds(lambda a=a, b=b: a @ b, cuda))
    return Peaks(max(rates), 2 * width**3 / min(products))


def _memory_rates(size: int, device: str, cuda: bool) -> list[float]:
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    copied = 2 * size / _seconds(lambda: target.copy_(source), cuda)
    return [copied] if cuda else [copied, size / _seconds(source.sum, cuda)]


def _seconds(run: Callable[[], object], cuda: bool) -> float:
    times = []
    for _ in range(7):
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times) if cuda else min(times)  # a CPU's peak is what it reaches when nothing else runs


def floor_seconds(
    shape: Shape, tokens: int, peaks: Peaks, *, hit: float | None = None, itemsize: int = 2, stored: bool = False
) -> float:
    """max(bytes that must move / bandwidth, operations / rate).

    Bytes: the weights of the experts that were hit, the tokens and the result. hit: distinct experts that are chosen; None is
    the expectation for uniform routing. stored: also the rows between both products, written and read once.
    """
    if hit is None:
        hit = shape.experts * (1 - (1 - shape.top_k / shape.experts) ** tokens)
    moved = hit * shape.expert_size + 2 * tokens * shape.hidden
    if stored:
        moved += 2 * tokens * shape.top_k * shape.inter
    flops = 2 * shape.expert_size * tokens * shape.top_k
    return max(moved * itemsize / peaks.bytes_per_second, flops / peaks.flops)
