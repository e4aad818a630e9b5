"""python -m moerunner.bench: prints a table, writes JSON with the environment it was measured in."""

from __future__ import annotations

import argparse
import itertools
import json
import platform
from pathlib import Path

import torch

from moerunner.bench.experts import Measured, measure
from moerunner.bench.shapes import SHAPES


def environment() -> dict[str, str]:
    """Versions and device that a result is worth nothing without."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "cuda": str(torch.version.cuda)}
    for name in ("triton", "transformers"):
        try:
            found[name] = __import__(name).__version__
        except ImportError:
            found[name] = "absent"
    found["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor()
    return found


def line(m: Measured) -> str:
    graph = "-" if m.graph is None else f"{m.graph * 1e6:.1f} us {m.ratio:6.2f} x floor"
    eager = "wrong" if m.eager is None else f"{m.eager * 1e6:.1f} us"
    return f"{m.shape:16} {m.tokens:6} {m.routing:8} {m.implementation:24} {graph:>28} eager {eager:>12} error {m.error:.1e}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 32, 128, 512, 2048, 8192])
    parser.add_argument("--routing", nargs="+", default=["uniform"], choices=["uniform", "zipf", "half"])
    parser.add_argument("--only", nargs="+", help="implementations to run")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--json", type=Path, help="where to write the results")
    args = parser.parse_args()
    device, dtype = "cuda" if torch.cuda.is_available() else "cpu", getattr(torch, args.dtype)
    results: list[Measured] = []
    for name, routing in itertools.product(args.shapes, args.routing):
        for m in measure(name, SHAPES[name], args.tokens, routing=routing, dtype=dtype, device=device, only=args.only):
            results.append(m)
            print(line(m), flush=True)
            if args.json:
                found = {"environment": environment(), "results": [r.to_dict() for r in results]}
                args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
