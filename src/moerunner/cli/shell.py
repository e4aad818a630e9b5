"""What the verbs share: exit codes, errors in one line, output for people or for machines, options."""

from __future__ import annotations

import contextlib
import enum
import functools
import json as jsonlib
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TextIO

import typer

from moerunner.cli.ranks import Ranks
from moerunner.errors import DistributedError, MoEError, PlanError, UnsupportedError

OK, MISMATCH, BAD_INPUT, UNSUPPORTED, FAILED, INTERRUPTED = 0, 1, 2, 3, 4, 130
PIPE_CLOSED = 128 + 13  # what a shell shows for a program that SIGPIPE ended


@dataclass(frozen=True)
class Answer:
    """What a verb gives back: data for --json, None if it has printed it, and the exit code."""

    data: dict[str, Any] | None
    code: int = OK


def verb(run: Callable[..., Answer]) -> Callable[..., None]:
    """Makes a verb of a function: its errors become one line on stderr and an exit code, with --json its data one object."""
    return _command(run, lambda: None)


def verb_of_ranks(run: Callable[..., Answer]) -> Callable[..., None]:
    """The same for a verb that torchrun may start several times: rank 0 prints, all end with one status."""
    return _command(run, Ranks.of_torchrun)


def _command(run: Callable[..., Answer], find_ranks: Callable[[], Ranks | None]) -> Callable[..., None]:
    @functools.wraps(run)
    def command(**options: Any) -> None:
        json, debug = options["json"], options["debug"]
        out, err = sys.stdout, sys.stderr
        ranks = None

        def say(error: BaseException, text: str) -> None:
            if debug:
                traceback.print_exception(error, file=err)
            print(f"moerunner: {text}", file=err, flush=True)
            if json:
                try:
                    print_json({"ok": False, "error": {"kind": type(error).__name__, "message": text}}, out)
                except OSError:  # a full disk, or a reader that left: stderr has been told
                    _discard(out)

        try:
            ranks = find_ranks()
            # Whatever a library prints must not come between a machine and its JSON.
            with _silence() if ranks and ranks.rank else contextlib.redirect_stdout(err) if json else contextlib.nullcontext():
                answer = run(**options)
                if json and answer.data is not None and not (ranks and ranks.rank):
                    print_json(answer.data, out)
                sys.stdout.flush()
            code = ranks.agree(answer.code) if ranks else answer.code
        except BrokenPipeError:
            _discard(out)
            code = PIPE_CLOSED
            if ranks:
                ranks.fail(code, lambda: None)
        except (Exception, KeyboardInterrupt) as error:
            if not ranks and isinstance(error, (typer.Exit, typer.BadParameter)):
                raise
            code, text = explain(error)
            if ranks:
                text = text if text.startswith("rank ") else f"rank {ranks.rank}: {text}"
                ranks.fail(code, functools.partial(say, error, text))
            say(error, text)
        raise typer.Exit(code)

    return command


def _discard(out: TextIO) -> None:
    """What could not be written goes nowhere, or Python would try again, and complain, when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Of every rank but the first."""
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing), contextlib.redirect_stderr(nothing):
        yield


def explain(error: BaseException) -> tuple[int, str]:
    """The exit code of an error, and its reason and next step in one line."""
    text = " ".join(str(error).split())
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted"
    if isinstance(error, UnsupportedError):
        return UNSUPPORTED, text
    if isinstance(error, DistributedError | PlanError):
        return FAILED, text
    if isinstance(error, MoEError | typer.BadParameter | FileNotFoundError | NotADirectoryError | PermissionError):
        return BAD_INPUT, text
    if isinstance(error, ImportError):
        return UNSUPPORTED, f"{text}. Install what is missing: pip install 'moerunner[hf]'"
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        return FAILED, f"out of memory: {text}. Choose a smaller --dtype, another --device or fewer tokens"
    return FAILED, f"{type(error).__name__}: {text}. Run again with --debug to see where it happened"


def print_json(data: dict[str, Any], out: TextIO | None = None) -> None:
    """One object. out: None is the process's own stdout, wherever `sys.stdout` is sent to."""
    print(jsonlib.dumps(_finite(data), indent=2), file=out or sys.__stdout__, flush=True)


def _finite(value: Any) -> Any:
    """JSON has no infinity and no NaN: they become strings."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class Screen:
    """Output for people: tables with lines on a terminal, aligned text elsewhere, nothing at all when quiet."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.terminal = sys.stdout.isatty()

    @property
    def drawing(self) -> bool:
        """Whether lines, blocks and colours can be shown."""
        return self.terminal and not self.quiet and (sys.stdout.encoding or "ascii").lower().startswith("utf")

    def say(self, text: str = "") -> None:
        if not self.quiet:
            print(text, flush=True)

    def write(self, text: str) -> None:
        """A piece of a text that goes on."""
        if not self.quiet:
            print(text, end="", flush=True)

    def heading(self, text: str) -> None:
        self.say(f"\n\033[1m{text}\033[0m" if self.terminal else f"\n{text}")

    def table(self, headers: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = True, wrap: bool = False) -> None:
        """The first column is left-aligned, others are right-aligned if they are numbers. wrap: long cells, on a terminal."""
        if self.quiet:
            return
        if self.terminal:
            from rich import box
            from rich.console import Console
            from rich.table import Table

            table = Table(*headers, box=box.SIMPLE_HEAD, pad_edge=False)
            table.columns[0].overflow = "fold"  # a long name is never cut
            for column in table.columns[1:]:
                column.justify, column.no_wrap = "right" if numbers else "left", not wrap
                column.overflow = "fold" if wrap else "ellipsis"
            for row in rows:
                table.add_row(*row)
            Console(markup=False, highlight=False).print(table)
            return
        widths = [max(map(len, column)) for column in zip(headers, *rows, strict=True)]
        for row in (headers, *rows):
            cells = [c.rjust(w) if i and numbers else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
            self.say("  ".join(cells).rstrip())

    @contextlib.contextmanager
    def progress(self, text: str) -> Iterator[None]:
        """Says on stderr what is going on, if that is a terminal."""
        if self.quiet or not sys.stderr.isatty():
            yield
            return
        from rich.console import Console

        with Console(stderr=True).status(text):
            yield


def quiet_transformers() -> None:
    """Transformers reports what goes wrong by raising; its notes and progress bars would mix with our output."""
    try:
        from transformers.utils import logging
    except ImportError as error:
        raise UnsupportedError(
            "Transformers is not installed", where="moerunner", next_step="pip install 'moerunner[hf]'"
        ) from error
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def count(given: str | int) -> int:
    """A readable number: 128, 1k = 1000, 1K = 1024, 2m, 2M; the letters mean what they mean in vLLM."""
    text = str(given)  # Typer hands the default through here too
    units = {"k": 10**3, "m": 10**6, "K": 2**10, "M": 2**20}
    digits, unit = (text[:-1], units[text[-1]]) if text[-1:] in units else (text, 1)
    try:
        value = float(digits) * unit
    except ValueError:
        value = math.nan
    if not (value >= 1 and value == int(value)):
        raise typer.BadParameter(f"{text!r} is not a count: give a whole number of at least 1, such as 128 or 1k")
    return int(value)


class Dtype(enum.StrEnum):
    """Number formats to compute in; `auto` is the checkpoint's own."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


def torch_dtype(dtype: Dtype) -> Any:
    """The torch dtype, None for auto."""
    import torch

    return None if dtype is Dtype.auto else getattr(torch, dtype.value)


def torch_device(name: str | None) -> str:
    """A device that exists: the one named, or a GPU if there is one."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # an unknown name, and a torch built without that device
        raise UnsupportedError(
            f"torch has no device {name!r} here", where="--device", next_step="moerunner env lists the devices"
        ) from error
    return str(device)


JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
DtypeOption = Annotated[Dtype, typer.Option("--dtype", help="Compute in this dtype; auto: the checkpoint's.")]
DeviceOption = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1; a GPU if there is one.")]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="Of everything that is drawn at random.")]
