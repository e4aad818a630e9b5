"""What becomes of measurements: rows of a CSV file, and a picture of time against tokens with the floor."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from moerunner.bench.experts import Measured


def csv_of(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each row, below the names of all fields."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def draw(results: Sequence[Measured], title: str, suffix: str = ".png") -> bytes:
    """The picture, as the bytes of a file of this kind: a panel per shape and routing, both axes logarithmic; the floor is
    the dashed line below which nothing can be."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    panels = list(dict.fromkeys((m.shape, m.routing) for m in results))
    names = sorted(dict.fromkeys(m.implementation for m in results), key=lambda n: [not _ours(n, results), n])
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(lines, columns, figsize=(max(7.5, 5.6 * columns), 3.8 * lines + 1.2), squeeze=False)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    colours = {name: f"C{i % 10}" for i, name in enumerate(names)}
    for ax, (shape, routing) in zip(axes.flat, panels, strict=False):
        here = [m for m in results if (m.shape, m.routing) == (shape, routing)]
        floor = {m.tokens: m.floor * 1e6 for m in here}
        ax.plot(list(floor), list(floor.values()), "k--", linewidth=1.2, label="floor")
        for name in names:
            points = [(m.tokens, m.seconds * 1e6) for m in here if m.implementation == name and m.seconds is not None]
            if points:
                ours = _ours(name, results)
                style = dict(linewidth=2.2 if ours else 1.2, marker="o" if ours else "s", markersize=5 if ours else 3.5)
                ax.plot(*zip(*points, strict=True), color=colours[name], label=name, zorder=3 if ours else 2, **style)
        ax.set(xscale="log", yscale="log", title=f"{shape}, {routing} routing", xlabel="tokens", ylabel="microseconds")
        ax.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
        ax.yaxis.set_major_formatter(ticker.FuncFormatter(lambda x, _: f"{x:,.0f}" if x >= 1 else f"{x:g}"))
        ax.set_xticks(list(floor), [f"{t:,}" for t in floor], rotation=30)
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    handles = {label: h for ax in axes.flat for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.suptitle(title)
    figure.legend(handles.values(), handles, loc="lower center", ncols=2 * columns, frameon=False)
    rows = -(-len(handles) // (2 * columns))
    figure.tight_layout(rect=(0, (0.15 + 0.23 * rows) / figure.get_figheight(), 1, 1 - 0.3 / figure.get_figheight()))
    out = io.BytesIO()
    figure.savefig(out, format=suffix.lstrip("."), dpi=130)
    pyplot.close(figure)
    return out.getvalue()


def _ours(name: str, results: Sequence[Measured]) -> bool:
    return any(m.ours for m in results if m.implementation == name)
