"""Files that verbs read and write: told early if they cannot be, and whole or not there at all."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path

from moerunner.errors import SpecError, UnsupportedError

PICTURES = (".png", ".svg", ".pdf")


def text_of(file: str, option: str) -> str:
    """A text file in UTF-8, - for stdin. option: by which it was given."""
    name = "stdin" if file == "-" else file
    try:
        return (sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()).decode("utf-8")
    except UnicodeDecodeError as error:
        step = f"Give {option} a text file"
        raise SpecError(f"is not text in UTF-8: {error.reason} at byte {error.start}", where=name, next_step=step) from error
    except OSError as error:
        raise SpecError(f"cannot be read: {error.strerror}", where=name, next_step=f"Give {option} an existing file") from error


def to_write(path: str | Path) -> Path:
    """The path of a file that can be written, so that no work is done for nothing. Raises `SpecError` if it cannot."""
    path = Path(path)
    if not path.parent.is_dir():
        raise SpecError("its folder does not exist", where=str(path), next_step=f"Make {path.parent} first")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise SpecError("cannot be written", where=str(path), next_step="Name another file")
    return path


def picture(path: str | Path) -> Path:
    """The same of a picture. Raises `UnsupportedError` if there is nothing to draw it with."""
    if Path(path).suffix.lower() not in PICTURES:
        raise SpecError(f"must end in {', '.join(PICTURES)}", where=str(path), next_step="Name a picture, such as out.png")
    if importlib.util.find_spec("matplotlib") is None:
        raise UnsupportedError("matplotlib is not installed", where="--plot", next_step="pip install 'moerunner[plot]'")
    return to_write(path)


def write(path: Path, content: str | bytes) -> None:
    """The whole file or nothing: it is written beside its place and moved there."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_bytes(content.encode() if isinstance(content, str) else content)
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
