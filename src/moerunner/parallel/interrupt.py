"""An error raised in a thread that a GPU keeps waiting."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
from collections.abc import Sequence
from typing import Any

from moerunner.errors import DistributedError


def interrupt(thread: int | None, error: DistributedError, groups: Sequence[Any], *, patience: float) -> None:
    """Raises the error in a thread of this process, and frees it from the collectives of these process groups.

    thread: its number, or None if it knows the error already.

    NCCL's kernels wait for ever for a rank that is gone, and so does whoever wants their result. They are ended with their
    communicators, and what they would have computed is never seen: the thread raises before it runs another line. If it
    cannot go on even then, for `patience` seconds, the process ends, with the error on stderr and status 1.
    """
    raised = threading.Event()

    class Raised(DistributedError):
        def __init__(self) -> None:  # an error that is raised from outside is made without arguments
            DistributedError.__init__(self, error.what, where=error.where, next_step=error.next_step)
            raised.set()

    Raised.__name__ = Raised.__qualname__ = DistributedError.__name__
    if thread is not None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(Raised))
    abort(groups)
    if thread is not None and not raised.wait(patience):
        sys.stderr.write(f"moerunner.DistributedError: {error}\n")
        sys.stderr.flush()
        os._exit(1)


def abort(groups: Sequence[Any]) -> threading.Thread:
    """Begins to end NCCL's communicators of these groups, with torch's threads that watch them; others have none."""
    import torch

    def end() -> None:
        for group in groups:
            with contextlib.suppress(RuntimeError, AttributeError):
                group._get_backend(torch.device("cuda")).abort()

    thread = threading.Thread(target=end, daemon=True)
    thread.start()
    return thread
