"""Writes the tables of README.md and docs/benchmarks.md from benchmarks/results/*.json, and nothing else: `make numbers`.

Two kinds of files are read. Layers: what `moerunner bench --save` writes, `results` with shape, tokens, routing,
implementation, floor and seconds. Whole models: `steps` with model, what, implementation, seconds and, where it is known,
floor. Of each device the newest file that has a shape or a model wins; the date is the file's name.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = {ROOT / "README.md": True, ROOT / "docs" / "benchmarks.md": False}  # True: a few rows only
BEGIN, END = "<!-- numbers: made by `make numbers` -->", "<!-- numbers: end -->"
SHORT_SHAPES, SHORT_TOKENS = ("qwen3-30b", "qwen3-next", "gpt-oss-120b"), (1, 512, 8192)
OURS = ("triton", "cuda", "cpu", "grouped_mm", "eager")  # names of our backends, where a result does not say `ours`

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


def files(kind: str, folder: Path) -> list[tuple[str, Row]]:
    """Files that have such a list, oldest first, with their dates."""
    found = []
    for path in sorted(folder.glob("*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        rows = data.get(kind) if isinstance(data, dict) else None
        if isinstance(rows, list) and rows and "implementation" in rows[0]:
            found.append((path.name[:10], data))
    return found


def newest(kind: str, keys: tuple[str, ...], folder: Path) -> dict[str, list[Row]]:
    """By device, the rows of the newest file for each value of the first key, each row with its date and versions."""
    kept: dict[tuple[str, Any], list[Row]] = {}
    for date, data in files(kind, folder):
        by_name: dict[tuple[str, Any], list[Row]] = {}
        for row in data[kind]:
            said = {**row, "date": date, "versions": versions_of(data["environment"]), "dtype": data.get("dtype", "bfloat16")}
            by_name.setdefault((device_of(data), row[keys[0]]), []).append(said)
        kept.update(by_name)
    devices: dict[str, list[Row]] = {}
    for (device, _), rows in kept.items():
        devices.setdefault(device, []).extend(rows)
    return devices


def seconds_of(row: Row) -> float | None:
    return row.get("graph") or row.get("eager")


def is_ours(row: Row) -> bool:
    return row["ours"] if "ours" in row else row["implementation"] in OURS


def microseconds(seconds: float) -> str:
    value = seconds * 1e6
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def layers(short: bool, folder: Path) -> list[str]:
    """A table for each device: the floor, ours, and the fastest of each other implementation."""
    lines = []
    for device, rows in newest("results", ("shape", "tokens"), folder).items():
        rows = [row for row in rows if row["routing"] == "uniform" and seconds_of(row)]
        if short:
            rows = [row for row in rows if row["shape"] in SHORT_SHAPES and row["tokens"] in SHORT_TOKENS]
        if not rows:
            continue
        peers = sorted({row["implementation"] for row in rows if not is_ours(row)})
        dates = ", ".join(sorted({row["date"] for row in rows}))
        dtypes, made = ", ".join(sorted({row["dtype"] for row in rows})), "; ".join(sorted({row["versions"] for row in rows}))
        lines += [
            f"Routed experts of one layer, {dtypes}, on one {device}, uniform routing ({made}; {dates}). Microseconds:",
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
    for device, rows in newest("steps", ("model", "what"), folder).items():
        names = list(dict.fromkeys(row["implementation"] for row in rows))
        floors = any(row.get("floor") for row in rows)
        dates, made = ", ".join(sorted({r["date"] for r in rows})), "; ".join(sorted({r["versions"] for r in rows}))
        dtypes = ", ".join(sorted({r["dtype"] for r in rows}))
        lines += [f"Whole models, {dtypes}, on one {device} ({made}; {dates}). Milliseconds a step:", ""]
        lines += [
            f"| model | step |{' floor |' * floors} {' | '.join(names)} |",
            "|---|---|" + "---:|" * floors + "---:|" * len(names),
        ]
        for model, what in dict.fromkeys((row["model"], row["what"]) for row in rows):
            here = {row["implementation"]: row for row in rows if (row["model"], row["what"]) == (model, what)}
            floor = next((row["floor"] for row in here.values() if row.get("floor")), None)
            times = [f"{here[name]['seconds'] * 1e3:.1f}" if name in here else "-" for name in names]
            cells = [model, what, *([f"{floor * 1e3:.1f}" if floor else "-"] * floors), *times]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return lines


def tables(short: bool, folder: Path = RESULTS) -> str:
    """What stands between the marks."""
    return "\n".join([BEGIN, "", *layers(short, folder), *steps(folder), END])


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
