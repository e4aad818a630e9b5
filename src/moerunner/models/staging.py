"""Bytes of files on their way to a GPU: a few threads read them into page-locked memory, one thread copies them on.

A thread that reads needs nothing of Python meanwhile; one that copies takes and gives back Python's lock several times for each
tensor. Threads that do both wait for each other most of the time.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from moerunner.models.places import Box
from moerunner.models.tensorfile import Reader, Stored, pieces_of

READERS = 6
ROOM = 8 * 2**20  # bytes of a buffer, which is read in one call


def serves(device: torch.device) -> bool:
    """Whether tensors on this device are filled from here. Into host memory a file is read directly."""
    return device.type == "cuda"


@dataclass(frozen=True)
class Piece:
    """A box of a tensor that is contiguous in its file. told: what the caller wants to know when its numbers are there."""

    source: Stored
    box: Box
    told: Any

    @property
    def start(self) -> int:
        return self.source.position(self.box)

    @property
    def shape(self) -> list[int]:
        return [side.stop - side.start for side in self.box]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.source.dtype.itemsize


def pieces_for(source: Stored, box: Box, told: Any) -> Iterator[Piece]:
    """A box in pieces that a buffer has room for."""
    for part in pieces_of(box, ROOM // source.dtype.itemsize) if source.nbytes else ():
        yield Piece(source, part, told)


def staged(
    pieces: Iterable[Piece],
    device: torch.device,
    step: Callable[[int], None],
    write: Callable[[Piece, Tensor], None],
) -> None:
    """Reads every piece and calls `write` with its values, in this thread.

    The values are in page-locked memory and stay there until what `write` has put on the device's current stream is done.
    pieces: in the order of their bytes. step: is told how many bytes were read, now and then.
    """
    chunks = list(_chunks(pieces))
    threads = min(READERS, len(chunks))
    left, lock = iter(chunks), threading.Lock()
    free: SimpleQueue[_Buffer | None] = SimpleQueue()
    ready: SimpleQueue[tuple[_Chunk, _Buffer] | BaseException] = SimpleQueue()

    def read() -> None:
        try:
            with Reader(step) as reader:
                while (buffer := free.get()) is not None:
                    with lock:
                        chunk = next(left, None)
                    if chunk is None:
                        return
                    reader.read([p.source for p in chunk.pieces], chunk.start, buffer.room(chunk.size))
                    ready.put((chunk, buffer))
        except BaseException as error:  # noqa: BLE001 - told by the thread that waits for it
            ready.put(error)

    with ThreadPoolExecutor(max(1, threads)) as pool:
        try:
            for _ in range(threads):
                pool.submit(read)
                for _ in range(2):
                    free.put(_Buffer(device))
            for _ in chunks:
                found = ready.get()
                if isinstance(found, BaseException):
                    raise found
                chunk, buffer = found
                for piece in chunk.pieces:
                    write(piece, buffer.values(piece, chunk.start))
                buffer.give()
                free.put(buffer)
        finally:
            with lock:
                for _ in left:  # after a failure nothing more is read
                    pass
            for _ in range(threads):
                free.put(None)


@dataclass(frozen=True)
class _Chunk:
    """Pieces that follow each other in one file, read in one call."""

    pieces: Sequence[Piece]
    start: int
    size: int


def _chunks(pieces: Iterable[Piece]) -> Iterator[_Chunk]:
    found: list[Piece] = []
    start = size = 0
    for piece in pieces:
        at, number = piece.start, piece.source.dtype.itemsize
        nbytes = piece.nbytes
        follows = found and piece.source.file == found[0].source.file and at == start + size
        if not follows or size + nbytes > ROOM or size % number:
            if found:
                yield _Chunk(found, start, size)
            found, start, size = [], at, 0
        found.append(piece)
        size += nbytes
    if found:
        yield _Chunk(found, start, size)


class _Buffer:
    """Room for a chunk, with what says that the device has read it."""

    def __init__(self, device: torch.device) -> None:
        self._gpu = device if device.type == "cuda" else None
        self._bytes = torch.empty(ROOM, dtype=torch.uint8, device="cpu", pin_memory=self._gpu is not None)
        self._copied = torch.cuda.Event() if self._gpu is not None else None

    def room(self, size: int) -> Tensor:
        """Its first bytes, once they are free."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._bytes[:size]

    def values(self, piece: Piece, start: int) -> Tensor:
        """The numbers of a piece of the chunk that begins there."""
        at = piece.start - start
        return self._bytes[at : at + piece.nbytes].view(piece.source.dtype).view(piece.shape)

    def give(self) -> None:
        """To be free as soon as all that the current stream was told to is done."""
        if self._copied is not None:
            self._copied.record(torch.cuda.current_stream(self._gpu))
