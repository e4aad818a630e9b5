"""Loads of experts on a terminal: colours where there are some, letters elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from moerunner.cli.shell import Screen

# Viridis, from no load to the busiest expert of the layer.
_COLOURS = ("#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725")


def encoding() -> str:
    """What stdout can write."""
    return (sys.stdout.encoding or "ascii").lower()


def bars(counts: Sequence[int], most_cells: int) -> str:
    """A bar for each expert, the highest for the busiest; for neighbours together, the busier's, if they would not fit."""
    shapes = " ▁▂▃▄▅▆▇█" if encoding().startswith("utf") else " 12345678"
    return "".join(shapes[level] for level in levels(counts, most_cells))


def levels(counts: Sequence[int], most_cells: int) -> list[int]:
    """0 to 8 for each expert, or for each group of neighbours: 0 is no token at all."""
    together = -(-len(counts) // most_cells)
    highest = [max(counts[at : at + together]) for at in range(0, len(counts), together)]
    busiest = max(1, *highest)
    return [-(-8 * count // busiest) for count in highest]


def show_loads(screen: Screen, layers: Sequence[Any]) -> None:
    """A row for each layer: name, counts, and what else it has."""
    if screen.quiet:
        return
    names = [layer.name for layer in layers]
    head = ["layer", "load", "busiest", "idlest", "busiest / mean"]
    numbers = [
        [f"{max(x.load) / max(1, sum(x.load)):.1%}", f"{min(x.load) / max(1, sum(x.load)):.1%}", f"{x.imbalance:.2f}"]
        for x in layers
    ]
    if not screen.drawing:
        drawn = [bars(layer.load, 128) for layer in layers]
        screen.table(head, [[n, d, *rest] for n, d, rest in zip(names, drawn, numbers, strict=True)])
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(markup=False, highlight=False)
    room = max(16, console.width - max(map(len, names)) - 36)
    table = Table(*head, box=box.SIMPLE_HEAD, pad_edge=False)
    table.columns[0].overflow = "fold"
    for column in table.columns[2:]:
        column.justify, column.no_wrap = "right", True
    for name, layer, rest in zip(names, layers, numbers, strict=True):
        cells = levels(layer.load, room)
        wide = max(1, min(3, room // len(cells)))
        heat = Text(no_wrap=True)
        for level in cells:
            heat.append(" " * wide, style=f"on {_COLOURS[level]}")
        table.add_row(name, heat, *rest)
    console.print(table)
    legend = Text("none ")
    for colour in _COLOURS:
        legend.append("  ", style=f"on {colour}")
    console.print(legend.append(" the busiest expert of the layer"))
