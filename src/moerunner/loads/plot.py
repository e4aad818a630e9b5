"""Loads as a picture, by matplotlib: a heat map of layers and experts, the imbalance beside it, pairs of experts below."""

from __future__ import annotations

import math
from typing import Any

from moerunner.loads.measure import LayerLoads, Loads

_SHOWN = 4  # layers whose pairs are drawn
_INK, _FAINT, _BAR = "#222222", "#888888", "#4c78a8"


def draw(loads: Loads, suffix: str = ".png") -> bytes:
    """The picture, as the bytes of a file of this kind. A cell of the heat map is 1 where all experts have the same load."""
    import io

    import matplotlib

    matplotlib.use("agg")
    style: Any = {"svg.fonttype": "none", "font.size": 9, "axes.edgecolor": _FAINT, "text.color": _INK, "axes.labelcolor": _INK}
    out = io.BytesIO()
    with matplotlib.rc_context(style):
        figure = _figure(loads)
        figure.savefig(out, format=suffix.lstrip("."), dpi=150)
    return out.getvalue()


def _figure(loads: Loads) -> Any:
    from matplotlib.figure import Figure

    layers = loads.layers
    shown = _spread(layers)
    rows = len(layers)
    heat_height = min(9.0, max(1.6, 0.32 * rows)) + 0.8
    pair_height = 10.5 / max(3, len(shown)) + 0.6
    figure = Figure(figsize=(10.5, heat_height + pair_height), layout="constrained")
    halves: Any = figure.subfigures(2, 1, height_ratios=[heat_height, pair_height])
    top, bottom = halves
    title = f"{loads.model}, {loads.tokens:,} tokens ({loads.sample}): load of each expert, 1 = even"
    top.suptitle(title, fontsize=11, x=0.01, ha="left")
    grid = top.add_gridspec(1, 2, width_ratios=[5, 1])
    _heat(top, top.add_subplot(grid[0]), layers)
    _bars(top.add_subplot(grid[1]), layers)
    bottom.suptitle("Two experts chosen by the same token, against chance", fontsize=11, x=0.01, ha="left")
    axes = list(bottom.subplots(1, max(3, len(shown)), squeeze=False)[0])
    for empty in axes[len(shown) :]:
        empty.set_axis_off()
    named = dict(zip((layer.name for layer in layers), short([layer.name for layer in layers])[0], strict=True))
    _pairs(bottom, axes, {named[layer.name]: layer for layer in shown})
    return figure


def _heat(figure: Any, axes: Any, layers: list[LayerLoads]) -> None:
    most = max(len(layer.load) for layer in layers)
    even = [[n * len(x.load) / max(1, sum(x.load)) for n in x.load] + [math.nan] * (most - len(x.load)) for x in layers]
    image = axes.imshow(even, aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
    axes.set_xlabel("expert")
    axes.xaxis.set_major_locator(_integers())
    names, pattern = short([layer.name for layer in layers])
    axes.set_ylabel(pattern)
    step = -(-len(names) // 32)  # more labels would run into each other
    axes.set_yticks(range(0, len(names), step), names[::step], fontsize=8)
    _spines_off(axes)
    if most * len(layers) <= 400:  # small enough to be read as numbers
        brightest = max(max(row[: len(x.load)]) for row, x in zip(even, layers, strict=True))
        for y, row in enumerate(even):
            for x, value in enumerate(row):
                if not math.isnan(value):
                    ink = "black" if value > 0.6 * brightest else "white"
                    axes.text(x, y, f"{value:.1f}", ha="center", va="center", fontsize=6.5, color=ink)
    figure.colorbar(image, ax=axes, fraction=0.025, pad=0.01)


def _bars(axes: Any, layers: list[LayerLoads]) -> None:
    values = [layer.imbalance for layer in layers]
    axes.barh(range(len(layers)), values, color=_BAR, height=0.7)
    axes.axvline(1, color=_INK, linewidth=0.8)
    axes.set_ylim(len(layers) - 0.5, -0.5)
    axes.set_yticks([])
    axes.set_xlim(0, 1.25 * max(values))
    axes.set_title("busiest / mean", fontsize=10, loc="left")
    if len(layers) <= 32:
        for y, value in enumerate(values):
            axes.text(value, y, f" {value:.1f}", va="center", fontsize=7.5)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _pairs(figure: Any, axes: list[Any], layers: dict[str, LayerLoads]) -> None:
    image = None
    for one, (name, layer) in zip(axes, layers.items(), strict=False):
        size = range(len(layer.load))
        lift = [[math.nan if i == j else math.log2(max(layer.lift(i, j), 2**-3)) for j in size] for i in size]
        image = one.imshow(lift, cmap="RdBu_r", vmin=-3, vmax=3, interpolation="nearest")
        one.set_title(name if "." in name else f"layer {name}", fontsize=9, loc="left")
        one.set_xlabel("expert")
        one.xaxis.set_major_locator(_integers())
        one.yaxis.set_major_locator(_integers())
        _spines_off(one)
    axes[0].set_ylabel("expert")
    bar = figure.colorbar(image, ax=axes, fraction=0.025, pad=0.01, shrink=0.8, ticks=[-3, -2, -1, 0, 1, 2, 3])
    bar.ax.set_yticklabels(["≤ 1/8", "1/4", "1/2", "chance", "2x", "4x", "≥ 8x"], fontsize=7.5)


def _integers() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=8, integer=True)


def _spread(layers: list[LayerLoads]) -> list[LayerLoads]:
    """A few layers, from the first to the last."""
    if len(layers) <= _SHOWN:
        return layers
    return [layers[round(i * (len(layers) - 1) / (_SHOWN - 1))] for i in range(_SHOWN)]


def short(names: list[str]) -> tuple[list[str], str]:
    """Names of layers without the parts that all have in common, and those parts with * for the others."""
    parts = [name.split(".") for name in names]
    if len({len(p) for p in parts}) != 1 or len(names) == 1:
        return names, ""
    differ = [len(set(column)) > 1 for column in zip(*parts, strict=True)]
    left = [".".join(part for part, differs in zip(p, differ, strict=True) if differs) for p in parts]
    return left, ".".join("*" if differs else part for part, differs in zip(parts[0], differ, strict=True))


def _spines_off(axes: Any) -> None:
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
