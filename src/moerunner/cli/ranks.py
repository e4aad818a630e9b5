"""The verbs on several ranks: who prints, how an error on one rank ends all, and the layout that the options ask for."""

from __future__ import annotations

import enum
import os
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from moerunner.errors import DistributedError, SpecError

if TYPE_CHECKING:
    from moerunner.parallel.layout import BoundLayout


class Attention(enum.StrEnum):
    """What each rank has of what lies outside of the MoE blocks."""

    replicate = "replicate"
    tp_plan = "tp_plan"


TpOption = Annotated[int | None, typer.Option("--tp", min=1, help="Under torchrun: ranks that share each expert's width.")]
EpOption = Annotated[int | None, typer.Option("--ep", min=1, help="Under torchrun: ranks that share the experts.")]
DpOption = Annotated[int | None, typer.Option("--dp", min=1, help="Under torchrun: copies of the model, on the same input.")]
AttentionOption = Annotated[
    Attention,
    typer.Option("--attention", help="Under torchrun: attention and dense parts whole on each rank, or by Transformers' plan."),
]
TimeoutOption = Annotated[
    float, typer.Option("--timeout", min=1.0, help="Under torchrun: seconds that a rank may wait for another one.")
]

_POLL, _JOIN = 0.1, 60.0  # seconds: between looks at the store, and until the first look at it must succeed
_LEAVE = 10.0  # seconds that ranks wait for each other when they end
_LOST = 4  # the exit status of a rank that loses the others


class Ranks:
    """This process among those that torchrun started. They tell each other how they end in the store of the rendezvous.

    The first rank to fail says why; a thread on each rank sees it, also while the rank waits in a collective, and ends it.
    """

    def __init__(self, store: Any, rank: int, world: int) -> None:
        self.rank, self.world, self._store = rank, world, store
        self._done = threading.Event()
        signal.signal(signal.SIGTERM, _told_to_end)
        threading.Thread(target=self._watch, daemon=True).start()

    @classmethod
    def of_torchrun(cls) -> Ranks | None:
        """None where there is one process only."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return None
        import torch.distributed as dist

        from moerunner.parallel.start import ranks_of_torchrun

        if ranks_of_torchrun() is None:
            return None
        store, rank, world = next(iter(dist.rendezvous("env://", timeout=timedelta(seconds=_JOIN))))
        return cls(dist.PrefixStore("moerunner", store), rank, world)

    def fail(self, code: int, say: Callable[[], None]) -> NoReturn:
        """Ends every rank with this status. What is said is said by the first rank that fails, and by no other."""
        if self._store.add("failures", 1) == 1:
            say()
            self._store.set("status", str(code))
        while True:
            time.sleep(1)  # the thread ends the process

    def agree(self, code: int) -> int:
        """The highest status of all ranks, once all have come here, with their output written; above 0, it ends the process."""
        self._store.set(f"status of {self.rank}", str(code))
        names = [f"status of {rank}" for rank in range(self.world)]
        while not self._store.check(names):
            time.sleep(_POLL)
        highest = max(int(self._store.get(name)) for name in names)
        self._done.set()
        self._leave(self.rank == 0 or highest > 0)
        if highest:
            os._exit(highest)  # at once: torchrun kills the ranks that take longer to end
        return highest

    def _watch(self) -> None:
        try:
            while not self._done.wait(_POLL):
                if self._store.check(["status"]):
                    code = int(self._store.get("status"))
                    self._leave(True)
                    os._exit(code)  # it may wait in a collective that never ends
        except RuntimeError:  # whoever kept the store has gone
            if not self._done.is_set():
                os._exit(_LOST)

    def _leave(self, last: bool) -> None:
        """last: wait for the others, as this rank may keep the store, and torchrun stops all when one has failed."""
        self._store.add("left", 1)
        end = time.monotonic() + _LEAVE
        while last and self._store.add("left", 0) < self.world and time.monotonic() < end:
            time.sleep(0.001)


def _told_to_end(*_: Any) -> NoReturn:
    """torchrun ends all processes when one has ended, or when it is itself told to end."""
    from moerunner.parallel.watch import Watch

    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it has been heard; if this takes too long, SIGKILL follows
    raise Watch.blame() or DistributedError("torchrun ends all ranks", where=f"rank {os.environ['RANK']}")


def bound_layout(tp: int | None, ep: int | None, dp: int | None, *, timeout: float) -> BoundLayout | None:
    """The layout of these options over the processes of torchrun, None where there is one. timeout: of a collective, seconds.

    Raises:
        SpecError: the sizes are not those of the processes.
    """
    from moerunner.parallel.layout import Layout
    from moerunner.parallel.start import ranks_of_torchrun

    layout, world = Layout(tp=tp or 1, ep=ep or 1, dp=dp or 1, timeout=timeout), ranks_of_torchrun() or 1
    if layout.world == world == 1:
        return None
    given = [f"--{name} {size}" for name, size in (("tp", tp), ("ep", ep), ("dp", dp)) if size is not None]
    step = f"Give --tp, --ep and --dp with the product {world}, such as --ep {world}"
    if not given:
        raise SpecError(f"there are {world} processes, and no layout for them", where="torchrun", next_step=step)
    if layout.world != world:
        start = f"torchrun --nproc-per-node {layout.world} -m moerunner ..."
        raise SpecError(
            f"{layout.world} ranks are asked for, there {'is 1 process' if world == 1 else f'are {world} processes'}",
            where=" ".join(given),
            next_step=f"Start it as {start}" if world == 1 else f"{step}, or start it as {start}",
        )
    return layout.bind()


def device_of_rank(device: str | None, bound: BoundLayout | None) -> str | None:
    """Each rank has its own GPU, so that one for all cannot be named."""
    if bound is not None and device is not None and ":" in device:
        raise SpecError(
            f"names one device for {bound.layout.world} ranks", where=f"--device {device}", next_step="Give cuda or cpu"
        )
    return device
