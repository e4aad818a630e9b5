"""Every model family on a GPU: a tiny random model of each, verified layer by layer and end to end, in three dtypes.

    python scripts/gpu_families.py results.json [--device cuda] [FAMILY ...]

Writes what `moerunner verify --family` finds, with the environment; exits 1 if a family that Transformers has is not right.
A family that it lacks, or that does not run on tokens, is listed with the reason.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import multiprocessing
import platform
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from moerunner.errors import UnsupportedError
from moerunner.models import registry
from moerunner.verify import verify

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check(job: tuple[str, torch.dtype, str]) -> dict[str, Any]:
    family, dtype, device = job
    transformers.logging.set_verbosity_error()
    facts: dict[str, Any] = {"family": family, "dtype": str(dtype).removeprefix("torch.")}
    try:
        report = verify(family=family, dtype=dtype, device=device, num_tokens=192, oracle_tokens=6)
    except UnsupportedError as reason:
        return facts | {"ok": None, "reason": str(reason)}
    except Exception as error:  # noqa: BLE001 - one family's failure is a result, not the end
        return facts | {"ok": False, "reason": f"{type(error).__name__}: {error}"}
    worst = max((layer.vs_transformers.max for layer in report.layers), default=0.0)
    problems = report.problems + [f"{layer.name}: {p}" for layer in report.layers for p in layer.problems]
    backends = sorted({layer.backend for layer in report.layers})
    facts |= {"ok": report.ok, "layers": len(report.layers), "backends": backends, "worst_block": worst}
    return facts | {"logits": report.logits.max, "skipped": report.skipped, "problems": problems}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--processes", type=int, default=12)
    parser.add_argument("families", nargs="*", default=[family.name for family in registry.registered()])
    options = parser.parse_intermixed_args()
    jobs = [(family, dtype, options.device) for family in options.families for dtype in DTYPES]
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(options.processes, mp_context=spawn) as pool:
        found = []
        for result in pool.map(check, jobs):
            found.append(result)
            if not result["ok"]:
                print(json.dumps(result), flush=True)
    on_gpu = options.device.startswith("cuda")
    environment = {
        "device": torch.cuda.get_device_name() if on_gpu else platform.processor(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    options.out.write_text(json.dumps({"environment": environment, "families": found}, indent=1) + "\n")
    wrong = [f for f in found if f["ok"] is False]
    print(f"{len(found) - len(wrong)} of {len(found)} right or not to be had here")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
