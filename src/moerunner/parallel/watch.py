"""How a rank learns that another one has failed: which one, and why.

Each process has a thread that writes into the store of the process group that it lives and which collectives it has come to,
and reads the same of the others. The first failure that anybody sees is written there too, so that all ranks end with the
same `DistributedError`. On CPUs the program's own thread looks at this whenever a collective takes long. On GPUs it may wait
where nothing can be raised, so there this thread interrupts it.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import json
import os
import queue
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

from moerunner.errors import DistributedError
from moerunner.parallel.interrupt import abort, interrupt
from moerunner.parallel.peers import Peer, compare, first_of_chain, here, key_of

_BEAT = 0.5  # seconds between two signs of life, and between two looks at them
_SILENT = 4 * _BEAT  # a lost connection and no sign of life for so long: that rank it is
_SETTLE = 10 * _BEAT  # how long to look for the cause of an error
_STEP = "End all ranks and start them again"
_current: Watch | None = None


class Watch:
    """One rank's view of whether the others live. There is one for a process group, of all its ranks."""

    def __init__(self, store: Any, rank: int, world: int) -> None:
        import torch.distributed as dist

        self.rank, self.world = rank, world
        self.failed: DistributedError | None = None
        self._default: Any = store
        self._store: Any = dist.PrefixStore("moerunner/watch", store)
        self._peers = {r: Peer() for r in range(world) if r != rank}
        self._heard = self._began = time.monotonic()  # the last time all was heard; when the store was last asked something
        self._idle, self._gone = True, False  # whether the store has answered; whether it never will
        self._issued: Counter[str] = Counter()
        self._asked: Counter[str] = Counter()
        self._waits, self._left, self._told, self._beat = False, False, False, 0
        self._groups, self._longest = [], _SILENT
        self._made: dict[tuple[tuple[int, ...], float], Any] = {}
        self._gpu: tuple[int, float] | None = None  # the thread that issues collectives of a GPU, and their timeout
        self._over, self._lock = threading.Event(), threading.Lock()
        self._questions: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, daemon=True, name="moerunner-watch")
        self._thread.start()
        atexit.register(self._leave)

    @classmethod
    def here(cls) -> Watch:
        """That of the process group that there is; made at the first call, which all ranks make."""
        import torch.distributed as dist

        global _current
        store = dist.distributed_c10d._get_default_store()
        if _current is None or _current._default is not store:
            if _current is not None:
                _current._over.set()
            _current = cls(store, dist.get_rank(), dist.get_world_size())
        return _current

    # What the ranks' own code calls.

    def group(self, members: tuple[int, ...], timeout: float) -> Any:
        """A process group of these ranks, made once; every rank must ask for it, in the same order as for all others."""
        import torch.distributed as dist

        if (members, timeout) not in self._made:
            self._made[members, timeout] = dist.new_group(list(members), timeout=timedelta(seconds=timeout))
        return self._made[members, timeout]

    def keep(self, group: Any, timeout: float, *, gpu: bool) -> None:
        """A group whose collectives this watches; timeout: seconds that one may take."""
        self._longest = max(timeout, self._longest)
        self._groups += [group] * (group not in self._groups)
        if gpu:
            self._gpu = (threading.get_ident(), min(timeout, self._gpu[1] if self._gpu else timeout))

    def check(self) -> None:
        """Raises if a rank has failed, or if the one that keeps the store has not answered for longer than any may wait."""
        if self.failed is not None:
            raise self._again()
        if not self._idle and time.monotonic() - self._began > self._longest:
            raise self.announce(*self._keeper("does not answer", "the program"))

    def come(self, members: Sequence[int]) -> None:
        """This rank has come to the next collective of these ranks."""
        self.check()
        self._issued[key_of(members)] += 1
        if self._gpu:
            self._gpu = (threading.get_ident(), self._gpu[1])

    def wait(self, work: Any, members: Sequence[int], what: str, timeout: float) -> None:
        """Until a collective on the CPU has ended; raises a `DistributedError` that names the rank for which it cannot."""
        with self._waiting():
            start = time.monotonic()
            while True:
                try:
                    work.wait(timedelta(seconds=max(0.01, min(_BEAT, start + timeout - time.monotonic()))))
                    return
                except RuntimeError:
                    if work.is_completed():  # then it was no time limit, or has ended just now
                        with self.lost(members, what, timeout):
                            work.wait()
                        return
                self._judge(members, what, time.monotonic() - start, timeout, done=work.is_completed)

    @contextlib.contextmanager
    def lost(self, members: Sequence[int], what: str, timeout: float) -> Iterator[None]:
        """What torch.distributed raises inside becomes a `DistributedError` that names the rank and the cause."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, DistributedError):
                raise
            end = time.monotonic() + min(_SETTLE, timeout)
            while time.monotonic() < end:
                self._judge(members, what, 0, timeout, broken=True)
                time.sleep(_BEAT / 5)
            raise self.announce(self.rank, f"{what} failed: {_line(error)}") from error

    def gather(self, text: str, members: Sequence[int], what: str, timeout: float) -> list[str]:
        """What each of the members passed, through the store; also where they could not agree on a collective."""
        self.come(members)
        key, store = key_of(members), self._store
        self._asked[key] += 1
        names = [f"said/{key}/{self._asked[key]}/{rank}" for rank in members]
        start, pause = time.monotonic(), 0.001

        def every() -> list[str] | None:
            return [store.get(name).decode() for name in names] if store.check(names) else None

        with self._waiting():
            self._later(lambda: store.set(f"said/{key}/{self._asked[key]}/{self.rank}", text))
            answer = self._later(every)
            while True:
                if answer.wait(pause):
                    if answer.value is not None:
                        return answer.value
                    time.sleep(pause)
                    answer = self._later(every)
                pause = min(_BEAT / 5, 2 * pause)
                self._judge(members, what, time.monotonic() - start, timeout)

    def agree(self, facts: Mapping[str, Any], timeout: float) -> None:
        """Raises on every rank unless all pass the same facts, plain data; it says in which they differ."""
        texts = self.gather(json.dumps(facts), range(self.world), f"comparing {' and '.join(facts)}", timeout)
        compare(self.rank, [json.loads(text) for text in texts])

    @classmethod
    def blame(cls) -> DistributedError | None:
        """This process is told to end: because of another rank?"""
        watch, end = _current, time.monotonic() + _SILENT
        while watch is not None and time.monotonic() < end:
            if watch.failed is not None:
                return watch._again()
            for rank, peer in watch._peers.items():
                if peer.process() == "ended" and not peer.left:
                    return watch.announce(rank, "its process has ended")
            time.sleep(_BEAT / 5)
        return None

    def fail(self, error: BaseException) -> DistributedError:
        """This rank cannot go on; what is returned is raised here, and on every other rank as soon as it waits for this one."""
        return self.announce(self.rank, f"{type(error).__name__}: {_line(error)}")

    def announce(self, rank: int, what: str) -> DistributedError:
        """A rank has failed; or another one has before, then that is what counts."""
        said = json.dumps({"rank": rank, "what": what})
        first = self._later(lambda: self._store.compare_set("failed", "", said).decode())
        first.wait(0 if self._deaf else _SILENT)  # without the store everybody finds out by itself
        return self._fail(json.loads(first.value or said))

    # Who it was.

    def _judge(
        self,
        members: Sequence[int],
        what: str,
        waited: float,
        timeout: float,
        *,
        broken: bool = False,
        done: Callable[[], bool] = lambda: False,
    ) -> None:
        """Raises if a rank is known to have failed. broken: a connection is lost. done: the collective has ended well."""
        self.check()
        others = [r for r in members if r != self.rank]
        peers = {r: self._peers[r] for r in others}
        ended = [r for r in others if peers[r].process() == "ended"]
        if ended and not broken:  # what it sent before may still be on its way
            time.sleep(_BEAT)
            if done():
                return
        self.check()
        if ended:
            left = peers[ended[0]].left
            raise self.announce(ended[0], f"its {'program' if left else 'process'} has ended before {what} did")
        if self._gone:
            raise self.announce(*self._keeper("has ended", what))
        late = waited >= timeout
        if not late and not broken:
            return
        everyone = others + [r for r in self._peers if r not in peers]
        stopped = [r for r in everyone if self._peers[r].process() == "stopped"]
        if stopped and late:
            raise self.announce(stopped[0], f"its process is stopped; {what} waited {timeout:g} s for it")
        if self._deaf and late:
            raise self.announce(*self._keeper("does not answer", what))
        silent = [r for r in everyone if self._heard - self._peers[r].seen > min(_SILENT, timeout) and not self._peers[r].left]
        if silent and not self._deaf:
            raise self.announce(silent[0], f"gives no sign of life; {what} {'lost it' if broken else 'waited for it'}")
        if late:
            key = key_of(members)
            behind = [r for r in others if peers[r].issued(key) < self._issued[key]]
            behind = [r for r in behind if not peers[r].said.get("waits")] or behind
            if behind:
                first = first_of_chain(self._peers, behind[0])
                raise self.announce(
                    first, f"has not come to {what if first in others else 'a collective'} within {timeout:g} s"
                )
            raise self.announce(self.rank, f"{what} did not end within {timeout:g} s, though all ranks have come to it")

    @property
    def _deaf(self) -> bool:
        """Whether the store does not answer."""
        return self._gone or (not self._idle and time.monotonic() - self._began > _SILENT)

    def _keeper(self, how: str, what: str) -> tuple[int, str]:
        """Who is at fault if the store has gone, and why."""
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        who = "the launcher, which keeps" if agent else "its process, which keeps"
        return self.rank if agent else 0, f"{who} the store of the process group, {how}; {what} waited for it"

    def _keeper_left(self) -> bool:
        """Whether rank 0, if it is that which keeps the store, came to its end without an error."""
        return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" and (self.rank == 0 or self._peers[0].left)

    def _fail(self, said: Mapping[str, Any]) -> DistributedError:
        with self._lock:
            if self.failed is None:
                import torch.distributed as dist

                # The threads of a group still wait for the rank that failed, and whoever frees the group waits for them.
                for group in [*self._groups, dist.group.WORLD]:
                    ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))
                self.failed = DistributedError(said["what"], where=f"rank {said['rank']}", next_step=_STEP)
        return self._again()

    def _again(self) -> DistributedError:
        """The error for the program, which knows of it from then on."""
        self._told = self._told or threading.current_thread() is not self._thread
        return self._error()

    def _error(self) -> DistributedError:
        """The same error, without the traceback of the last time."""
        assert self.failed is not None
        return DistributedError(self.failed.what, where=self.failed.where, next_step=self.failed.next_step)

    @contextlib.contextmanager
    def _waiting(self) -> Iterator[None]:
        self._waits = True
        try:
            yield
        finally:
            self._waits = False

    # The thread. It alone talks to the store, which may not answer: the rank that keeps it may be the one that hangs.

    def _run(self) -> None:
        import torch.distributed as dist

        until = 0.0
        while True:
            try:
                question = self._questions.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                question = self._exchange
                until = time.monotonic() + _BEAT
            if not self._gone:
                self._began, self._idle = time.monotonic(), False
                try:
                    question()
                except RuntimeError:  # whoever keeps the store has ended
                    self._gone = True
                    if not self._keeper_left():
                        self._fail(dict(zip(("rank", "what"), self._keeper("has ended", "the program"), strict=True)))
                self._idle = True
            if self._over.is_set():
                self._default = self._store = None
                self._groups, self._made = [], {}
                return
            if not dist.is_initialized():
                self._over.set()
            elif self._gpu is not None and question == self._exchange:
                self._rescue()

    def _later(self, question: Callable[[], Any]) -> _Answer:
        """Something that the thread is to ask the store."""
        answer = _Answer()

        def ask() -> None:
            answer.value = question()
            answer.set()

        self._questions.put(ask)
        return answer

    def _exchange(self) -> None:
        """Says that this rank lives, and hears what the others say."""
        import torch.distributed as dist

        self._beat += 1
        said = {**here(), "beat": self._beat, "issued": dict(self._issued), "waits": self._waits}
        said |= {"left": self.failed is None and (self._left or not dist.is_initialized())}
        self._store.set(f"beat/{self.rank}", json.dumps({**said, "failed": self.failed is not None}))
        for rank, peer in self._peers.items():
            if self._store.check([f"beat/{rank}"]):
                peer.hear(json.loads(self._store.get(f"beat/{rank}").decode()))
        self._heard = time.monotonic()
        if self.failed is None and self._store.check(["failed"]):
            self._fail(json.loads(self._store.get("failed").decode()))

    def _rescue(self) -> None:
        """On GPUs: if a rank has failed, the error is raised in the thread that may wait for it."""
        assert self._gpu is not None
        thread, timeout = self._gpu
        if self.failed is None:
            found = self._find_on_gpu(timeout)
            if found is not None:
                said = {"rank": found[0], "what": found[1]}
                self._fail(said)
                self._later(lambda: self._store.compare_set("failed", "", json.dumps(said)))
        if self.failed is None or self._over.wait(2 * _BEAT):  # it may come to a collective, and raise there by itself
            return
        self._gpu = None
        interrupt(None if self._told else thread, self._error(), self._groups, patience=10 * _BEAT)

    def _find_on_gpu(self, timeout: float) -> tuple[int, str] | None:
        """A rank for which this one may wait in vain. One that has not come is late only if it comes to nothing else either."""
        for rank, peer in self._peers.items():
            process = peer.process()
            if peer.left:
                continue
            if process == "ended":
                return rank, "its process has ended"
            if self._heard - peer.seen > timeout:
                return rank, f"{'its process is stopped' if process else 'gives no sign of life'}, for {timeout:g} s"
            common = (key for key in self._issued if str(rank) in key.split(","))
            if self._heard - peer.changed > timeout and any(peer.issued(key) < self._issued[key] for key in common):
                return rank, f"has not come to a collective within {timeout:g} s"
        return None

    def _leave(self) -> None:
        """At the end of the process: says how it ended, and where it keeps the store, lets the others read that."""
        atexit.unregister(self._leave)
        error = getattr(sys, "last_value", None)
        if self._over.is_set():
            return
        if isinstance(error, Exception) and not isinstance(error, DistributedError) and not hasattr(sys, "ps1"):
            self.fail(error)
        self._gpu, self._left = None, True
        if self.failed is not None:
            abort(self._groups).join(_SETTLE)  # or NCCL's threads abort the process that ends
        keeps = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        end = time.monotonic() + (2 * _SILENT if keeps else _BEAT)
        while time.monotonic() < end:
            self._later(self._exchange).wait(_BEAT)
            alone = self._gone or self.failed is None or not keeps
            if alone or all(p.said.get("failed") or p.process() for p in self._peers.values()):
                break
            time.sleep(_BEAT / 5)
        if keeps and self.failed is None and any(not p.left and not p.process() for p in self._peers.values()):
            time.sleep(2 * _BEAT)  # until the others have heard that it ends well
        self._over.set()
        self._later(lambda: None)
        self._thread.join(_BEAT)


class _Answer(threading.Event):
    """Set when the store has answered, with the value."""

    value: Any = None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]
