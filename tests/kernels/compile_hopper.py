"""Compiles the Hopper kernel for sm_90a without a GPU, in a process whose kernels are not decorated for the interpreter.

Prints one line of JSON per variant: its name, shared memory in bytes, bytes of spilled registers.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import driver

from moerunner.kernels import hopper
from moerunner.kernels.activation import KINDS

PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
EXPERTS, TOP_K = 4, 2
PLAIN = dict(LIMIT=None, CLAMP_AFTER=False, GATE_SOFTCAP=None, UP_SOFTCAP=None, ALPHA=1.0, BETA=0.0, KIND=0)
VARIANTS = {
    "up": dict(up=True),
    "down": dict(up=False),
    "gpt_oss": dict(up=True, bias=True, interleaved=True, ALPHA=1.702, BETA=1.0, LIMIT=7.0),
    "ungated": dict(up=True, gated=False, KIND=KINDS.index("relu2")),
    "input weighting, softcaps": dict(up=True, weighted=True, GATE_SOFTCAP=5.0, UP_SOFTCAP=4.0),
    "clamp after, gelu, bias": dict(up=True, bias=True, KIND=KINDS.index("gelu"), LIMIT=1.0, CLAMP_AFTER=True),
    "down, bias": dict(up=False, bias=True),
    "rows, float16": dict(up=False, weighted=False, dtype=torch.float16),
}


class Target:
    """What Triton asks a driver for when it only compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def compiled(
    *, up, hidden, inter, bias=False, interleaved=False, gated=True, weighted=None, dtype=torch.bfloat16, **activation
):
    def boxes(rows: int, depth: int) -> TensorDescriptor:
        matrix = torch.empty(rows, depth, dtype=dtype)
        return TensorDescriptor(matrix, [rows, depth], [depth, 1], [128, 64], gl.NVMMASharedLayout(128, 16, 2))

    rows = ((2 if gated else 1) * inter) if up else hidden
    depth, width = (hidden, inter) if up else (inter, hidden)
    a = torch.empty(8, hidden, dtype=dtype) if up else boxes(8 * TOP_K, inter)
    b = torch.empty(EXPERTS, rows, dtype=dtype) if bias else None
    index, weights = torch.empty(64, dtype=torch.int32), torch.empty(64)
    return hopper.grouped_product.warmup(
        a, boxes(EXPERTS * rows, depth), b, weights, index, index, torch.empty(8 * TOP_K, width, dtype=dtype), TOP_K, 16,
        6, 600, depth // 8, width // 8, rows, hidden // 8, *(b.stride() if bias else (0, 0)), UP=up,
        WEIGHTED=not up if weighted is None else weighted, GATED=gated, INTERLEAVED=interleaved, STAGES=4, LAG=0, num_warps=4,
        grid=(132,), **PLAIN | activation,
    )  # fmt: skip


def spilled(ptx: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [PTXAS, "-arch=sm_90a", "-v", source, "-o", source.with_suffix(".cubin")]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert "serialized" not in said, said
    return sum(map(int, re.findall(r"(\d+) bytes spill", said)))


if __name__ == "__main__":
    driver.set_active(Target())
    hidden, inter = map(int, sys.argv[1:3])
    for name in sys.argv[3:]:
        kernel = compiled(hidden=hidden, inter=inter, **VARIANTS[name])
        print(json.dumps([name, kernel.metadata.shared, spilled(kernel.asm["ptx"])]))
