"""Measures tiles for a shape: the choice from the shape alone, and about a dozen others that differ from it in one part.

Shape suffixes as in `experts.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from moerunner.bench.experts import Inputs, Judge, Routing, copies_of, draw_inputs, make_weights
from moerunner.bench.peers import words
from moerunner.bench.shapes import Shape
from moerunner.bench.timing import capture, replay_seconds

GAIN = 0.97
"""Tiles are kept if they take at most this share of the time of those chosen from the shape alone; less is noise."""


@dataclass(frozen=True)
class Timed:
    """Seconds of one call in a CUDA graph, None with the reason where there are none."""

    tiles: Any
    seconds: float | None
    problem: str = ""


@dataclass(frozen=True)
class Tuned:
    """One number of tokens: the tiles chosen from the shape alone, and all that were measured, those first."""

    tokens: int
    timed: tuple[Timed, ...]

    @property
    def analytic(self) -> Timed:
        return self.timed[0]

    @property
    def best(self) -> Timed:
        """The fastest; those chosen from the shape alone unless another is clearly faster."""
        right = [t for t in self.timed if t.seconds is not None]
        best = min(right, key=lambda t: t.seconds or 0.0, default=self.analytic)
        clear = best.seconds is not None and best.seconds <= GAIN * (self.analytic.seconds or float("inf"))
        return best if clear else self.analytic


def run_with(tiles: Any, shape: Shape, inputs: Inputs) -> torch.Tensor:
    """The kernels with these tiles, [T, H] in the tokens' dtype."""
    from moerunner.kernels import experts as kernels
    from moerunner.kernels.operators import KINDS

    x, topk, w = inputs
    layout, kind = kernels.LAYOUTS.index(w.gate_up), KINDS.index(shape.kind)
    rest = (layout, kind, 1.0, 0.0, None, False, None, None, False, kernels.FINAL, 1.0)
    return kernels.run(x, topk.ids, topk.weights, w.w13, w.w2, None, None, *rest, tiles)


def tune(
    shape: Shape,
    tokens: Iterable[int],
    *,
    dtype: torch.dtype,
    device: str = "cuda",
    routing: Routing = "uniform",
    seed: int = 0,
    replays: int = 9,
) -> Iterator[Tuned]:
    """Measures every number of tokens. Tiles that give a wrong result are not timed."""
    from moerunner.kernels import hopper
    from moerunner.kernels import tiles as choice

    able = not hopper.why_not(torch.device(device))
    generator = torch.Generator(torch.device(device).type).manual_seed(seed)
    weights = make_weights(shape, copies_of(shape, dtype), dtype, device)
    for count in tokens:
        inputs, _ = draw_inputs(shape, count, routing, weights, generator)
        judge = Judge.of(shape, inputs[0])
        start = choice.choose(
            count, shape.top_k, shape.experts, shape.hidden, shape.inter, itemsize=dtype.itemsize, specialised=able
        )

        def clock(tiles: Any, inputs: list[Inputs] = inputs, judge: Judge = judge) -> Timed:
            return _time(tiles, shape, inputs, judge, replays)

        yield Tuned(count, _search(start, clock, able))


def _search(start: Any, clock: Callable[[Any], Timed], able: bool) -> tuple[Timed, ...]:
    """Neighbours first; of the best one part after the other; then `hopper.py`, if it is able to run. Each tiles once, `start`
    first."""
    from moerunner.kernels import tiles as choice

    done: dict[Any, Timed] = {}

    def fastest(each: list[Any]) -> Any:
        for tiles in each:
            if tiles not in done:
                done[tiles] = clock(tiles)
        return min((done[tiles] for tiles in each), key=lambda t: t.seconds or float("inf")).tiles

    base = fastest([start, *choice.neighbours(start)])
    for part, others in choice.alternatives(base):
        base = dataclasses.replace(base, **{part: getattr(fastest([base, *others]), part)})
    if able:
        fastest([base, *choice.specialised(start)])
    return tuple(done.values())


def _time(tiles: Any, shape: Shape, inputs: list[Inputs], judge: Judge, replays: int) -> Timed:
    try:
        error, bound = judge.error(run_with(tiles, shape, inputs[0])), judge.bound(inputs[0][0].dtype, ours=True)
        if not error <= bound:
            return Timed(tiles, None, f"wrong: error {error:.1e}, allowed {bound:.1e}")
        calls = [lambda i=i: run_with(tiles, shape, i) for i in inputs]
        return Timed(tiles, replay_seconds({"": capture(calls)}, replays=replays)[""] / len(calls))
    except Exception as problem:  # noqa: BLE001 - tiles may need more shared memory than there is
        torch.cuda.synchronize()
        return Timed(tiles, None, words(problem))
