"""`moerunner bench`: time beside the floor and beside what else is installed."""

from __future__ import annotations

import json as jsonlib
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

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
)
from moerunner.cli.shell import verb as verb_of
from moerunner.errors import SpecError


@verb_of
def run(
    shapes: Annotated[str | None, typer.Option(help="Names such as qwen3-30b,olmoe; all known ones on a GPU.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Numbers of tokens, such as 1,8,2k.")] = None,
    routing: Annotated[
        str, typer.Option(help="uniform, zipf, half (one expert is half the tokens' choice), or several.")
    ] = "uniform",
    only: Annotated[str | None, typer.Option(help="Implementations by name, such as triton,vllm.")] = None,
    bandwidth: Annotated[float | None, typer.Option(min=1e-6, help="GB/s of the memory; measured if not given.")] = None,
    tflops: Annotated[float | None, typer.Option(min=1e-6, help="Of large products; measured if not given.")] = None,
    seconds: Annotated[float | None, typer.Option(min=0.0, help="Begin nothing new after so many seconds.")] = None,
    save: Annotated[Path | None, typer.Option(help="JSON file, written after every measurement.")] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG file of time against tokens; a CSV file is written beside it.")] = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = None,
    seed: SeedOption = 0,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> Answer:
    """Time the routed experts, from top-k ids to their sum, beside the floor and beside other implementations.

    A result that is wrong against float64 is not timed. On a CPU one small shape is the default.
    """
    started = time.monotonic()
    device = torch_device(device)
    import torch

    from moerunner import bench
    from moerunner.bench import output
    from moerunner.bench import shapes as known
    from moerunner.env import collect

    on_gpu = torch.device(device).type == "cuda"
    names = _names(shapes, known.GPU_SHAPES if on_gpu else known.CPU_SHAPES, known.SHAPES, "--shapes")
    routings = _names(routing, [], bench.ROUTINGS, "--routing")
    counts = [count(t) for t in tokens.split(",")] if tokens else known.GPU_TOKENS if on_gpu else known.CPU_TOKENS
    number = torch_dtype(dtype) or (torch.bfloat16 if on_gpu else torch.float32)
    screen = Screen(quiet=json)
    facts: dict[str, Any] = collect()
    facts["versions"] |= bench.versions()
    given = bandwidth is not None and tflops is not None
    with screen.progress("measuring the floor"):
        peaks = bench.Peaks(1.0, 1.0) if given else bench.measure_peaks(device, number)
    peaks = bench.Peaks(
        peaks.bytes_per_second if bandwidth is None else bandwidth * 1e9, peaks.flops if tflops is None else tflops * 1e12
    )
    results: list[Any] = []
    absent: dict[str, str] = {}
    left_out: list[str] = []

    def found() -> dict[str, Any]:
        wrong = [m for m in results if m.ours and m.problem.startswith("wrong")]
        return {
            "ok": not wrong,
            "environment": facts,
            "device": device,
            "dtype": str(number).removeprefix("torch."),
            "peaks": {"bytes_per_second": peaks.bytes_per_second, "flops": peaks.flops, "measured": not given},
            "absent": absent,
            "left_out": left_out,
            "results": [m.to_dict() for m in results],
        }

    screen.say(
        f"{_device(facts)}, {found()['dtype']}: {peaks.bytes_per_second / 1e9:.0f} GB/s, {peaks.flops / 1e12:.1f} TFLOP/s"
    )
    for name in names:
        for way in routings:

            def in_time(label: str = f"{name} {way}") -> Iterable[int]:
                for cell in counts:
                    if seconds is not None and time.monotonic() - started > seconds:
                        left_out.append(f"{label} {cell}")
                    else:
                        yield cell

            mine: list[Any] = []
            asked = None if only is None else only.split(",")
            with screen.progress(f"{name}, {way} routing"):
                for cell in bench.measure(
                    name, known.SHAPES[name], in_time(), peaks=peaks, routing=way, dtype=number, device=device, only=asked,
                    seed=seed, absent=absent,
                ):  # fmt: skip
                    mine += cell
                    results += cell
                    if save is not None:
                        save.write_text(jsonlib.dumps(found(), indent=1) + "\n")
            if mine:
                _show(screen, f"{name}, {way} routing", mine)
    screen.say()
    for name, why in absent.items():
        screen.say(f"not timed: {name}: {why}")
    for what in left_out:
        screen.say(f"left out for lack of time: {what}")
    if only is not None and not results:
        raise SpecError(f"none of {only} runs here", where="--only", next_step=f"Known: {', '.join(absent)}")
    if plot is not None and results:
        output.write_plot(plot, results, f"Routed experts, {found()['dtype']}, {_device(facts)}")
        output.write_csv(plot.with_suffix(".csv"), results)
        screen.say(f"written: {plot} and {plot.with_suffix('.csv')}")
    return Answer(found(), OK if found()["ok"] else MISMATCH)


def _names(text: str | None, default: list[str], known: Iterable[str], where: str) -> list[str]:
    names = default if text is None else text.split(",")
    unknown = [n for n in names if n not in known]
    if unknown:
        raise SpecError(f"does not know {', '.join(unknown)}", where=where, next_step=f"Known: {', '.join(known)}")
    return names


def _device(facts: dict[str, Any]) -> str:
    return facts["gpus"][0]["name"] if facts["gpus"] else f"{facts['cpu']['model']}, {facts['cpu']['threads']} threads"


def _show(screen: Screen, title: str, measured: list[Any]) -> None:
    """Implementations down, tokens across: microseconds, and how many times the floor."""
    tokens = list(dict.fromkeys(m.tokens for m in measured))
    floors = {m.tokens: m.floor for m in measured}
    ways = [("in a CUDA graph", "graph"), ("launched from Python", "eager")]
    for words, field in ways:
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
