"""What Prometheus reads: requests, tokens, times, the queue, and how often each expert of each layer was chosen."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from moerunner.parallel.balance import LoadCounter, imbalance

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """The counters of one server. loads: of each MoE layer by its name. running, waiting: how many requests there are now."""

    def __init__(
        self, loads: Mapping[str, LoadCounter], running: Callable[[], int], waiting: Callable[[], int], model: str, engine: str
    ) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"moerunner_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, buckets: Iterable[float], *labels: str) -> Histogram:
            return Histogram(f"moerunner_{name}_seconds", text, labels, buckets=tuple(buckets), registry=self.registry)

        self.requests = counter(
            "requests", "Requests, by endpoint and HTTP status (499: the client left).", "endpoint", "status"
        )
        self.prompt_tokens = counter("prompt_tokens", "Tokens of the prompts that were run.")
        self.new_tokens = counter("generated_tokens", "Tokens that the model wrote.")
        self.request_seconds = histogram("request", "From a request to its end.", _SECONDS, "endpoint")
        self.first_token_seconds = histogram("first_token", "From a request to its first token, the queue included.", _SECONDS)
        self.between_tokens_seconds = histogram("between_tokens", "From one token of an answer to the next.", _BETWEEN)
        self.registry.register(_Now(loads, running, waiting, model, engine))


class _Now(Collector):
    """What is read when it is asked for."""

    def __init__(
        self, loads: Mapping[str, LoadCounter], running: Callable[[], int], waiting: Callable[[], int], model: str, engine: str
    ) -> None:
        self._loads, self._running, self._waiting, self._who = loads, running, waiting, (model, engine)

    def collect(self) -> Iterable[Any]:
        info = GaugeMetricFamily("moerunner_info", "Which model is served, and how.", labels=["model", "engine"])
        info.add_metric(self._who, 1)
        yield info
        yield GaugeMetricFamily("moerunner_requests_running", "Requests that are computed now.", value=self._running())
        yield GaugeMetricFamily("moerunner_requests_waiting", "Requests that wait for their turn.", value=self._waiting())
        chosen = CounterMetricFamily(
            "moerunner_expert_tokens", "Tokens that went to an expert, by layer and expert.", labels=["layer", "expert"]
        )
        uneven = GaugeMetricFamily(
            "moerunner_layer_imbalance", "Tokens of a layer's busiest expert over the mean of its experts.", labels=["layer"]
        )
        for layer, loads in self._loads.items():
            counts = loads.counts.tolist()
            for expert, count in enumerate(counts):
                chosen.add_metric([layer, str(expert)], count)
            if any(counts):
                uneven.add_metric([layer], imbalance(counts))
        yield chosen
        yield uneven
