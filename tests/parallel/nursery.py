"""Ranks that are made to fail: processes of their own, which start and end as a user's program does.

Run as a script it imports everything once and then, for each case that it reads (a line of JSON), forks one process per rank,
waits until all have ended, and writes (a line of JSON) how each of them did: see `Ended`. `Nursery` is the other end of that.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FAULTS = ("kill", "stop", "raise", "memory", "exit", "sleep", "spec", "weights", "layout", "none")
LATEST = 30.0  # seconds beyond the timeout after which a process counts as hung


@dataclass(frozen=True)
class Ended:
    """One rank. status: as of `os.waitpid`, None if it had to be killed at the end. error: type and text of what it raised.

    seconds: from the last finished layer, or the start, to the error. wrong: a layer gave another result than one rank.
    """

    status: int | None
    error: tuple[str, str] | None = None
    cause: str = ""
    seconds: float = 0.0
    forwards: int = 0
    wrong: bool = False
    text: str = ""


class Nursery:
    """The process that forks ranks."""

    def __init__(self) -> None:
        root = Path(__file__).resolve().parents[2]
        paths = os.pathsep.join([str(root / "src"), str(root)])
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": ""}
        command = [sys.executable, str(Path(__file__))]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True)

    def run(self, **case: Any) -> list[Ended]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(case), file=self._process.stdin, flush=True)
        return [Ended(**of) for of in json.loads(self._process.stdout.readline())]

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


def main() -> None:
    import tests.parallel.broken  # noqa: F401 - what the ranks need, once

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        case = json.loads(line)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        folder = Path(tempfile.mkdtemp())
        pids: list[int] = []
        for rank in range(case["world"]):
            pid = os.fork()
            if pid == 0:
                answers.close()
                be_a_rank(case, rank, port, folder)  # does not return
            pids.append(pid)
        print(json.dumps(attend(case, pids, folder)), file=answers, flush=True)


def be_a_rank(case: dict[str, Any], rank: int, port: int, folder: Path) -> None:
    """Ends this process, through the interpreter's own end."""
    from tests.parallel.broken import rank_main

    words = os.open(folder / f"{rank}.txt", os.O_CREAT | os.O_WRONLY)
    os.dup2(words, 2)
    os.dup2(words, 1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(case["world"])}
    rank_main(case, rank, folder / f"{rank}.json")
    sys.exit(0)


def attend(case: dict[str, Any], pids: list[int], folder: Path) -> list[dict[str, Any]]:
    """Waits for all ranks; one that is stopped is killed when the others have ended, and so is what hangs."""
    statuses: dict[int, int | None] = {}
    end = time.monotonic() + case["timeout"] + LATEST
    stopped = {case["victim"]} if case["fault"] == "stop" else set()
    while len(statuses) < len(pids):
        for rank, pid in enumerate(pids):
            if rank not in statuses:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    statuses[rank] = status
        rest = set(range(len(pids))) - set(statuses)
        if rest and (rest <= stopped or time.monotonic() > end):
            for rank in rest:
                os.kill(pids[rank], signal.SIGKILL)
                os.waitpid(pids[rank], 0)
                statuses[rank] = None
        time.sleep(0.02)
    ended = []
    for rank in range(len(pids)):
        told = folder / f"{rank}.json"
        ended.append({"status": statuses[rank], "text": (folder / f"{rank}.txt").read_text(errors="replace")})
        if told.exists():
            ended[-1] |= json.loads(told.read_text())
    return ended


if __name__ == "__main__":
    main()
