"""Times the experts' tiles on a GPU, and makes the tables that are shipped. Results are written after each cell.

    python scripts/gpu_bench.py results.json --shapes qwen3-30b,olmoe --seconds 110
    python scripts/gpu_bench.py --table results.json more.json    # into src/moerunner/assets/tiles/

A cell is a shape and a number of tokens: the choice from the shape alone, its neighbours, and what differs from the best in one
part (`moerunner.bench.tune`), each held against float64 before it is timed. Kernels are compiled by several processes before.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import math
import multiprocessing
import os
import time
from pathlib import Path

import torch

from moerunner.bench import measure_peaks
from moerunner.bench.experts import draw_inputs, make_weights
from moerunner.bench.shapes import GPU_SHAPES, SHAPES, Peaks, floor_seconds
from moerunner.bench.tune import Tuned, run_with, tune
from moerunner.env import collect
from moerunner.kernels import hopper, tables, tiles

TOKENS = [1, 2048, 8192, 512, 8, 32, 128]  # what matters most first


def candidates(shape, count: int, itemsize: int) -> list[tiles.Tiles]:
    able = not hopper.why_not(torch.device("cuda"))
    start = tiles.choose(count, shape.top_k, shape.experts, shape.hidden, shape.inter, itemsize=itemsize, specialised=able)
    found = [start, *tiles.neighbours(start)]
    parts = [other for base in found for _, others in tiles.alternatives(base) for other in others]
    return [*found, *parts, *tiles.specialised(start)]


def small(shape):
    """A shape whose kernels are those of this one: the same remainders, far fewer parameters."""
    width = [3 * math.gcd(n, 1024) for n in (shape.hidden, shape.inter)]
    return dataclasses.replace(shape, experts=min(shape.experts, 16), hidden=width[0], inter=width[1])


def compile_all(jobs, dtype: torch.dtype) -> list[str]:
    """In a process of its own: runs each (shape, tiles) once, which leaves the kernels in Triton's cache."""
    generator, problems = torch.Generator("cuda").manual_seed(0), []
    for shape, each in jobs:
        try:
            inputs, _ = draw_inputs(shape, 1, "uniform", make_weights(shape, 1, dtype, "cuda"), generator)
            for one in each:
                try:
                    run_with(one, shape, inputs[0])
                    torch.cuda.synchronize()
                except Exception as error:  # noqa: BLE001 - the timed run will tell
                    problems.append(f"{one}: {type(error).__name__} {str(error)[:120]}")
        except Exception as error:  # noqa: BLE001
            problems.append(f"{shape}: {type(error).__name__} {str(error)[:120]}")
    return problems


def warm(names: list[str], counts: list[int], dtype: torch.dtype, workers: int, seconds: float) -> list[str]:
    wanted: dict[tiles.Tiles, set] = {}
    for name in names:
        for count in counts:
            for one in candidates(SHAPES[name], count, dtype.itemsize):
                wanted.setdefault(one, set()).add(small(SHAPES[name]))
    jobs = [[(shape, [one]) for shape in shapes] for one, shapes in wanted.items()]
    print(f"compiling for {len(jobs)} tiles with {workers} processes", flush=True)
    pool = concurrent.futures.ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    done = [pool.submit(compile_all, job, dtype) for job in jobs]
    concurrent.futures.wait(done, timeout=seconds)
    late = sum(not d.done() for d in done)
    processes = list((pool._processes or {}).values())
    pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        process.terminate()
    problems = [p for d in done if d.done() and not d.cancelled() and d.exception() is None for p in d.result()]
    problems += [f"{type(d.exception()).__name__}" for d in done if d.done() and not d.cancelled() and d.exception()]
    return [*problems, *([f"{late} of {len(done)} were not compiled in time"] if late else [])]


def row(name: str, tuned: Tuned, peaks: Peaks, dtype: torch.dtype, routing: str) -> dict:
    shape = SHAPES[name]
    hit = None if routing == "uniform" else shape.experts
    floor = floor_seconds(shape, tuned.tokens, peaks, hit=hit, itemsize=dtype.itemsize)
    timed = [{"tiles": tiles.to_dict(t.tiles), "seconds": t.seconds, "problem": t.problem} for t in tuned.timed]
    best, first = tuned.best, tuned.analytic
    print(
        f"{name:16} {tuned.tokens:6} {(first.seconds or 0) * 1e6:9.1f} us {(first.seconds or 0) / floor:5.2f} x floor, best "
        f"{(best.seconds or 0) * 1e6:9.1f} us {(best.seconds or 0) / floor:5.2f}  {tiles.to_dict(best.tiles)}",
        flush=True,
    )
    for t in tuned.timed:
        if t.problem:
            print(f"    {tiles.to_dict(t.tiles)}: {t.problem}", flush=True)
    key = tables.key(
        experts=shape.experts, top_k=shape.top_k, hidden=shape.hidden, inter=shape.inter, gated=shape.gated, dtype=dtype
    )
    best_row = {"tiles": tiles.to_dict(best.tiles), "seconds": best.seconds, "analytic_seconds": first.seconds}
    return {"shape": name, "key": key, "tokens": tuned.tokens, "floor": floor, "best": best_row, "timed": timed}


def write_tables(results: list[Path]) -> None:
    """The cells in which other tiles were clearly faster than the choice from the shape alone."""
    for path in results:
        found = json.loads(path.read_text())
        shapes: dict = {}
        for cell in found["cells"]:
            if cell["best"]["tiles"] != cell["timed"][0]["tiles"]:
                shapes.setdefault(cell["key"], {})[str(cell["tokens"])] = cell["best"]
        target = tables.shipped_file(found["environment"]["gpus"][0]["name"])
        versions = {n: found["environment"]["versions"][n] for n in ("torch", "triton")}
        tables.write(target, {"gpu": found["environment"]["gpus"][0]["name"], **versions}, shapes)
        print(target, sum(map(len, shapes.values())), "entries")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--shapes", type=lambda s: s.split(","), default=GPU_SHAPES)
    parser.add_argument("--tokens", type=lambda s: [int(n) for n in s.split(",")], default=TOKENS)
    parser.add_argument("--routing", default="uniform")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seconds", type=float, default=110)
    parser.add_argument("--workers", type=int, default=min(14, os.cpu_count() or 1))
    args = parser.parse_args()
    if args.table:
        write_tables(args.files)
    else:
        measure(args)


def measure(args: argparse.Namespace) -> None:
    started, dtype, out = time.monotonic(), getattr(torch, args.dtype), args.files[0]
    found: dict = {"environment": collect(), "dtype": args.dtype, "routing": args.routing, "cells": [], "problems": []}
    found["problems"] += warm(args.shapes, args.tokens, dtype, args.workers, 0.45 * args.seconds) if args.workers else []
    found["compile_seconds"] = time.monotonic() - started
    print(f"compiled after {found['compile_seconds']:.0f} s", found["problems"][-3:], flush=True)
    peaks = measure_peaks("cuda", dtype)
    found["peaks"] = dataclasses.asdict(peaks)
    for name in args.shapes:

        def in_time(name: str = name):
            for count in args.tokens:
                if time.monotonic() - started < args.seconds:
                    yield count
                else:
                    found["problems"].append(f"no time for {name} {count}")

        try:
            for tuned in tune(SHAPES[name], in_time(), dtype=dtype, routing=args.routing):
                found["cells"].append(row(name, tuned, peaks, dtype, args.routing))
                found["seconds"] = time.monotonic() - started
                out.write_text(json.dumps(found, indent=1) + "\n")
        except Exception as error:  # noqa: BLE001 - one broken shape must not hide the others
            found["problems"].append(f"{name}: {type(error).__name__}: {str(error)[:300]}")
            print("PROBLEM", found["problems"][-1], flush=True)
        torch.cuda.empty_cache()
    out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
