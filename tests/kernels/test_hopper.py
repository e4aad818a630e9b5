"""The Hopper kernel has no interpreter. Here it is compiled for sm_90a; what it computes is checked on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from cases import case, error

from moerunner.kernels.hopper import runs_on
from moerunner.kernels.tiles import Specialised
from moerunner.spec import ActivationSpec

FILE = Path(__file__).with_name("compile_hopper.py")
SHARED = 227 * 1024  # bytes of a program on Hopper
SPILLED = 128  # bytes: a few values that live across a whole tile, not the accumulator
FEW = ["up", "down", "gpt_oss"]
REST = ["ungated", "input weighting, softcaps", "clamp after, gelu, bias", "down, bias", "rows, float16"]


@pytest.mark.parametrize(
    ("hidden", "inter", "names"),
    [
        (2048, 768, FEW),
        pytest.param(2048, 768, REST, marks=pytest.mark.slow),
        pytest.param(200, 136, FEW + REST, marks=pytest.mark.slow),  # rows of whole 16 bytes, no more
    ],
)
def test_compiles_for_hopper_and_keeps_the_accumulator_in_registers(hidden, inter, names):
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, FILE, str(hidden), str(inter), *names]
    done = subprocess.run(command, env=plain, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [name for name, _, _ in found] == names
    assert all(shared <= SHARED and spilled <= SPILLED for _, shared, spilled in found), found


@pytest.mark.skipif(not (torch.cuda.is_available() and runs_on(torch.device("cuda"))), reason="needs a Hopper GPU")
@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"bias": True, "gate_up": "interleaved", "activation": ActivationSpec(kind="swigluoai")},
        {"gate_up": "none", "activation": ActivationSpec(kind="relu2"), "bias": True},
        {"input_weighting": True},
        {"output": "rows", "bias": True},
        {"hidden": 200, "inter": 136, "tokens": 300},
        {"tokens": 700, "experts": 2, "top_k": 1, "skip": False},
    ],
)
def test_equals_float64_on_a_gpu(facts, dtype, lag):
    c = case("cuda", dtype, **{"hidden": 128, "inter": 64, "tokens": 40, **facts})
    first, again = c.kernel(Specialised(lag=lag)), c.kernel(Specialised(lag=lag))
    assert error(first, c.exact()) <= c.bound()
    assert torch.equal(first, again)
