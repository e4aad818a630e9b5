"""The Hopper kernel has no interpreter. Here it is compiled for sm_90a; what it computes is checked on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

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
