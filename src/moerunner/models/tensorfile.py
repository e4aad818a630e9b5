"""One safetensors file: its header, read with every check, and the bytes of its tensors.

A file is 8 bytes with the length of a JSON header, the header, and the tensors one after another. It is read with plain
reads into memory of ours. A memory map, which the safetensors library uses, would be shorter; but a file that is cut or
replaced while it is mapped ends the process with SIGBUS, a failing disk likewise, and mapped pages count as memory in use.
"""

from __future__ import annotations

import ctypes
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from moerunner.errors import CheckpointError, UnsupportedError

PIECE = 2 * 2**20  # bytes held while numbers are converted: small enough to stay in a processor's cache
_STRIDE = 64 * 2**20  # bytes read in one call
_LONGEST_HEADER = 100_000_000  # as in the safetensors library
_AGAIN = "Copy or download the file again"

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_PACKED = ("F4", "F6_E2M3", "F6_E3M2", "F8_E8M0", "C64")  # safetensors has them, no weight that is read here does


@dataclass(frozen=True)
class Stored:
    """A tensor in a file. start: of its bytes, from the beginning of the file."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def position(self, box: tuple[slice, ...]) -> int:
        """Where the first number of a box lies in the file."""
        number = 0
        for size, side in zip(self.shape, box, strict=True):
            number = number * size + side.start
        return self.start + number * self.dtype.itemsize


def read_header(file: Path) -> list[Stored]:
    """The tensors of a file, in the order of their bytes.

    Raises:
        CheckpointError: the file is absent, cut short, or its header is not one. UnsupportedError: a dtype is not offered.
    """
    try:
        size = file.stat().st_size
        with file.open("rb", buffering=0) as opened:
            length = int.from_bytes(_exactly(opened, 8, file), "little")
            if length > min(_LONGEST_HEADER, size - 8):
                raise _damaged(file, f"its header claims {length} bytes, the file has {size}")
            text = _exactly(opened, length, file)
    except FileNotFoundError as error:
        raise CheckpointError("is missing", where=str(file), next_step=_AGAIN) from error
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=str(file)) from error
    try:
        if text[:1] != b"{":
            raise ValueError("it does not begin with {")
        header = json.loads(text, object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise _damaged(file, f"its header is not JSON: {error}") from error
    notes = header.pop("__metadata__", None) or {}
    if not isinstance(notes, dict) or not all(isinstance(value, str) for value in notes.values()):
        raise _damaged(file, "its header has a __metadata__ that is not text by name")
    found = sorted((_stored(file, name, entry, 8 + length) for name, entry in header.items()), key=lambda f: f[0])
    position = 8 + length
    for (start, end), tensor in found:
        if start != position or end - start != tensor.nbytes:
            raise _damaged(file, f"its header puts {tensor.name!r} at bytes {start} to {end}, which cannot be")
        position = end
    if position != size:
        cut = "it is cut short" if position > size else "there is more in it"
        raise _damaged(file, f"{cut}: its header asks for {position} bytes, it has {size}")
    return [tensor for _, tensor in found]


class Reader:
    """Reads stored tensors; keeps one file open and a piece in memory, which a later piece overwrites.

    step: is told how many bytes were read, now and then.
    """

    def __init__(self, step: Callable[[int], None]) -> None:
        self._step = step
        self._piece = torch.empty(PIECE, dtype=torch.uint8, device="cpu")
        self._file: FileIO | None = None
        self._path: Path | None = None

    def pieces(self, tensor: Stored, within: tuple[slice, ...]) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
        """A box that is contiguous in the file in smaller ones: where in the tensor, and the values.

        They are valid until the next is asked for.
        """
        if tensor.nbytes == 0:
            return
        position = tensor.position(within)
        for box in pieces_of(within, PIECE // tensor.dtype.itemsize):
            shape = [side.stop - side.start for side in box]
            values = self._piece[: math.prod(shape) * tensor.dtype.itemsize].view(tensor.dtype).view(shape)
            self.read([tensor], position, values)
            yield box, values
            position += values.nbytes

    def all(self, tensor: Stored) -> Tensor:
        """The whole tensor in memory of its own."""
        values = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        self.read([tensor], tensor.start, values)
        return values

    def read(self, tensors: Sequence[Stored], position: int, into: Tensor) -> None:
        """Fills a contiguous tensor in host memory with the bytes of a file from `position` on, which are of these tensors."""

        def here() -> str:
            return next(t.name for t in reversed(tensors) if t.start <= position + done or t is tensors[0])

        memory = memoryview((ctypes.c_char * into.nbytes).from_address(into.data_ptr())).cast("B")
        done, path = 0, tensors[0].file
        try:
            file = self._open(path)
            file.seek(position)
            while done < len(memory):
                count = file.readinto(memory[done : done + _STRIDE])
                if not count:
                    raise _damaged(path, f"it ends within {here()!r}: it was cut after loading began")
                done += count
                self._step(count)
        except OSError as error:
            raise CheckpointError(f"cannot be read at {here()!r}: {error.strerror}", where=str(path)) from error

    def _open(self, path: Path) -> FileIO:
        if self._file is None or (self._path is not path and self._path != path):
            self.close()
            self._file, self._path = FileIO(path), path
        return self._file

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def pieces_of(box: tuple[slice, ...], most: int) -> Iterator[tuple[slice, ...]]:
    """Cuts a box that is contiguous in memory into boxes of at most `most` numbers, which are so too, in order."""
    for inner in boxes(tuple(side.stop - side.start for side in box), most):
        yield tuple(slice(a.start + b.start, a.start + b.stop) for a, b in zip(box, inner, strict=True))


def boxes(shape: tuple[int, ...], most: int) -> Iterator[tuple[slice, ...]]:
    """Cuts a row-major tensor into boxes of at most `most` numbers, contiguous in memory and in order."""
    if not shape:
        yield ()
        return
    inner = math.prod(shape[1:])
    if inner <= most:
        rows = max(1, most // max(1, inner))
        rest = tuple(slice(0, n) for n in shape[1:])
        for at in range(0, shape[0], rows):
            yield slice(at, min(at + rows, shape[0])), *rest
        return
    for at in range(shape[0]):
        for box in boxes(shape[1:], most):
            yield slice(at, at + 1), *box


def _exactly(opened: Any, count: int, file: Path) -> bytes:
    parts = []
    while count:
        part = opened.read(count)
        if not part:
            raise _damaged(file, "it ends within its header")
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


def _stored(file: Path, name: str, entry: Any, data: int) -> tuple[tuple[int, int], Stored]:
    """The tensor's range of bytes in the file, and the tensor."""
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [start, end, *shape]
    except (TypeError, KeyError, ValueError) as error:
        raise _damaged(file, f"its header describes {name!r} wrongly") from error
    if not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
        raise _damaged(file, f"its header describes {name!r} wrongly")
    if dtype in _PACKED:
        raise UnsupportedError(f"the tensor {name!r} has the format {dtype}", where=str(file), next_step=_OFFERED)
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise _damaged(file, f"its header gives {name!r} the unknown dtype {dtype!r}")
    return (data + start, data + end), Stored(name, file, _DTYPES[dtype], tuple(shape), data + start)


_OFFERED = f"Weights are read as {', '.join(_DTYPES)}"


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} is in it twice")
    return found


def _damaged(file: Path, what: str) -> CheckpointError:
    return CheckpointError(f"is damaged: {what}", where=str(file), next_step=_AGAIN)
