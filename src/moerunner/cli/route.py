"""`moerunner route`: where the tokens of a text go."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Annotated, Any

import typer

from moerunner.cli import files
from moerunner.cli.drawing import show_loads
from moerunner.cli.generate import load_tokenizer, refuse_without_a_block
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
from moerunner.errors import SpecError


@verb
def run(
    path: Annotated[str, typer.Argument(help="Folder of a model: config.json, safetensors, tokenizer.")],
    text: Annotated[str | None, typer.Option(help="File to read, - for stdin; by default moerunner's own source.")] = None,
    plot: Annotated[
        str | None, typer.Option(help="Draw into this .png, .svg or .pdf, and put two .csv with its name beside it.")
    ] = None,
    tokens: Annotated[int, typer.Option(parser=count, metavar="N", help="At most so many tokens; 1k works.")] = 4096,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = None,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> Answer:
    """Show how the experts of each layer share the tokens of a text: load, imbalance, and experts chosen together."""
    quiet_transformers()
    from moerunner.loads import measure
    from moerunner.loads.plot import draw
    from moerunner.models import load
    from moerunner.models.inspection import inspect as look

    picture = None if plot is None else files.picture(plot)
    words, sample = read(text)
    weights, where = torch_dtype(dtype), torch_device(device)
    refuse_without_a_block(look(path, dtype=weights, device=where), None)
    tokenizer = load_tokenizer(path)
    ids = tokenizer(words, return_tensors="pt")["input_ids"][:, :tokens]
    if not ids.shape[1]:
        raise SpecError("has no tokens", where=sample, next_step="Give a longer text")
    screen = Screen(quiet=json)
    model = load(path, dtype=weights, device=where)
    with screen.progress(f"reading {ids.shape[1]} tokens"):
        found = measure(model, ids, name=Path(path).resolve().name, sample=sample)
    screen.say(f"{found.model}: {found.tokens} tokens ({sample}) through {len(found.layers)} MoE layers")
    screen.heading("Tokens of each expert")
    show_loads(screen, found.layers)
    screen.heading("Experts that are chosen together, against chance")
    screen.table(["layer", "experts at work", "idle", "pairs with the strongest bond"], rows(found), numbers=False, wrap=True)
    written: list[str] = []
    if picture is not None:
        made = {
            picture: draw(found, picture.suffix.lower()),
            picture.with_suffix(".csv"): found.csv(),
            picture.with_suffix(".pairs.csv"): found.pairs_csv(),
        }
        for file, content in made.items():
            files.write(file, content)
        written = [str(file) for file in made]
        screen.say(f"\nwritten: {', '.join(written)}")
    return Answer({"ok": True, **found.to_dict(), "files": written})


def read(file: str | None) -> tuple[str, str]:
    """A text, and what it is."""
    if file is None:
        import moerunner.loads.measure

        return inspect.getsource(moerunner.loads.measure), "moerunner's own source"
    return files.text_of(file, "--text"), "stdin" if file == "-" else Path(file).name


def rows(found: Any) -> list[list[str]]:
    """For each layer how many experts really share the work, and its strongest bonds."""
    return [
        [
            layer.name,
            f"{layer.effective:.1f} of {len(layer.load)}",
            str(layer.idle),
            ", ".join(f"{i}+{j} {lift:.1f}x" for i, j, lift in layer.bonds()) or "-",
        ]
        for layer in found.layers
    ]
