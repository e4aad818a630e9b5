"""Compiles the rotary embedding for sm_90 without a GPU, in a process whose kernels are not decorated for the interpreter.

Prints one line of JSON per form and dtype: bytes of spilled registers, products contracted into sums.
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
from triton.runtime import driver

from moerunner.kernels import rotary

PTXAS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"


class Target:
    """What Triton asks a driver for when it only compiles."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def spilled(ptx: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [PTXAS, "-arch=sm_90a", "-v", source, "-o", source.with_suffix(".cubin")]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert "serialized" not in said, said
    return sum(map(int, re.findall(r"(\d+) bytes spill", said)))


def compile_only(kernel, grid, *args, device, warps, first, exact):
    ptx = kernel.warmup(*args, PDL=True, grid=grid, num_warps=warps, enable_fp_fusion=not exact).asm["ptx"]
    print(json.dumps([spilled(ptx), len(re.findall(r"\bfma\.", ptx))]))


if __name__ == "__main__":
    driver.set_active(Target())
    rotary.launch = compile_only
    for form in map(int, sys.argv[1:]):
        for dtype, columns in ((torch.bfloat16, 64), (torch.float32, 48)):
            q, k = (torch.empty(2, 8, heads, 128, dtype=dtype).transpose(1, 2) for heads in (32, 3))
            cos = torch.empty(1, 8, columns, dtype=dtype)
            rotary.rotary(q, k, cos, cos, rotary.FORMS[form])
