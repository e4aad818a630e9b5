"""Writes stored tensors, or tensors that arrive one by one, to their places in a model, and counts every number written."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed

import torch
from torch import Tensor

from moerunner.errors import CheckpointError, UnsupportedError
from moerunner.models import staging
from moerunner.models.checkpoint import one_line, some
from moerunner.models.names import Arrangement, Group, Naming
from moerunner.models.places import Box, Cut, Part, regions
from moerunner.models.tensorfile import Reader, Stored, pieces_of

Step = Callable[[int], None]
Targets = list[tuple[str, Part]]
Region = tuple[Box, Targets]
Job = tuple[str, "list[Region] | Group"]
_THREADS = 8  # measured from the page cache: 8.6 GB/s to memory, where one reads 1.5
_MOST = 32 * 2**20  # bytes of a tensor that one thread reads while others read the rest: an embedding is as long as all else
_LEAST = 128 * 2**10  # bytes: reading less from a row costs as much as the row, as systems read ahead
_ONE_MODEL = "The config and the weights must be of one and the same model"


class Filling:
    """The tensors of one model while they are written.

    place: gives the tensor to write to, by its name in the model; it is asked when the first number arrives. cuts: of which
    tensors only a part is kept, which; places that hold zeros are made zero. written: how many numbers of each came.
    """

    def __init__(self, naming: Naming, place: Callable[[str], Tensor], cuts: Mapping[str, Cut]) -> None:
        self.naming, self._place, self.cuts = naming, place, cuts
        self._tensors: dict[str, Tensor] = {}
        self._lock = threading.Lock()
        self.written: Counter[str] = Counter()

    def tensor(self, name: str) -> Tensor:
        with self._lock:
            if name not in self._tensors:
                tensor = self._place(name)
                if name in self.cuts and self.cuts[name].has_zeros:
                    tensor.zero_()
                self._tensors[name] = tensor
            return self._tensors[name]

    def size(self, name: str) -> int:
        """How many numbers are to be written to a tensor."""
        return self.cuts[name].numel if name in self.cuts else self.naming.wanted[name].numel()

    def kept(self, parts: Iterable[tuple[str, Part]]) -> Targets:
        """What is left of parts of whole tensors."""
        return [(n, left) for n, part in parts for left in (self.cuts[n].parts(part) if n in self.cuts else (part,))]

    def write(self, parts: Targets, box: Box, values: Tensor, *, stays: bool = False) -> None:
        """Some values of a source to its places. stays: the values stay as they are until a GPU has copied them."""
        for name, part in parts:
            self.count(name, part.write(self.tensor(name), box, values, stays=stays))

    def memory(self, parts: Targets, box: Box, dtype: torch.dtype) -> Tensor | None:
        """Where the bytes of a box of a source can be read to as they are, if they can."""
        if len(parts) > 1:
            return None
        name, part = parts[0]
        target = self.tensor(name)
        place = part.box(box) if target.dtype == dtype and target.device.type == "cpu" else None
        return target[place] if place is not None and target[place].is_contiguous() else None

    def count(self, name: str, written: int) -> None:
        with self._lock:
            self.written[name] += written

    def finish(self, names: Iterable[str], where: str) -> None:
        """Raises unless each number of these tensors was written once. Planned places are such that it was."""
        names = list(names)
        for name in names:
            if not self.size(name):
                self.tensor(name)  # nothing is written to it
        wrong = [name for name in names if self.written[name] != self.size(name)]
        if wrong:
            raise CheckpointError(f"does not give each number of {some(sorted(wrong))} once", where=where)

    def write_group(self, group: Group, read: Callable[[str], Tensor]) -> list[str]:
        """A group of sources that is converted in one piece. Gives back the names of the tensors that it makes."""
        try:
            values = group.convert(read, self.naming)
        except CheckpointError:
            raise
        except Exception as error:
            raise CheckpointError(f"cannot be made of {some(group.names())}: {one_line(error)}", where=group.target) from error
        for name, value in values.items():
            wanted = self.naming.wanted.get(name)
            if wanted is None or value.shape != wanted.shape:
                asked = "nothing" if wanted is None else list(wanted.shape)
                what = f"{some(group.names())} give {list(value.shape)}, the config asks for {asked}"
                raise CheckpointError(what, where=name)
            self.tensor(name).copy_(self.cuts[name].take(value) if name in self.cuts else value)
            self.count(name, self.size(name))
        return list(values)


def stream(filling: Filling, arranged: Arrangement, stored: Mapping[str, Stored], device: torch.device) -> None:
    """Reads what is arranged and kept, file by file from front to back, in a few threads that each hold one piece in memory."""

    def place(name: str) -> tuple[str, int]:
        return str(stored[name].file), stored[name].start

    whole: list[Job] = [(group.names()[0], group) for group in arranged.whole]
    parts: list[tuple[str, list[Region]]] = []
    for name in sorted(arranged.parts, key=place):
        found = regions(filling.kept(arranged.parts[name]), stored[name].shape, _LEAST // stored[name].dtype.itemsize)
        parts.append((name, found))
    total = sum(_bytes(what, stored, name) for name, what in [*whole, *parts])
    with progress("Loading weights", total) as step, torch.no_grad():
        if not staging.serves(device):
            each = [(name, [one]) for name, found in parts for one in _split(found, stored[name])]
            _read_all(filling, sorted([*whole, *each], key=lambda job: place(job[0])), stored, step)
            return
        _read_all(filling, sorted(whole, key=lambda job: place(job[0])), stored, step)
        pieces = [p for name, found in parts for box, mine in found for p in staging.pieces_for(stored[name], box, mine)]
        staging.staged(pieces, device, step, lambda piece, values: filling.write(piece.told, piece.box, values, stays=True))
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # what was copied is there, or its failure is told here


def _split(found: list[Region], source: Stored) -> Iterator[Region]:
    """Regions of a large tensor in such as several threads can read."""
    for box, mine in found:
        for piece in pieces_of(box, _MOST // source.dtype.itemsize) if source.nbytes > _MOST else (box,):
            yield piece, mine


def _read_all(filling: Filling, jobs: list[Job], stored: Mapping[str, Stored], step: Callable[[int], None]) -> None:
    """In a few threads, each of which takes the next job when it has done one."""
    left, lock, stop = iter(jobs), threading.Lock(), threading.Event()

    def work() -> None:
        def count(read: int) -> None:
            if stop.is_set():
                raise _Stopped
            step(read)

        with Reader(count) as reader, torch.no_grad():
            while True:
                with lock:
                    name, what = next(left, ("", None))
                if what is None:
                    return
                if isinstance(what, Group):
                    filling.write_group(what, lambda source: reader.all(stored[source]))
                else:
                    _read(reader, filling, what, stored[name])

    threads = min(_THREADS, os.cpu_count() or 1, len(jobs))
    with ThreadPoolExecutor(max(1, threads)) as pool:
        try:
            for worker in as_completed([pool.submit(work) for _ in range(threads)]):
                worker.result()
        except BaseException:  # Ctrl-C too
            stop.set()
            raise


def _bytes(what: list[Region] | Group, stored: Mapping[str, Stored], name: str) -> int:
    if isinstance(what, Group):
        return sum(stored[source].nbytes for source in what.names())
    return sum(math.prod(side.stop - side.start for side in box) for box, _ in what) * stored[name].dtype.itemsize


def _read(reader: Reader, filling: Filling, what: list[Region], source: Stored) -> None:
    for within, parts in what:
        memory = filling.memory(parts, within, source.dtype)
        if memory is not None:
            reader.read([source], source.position(within), memory)
            filling.count(parts[0][0], memory.numel())
            continue
        for box, values in reader.pieces(source, within):
            filling.write(parts, box, values)


class _Stopped(Exception):
    """Another thread has failed."""


def check(arranged: Arrangement, where: str, next_step: str = _ONE_MODEL) -> None:
    """Raises a CheckpointError that lists every tensor at fault; its attribute `tensors` has all of them."""
    faults = {
        "missing": arranged.missing,
        "not in the model": arranged.extra,
        "there twice": arranged.doubled,
        "misshapen": [f"{name} ({reason})" for name, reason in arranged.misshapen.items()],
    }
    told = [f"{len(names)} {fault}: {some(names)}" for fault, names in faults.items() if names]
    if told:
        error = CheckpointError(
            f"the tensors do not fit the model; {'; '.join(told)}",
            where=where,
            next_step=next_step,
        )
        error.__dict__["tensors"] = {
            "missing": list(arranged.missing),
            "extra": list(arranged.extra),
            "doubled": list(arranged.doubled),
            "misshapen": list(arranged.misshapen),
        }
        raise error


def check_kind(name: str, dtype: torch.dtype, wanted: torch.dtype, where: str) -> None:
    """Raises unless numbers of a dtype can stand for numbers of the wanted one."""
    if dtype.is_floating_point and dtype.itemsize == 1:
        raise UnsupportedError(
            f"{name} is stored as {_short(dtype)}, a quantised format, and the config has no quantization_config",
            where=where,
            next_step="Weights in float32, bfloat16 or float16 are read",
        )
    if _kind(dtype) != _kind(wanted):
        raise CheckpointError(f"{name} is stored as {_short(dtype)}, the model has {_short(wanted)}", where=where)


@contextlib.contextmanager
def progress(text: str, total: int) -> Iterator[Step]:
    """Counts bytes: a bar on stderr with bytes and bytes per second if that is a terminal, otherwise nothing."""
    if not sys.stderr.isatty():
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn(text), BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(text, total=total)
        yield lambda count: bar.advance(task, count)


def _kind(dtype: torch.dtype) -> str:
    if dtype == torch.bool:
        return "bool"
    return "float" if dtype.is_floating_point else "complex" if dtype.is_complex else "int"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
