"""`moerunner bench`: time beside the floor and beside what else is installed."""

from __future__ import annotations

import json as jsonlib
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from moerunner.cli import files
from moerunner.cli.shell import (
    MISMATCH,
    OK,
    Answer,
    DebugOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    JsonOption,
    Screen,
    SeedOption,
    count,
    torch_device,
    torch_dtype,
    verb,
)
from moerunner.errors import SpecError


@verb
def run(
    layer: Annotated[bool, typer.Option("--layer", help="Whole MoE layers, in place of the routed experts alone.")] = False,
    model: Annotated[
        str | None, typer.Option(help="A whole model, in place of layers: a folder, or a name such as qwen3-30b-a3b.")
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Of --model: only the first so many, with random weights.")] = None,
    batches: Annotated[str, typer.Option(help="Of --model: rows of a decode step.")] = "1,32",
    prompts: Annotated[str, typer.Option(help="Of --model: tokens of a prefill.")] = "2k,8k",
    shapes: Annotated[str | None, typer.Option(help="Names such as qwen3-30b,olmoe; all that are known, on a GPU.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Numbers of tokens, such as 1,8,2k.")] = None,
    routing: Annotated[
        str, typer.Option(help="uniform, zipf, half (half the tokens choose one expert), or several.")
    ] = "uniform",
    only: Annotated[str | None, typer.Option(help="Implementations by name, such as triton,vllm.")] = None,
    bandwidth: Annotated[float | None, typer.Option(min=1e-6, help="GB/s of the memory; measured if not given.")] = None,
    tflops: Annotated[float | None, typer.Option(min=1e-6, help="Of large products; measured if not given.")] = None,
    seconds: Annotated[float | None, typer.Option(min=0.0, help="Begin no measurement after so many seconds.")] = None,
    save: Annotated[Path | None, typer.Option(help="JSON file, written after every measurement.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw into this .png, .svg or .pdf, with a .csv beside it.")] = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = None,
    seed: SeedOption = 0,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> Answer:
    """Time the routed experts, from top-k ids to their sum, beside the floor and beside other implementations.

    A result that is wrong against float64 is not timed. On a CPU one small shape is the default. The dtype is bfloat16 on a
    GPU and float32 on a CPU unless another is given.
    """
    deadline = None if seconds is None else time.monotonic() + seconds
    save, plot = save and files.to_write(save), plot and files.picture(plot)
    device = torch_device(device)
    counts = None if tokens is None else [count(t) for t in tokens.split(",")]
    import torch

    from moerunner import bench
    from moerunner.bench import output
    from moerunner.bench import shapes as known

    on_gpu = torch.device(device).type == "cuda"
    default = known.GPU_SHAPES if on_gpu else known.CPU_SHAPES
    names = _names(
        shapes, [n for n in default if n in bench.LAYERS or not layer], bench.LAYERS if layer else known.SHAPES, "--shapes"
    )
    ways: list[Any] = ["the router's"] if layer else _names(routing, [], bench.ROUTINGS, "--routing")
    number = torch_dtype(dtype) or (torch.bfloat16 if on_gpu else torch.float32)
    screen = Screen(quiet=json)
    with screen.progress("measuring the floor"):
        peaks = _peaks(bandwidth, tflops, device, number)
    if model is not None:
        sizes = [[count(n) for n in text.split(",")] for text in (batches, prompts)]
        how = dict(dtype=number, device=device, peaks=peaks, layers=layers, implementations=only and only.split(","))
        limit = {} if seconds is None else {"seconds": seconds}
        return _whole(screen, model, save, plot, batches=sizes[0], prompts=sizes[1], **how, **limit)
    session = Session(str(number).removeprefix("torch."), device, peaks, bandwidth is None or tflops is None, save)
    screen.say(session.title)
    asked = None if only is None else only.split(",")
    rest = dict(peaks=peaks, dtype=number, device=device, only=asked, seed=seed)
    for name in names:
        for way in ways:
            label = f"{name}, {way} routing"
            some = session.in_time(counts or (known.GPU_TOKENS if on_gpu else known.CPU_TOKENS), label, deadline)
            with screen.progress(label):
                if layer:
                    mine = session.take(bench.measure_layer(name, some, **rest))
                else:
                    mine = session.take(
                        bench.measure(name, known.SHAPES[name], some, routing=way, absent=session.absent, **rest)
                    )
            if mine:
                _show(screen, label, mine)
    screen.say()
    for name, why in session.absent.items():
        screen.say(f"not timed: {name}: {why}")
    for what in session.left_out:
        screen.say(f"left out for lack of time: {what}")
    if only is not None and not session.results and not session.left_out:
        raise SpecError(f"none of {only} runs here", where="--only", next_step="Run without it to see who does")
    if plot is not None and session.results:
        what = "MoE layers" if layer else "Routed experts"
        files.write(plot, output.draw(session.results, f"{what}\n{session.title}", plot.suffix.lower()))
        files.write(plot.with_suffix(".csv"), output.csv_of([m.to_dict() for m in session.results]))
        screen.say(f"written: {plot} and {plot.with_suffix('.csv')}")
    found = session.found()
    return Answer(found, OK if found["ok"] else MISMATCH)


def _whole(screen: Screen, name: str, save: Path | None, plot: Path | None, **how: Any) -> Answer:
    """The benchmark of a whole model: printed, saved and drawn."""
    from moerunner.bench import model, output
    from moerunner.env import collect

    with screen.progress(f"{name}: decode and prefill"):
        found = {"ok": True, "environment": collect()} | model.measure(name, **how)
    for what, size in (("decode", "batch"), ("prefill", "tokens")):
        rows = [
            [row["implementation"], str(row[size]), *(_ms(row.get(way)) for way in ("python", "graph")), _ms(row["floor"])]
            for row in found[what]
            if size in row
        ]
        screen.heading(f"{what}, {found['layers']} layers, {found['dtype']}: ms")
        screen.table(["", size, "from Python", "CUDA graph", "floor"], rows)
        for row in found[what]:
            if row.get("note"):
                screen.say(f"{row['implementation']}, {what} {row.get(size, '')}: {row['note']}")
    if save is not None:
        files.write(save, jsonlib.dumps(found, indent=1) + "\n")
    if plot is not None:
        files.write(plot, model.draw(found, plot.suffix.lower()))
        files.write(plot.with_suffix(".csv"), output.csv_of(model.rows(found)))
        screen.say(f"written: {plot} and {plot.with_suffix('.csv')}")
    return Answer(found, OK)


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.2f}"


class Session:
    """What was measured so far, and where. absent: who cannot run and why; left_out: what there was no time for."""

    def __init__(self, dtype: str, device: str, peaks: Any, measured: bool, save: Path | None) -> None:
        from moerunner import bench
        from moerunner.env import collect

        self.results: list[Any] = []
        self.absent: dict[str, str] = {}
        self.left_out: list[str] = []
        self._dtype, self._device, self._peaks, self._measured, self._save = dtype, device, peaks, measured, save
        self._environment = collect()
        self._environment["versions"] |= bench.versions()

    @property
    def title(self) -> str:
        gpus, cpu = self._environment["gpus"], self._environment["cpu"]
        name = gpus[0]["name"] if gpus and self._device != "cpu" else f"{cpu['model']}, {cpu['threads']} threads"
        peaks = f"{self._peaks.bytes_per_second / 1e9:.0f} GB/s, {self._peaks.flops / 1e12:.4g} TFLOP/s"
        return f"{self._dtype}, {name}: {peaks} {'measured' if self._measured else 'given'}"

    def in_time(self, tokens: Iterable[int], label: str, deadline: float | None) -> Iterator[int]:
        for n in tokens:
            if deadline is not None and time.monotonic() > deadline:
                self.left_out.append(f"{label}, {n} tokens")
            else:
                yield n

    def take(self, cells: Iterable[list[Any]]) -> list[Any]:
        """Measures, keeping and saving what is there after each cell."""
        mine: list[Any] = []
        for cell in cells:
            mine += cell
            self.results += cell
            if self._save is not None:
                files.write(self._save, jsonlib.dumps(self.found(), indent=1) + "\n")
        return mine

    def found(self) -> dict[str, Any]:
        return {
            "ok": not any(m.ours and m.problem.startswith("wrong") for m in self.results),
            "environment": self._environment,
            "device": self._device,
            "dtype": self._dtype,
            "peaks": {
                "bytes_per_second": self._peaks.bytes_per_second, "flops": self._peaks.flops, "measured": self._measured,
            },
            "absent": self.absent,
            "left_out": self.left_out,
            "results": [m.to_dict() for m in self.results],
        }  # fmt: skip


def _peaks(bandwidth: float | None, tflops: float | None, device: str, dtype: Any) -> Any:
    """GB/s and TFLOP/s as given; what is not given is measured."""
    from moerunner.bench import Peaks, measure_peaks

    if bandwidth is not None and tflops is not None:
        return Peaks(bandwidth * 1e9, tflops * 1e12)
    found = measure_peaks(device, dtype)
    return Peaks(
        found.bytes_per_second if bandwidth is None else bandwidth * 1e9, found.flops if tflops is None else tflops * 1e12
    )


def _names(text: str | None, default: list[str], known: Iterable[str], where: str) -> list[str]:
    names = default if text is None else text.split(",")
    unknown = [n for n in names if n not in known]
    if unknown:
        raise SpecError(f"does not know {', '.join(unknown)}", where=where, next_step=f"Known: {', '.join(known)}")
    return names


def _show(screen: Screen, title: str, measured: list[Any]) -> None:
    """Implementations down, tokens across: microseconds, and how many times the floor."""
    tokens = list(dict.fromkeys(m.tokens for m in measured))
    floors = {m.tokens: m.floor for m in measured}
    for words, field in (("in a CUDA graph", "graph"), ("launched from Python", "eager")):
        if all(getattr(m, field) is None for m in measured):
            continue
        screen.heading(f"{title}, {words}: us, x floor")
        rows = [["floor", *(f"{floors[t] * 1e6:.1f}" for t in tokens)]]
        for name in dict.fromkeys(m.implementation for m in measured):
            cells = {m.tokens: m for m in measured if m.implementation == name}
            rows.append([name, *(_cell(cells[t], field) for t in tokens)])
        screen.table(["tokens", *map(str, tokens)], rows)
    for m in measured:
        if m.problem:
            screen.say(f"{m.implementation}, {m.tokens} tokens: {m.problem}")


def _cell(m: Any, field: str) -> str:
    value = getattr(m, field)
    return "-" if value is None else f"{value * 1e6:.1f} {value / m.floor:.2f}x"
