"""Writes the tables of README.md and docs/benchmarks.md from benchmarks/results/*.json, and nothing else: `make numbers`.

Three kinds of files are read. Layers: what `moerunner bench --save` and `python -m moerunner.bench.cpu --save` write, `results`
with shape, tokens, routing, implementation, floor and seconds. Tiles: what `scripts/gpu_bench.py` writes, `cells` with shape,
tokens, floor and the seconds of the best. Whole models: what `scripts/gpu_model.py` writes, `decode` and `prefill` of each
implementation, with the floor. Of each device the newest file that has a shape or a model wins; the date is the file's name.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = {ROOT / "README.md": True, ROOT / "docs" / "benchmarks.md": False}  # True: a few rows only
BEGIN, END = "<!-- numbers: made by `make numbers` -->", "<!-- numbers: end -->"
SHORT_SHAPES, SHORT_TOKENS = ("qwen3-30b", "qwen3-next", "gpt-oss-120b"), (1, 512, 8192)
OURS = ("triton", "cuda", "cpu", "grouped_mm", "eager")  # names of our backends, where a result does not say `ours`
WHOLE = {"generate": "moerunner generate", "patched": "moerunner patch"}  # ours among the implementations of a whole model

Row = dict[str, Any]


def device_of(data: Row) -> str:
    """The GPU, or the CPU with its threads."""
    environment = data["environment"]
    if environment.get("gpus") and not str(data.get("device", "")).startswith("cpu"):
        return str(environment["gpus"][0]["name"])
    cpu = environment.get("cpu")
    return f"{cpu['model']}, {cpu['threads']} threads" if cpu else str(environment["device"])


def versions_of(environment: Row) -> str:
    found = {**environment, **environment.get("versions", {})}
    return ", ".join(f"{name} {found[name]}" for name in ("torch", "triton", "transformers", "vllm") if found.get(name))


def files(folder: Path) -> list[tuple[str, Row]]:
    """Every result, oldest first, with its date."""
    found = [(path.name[:10], json.loads(path.read_text(encoding="utf-8"))) for path in sorted(folder.glob("*.json"))]
    return [(date, data) for date, data in found if isinstance(data, dict)]


def newest(rows_of: Callable[[Row], list[Row]], key: str, folder: Path) -> dict[str, list[Row]]:
    """By device, the rows of the newest file for each value of the key, each row with its date, dtype and versions."""
    kept: dict[tuple[str, Any], list[Row]] = {}
    for date, data in files(folder):
        by_name: dict[tuple[str, Any], list[Row]] = {}
        for row in rows_of(data):
            dtype = row.get("dtype", data.get("dtype", "bfloat16"))
            said = {**row, "date": date, "versions": versions_of(data["environment"]), "dtype": dtype}
            by_name.setdefault((device_of(data), row[key]), []).append(said)
        kept.update(by_name)
    devices: dict[str, list[Row]] = {}
    for (device, _), rows in kept.items():
        devices.setdefault(device, []).extend(rows)
    return devices


def layer_rows(data: Row) -> list[Row]:
    rows = data.get("results")
    return rows if isinstance(rows, list) and rows and "implementation" in rows[0] else []


def step_rows(data: Row) -> list[Row]:
    """A row for each step of each implementation: launched from Python, and another inside a CUDA graph where there is one."""
    found = []
    for part in data.values():
        if not (isinstance(part, dict) and isinstance(part.get("decode"), list)):
            continue
        model = f"{data.get('model', 'Qwen3-30B-A3B')}, {data['layers']} layers"
        for row in part["decode"]:
            place = {"model": model, "place": row["batch"]}
            if row.get("graph"):
                found.append({**row, **place, "what": f"decode, batch {row['batch']} in a CUDA graph"})
                place["place"] += 10**5
            how = ", launched from Python" if row.get("graph") else ""
            found.append({**row, **place, "graph": None, "what": f"decode, batch {row['batch']}{how}"})
        for row in part.get("prefill", ()):
            found.append({**row, "model": model, "what": f"prefill, {row['tokens']:,} tokens", "place": 10**6 + row["tokens"]})
    return found


def seconds_of(row: Row) -> float | None:
    return row.get("graph") or row.get("eager") or row.get("python")


def is_ours(row: Row) -> bool:
    return row["ours"] if "ours" in row else row["implementation"] in OURS


def microseconds(seconds: float) -> str:
    value = seconds * 1e6
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def layers(short: bool, folder: Path, routing: str = "uniform") -> list[str]:
    """A table for each device and dtype: the floor, ours, and the fastest of each other implementation."""
    lines = []
    found = newest(lambda data: [row for row in layer_rows(data) if row["routing"] == routing], "shape", folder)
    what = "Routed experts of one layer" if routing == "uniform" else "Whole layers, from their input to their output"
    how = f"{routing} routing" if routing == "uniform" else "routed by their routers, in a CUDA graph"
    for device, dtype in [(d, t) for d, rows in found.items() for t in sorted({row["dtype"] for row in rows})]:
        rows = [row for row in found[device] if row["dtype"] == dtype and seconds_of(row)]
        if short:
            rows = [row for row in rows if row["shape"] in SHORT_SHAPES and row["tokens"] in SHORT_TOKENS]
        if not rows:
            continue
        peers = sorted({row["implementation"] for row in rows if not is_ours(row)})
        lines += [
            f"{what}, {said_of(rows)}, on one {device}, {how} ({made_of(rows)}). Microseconds:",
            "",
        ]
        lines += [
            f"| layer | tokens | floor | moerunner | of the floor | {' | '.join(peers)} |",
            "|---|---:|---:|---:|---:" + "|---:" * len(peers) + "|",
        ]
        for shape, tokens in dict.fromkeys((row["shape"], row["tokens"]) for row in rows):
            here = [row for row in rows if (row["shape"], row["tokens"]) == (shape, tokens)]
            mine = min((row for row in here if is_ours(row)), key=lambda row: seconds_of(row) or 0, default=None)
            if mine is None:
                continue
            time = seconds_of(mine) or 0.0
            cells = [
                shape,
                f"{tokens:,}",
                microseconds(mine["floor"]),
                f"**{microseconds(time)}**",
                f"{time / mine['floor']:.2f}x",
            ]
            for peer in peers:
                theirs = [seconds_of(row) for row in here if row["implementation"] == peer]
                cells.append(microseconds(theirs[0]) if theirs and theirs[0] else "-")
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return lines


def steps(folder: Path) -> list[str]:
    """A table for each device: whole models, one step of decoding or one prefill."""
    lines = []
    for device, rows in newest(step_rows, "model", folder).items():
        timed = sorted((row for row in rows if seconds_of(row)), key=lambda row: row["place"])
        names = sorted({row["implementation"] for row in timed}, key=lambda name: (name not in WHOLE, name))
        lines += [f"Whole models, {said_of(timed)}, on one {device} ({made_of(timed)}). Milliseconds a step:", ""]
        heads = [WHOLE.get(name, f"Transformers {name}") for name in names]
        lines += [f"| model | step | floor | {' | '.join(heads)} |", "|---|---|---:|" + "---:|" * len(heads)]
        for model, what in dict.fromkeys((row["model"], row["what"]) for row in timed):
            here = {row["implementation"]: row for row in timed if (row["model"], row["what"]) == (model, what)}
            floor = next(iter(here.values()))["floor"]
            times = [f"{(seconds_of(here[name]) or 0) * 1e3:.2f}" if name in here else "-" for name in names]
            lines.append(f"| {' | '.join([model, what, f'{floor * 1e3:.2f}', *times])} |")
        lines.append("")
    return lines


def tiles(folder: Path) -> list[str]:
    """A table for each GPU: the time of the tiles that are taken, by shape and number of tokens, beside the floor."""
    lines = []
    for device, rows in newest(lambda data: data.get("cells", []), "shape", folder).items():
        counts = sorted({row["tokens"] for row in rows})
        cells = {(row["shape"], row["tokens"]): row for row in rows}
        lines += [
            f"Routed experts by the tiles that are taken, {said_of(rows)}, on one {device}, uniform routing, in a CUDA graph "
            f"({made_of(rows)}). Microseconds by number of tokens, and how often the floor that was measured in the same run:",
            "",
            f"| layer | {' | '.join(f'{count:,}' for count in counts)} |",
            "|---|" + "---:|" * len(counts),
        ]
        for shape in dict.fromkeys(row["shape"] for row in rows):
            here = [cells.get((shape, count)) for count in counts]
            said = [
                f"{microseconds(c['best']['seconds'])} ({c['best']['seconds'] / c['floor']:.2f}x)" if c else "-" for c in here
            ]
            lines.append(f"| {shape} | {' | '.join(said)} |")
        lines.append("")
    return lines


def said_of(rows: list[Row]) -> str:
    return ", ".join(sorted({row["dtype"] for row in rows}))


def made_of(rows: list[Row]) -> str:
    """With which versions, and when."""
    return "; ".join([*sorted({row["versions"] for row in rows}), ", ".join(sorted({row["date"] for row in rows}))])


def tables(short: bool, folder: Path = RESULTS) -> str:
    """What stands between the marks."""
    rest = [] if short else [*tiles(folder), *layers(short, folder, "the router's")]
    return "\n".join([BEGIN, "", *layers(short, folder), *rest, *steps(folder), END])


def page(text: str, table: str) -> str:
    """The page with the tables in place of what is between the marks."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"the page has no {BEGIN} ... {END}")
    return head + table + tail


def main() -> None:
    for path, short in PAGES.items():
        text = path.read_text(encoding="utf-8")
        path.write_text(page(text, tables(short)), encoding="utf-8")
        print(f"{path.relative_to(ROOT)}: {'as before' if path.read_text(encoding='utf-8') == text else 'written'}")


if __name__ == "__main__":
    sys.exit(main())
