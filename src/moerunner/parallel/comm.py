"""Collectives over the axes of a layout: none for one rank, torch.distributed, or N simulated ranks in one process.

Every implementation keeps what it last issued in `log`, so that a test can compare it with the plan.
"""

from __future__ import annotations

import json
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from moerunner.errors import Changed, DistributedError, UnsupportedError
from moerunner.parallel.layout import BoundLayout, Layout
from moerunner.parallel.peers import compare
from moerunner.parallel.rows import Work, differentiable, pack, unpack
from moerunner.values import AXES

R = TypeVar("R")


class Comm(ABC):
    """One rank's view. `axes` name the axes that a collective runs over; rows are dimension 0 everywhere.

    Every collective has a backward. A value that is whole on several ranks has the same, complete gradient on each of them,
    and so does every part of a sum: a caller who is given the sum on every rank passes its gradient on every rank.
    """

    def __init__(self, layout: Layout, rank: int) -> None:
        self.layout, self.rank = layout, rank
        self.coordinates = layout.coordinates(rank)
        self.log: deque[tuple[str, tuple[str, ...]]] = deque(maxlen=1024)
        self.counted: deque[tuple[str, tuple[str, ...]]] = deque(maxlen=1024)

    def all_reduce(self, x: Tensor, axes: tuple[str, ...]) -> Tensor:
        """The sum over the group, on every rank. Backward: the gradient of the sum is that of each part."""
        return differentiable(lambda x: (self._issue_all_reduce(x, axes),), lambda g: (g,), x)[0]

    def fan_out(
        self, values: Sequence[Tensor], axes: tuple[str, ...], *, travels: Sequence[torch.dtype], counts: Sequence[bool]
    ) -> tuple[Tensor, ...]:
        """The values, whole on every rank, where each rank begins its part of a sum.

        Backward: their gradients are parts of a sum too and are added up over the group, each in its `travels`; a rank
        whose `counts` is false has what another one has and adds nothing. Values of one dtype share a collective.
        """

        def back(*gradients: Tensor) -> tuple[Tensor, ...]:
            flat = [(g if own else torch.zeros_like(g)).reshape(1, -1) for g, own in zip(gradients, counts, strict=True)]
            if axes:
                flat = _together(flat, travels, lambda g: self._issue_all_reduce(g, axes))
            return tuple(part.reshape(g.shape) for part, g in zip(flat, gradients, strict=True))

        return differentiable(lambda *values: tuple(v.view_as(v) for v in values), back, *values)

    def once(self, x: Tensor, axes: tuple[str, ...]) -> Tensor:
        """A value that is whole on every rank as parts of a sum: x on coordinate 0 of the axes, zeros elsewhere.

        Backward: x is the sum, whose gradient every rank has.
        """
        here = all(self.coordinates[a] == 0 for a in axes)
        return differentiable(lambda x: (x.view_as(x) if here else torch.zeros_like(x),), lambda g: (g,), x)[0]

    def own_rows(self, x: Tensor, counts: list[int], axes: tuple[str, ...]) -> Tensor:
        """This rank's `counts[i]` rows of a value that is whole on every rank. Backward: all ranks' rows are gathered."""
        here = self.index(axes)
        return differentiable(
            lambda x: (x.split(counts)[here].clone(),), lambda g: (self._issue_all_gather(g, counts, axes),), x
        )[0]

    def all_gather(
        self, rows: Sequence[Tensor], axes: tuple[str, ...], travels: Sequence[torch.dtype]
    ) -> tuple[tuple[Tensor, ...], list[int]]:
        """All ranks' rows in rank order, and how many each had; the counts may differ.

        rows: tensors [R, n] of any dtypes, which travel together as bytes. Backward: a reduce-scatter, the gradient of each
        floating tensor in its `travels`, one collective for all of one dtype.
        """
        counts = self._issue_gather_counts(rows[0].shape[0], rows[0].device, axes)

        def there(*rows: Tensor) -> tuple[Tensor, ...]:
            return unpack(self._issue_all_gather(pack(rows), counts, axes), rows)

        def back(*gradients: Tensor) -> tuple[Tensor, ...]:
            return _together(gradients, travels, lambda g: self._issue_reduce_scatter(g, counts, axes))

        return differentiable(there, back, *rows), counts

    def reduce_scatter(self, x: Tensor, counts: list[int], axes: tuple[str, ...]) -> Tensor:
        """The sum over the group, of which this rank gets its `counts[i]` rows. Backward: all ranks' rows are gathered."""
        return differentiable(
            lambda x: (self._issue_reduce_scatter(x, counts, axes),), lambda g: (self._issue_all_gather(g, counts, axes),), x
        )[0]

    def all_to_all(
        self, rows: Sequence[Tensor], send: list[int], axes: tuple[str, ...], receive: list[int] | None = None
    ) -> Work[tuple[tuple[Tensor, ...], list[int]]]:
        """Starts to send `send[i]` rows to rank i of the group; what came, in rank order, and how many from each.

        rows: tensors [R, n] of any dtypes, which travel together as bytes. What is computed until `wait` runs while they
        travel. receive: how many come from each, where that is known. Backward: the gradients go the other way.
        """
        if receive is None:
            self.counted.append(("all_to_all", axes))
            receive = self._all_to_all_counts(send, rows[0].device, axes)
        received = receive
        with torch.no_grad():
            arrive = self._issue_all_to_all(pack(rows), send, received, axes)

        def there(*rows: Tensor) -> tuple[Tensor, ...]:
            return unpack(arrive(), rows)

        def back(*gradients: Tensor) -> tuple[Tensor, ...]:
            return unpack(self._issue_all_to_all(pack(gradients), received, send, axes)(), gradients)

        return Work(lambda: (differentiable(there, back, *rows), received))

    def same(self, facts: Mapping[str, Any]) -> None:
        """Raises a `DistributedError` on every rank unless all ranks pass the same facts; it says in which they differ."""
        texts = self._gather_objects(json.dumps(facts, default=str), AXES)
        compare(self.rank, [json.loads(text) for text in texts])

    def failed(self, error: Exception) -> Exception:
        """Tells the other ranks, where there are any, that this one cannot go on; what is to be raised here."""
        return error

    def process_group(self, axes: tuple[str, ...]) -> Any:
        """The `ProcessGroup` of torch.distributed over these axes, for kernels that communicate by themselves."""
        raise UnsupportedError("simulated ranks have no process group", where=f"rank {self.rank}")

    def index(self, axes: tuple[str, ...]) -> int:
        """This rank's place in the group over these axes."""
        return self.layout.group(self.rank, axes).index(self.rank)

    def _issue_gather_counts(self, rows: int, device: torch.device, axes: tuple[str, ...]) -> list[int]:
        self.counted.append(("all_gather", axes))
        return self._gather_counts(rows, device, axes)

    def _issue_all_reduce(self, x: Tensor, axes: tuple[str, ...]) -> Tensor:
        self.log.append(("all_reduce", axes))
        return self._all_reduce(x, axes)

    def _issue_all_gather(self, x: Tensor, counts: list[int], axes: tuple[str, ...]) -> Tensor:
        self.log.append(("all_gather", axes))
        return self._all_gather(x, counts, axes)

    def _issue_reduce_scatter(self, x: Tensor, counts: list[int], axes: tuple[str, ...]) -> Tensor:
        self.log.append(("reduce_scatter", axes))
        return self._reduce_scatter(x, counts, axes)

    def _issue_all_to_all(self, x: Tensor, send: list[int], received: list[int], axes: tuple[str, ...]) -> Callable[[], Tensor]:
        self.log.append(("all_to_all", axes))
        return self._all_to_all(x, send, received, axes)

    @abstractmethod
    def _gather_objects(self, item: Any, axes: tuple[str, ...]) -> list[Any]: ...

    @abstractmethod
    def _gather_counts(self, rows: int, device: torch.device, axes: tuple[str, ...]) -> list[int]: ...

    @abstractmethod
    def _all_to_all_counts(self, send: list[int], device: torch.device, axes: tuple[str, ...]) -> list[int]: ...

    @abstractmethod
    def _all_reduce(self, x: Tensor, axes: tuple[str, ...]) -> Tensor: ...

    @abstractmethod
    def _all_gather(self, x: Tensor, counts: list[int], axes: tuple[str, ...]) -> Tensor: ...

    @abstractmethod
    def _reduce_scatter(self, x: Tensor, counts: list[int], axes: tuple[str, ...]) -> Tensor: ...

    @abstractmethod
    def _all_to_all(self, x: Tensor, send: list[int], received: list[int], axes: tuple[str, ...]) -> Callable[[], Tensor]:
        """Starts it; the function that is returned waits and gives what came."""


def _together(
    gradients: Sequence[Tensor], travels: Sequence[torch.dtype], move: Callable[[Tensor], Tensor]
) -> tuple[Tensor, ...]:
    """Each gradient [R, n] moved in its dtype, those of one dtype side by side in one collective."""
    moved: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(travels):
        own = [i for i, d in enumerate(travels) if d == dtype]
        sums = move(torch.cat([gradients[i].to(dtype) for i in own], dim=1))
        parts = sums.split([gradients[i].shape[1] for i in own], dim=1)
        moved |= {i: part.to(gradients[i].dtype) for i, part in zip(own, parts, strict=True)}
    return tuple(moved[i] for i in range(len(gradients)))


def on_every_rank(method: Callable[..., R]) -> Callable[..., R]:
    """An error on one rank in a method that all ranks call together is a `DistributedError` on all; `self._comm` tells them."""

    @wraps(method)
    def told(self: Any, *args: Any, **kwargs: Any) -> R:
        try:
            return method(self, *args, **kwargs)
        except Changed:
            raise
        except Exception as error:
            raised = self._comm.failed(error)
            if raised is error:
                raise
            raise raised from error

    return told


class GatherComm(Comm):
    """Collectives made of one primitive: every rank of the group learns what every other passed."""

    def _gather_counts(self, rows: int, device: torch.device, axes: tuple[str, ...]) -> list[int]:
        return self._gather_objects(rows, axes)

    def _all_to_all_counts(self, send: list[int], device: torch.device, axes: tuple[str, ...]) -> list[int]:
        here = self.index(axes)
        return [counts[here] for counts in self._gather_objects(send, axes)]

    def _all_reduce(self, x: Tensor, axes: tuple[str, ...]) -> Tensor:
        parts = self._gather_objects(x, axes)
        total = parts[0].double()
        for part in parts[1:]:
            total = total + part.double()
        return total.to(x.dtype)

    def _all_gather(self, x: Tensor, counts: list[int], axes: tuple[str, ...]) -> Tensor:
        return torch.cat(self._gather_objects(x, axes))

    def _reduce_scatter(self, x: Tensor, counts: list[int], axes: tuple[str, ...]) -> Tensor:
        return self._all_reduce(x, axes).split(counts)[self.index(axes)]

    def _all_to_all(self, x: Tensor, send: list[int], received: list[int], axes: tuple[str, ...]) -> Callable[[], Tensor]:
        here = self.index(axes)
        parts = self._gather_objects((x, send), axes)
        came = torch.cat([rows.split(counts)[here] for rows, counts in parts])
        return lambda: came


class LocalComm(GatherComm):
    """One rank: nothing to exchange."""

    def __init__(self) -> None:
        super().__init__(Layout(), 0)

    def _gather_objects(self, item: Any, axes: tuple[str, ...]) -> list[Any]:
        return [item]


def comm_of(layout: Layout | BoundLayout | None) -> Comm:
    """What a bound layout communicates by, or that of one rank.

    Raises:
        DistributedError: the layout has several ranks and is not bound to them.
    """
    if isinstance(layout, BoundLayout):
        return layout.comm
    if layout is not None and layout.world > 1:
        what = f"the layout has {layout.world} ranks and is not bound to them"
        raise DistributedError(what, where="MoERunner", next_step="Layout.bind(mesh)")
    return LocalComm()


class SimulatedComm(GatherComm):
    """One of N ranks that are threads of this process."""

    def __init__(self, layout: Layout, rank: int, board: list[Any], barrier: threading.Barrier) -> None:
        super().__init__(layout, rank)
        self._board, self._barrier = board, barrier

    def _gather_objects(self, item: Any, axes: tuple[str, ...]) -> list[Any]:
        self._board[self.rank] = item
        self._barrier.wait(self.layout.timeout)
        items = [self._board[r] for r in self.layout.group(self.rank, axes)]
        self._barrier.wait(self.layout.timeout)
        return items


def simulate(layout: Layout, rank_main: Callable[[BoundLayout], R]) -> list[R]:
    """Runs `rank_main` once per rank of the layout, as threads, and returns the results in rank order.

    The first rank that raises ends the others; its error is raised here.
    """
    board: list[Any] = [None] * layout.world
    barrier = threading.Barrier(layout.world)
    results: list[Any] = [None] * layout.world
    failures: list[tuple[int, BaseException]] = []
    waited: list[int] = []
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()

    def main(rank: int) -> None:
        try:
            # A GPU's backward runs on a thread that all ranks would share, each waiting for the others: here it stays here.
            own_thread = torch.autograd.set_multithreading_enabled(False)
            with own_thread, torch.inference_mode(inference), torch.set_grad_enabled(grad and not inference):
                results[rank] = rank_main(BoundLayout(layout, SimulatedComm(layout, rank, board, barrier)))
        except threading.BrokenBarrierError:
            waited.append(rank)
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            failures.append((rank, error))
            barrier.abort()

    threads = [threading.Thread(target=main, args=(rank,), daemon=True) for rank in range(layout.world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise min(failures, key=lambda failure: failure[0])[1]
    if waited:
        absent = [rank for rank in range(layout.world) if rank not in waited]
        what = f"has not come to a collective within {layout.timeout:g} s"
        raise DistributedError(what, where=f"rank {absent[0]}" if absent else "a rank")
    return results
