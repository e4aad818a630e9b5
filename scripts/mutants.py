#!/usr/bin/env python
"""Breaks the code on purpose, one way at a time, and sees whether a test notices.

    python scripts/mutants.py [--list] [--only TEXT] [--workers N]

scripts/mutants.txt says how. Each mutant changes a copy of the tree, never the tree itself, and runs the tests that are there
for it. Exit status 1: a mutant survived, its text is no longer in the source, or the tests fail without any mutant.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIST = Path(__file__).with_suffix(".txt")
SECONDS = 150  # for the tests of one mutant; a deadlock of simulated ranks ends earlier, by pytest-timeout
SEED = "20250101"


@dataclass
class Mutant:
    """name: what is broken. file: under src/moerunner. edits: (old, new). tests: under tests/."""

    name: str
    file: str
    edits: list[tuple[str, str]] = field(default_factory=list)
    tests: list[str] = field(default_factory=list)

    def apply(self, text: str) -> str:
        """The broken source; a LookupError if the text to replace is not there exactly once."""
        for old, new in self.edits:
            found = text.count(old)
            if found != 1:
                raise LookupError(f"{self.name}: {self.file} has {found} places with {old!r}")
            text = text.replace(old, new)
        return text


@dataclass(frozen=True)
class Outcome:
    """verdict: killed, survived, stale (the text is gone), or broken (the tests could not run)."""

    mutant: Mutant
    verdict: str
    by: str
    seconds: float


def read(text: str) -> list[Mutant]:
    """The entries of mutants.txt."""
    mutants: list[Mutant] = []
    sides: dict[str, list[str]] = {"<": [], ">": []}

    def close() -> None:
        if sides["<"]:
            mutants[-1].edits.append(("\n".join(sides["<"]), "\n".join(sides[">"])))
        sides["<"], sides[">"] = [], []

    for number, line in enumerate(text.splitlines(), 1):
        mark, rest = line[:1], line[2:]
        if mark == "[":
            name, file = re.fullmatch(r"\[(.+)\] (\S+)", line).groups()  # type: ignore[union-attr]
            mutants.append(Mutant(name, file))
        elif mark in sides:
            if mark == "<" and sides[">"]:
                close()
            sides[mark].append(rest)
        elif mark == "?":
            close()
            mutants[-1].tests.append(rest)
        elif line and mark != "#":
            raise ValueError(f"{LIST.name}, line {number}: {line!r}")
    return mutants


def copy_tree(target: Path) -> None:
    """What the tests need, without caches."""
    skip = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
    for name in ("src", "tests"):
        shutil.copytree(ROOT / name, target / name, ignore=skip)
    shutil.copy(ROOT / "pyproject.toml", target)


class Run:
    """The tests of one mutant, in a child of this process, which has imported all that takes long and nothing of ours."""

    def __init__(self, tree: Path, tests: list[str]) -> None:
        self.tree, self.begin, self.output = tree, time.monotonic(), tree / "output.txt"
        self.pid = os.fork()
        if self.pid == 0:
            self._child([str(tree / "tests" / test) for test in tests])

    def _child(self, tests: list[str]) -> None:
        code = 3
        try:
            os.setpgid(0, 0)
            with open(self.output, "wb") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            os.chdir(self.tree)
            sys.path[:0] = [str(self.tree / "src"), str(self.tree)]  # as `python -m pytest` has it, for processes of tests too
            import pytest

            code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--no-header", "--tb=no", "--timeout=60", *tests])
        finally:
            sys.stdout.flush()
            os._exit(code)

    def poll(self, seconds: float) -> int | None:
        """The exit status, None while it runs, -1 when its time is up."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() - self.begin < seconds:
            return None
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        return -1

    def wait(self, seconds: float) -> int:
        while (status := self.poll(seconds)) is None:
            time.sleep(0.05)
        return status


def first_failure(output: str) -> str:
    found = re.search(r"^(?:FAILED|ERROR) \S*?tests/(.*?)(?: - |$)", output, flags=re.MULTILINE)
    return found[1] if found else ""


class Trial:
    """One mutant in one copy of the tree; the copy is whole again afterwards."""

    def __init__(self, mutant: Mutant, tree: Path) -> None:
        self.mutant, self.path = mutant, tree / "src" / "moerunner" / mutant.file
        self.before = self.path.read_text(encoding="utf-8")
        self._write(mutant.apply(self.before))
        self.run = Run(tree, mutant.tests)

    def _write(self, text: str) -> None:
        self.path.write_text(text, encoding="utf-8")
        Path(importlib.util.cache_from_source(str(self.path))).unlink(missing_ok=True)

    def outcome(self) -> Outcome | None:
        status = self.run.poll(SECONDS)
        if status is None:
            return None
        self._write(self.before)
        seconds, output = time.monotonic() - self.run.begin, self.run.output.read_text(encoding="utf-8", errors="replace")
        if status == -1:
            return Outcome(self.mutant, "killed", f"the time limit of {SECONDS} s", seconds)
        if status == 0:
            return Outcome(self.mutant, "survived", ", ".join(self.mutant.tests), seconds)
        if status != 1 or not first_failure(output):
            return Outcome(self.mutant, "broken", output[-500:].strip(), seconds)
        return Outcome(self.mutant, "killed", first_failure(output), seconds)


def try_all(mutants: list[Mutant], workers: int) -> Iterator[Outcome]:
    """Outcomes as they come, from `workers` copies of the tree."""
    with tempfile.TemporaryDirectory(prefix="moerunner-mutants-") as folder:
        trees = [Path(folder) / str(number) for number in range(workers)]
        for tree in trees:
            copy_tree(tree)
        begin, tests = time.monotonic(), sorted({test for m in mutants for test in m.tests})
        first = Run(trees[0], tests)
        if first.wait(4 * SECONDS) != 0:
            sys.exit(f"the tests fail without any mutant:\n{first.output.read_text(encoding='utf-8')[-3000:]}")
        print(f"without a mutant their tests pass ({time.monotonic() - begin:.0f} s)", flush=True)
        waiting, running = mutants[::-1], dict[Path, Trial]()
        while waiting or running:
            for tree in trees:
                if tree not in running and waiting:
                    mutant = waiting.pop()
                    try:
                        running[tree] = Trial(mutant, tree)
                    except LookupError as error:
                        yield Outcome(mutant, "stale", str(error), 0.0)
            for tree, trial in list(running.items()):
                outcome = trial.outcome()
                if outcome is not None:
                    del running[tree]
                    yield outcome
            time.sleep(0.02)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="name the mutants and the tests that have to notice them")
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="only those whose name holds this text")
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args(arguments)
    every = read(LIST.read_text(encoding="utf-8"))
    mutants = [m for m in every if not given.only or any(text.lower() in m.name.lower() for text in given.only)]
    if not mutants:
        parser.error(f"no mutant is called {', '.join(given.only)}")
    if given.list:
        for m in mutants:
            print(f"{m.name:<76} {m.file:<22} {', '.join(m.tests)}")
        return 0
    os.environ |= {"OMP_NUM_THREADS": "1", "MOERUNNER_SEED": SEED}
    import hypothesis  # noqa: F401 - all of these before the first fork
    import pytest  # noqa: F401
    import torch.distributed.tensor  # noqa: F401

    begin, outcomes = time.monotonic(), []
    for o in try_all(mutants, min(given.workers, len(mutants))):
        outcomes.append(o)
        print(f"{o.verdict:<9} {o.mutant.name:<76} {o.mutant.file:<22} {o.seconds:5.1f} s  {o.by}", flush=True)
    bad = [o for o in outcomes if o.verdict != "killed"]
    print(f"{len(outcomes) - len(bad)} of {len(outcomes)} mutants were noticed, in {time.monotonic() - begin:.0f} s")
    for o in bad:
        print(f"NOT NOTICED ({o.verdict}): {o.mutant.name}: {o.by}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
