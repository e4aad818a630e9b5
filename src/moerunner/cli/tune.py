"""`moerunner tune`: measures kernel configurations for a shape and keeps them in the user's cache."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from moerunner.cli.shell import (
    Answer,
    DebugOption,
    Dtype,
    DtypeOption,
    JsonOption,
    Screen,
    SeedOption,
    count,
    torch_dtype,
    verb,
)
from moerunner.errors import SpecError, UnsupportedError


@verb
def run(
    shapes: Annotated[list[str], typer.Argument(help="Names that bench knows, or experts,top_k,hidden,intermediate.")],
    tokens: Annotated[str | None, typer.Option(help="Numbers of tokens, such as 1,8,2k.")] = None,
    activation: Annotated[str, typer.Option(help="Of shapes given by numbers.")] = "silu",
    plain: Annotated[bool, typer.Option("--plain", help="Shapes given by numbers have no gate.")] = False,
    dtype: DtypeOption = Dtype.auto,
    seed: SeedOption = 0,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> Answer:
    """Measure tiles of the expert kernels on this GPU and keep those that are clearly faster than the usual choice.

    Forward reads what is kept and never measures. Measure again after a new driver or Triton, which the file's name holds.
    """
    counts = None if tokens is None else [count(t) for t in tokens.split(",")]
    import torch

    from moerunner.bench.shapes import GPU_TOKENS

    wanted = {text: _shape(text, activation, not plain) for text in shapes}
    if not torch.cuda.is_available():
        raise UnsupportedError(
            "measures on a GPU, and there is none", where="tune", next_step="moerunner env lists the devices"
        )
    import triton

    from moerunner.bench.tune import tune
    from moerunner.kernels import tables, tiles

    number, device = torch_dtype(dtype) or torch.bfloat16, torch.device("cuda", torch.cuda.current_device())
    path, screen = tables.cache_file(device), Screen(quiet=json)
    made_on = {"gpu": torch.cuda.get_device_name(device), "torch": torch.__version__, "triton": triton.__version__}
    answers = []
    for text, shape in wanted.items():
        key = tables.key(
            experts=shape.experts, top_k=shape.top_k, hidden=shape.hidden, inter=shape.inter, gated=shape.gated, dtype=number
        )
        rows, kept = [], {}
        with screen.progress(f"measuring {text}"):
            for found in tune(shape, counts or GPU_TOKENS, dtype=number, device=str(device), seed=seed):
                best, first = found.best, found.analytic
                rows.append(_row(found))
                if best is not first:
                    kept[str(found.tokens)] = {
                        "tiles": tiles.to_dict(best.tiles), "seconds": best.seconds, "analytic_seconds": first.seconds,
                    }  # fmt: skip
        tables.write(path, made_on, {key: kept})
        screen.heading(text)
        screen.table(["tokens", "usual choice, us", "best, us", "measured", "kept"], rows)
        answers.append({"shape": text, "key": key, "kept": kept})
    screen.say(f"\nkept in {path}")
    return Answer({"ok": True, "file": str(path), "environment": made_on, "shapes": answers})


def _row(found: Any) -> list[str]:
    best, first = found.best, found.analytic
    times = [f"{t.seconds * 1e6:.1f}" if t.seconds is not None else "-" for t in (first, best)]
    return [str(found.tokens), *times, str(len(found.timed)), "no" if best is first else _words(best.tiles)]


def _words(tiles: Any) -> str:
    return f"{getattr(tiles, 'block_m', 'few')} " + " ".join(
        f"{p.block_n}x{p.block_k}/{p.warps}/{p.stages}" for p in (tiles.up, tiles.down)
    )


def _shape(text: str, activation: str, gated: bool) -> Any:
    from moerunner.bench.shapes import SHAPES, Shape
    from moerunner.spec import ActivationSpec, ExpertsSpec

    if text in SHAPES:
        return SHAPES[text]
    parts = text.split(",")
    if len(parts) != 4 or not all(p.isdigit() and int(p) > 0 for p in parts):
        known = ", ".join(SHAPES)
        raise SpecError(f"{text!r} is neither four numbers such as 128,8,2048,768 nor one of {known}", where="tune")
    experts, top_k, hidden, inter = map(int, parts)
    if top_k > experts:
        raise SpecError(f"{text!r} chooses {top_k} of {experts} experts", where="tune")
    ExpertsSpec(intermediate_size=inter, activation=ActivationSpec(kind=activation), gated=gated)  # type: ignore[arg-type]
    return Shape(experts, top_k, hidden, inter, activation, gated)
