"""python -m moerunner.bench.cpu: the experts on a CPU, time beside the floor and beside what else runs here.

`moerunner bench` measures plain weights; this adds experts held as int8, whose floor is that of their bytes, Transformers'
batched_mm under torch.compile, and the path of the kernels. All take turns in one run, with the peaks measured before.
"""

from __future__ import annotations

import argparse
import json
import platform
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moerunner.bench.experts import Judge, copies_of, draw_inputs, make_weights
from moerunner.bench.peers import Implementation, implementations, versions, words
from moerunner.bench.shapes import CPU_SHAPES, SHAPES, Shape, floor_seconds, measure_peaks
from moerunner.bench.timing import turns_seconds
from moerunner.experts import cpu
from moerunner.experts.base import ExpertsCall
from moerunner.kernels.cpu import library
from moerunner.quant import int8
from moerunner.values import ExpertWeights, TopK

INT8, BATCHED, COMPILED = "cpu int8", "transformers.batched_mm", "transformers.batched_mm compiled"
_BATCHED_TOKENS = 16  # it gathers the weights of every slot


def rows(name: str, dtype: torch.dtype, tokens: list[int], only: set[str] | None) -> list[dict[str, Any]]:
    """One per implementation and number of tokens; `eager`, seconds, is a median, `ratio` is to the floor of its own bytes."""
    shape, found = SHAPES[name], []
    peaks = measure_peaks("cpu", dtype)
    weights = make_weights(shape, copies_of(shape, dtype), dtype, "cpu")
    able = _all(shape, dtype, weights) if library.why_not() == "" else implementations(shape, dtype, "cpu")[0]
    for count in tokens:
        inputs, hit = draw_inputs(shape, count, "uniform", weights, torch.Generator().manual_seed(count))
        judge, calls, errors = Judge.of(shape, inputs[0]), {}, {}
        for label, one in able.items():
            if (only and label not in only) or (label in (BATCHED, COMPILED) and count > _BATCHED_TOKENS):
                continue
            try:
                errors[label] = judge.error(one.run(*inputs[0]))
            except Exception as problem:  # noqa: BLE001 - another library's failure is a result
                print(f"{label}: {words(problem)}")
                continue
            calls[label] = [lambda run=one.run, i=i: run(*i) for i in inputs]
        for label, seconds in turns_seconds(calls).items():
            size = 1 if label == INT8 else dtype.itemsize
            floor = floor_seconds(shape, count, peaks, hit=hit, itemsize=size)
            row = dict(shape=name, dtype=str(dtype)[6:], tokens=count, routing="uniform", implementation=label)
            row |= dict(eager=seconds, floor=floor)
            found.append(row | dict(ratio=seconds / floor, error=errors[label], yardstick=judge.yardstick, peaks=vars(peaks)))
            print(f"{name} {row['dtype']:8} {count:5} {label:34} {seconds * 1e3:8.3f} ms {seconds / floor:6.2f} x floor")
    return found


def _all(shape: Shape, dtype: torch.dtype, weights: list[ExpertWeights]) -> dict[str, Implementation]:
    able, _ = implementations(shape, dtype, "cpu")
    call, held = ExpertsCall(activation=shape.activation), {id(w): int8.quantize(w) for w in weights}
    able[INT8] = Implementation(lambda x, topk, w: cpu.run(x, topk, held[id(w)], call), ours=True)
    batched = able.get(BATCHED)
    if batched is not None:

        @cache
        def compiled() -> Any:
            return torch.compile(
                lambda x, ids, p, w13, w2: batched.run(x, TopK(ids, p), ExpertWeights.of({"w13": w13, "w2": w2}))
            )

        def run(x: Tensor, topk: TopK, w: ExpertWeights) -> Tensor:
            return compiled()(x, topk.ids, topk.weights, w.w13, w.w2)

        able[COMPILED] = Implementation(run)
    return able


def environment() -> dict[str, Any]:
    """What a result is worth nothing without."""
    info = Path("/proc/cpuinfo")
    named = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    cpu = {"model": (named or [platform.processor()])[0], "threads": torch.get_num_threads(), "path": library.chosen()[0]}
    return {"python": platform.python_version(), "torch": torch.__version__, "cpu": cpu, **versions()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m moerunner.bench.cpu", description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=CPU_SHAPES, choices=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 256, 2048])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=["bfloat16", "float32", "float16"])
    parser.add_argument("--only", nargs="+", help="implementations by name")
    parser.add_argument("--save", type=Path, help="JSON file")
    given = parser.parse_args()
    only: set[str] | None = set(given.only) if given.only else None
    results: list[dict[str, Any]] = []
    with torch.no_grad():
        for name in given.shapes:
            for dtype in given.dtypes:
                results += rows(name, getattr(torch, dtype), given.tokens, only)
                if given.save is not None:
                    given.save.write_text(json.dumps({"environment": environment(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
