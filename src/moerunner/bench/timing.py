"""Times of device work: CUDA events around graph replays, interleaved, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

Calls = Sequence[Callable[[], object]]


def capture(calls: Calls) -> torch.cuda.CUDAGraph:
    """A CUDA graph that holds all of `calls`, replayed twice.

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
    return graph


def replay_seconds(graphs: Mapping[str, torch.cuda.CUDAGraph], *, replays: int = 15) -> dict[str, float]:
    """Seconds of one replay of each, the median; they take turns, so that what slows the device slows all alike."""
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in graphs}
    for _ in range(replays):
        for name, graph in graphs.items():
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            pair[0].record()
            graph.replay()
            pair[1].record()
            events[name].append(pair)
    if graphs:
        torch.cuda.synchronize()
    return {name: statistics.median(a.elapsed_time(b) for a, b in pairs) / 1e3 for name, pairs in events.items()}


def graph_seconds(calls: Calls, *, replays: int = 15) -> float:
    """Seconds of one call inside a CUDA graph that holds all of `calls`."""
    return replay_seconds({"": capture(calls)}, replays=replays)[""] / len(calls)


def eager_seconds(calls: Calls, *, rounds: int = 5) -> float:
    """Seconds of one call launched from Python, until its result is there; on a CPU too."""
    return turns_seconds({"": calls}, rounds=rounds)[""]


def turns_seconds(calls: Mapping[str, Calls], *, rounds: int = 5) -> dict[str, float]:
    """The same for several that take turns."""
    cuda = torch.cuda.is_available()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, each in calls.items():
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
            for call in each:
                call()
            if cuda:
                torch.cuda.synchronize()
            times[name].append((time.perf_counter() - start) / len(each))
    return {name: statistics.median(each) for name, each in times.items()}
