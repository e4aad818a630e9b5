"""`moerunner inspect`: what a model folder holds and how it would run, without loading a weight."""

from __future__ import annotations

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
    ep: Annotated[int, typer.Option(parser=count, metavar="N", help="Ranks that the experts are split over.")] = 1,
    tp: Annotated[int, typer.Option(parser=count, metavar="N", help="Ranks that each expert's width is split over.")] = 1,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = None,
    explain: Annotated[bool, typer.Option("--explain", help="Print the whole plan of each kind of layer.")] = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> Answer:
    """Show a model's MoE layers: routing, experts, memory per rank, kernels and why. No weight is loaded."""
    quiet_transformers()
    from moerunner.models.inspection import inspect
    from moerunner.parallel import Layout

    screen = Screen(quiet=json)
    found = inspect(path, layout=Layout(ep=ep, tp=tp), dtype=torch_dtype(dtype), device=torch_device(device))
    show(screen, found)
    for kind in found.kinds:
        show_kind(screen, kind, found.layout)
        if explain:
            screen.say(f"\n{kind.plan.explain()}")
    if found.left_alone:
        screen.heading("Left as they are, with Transformers' own code")
        for name, reason in found.left_alone.items():
            screen.say(f"{name}: {reason}")
    return Answer({"ok": True, **found.to_dict()})


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
        rows["each rank"] = f"{held} with ep {layout.ep} x tp {layout.tp}"
    rows["kernel"] = f"{step.kernel}: {step.reason}"
    if step.few[0]:
        rows["kernel"] += f"; {step.few[1]} up to {step.few[0]} token{'s' * (step.few[0] > 1)}"
    screen.heading(f"{kind.name}, {kind.layers} {'layer' if kind.layers == 1 else 'layers'}")
    width = max(map(len, rows))
    for name, text in rows.items():
        if text:
            screen.say(f"  {name:<{width}}  {text}")
    for name, reason in step.refused:
        screen.say(f"  {'':<{width}}  not {name}: {reason}")


def many(number: int) -> str:
    """1.5 million."""
    for size, word in ((10**9, "billion"), (10**6, "million")):
        if number >= size:
            return f"{number / size:.1f} {word}"
    return f"{number:,}"
