"""Times of device work: CUDA events around graph replays, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch


def graph_seconds(calls: Sequence[Callable[[], object]], *, replays: int = 15) -> float:
    """Seconds of one call inside a CUDA graph that holds all of `calls`, the median over replays.

    The calls differ in weights and routing, so that none finds its weights in the cache of the one before.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(2):
        graph.replay()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(replays)]
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3 / len(calls)


def eager_seconds(calls: Sequence[Callable[[], object]], *, rounds: int = 5) -> float:
    """Seconds of one call launched from Python, until its result is there; on a CPU too."""
    cuda = torch.cuda.is_available()
    times = []
    for _ in range(rounds):
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for call in calls:
            call()
        if cuda:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) / len(calls))
    return statistics.median(times)
