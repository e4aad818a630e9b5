"""Counts the choices of a patched model's routers while it reads a text. Letters: T tokens, E experts, K chosen."""

from __future__ import annotations

import csv
import inspect
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moerunner.errors import SpecError, UnsupportedError
from moerunner.models.adapt import runners
from moerunner.parallel.balance import LoadCounter, imbalance
from moerunner.parallel.pairs import SlotMap
from moerunner.values import TopK

MOST_WINDOW = 4096  # tokens that the model reads at once, at most


class PairCounter(LoadCounter):
    """A `LoadCounter` that also counts the tokens that chose two experts together, and adds up the routing weights.

    pairs: [E, E] float64, symmetric, with the loads on its diagonal; weights: [E] float64; tokens: how many were counted.
    """

    def __init__(self, num_experts: int) -> None:
        super().__init__(num_experts)
        self.pairs = torch.zeros(num_experts, num_experts, dtype=torch.float64)
        self.weights, self.tokens = torch.zeros(num_experts, dtype=torch.float64), 0

    def add(self, topk: TopK, slots: SlotMap) -> None:
        super().add(topk, slots)
        ids_TK = slots.logical(topk.ids) if topk.space == "physical" else topk.ids
        ids_TK = ids_TK.reshape(-1, ids_TK.shape[-1]).cpu()
        mine_TK = (ids_TK >= 0) & (ids_TK < self._num_experts)
        kept_TK = torch.where(mine_TK, ids_TK, self._num_experts)
        chosen_TE = torch.zeros(len(ids_TK), self._num_experts + 1, dtype=torch.float64).scatter_(1, kept_TK, 1.0)
        chosen_TE = chosen_TE[:, : self._num_experts]
        self.pairs += chosen_TE.T @ chosen_TE
        self.weights.index_add_(0, ids_TK[mine_TK], topk.weights.reshape(ids_TK.shape).cpu().double()[mine_TK])
        self.tokens += len(ids_TK)


@dataclass(frozen=True)
class LayerLoads:
    """One layer's. load: tokens of each expert; pairs: tokens that chose both; weights: routing weights, added up."""

    name: str
    tokens: int
    load: list[int]
    pairs: list[list[int]]
    weights: list[float]

    @property
    def imbalance(self) -> float:
        """The busiest expert over the mean; 1.0 is even."""
        return imbalance(self.load)

    @property
    def idle(self) -> int:
        """Experts that no token chose."""
        return self.load.count(0)

    @property
    def effective(self) -> float:
        """As many experts as would have this entropy if all had the same load: exp(-sum p log p)."""
        total = sum(self.load)
        return math.exp(-sum(n / total * math.log(n / total) for n in self.load if n)) if total else 0.0

    def lift(self, i: int, j: int) -> float:
        """Tokens that chose both, over those that would have if each were chosen on its own: 1.0 is no bond."""
        by_chance = self.load[i] * self.load[j] / self.tokens if self.tokens else 0.0
        return self.pairs[i][j] / by_chance if by_chance else 1.0

    def bonds(self, most: int = 3, *, least: float = 0.01) -> list[tuple[int, int, float]]:
        """The pairs with the highest lift among those that at least this share of the tokens chose."""
        found = [
            (i, j, self.lift(i, j))
            for i in range(len(self.load))
            for j in range(i + 1, len(self.load))
            if self.pairs[i][j] >= max(1.0, least * self.tokens)
        ]
        return sorted(found, key=lambda bond: -bond[2])[:most]

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "tokens": self.tokens,
            "load": self.load,
            "weights": self.weights,
            "pairs": self.pairs,
            "imbalance": self.imbalance,
            "idle": self.idle,
            "effective_experts": self.effective,
            "bonds": [{"experts": [i, j], "lift": lift} for i, j, lift in self.bonds()],
        }


@dataclass(frozen=True)
class Loads:
    """All layers'. tokens: of the text."""

    model: str
    sample: str
    tokens: int
    layers: list[LayerLoads]

    def to_dict(self) -> dict[str, Any]:
        return {"model": self.model, "sample": self.sample, "tokens": self.tokens, "layers": [x.to_dict() for x in self.layers]}

    def csv(self) -> str:
        """A line for each expert of each layer."""
        rows = [
            (layer.name, expert, count, f"{count / max(1, sum(layer.load)):.6g}", f"{weight:.6g}")
            for layer in self.layers
            for expert, (count, weight) in enumerate(zip(layer.load, layer.weights, strict=True))
        ]
        return _csv(("layer", "expert", "tokens", "share", "weight"), rows)

    def pairs_csv(self) -> str:
        """A line for each pair of experts of a layer that a token chose together."""
        rows = [
            (layer.name, i, j, layer.pairs[i][j], f"{layer.lift(i, j):.6g}")
            for layer in self.layers
            for i in range(len(layer.load))
            for j in range(i + 1, len(layer.load))
            if layer.pairs[i][j]
        ]
        return _csv(("layer", "expert", "other", "tokens", "lift"), rows)


def _csv(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([head, *rows])
    return out.getvalue()


@torch.no_grad()
def measure(
    model: Any, input_ids: Tensor, *, name: str = "", sample: str = "", told: Callable[[int], None] | None = None
) -> Loads:
    """Has a patched model read tokens, and counts what its routers choose.

    Args:
        input_ids: [1, T]; more than the model's context is read in windows of it. told: called with the tokens read so far.

    Raises:
        UnsupportedError: no block of the model is patched. SpecError: there are no tokens.
    """
    found = runners(model)
    if not found:
        raise UnsupportedError("has no patched MoE block", where=name or type(model).__name__)
    if not input_ids.shape[1]:
        raise SpecError("has no tokens", where="the text", next_step="Give a longer one")
    window = min(getattr(model.config.get_text_config(), "max_position_embeddings", MOST_WINDOW) or MOST_WINDOW, MOST_WINDOW)
    before = {block: runner.loads for block, runner in found.items()}
    counters = {block: PairCounter(runner.spec.num_experts) for block, runner in found.items()}
    more = _arguments(model)
    try:
        for block, runner in found.items():
            runner.loads = counters[block]
        for at in range(0, input_ids.shape[1], window):
            piece = input_ids[:, at : at + window]
            model(input_ids=piece.to(model.device), **more)
            if told is not None:
                told(at + piece.shape[1])
    finally:
        for block, runner in found.items():
            runner.loads = before[block]
    layers = [
        LayerLoads(block, c.tokens, c.counts.tolist(), c.pairs.round().long().tolist(), c.weights.tolist())
        for block, c in counters.items()
        if c.tokens
    ]
    return Loads(name or type(model).__name__, sample, input_ids.shape[1], layers)


def _arguments(model: nn.Module) -> dict[str, Any]:
    """No cache, and the logits of the last token only, where the model can leave them out."""
    takes = inspect.signature(model.forward).parameters
    return {n: value for n, value in (("use_cache", False), ("logits_to_keep", 1)) if n in takes}
