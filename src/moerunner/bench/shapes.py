"""The layers that are measured, and the time below which no implementation of them can fall."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """The routed experts of one layer."""

    experts: int
    top_k: int
    hidden: int
    inter: int


SHAPES = {
    "mixtral-8x7b": Shape(8, 2, 4096, 14336),
    "qwen3-30b": Shape(128, 8, 2048, 768),
    "qwen3-next": Shape(512, 10, 2048, 512),
    "olmoe": Shape(64, 8, 2048, 1024),
    "glm-4.5-air": Shape(128, 8, 4096, 1408),
    "gpt-oss-120b": Shape(128, 4, 2880, 2880),
    "deepseek-v3-tp8": Shape(256, 8, 7168, 256),
    "32-experts-k8": Shape(32, 8, 7168, 2048),
}


@dataclass(frozen=True)
class Peaks:
    """What a device reaches: bytes read and written per second, and operations per second of large products."""

    bytes_per_second: float
    flops: float


# Measured with a device copy and an 8192^3 bfloat16 product on random data, not taken from a data sheet.
DEVICES = {"H200": Peaks(4.3e12, 790e12), "H100": Peaks(3.0e12, 790e12)}


def peaks_of(device_name: str) -> Peaks:
    """Of the device with this name; an unknown one is judged as an H200."""
    return next((p for name, p in DEVICES.items() if name in device_name), DEVICES["H200"])


def floor_seconds(shape: Shape, tokens: int, peaks: Peaks, *, hit: float | None = None, itemsize: int = 2) -> float:
    """max(bytes that must move / bandwidth, operations / rate).

    Bytes: the weights of the experts that were hit, the tokens and the result. hit: distinct experts that are chosen; None is
    the expectation for uniform routing.
    """
    if hit is None:
        hit = shape.experts * (1 - (1 - shape.top_k / shape.experts) ** tokens)
    moved = hit * 3 * shape.hidden * shape.inter + 2 * tokens * shape.hidden
    flops = 6 * shape.hidden * shape.inter * tokens * shape.top_k
    return max(moved * itemsize / peaks.bytes_per_second, flops / peaks.flops)
