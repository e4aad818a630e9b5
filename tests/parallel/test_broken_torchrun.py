"""Ranks of the command line that are killed or stopped: one line that says which and why, status 4, and no process stays."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import moerunner

TIMEOUT = {"SIGKILL": 90.0, "SIGSTOP": 20.0}  # of --timeout, seconds
LATEST = 180.0  # until all must be gone: torchrun waits 30 s for a process that is stopped before it kills it

# Runs the command line, and after some layers does to rank 1 what it was told.
SCRIPT = """
import os, signal, sys
from moerunner.cli import main
from moerunner.runner import MoERunner
fault, folder = sys.argv.pop(1), sys.argv.pop(1)
open(os.path.join(folder, str(os.getpid())), "w").close()
right, calls = MoERunner.forward, []
def forward(self, x, **inputs):
    calls.append(None)
    if os.environ["RANK"] == "1" and len(calls) == 5:
        os.kill(os.getpid(), getattr(signal, fault))
    return right(self, x, **inputs)
MoERunner.forward = forward
main()
"""


def run(fault: str, folder: Path, tmp_path: Path, verb: str) -> tuple[int, str, str, float]:
    """The status of torchrun, what was printed, and how long it took."""
    script, pids = tmp_path / "script.py", tmp_path / "pids"
    script.write_text(SCRIPT)
    pids.mkdir(exist_ok=True)
    arguments = ["abc", "--max-new-tokens", "40"] if verb == "generate" else ["--tokens", "24"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(script), fault]
    command += [str(pids), verb, str(folder), *arguments, "--ep", "2", "--timeout", str(TIMEOUT[fault])]
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = str(Path(moerunner.__file__).parents[1])
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env)
    took = time.monotonic() - start
    left = [pid for pid in map(int, os.listdir(pids)) if lives(pid)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left, done.stderr
    return done.returncode, done.stdout, done.stderr, took


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def check(fault: str, folder: Path, tmp_path: Path, verb: str) -> None:
    status, out, err, took = run(fault, folder, tmp_path, verb)
    assert status != 0
    (line,) = [line for line in err.splitlines() if line.startswith("moerunner: ")]
    told = {"SIGKILL": r"its process has ended", "SIGSTOP": r"is stopped|has not come to|no sign of life"}[fault]
    assert re.match(rf"moerunner: rank 1: .*({told})", line), err
    assert "Traceback" not in out + "".join(part for part in err.splitlines() if part.startswith("moerunner"))
    if fault == "SIGSTOP":
        assert re.search(r"exitcode\s*: 4 ", err), err
    assert took < LATEST


@pytest.fixture(scope="module")
def demo() -> Path:
    return Path(moerunner.__file__).parent / "assets" / "demo"


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["SIGKILL"])
def test_a_killed_rank_ends_all_with_one_line_that_names_it(demo, tmp_path, fault):
    check(fault, demo, tmp_path, "generate")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("verb", ["generate", "verify"])
@pytest.mark.parametrize("fault", ["SIGKILL", "SIGSTOP"])
def test_ten_times(demo, tmp_path, fault, verb):
    for _ in range(10):
        check(fault, demo, tmp_path, verb)
