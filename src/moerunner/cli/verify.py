"""`moerunner verify`: is what moerunner computes right?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from moerunner.cli.ranks import (
    Attention,
    AttentionOption,
    DpOption,
    EpOption,
    TimeoutOption,
    TpOption,
    bound_layout,
    device_of_rank,
)
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
    quiet_transformers,
    torch_device,
    torch_dtype,
    verb_of_ranks,
)

HEADERS = ("layer", "vs HF", "vs f64", "HF vs f64", "routing", "ties", "worst")
LEGEND = """HF: Transformers, f64: the float64 oracle, routing: tokens with the same experts, ties apart,
worst: the token and the expert with the largest difference. Differences are max|y - ref| / max|ref|.
"""

TIMEOUT = 3600.0  # seconds that a rank may wait, while rank 0 loads and runs the whole model


@verb_of_ranks
def run(
    path: Annotated[str | None, typer.Argument(help="Folder of a model: config.json and safetensors.")] = None,
    family: Annotated[str | None, typer.Option(help="A tiny random model of this model_type instead.")] = None,
    text: Annotated[str | None, typer.Option(help="A text to run on, not a file; by default moerunner's own source.")] = None,
    tokens: Annotated[int, typer.Option(parser=count, metavar="N", help="At most so many tokens; 1k works.")] = 128,
    oracle_tokens: Annotated[
        int, typer.Option(parser=count, metavar="N", help="Of these, so many in float64, on one rank.")
    ] = 8,
    record: Annotated[bool, typer.Option(help="First write PATH/SHA256SUMS, which this and later runs compare.")] = False,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = None,
    seed: SeedOption = 0,
    tp: TpOption = None,
    ep: EpOption = None,
    dp: DpOption = None,
    attention: AttentionOption = Attention.replicate,
    timeout: TimeoutOption = TIMEOUT,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> Answer:
    """Compare each MoE layer, and the whole model, with Transformers and with a float64 oracle."""
    if (path is None) == (family is None):
        raise typer.BadParameter("give the folder of a model, or --family NAME, and not both")
    if record and path is None:
        raise typer.BadParameter("--record needs the folder of a model")
    if attention != Attention.replicate and path is None:
        raise typer.BadParameter("--attention needs the folder of a model")
    quiet_transformers()
    bound = bound_layout(tp, ep, dp, timeout=timeout)
    from moerunner.models.attention import check as check_attention
    from moerunner.models.checkpoint import check_folder
    from moerunner.verify import digests, verify

    check_attention(attention, bound)
    screen = Screen(quiet=json)
    where = torch_device(device_of_rank(device, bound))
    if record and path is not None and (bound is None or bound.comm.rank == 0):
        check_folder(Path(path))
        screen.say(f"checksums kept in {digests.record(path)}")
    if bound is not None:
        from moerunner.verify.ranks import verify_ranks

        report = verify_ranks(
            path,
            bound,
            family=family,
            text=text,
            num_tokens=tokens,
            dtype=torch_dtype(dtype),
            device=where,
            seed=seed,
            attention=attention,
        )
        screen.say(f"{report.model}, {report.dtype} on {report.device}, {report.tokens} tokens ({report.sample})\n")
        show_ranks(screen, report)
        return Answer(report.to_dict(), OK if report.ok else MISMATCH)
    with screen.progress(f"comparing {path or family}"):
        report = verify(
            path,
            family=family,
            text=text,
            num_tokens=tokens,
            oracle_tokens=oracle_tokens,
            dtype=torch_dtype(dtype),
            device=where,
            seed=seed,
        )
    screen.say(f"{report.model}, {report.dtype} on {report.device}, {report.tokens} tokens ({report.sample})\n")
    show(screen, report)
    return Answer(report.to_dict(), OK if report.ok else MISMATCH)


def show(screen: Screen, report: Any) -> None:
    """The layers as a table, then the verdict."""
    if report.layers:
        screen.table(HEADERS, [_row(layer) for layer in report.layers])
        screen.say(LEGEND)
    for line in report.skipped:
        screen.say(f"not compared: {line}")
    for note in report.notes + [f"{layer.name}: {note}" for layer in report.layers for note in layer.notes]:
        screen.say(f"note: {note}")
    screen.say(str(report))


def show_ranks(screen: Screen, report: Any) -> None:
    """The same of a model over several ranks."""
    rows = [[x.name, f"{x.vs_transformers.max:.1e}", str(x.tied), ", ".join(x.collectives) or "-"] for x in report.layers]
    screen.table(("layer", "vs HF in one process", "ties", "collectives"), rows)
    for line in report.skipped:
        screen.say(f"not compared: {line}")
    for note in report.notes:
        screen.say(f"note: {note}")
    screen.say(f"\n{report}")


def _row(layer: Any) -> list[str]:
    worst = "-" if layer.worst_expert is None else f"{layer.worst_token}/{layer.worst_expert}"
    errors = (layer.vs_transformers, layer.vs_oracle, layer.transformers_vs_oracle)
    return [layer.name, *(f"{e.max:.1e}" for e in errors), f"{layer.same_experts:.1%}", str(layer.tied), worst]
