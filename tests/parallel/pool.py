"""Processes that stay for the whole run of pytest: a test on real ranks costs what it computes, not what imports cost.

`on_ranks(2, function, *arguments)` calls `function(*arguments)` in every process of a gloo process group of two ranks. The
function and what it is given must be picklable; it belongs to a module that the processes can import.
"""

from __future__ import annotations

import atexit
import pickle
import shutil
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from moerunner.errors import UnsupportedError

_LONGEST = 120  # seconds that a collective, and beyond it a whole call, may take
_IMPORTED_ONCE = ["moerunner", "transformers.generation.utils", "tests.parallel.models"]
_pools: dict[int, Pool] = {}


def on_ranks(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What each rank returned, in the order of ranks. A rank's exception is raised here; then the processes are new ones.

    They stay where every rank was refused the same thing: that leaves no collective open.
    """
    pool = _pools.get(world) or _pools.setdefault(world, Pool(world))
    answers = pool.call(function, arguments)
    failed = [rank for rank, (error, _) in enumerate(answers) if error is not None]
    if failed:
        refused = [str(error) for error, _ in answers if isinstance(error, UnsupportedError)]
        if len(refused) < world or len(set(refused)) > 1:
            end(world)
        first = min(failed, key=lambda rank: (isinstance(answers[rank][0], TimeoutError), rank))
        error, text = answers[first]
        error.add_note(f"on rank {first} of {world}; ranks that failed: {failed}\n{text}")
        raise error
    return [value for _, value in answers]


def forks() -> Any:
    """Processes that are forked from one that has imported all."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED_ONCE)
    return context


def end(world: int) -> None:
    """Ends the processes of this many ranks, if there are any; the next call makes new ones."""
    if world in _pools:
        _pools.pop(world).end()


class Pool:
    """The ranks of one process group."""

    def __init__(self, world: int) -> None:
        context = forks()
        self._folder = Path(tempfile.mkdtemp())
        pipes = [context.Pipe() for _ in range(world)]
        self._ends = [mine for mine, _ in pipes]
        self._processes = [
            context.Process(target=_serve, args=(rank, world, str(self._folder / "store"), theirs), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process, (_, theirs) in zip(self._processes, pipes, strict=True):
            process.start()
            theirs.close()

    def call(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> list[tuple[BaseException | None, Any]]:
        """For each rank None and what it returned, or an exception and its traceback."""
        task = pickle.dumps((function, arguments))
        for end in self._ends:
            end.send_bytes(task)
        return [self._answer(end) for end in self._ends]

    def _answer(self, end: Connection) -> tuple[BaseException | None, Any]:
        try:
            if end.poll(2 * _LONGEST):
                return pickle.loads(end.recv_bytes())
        except EOFError as error:
            return error, "the process has ended"
        return TimeoutError("no answer"), ""

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        shutil.rmtree(self._folder, ignore_errors=True)


def _serve(rank: int, world: int, store: str, end: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=_LONGEST)
    )
    while True:
        try:
            function, arguments = pickle.loads(end.recv_bytes())
        except EOFError:
            return
        try:
            answer = pickle.dumps((None, function(*arguments)))
        except BaseException as error:  # noqa: BLE001 - raised again in the test
            answer = pickle.dumps((_picklable(error), traceback.format_exc()))
        end.send_bytes(answer)


def _picklable(error: BaseException) -> BaseException:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


@atexit.register
def end_all() -> None:
    for world in list(_pools):
        end(world)
