"""What a rank of a failing program does; run by `nursery.py`."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tests.parallel.ranks import SPEC, rows_of, weights

from moerunner import LayerWeights, Layout, MoERunner, Options
from moerunner.execute import Verbs
from moerunner.ops.reference import reference

STEADY = 3  # layers that run before anything happens


class Refused(RuntimeError):
    """What the program of a failing rank raises."""


def rank_main(case: dict[str, Any], rank: int, told: Path) -> None:
    """Layers until an error, of which `told` says what it was; the error then ends the process as it would any program."""
    dist.init_process_group("gloo")
    fault, victim = case["fault"], rank == case["victim"]
    layout = Layout(**case["layout"], timeout=case["timeout"])
    spec, dtype = SPEC, getattr(torch, case.get("dtype", "float32"))
    found: dict[str, Any] = {"forwards": 0}
    start = time.monotonic()
    try:
        if victim and fault == "layout":
            layout = dataclasses.replace(layout, ep=layout.tp, tp=layout.ep, dp=layout.dp, placement="round_robin")
        bound = layout.bind()
        own = {name: tensor.to(dtype) for name, tensor in weights(case["seed"]).items()}
        if victim and fault == "spec":
            spec = dataclasses.replace(spec, routed_scaling_factor=1.5)
        if victim and fault == "weights":
            spec = dataclasses.replace(spec, experts=dataclasses.replace(spec.experts, intermediate_size=24))
            own = {name: torch.randn(shape, dtype=dtype) for name, shape in spec.weight_shapes().items()}
        runner = MoERunner(spec, own, bound, Options(**case["options"]))
        counts = case.get("counts", [5] * layout.world)
        x = rows_of(layout, counts, case["seed"])[rank].to(dtype)
        expected = reference(SPEC, LayerWeights.of(SPEC, weights(case["seed"])), x)
        if case["options"].get("output") == "shard":
            expected = expected.split(layout.token_counts(len(x)))[rank % (layout.ep * layout.tp)]
        draw = random.Random(case["seed"])
        if victim and fault in ("kill", "stop"):
            number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[fault]
        with torch.no_grad():
            for count in range(100000):
                if victim and count == STEADY:
                    if fault in ("kill", "stop"):  # at any moment
                        threading.Timer(0.2 * draw.random(), os.kill, (os.getpid(), number)).start()
                    elif fault == "exit":
                        return
                    elif fault == "sleep":
                        time.sleep(case["timeout"] + 5)
                    elif fault in ("raise", "memory"):
                        _break(fault)
                    elif fault == "outside":
                        raise Refused("is broken here")
                if count == STEADY and fault.startswith("gpu"):
                    _wait_as_on_a_gpu(bound, victim, 0.01 if fault == "gpu" else 60)
                start = time.monotonic()
                y = runner(x)
                found["forwards"] += 1
                if y.numel() and not _close(y, expected, 2e-6 if dtype == torch.float32 else 2e-2):
                    found["wrong"] = True
                start = time.monotonic()
    except Exception as error:
        found |= {"error": (type(error).__name__, str(error)), "seconds": time.monotonic() - start}
        found["cause"] = "" if error.__cause__ is None else type(error.__cause__).__name__
        raise
    finally:
        told.write_text(json.dumps(found))


def _wait_as_on_a_gpu(bound: Any, killed: bool, seconds: float) -> None:
    """For ever, as for the result of a collective that a rank does not come to; nothing is raised for so many seconds."""
    watch = bound.comm._watch
    watch.keep(bound.comm._groups[("ep",)], bound.layout.timeout, gpu=True)
    if killed:
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        time.sleep(seconds)


def _break(fault: str) -> None:
    def raises(*_: Any) -> Any:
        if fault == "raise":
            raise Refused("is broken here")
        return torch.empty(1 << 60)

    Verbs.experts = raises  # type: ignore[method-assign]


def _close(y: torch.Tensor, expected: torch.Tensor, allowed: float) -> bool:
    return float((y.double() - expected.double()).abs().max() / expected.double().abs().max()) <= allowed
