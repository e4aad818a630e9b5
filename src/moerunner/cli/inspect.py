"""`moerunner inspect`: what a model folder holds and how it would run, without loading a weight."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import typer

from moerunner.cli.shell import (
    Answer,
    DebugOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    JsonOption,
    Screen,
    count,
    quiet_transformers,
    torch_device,
    torch_dtype,
    verb,
)


@verb
def run(
    path: Annotated[str, typer.Argument(help="Folder of a model: config.json, and safetensors if they are there.")],
    ep: Annotated[int | None, typer.Option(parser=count, metavar="N", help="Ranks that the experts are split over.")] = None,
    tp: Annotated[
        int | None, typer.Option(parser=count, metavar="N", help="Ranks that each expert's width is split over.")
    ] = None,
    dp: Annotated[int | None, typer.Option(parser=count, metavar="N", help="Copies of the whole.")] = None,
    layout: Annotated[
        str | None, typer.Option(metavar="FIELDS", help="All fields of Layout, such as ep=4,tp=2,redundant=8.")
    ] = None,
    skew: Annotated[float, typer.Option(min=0.0, help="Loads of experts fall as 1 / rank ** skew; 0 is even.")] = 0.0,
    trace: Annotated[str | None, typer.Option(help="JSON file of measured loads (route --json), in place of a skew.")] = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = None,
    explain: Annotated[bool, typer.Option("--explain", help="Print the whole plan of each kind of layer.")] = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> Answer:
    """Show a model's MoE layers: routing, kernels and why, each rank's memory and expected load. No weight is loaded."""
    sizes: dict[str, Any] = {name: size for name, size in (("dp", dp), ("ep", ep), ("tp", tp)) if size is not None}
    if layout is not None and sizes:
        raise typer.BadParameter(f"give either --layout or {', '.join(f'--{name}' for name in sizes)}")
    if trace is not None and skew:
        raise typer.BadParameter("give either --skew or --trace")
    quiet_transformers()
    from moerunner.models.expected import layer_loads, layout_of, loads_of, ranks_of, read_trace
    from moerunner.models.inspection import inspect
    from moerunner.parallel import Layout

    screen = Screen(quiet=json)
    asked = Layout(**sizes) if layout is None else layout_of(layout)
    found = inspect(path, layout=asked, dtype=torch_dtype(dtype), device=torch_device(device))
    loads = loads_of(found, skew=skew, trace=None if trace is None else read_trace(trace))
    layers = layer_loads(found, loads)
    ranks = ranks_of(found, layers)
    show(screen, found)
    if screen.drawing:
        draw(found)
    for kind in found.kinds:
        if not screen.drawing:
            show_kind(screen, kind, found.layout)
        if explain:
            screen.say(f"\n{kind.plan.explain()}")
    source = trace or (f"skew {skew:g}" if skew else "even routing")
    if layers and asked.world > 1:
        show_ranks(screen, found, layers, ranks, source)
    if found.left_alone:
        screen.heading("Left as they are, with Transformers' own code")
        for name, reason in found.left_alone.items():
            screen.say(f"{name}: {reason}")
    expected = {"source": source, "layers": [dataclasses.asdict(layer) | {"busiest": layer.busiest} for layer in layers]}
    return Answer({"ok": True, **found.to_dict(), "load": expected, "ranks": [dataclasses.asdict(rank) for rank in ranks]})


def show(screen: Screen, found: Any) -> None:
    """The model as a whole."""
    from moerunner.models.inspection import bytes_in_words as size
    from moerunner.models.inspection import ranges

    screen.say(f"{found.model_type}, {found.architecture}, {found.dtype} ({found.dtype_from})")
    screen.say(f"{many(found.parameters)} weights, {many(found.active)} at work on a token, {size(found.size)}")
    for stack in found.stacks:
        screen.say(f"MoE in {len(stack.moe)} of the {stack.layers} layers of {stack.name}: {ranges(stack.moe)}")
    if not found.kinds and not found.left_alone:
        screen.say(f"{found.layers} layers, and no MoE block: moerunner has nothing to run here")
    if found.kinds and found.layout.world > 1:
        screen.say(f"MoE weights: {size(found.moe)}, of which each of {found.layout.world} ranks holds {size(found.moe_rank)}")
        screen.say(f"everything else: {size(found.size - found.moe)}, which moerunner does not split")
    for note in found.notes:
        screen.say(f"note: {note}")


def show_kind(screen: Screen, kind: Any, layout: Any) -> None:
    """One kind of MoE layer."""
    rows = facts(kind, layout)
    screen.heading(title(kind))
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        screen.say(f"  {name:<{width}}  {text}")


def show_ranks(screen: Screen, found: Any, layers: Any, ranks: Any, source: str) -> None:
    """What each rank holds and has to do; ranks that have the same experts are one line."""
    from moerunner.models.inspection import bytes_in_words as size
    from moerunner.models.inspection import ranges

    screen.heading(f"Expected load ({source}), 1 is the mean")
    alike: dict[int, list[Any]] = {}
    for rank in ranks:
        alike.setdefault(rank.ep, []).append(rank)
    rows, differ = [], len({tuple(layer.per_ep) for layer in layers}) > 1
    for ep, those in alike.items():
        held = {ranges(sorted({e for e in kind.slots[ep] if e >= 0})) for kind in found.kinds}
        highest = max(layers, key=lambda layer: layer.per_ep[ep])
        worst = f"{those[0].most:.2f} in {highest.name}" if differ else ""
        rows.append(
            [ranges([r.rank for r in those]), "; ".join(sorted(held)), size(those[0].size), f"{those[0].load:.2f}", worst]
        )
    screen.table(("rank", "experts", "model", "load", "highest" if differ else ""), rows)
    busiest = sum(layer.busiest for layer in layers) / len(layers)
    placed = sum(layer.placed for layer in layers) / len(layers)
    screen.say(
        f"busiest rank, on average over the layers: {busiest:.2f}; with experts placed by load (rebalance): {placed:.2f}"
    )


def draw(found: Any) -> None:
    """The model as a tree: its stacks with a square for each layer, and each kind of MoE layer with its memory as a bar."""
    from rich.console import Console, Group
    from rich.table import Table
    from rich.text import Text
    from rich.tree import Tree

    from moerunner.models.inspection import bytes_in_words as size

    tree = Tree(Text(found.architecture, style="bold"), guide_style="dim")
    for stack in found.stacks:
        line = Text(f"{stack.name}  ")
        for index in range(stack.layers):
            moe = index in stack.moe
            line.append("■" if moe else "□", style=_COLOURS["routed"] if moe else "dim")
        tree.add(line.append("  ■ MoE  □ other", style="dim"))
    for kind in found.kinds:
        table = Table.grid(padding=(0, 2))
        table.add_column(style="dim")
        for name, text in facts(kind, found.layout):
            table.add_row(name, Text(text))
        parts, total = kind.memory.to_dict(), kind.memory.total
        bar, legend = Text(), Text()
        for name, colour in _COLOURS.items():
            if parts[name]:
                bar.append("█" * max(1, round(60 * parts[name] / total)), style=colour)
                legend.append(f"█ {name} {size(parts[name])}  ", style=colour)
        tree.add(Text(title(kind), style="bold")).add(Group(table, bar, legend))
    Console(markup=False, highlight=False).print(tree)


_COLOURS = {"routed": "cyan", "shared": "green", "router": "yellow", "transforms": "magenta"}


def title(kind: Any) -> str:
    return f"{kind.name}, {kind.layers} {'layer' if kind.layers == 1 else 'layers'}"


def facts(kind: Any, layout: Any) -> list[tuple[str, str]]:
    """What is worth knowing about one kind of MoE layer, a line each."""
    from moerunner.models.inspection import bytes_in_words as size

    data = kind.to_dict()
    said, memory, step = data["words"], kind.memory, kind.plan.step("experts")
    parts = {"routed": memory.routed, "shared": memory.shared, "router": memory.router, "transforms": memory.transforms}
    rows = {
        "family": f"{kind.family}, {kind.block.rpartition('.')[2]}",
        **{name: said[name] for name in ("experts", "routing", "shared", "activation", "factor")},
        "also": ", ".join(said["specials"]),
        **said["transforms"],
        "weights": f"{kind.dtype}, {many(kind.parameters)} a layer, {many(kind.active)} at work on a token",
        "memory": ", ".join(f"{name} {size(value)}" for name, value in parts.items() if value),
        "": f"{size(memory.total)} a layer, {size(kind.layers * memory.total)} in all",
    }
    if layout.world > 1:
        held = f"{size(kind.rank.total)} a layer, {size(kind.layers * kind.rank.total)} in all"
        rows["each rank"] = f"{held} with dp {layout.dp} x ep {layout.ep} x tp {layout.tp}"
    rows["kernel"] = f"{step.kernel}: {step.reason}"
    if step.few[0]:
        rows["kernel"] += f"; {step.few[1]} up to {step.few[0]} token{'s' * (step.few[0] > 1)}"
    return [(name, text) for name, text in rows.items() if text] + [("", f"not {n}: {why}") for n, why in step.refused]


def many(number: int) -> str:
    """1.5 million."""
    for size, word in ((10**9, "billion"), (10**6, "million")):
        if number >= size:
            return f"{number / size:.1f} {word}"
    return f"{number:,}"
