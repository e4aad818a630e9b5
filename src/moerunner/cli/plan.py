"""`moerunner plan`: which layout for how many ranks, from the config alone."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from moerunner.cli.shell import Answer, DebugOption, Dtype, DtypeOption, JsonOption, Screen, count, quiet_transformers, verb
from moerunner.cli.shell import torch_dtype as dtype_of
from moerunner.errors import SpecError


def ranks_of(text: str) -> list[int]:
    """8,16,64 as it stands; 8..4096 doubles from the first to the last."""
    try:
        if ".." not in text:
            found = [int(n) for n in text.split(",")]
        else:
            first, last = (int(n) for n in text.split(".."))
            found, n = [], first
            while 0 < n <= last:
                found.append(n)
                n *= 2
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise SpecError(f"{text!r} is neither a list such as 8,16 nor a range such as 8..4096", where="--ranks")
    return found


@verb
def run(
    ranks: Annotated[str, typer.Option("--ranks", help="GPUs: 8,16,64, or 8..4096 for every doubling.")],
    nvlink: Annotated[float, typer.Option(min=1e-6, help="GB/s from one GPU to the others of its node.")],
    net: Annotated[float, typer.Option(min=1e-6, help="GB/s from one GPU to other nodes.")],
    config: Annotated[str | None, typer.Option("--config", help="Folder of a model, or its config.json.")] = None,
    family: Annotated[str | None, typer.Option("--family", help="A model type, with its default config.")] = None,
    hbm: Annotated[float, typer.Option(min=1e-6, help="GB/s from a GPU's memory.")] = 4800.0,
    tflops: Annotated[float, typer.Option(min=1e-6, help="Dense TFLOP/s of one GPU in the dtype.")] = 989.0,
    memory: Annotated[float, typer.Option(min=1e-6, help="GB of one GPU.")] = 141.0,
    gpus_per_node: Annotated[int, typer.Option(parser=count, metavar="N", help="GPUs that NVLink joins.")] = 8,
    latency: Annotated[float, typer.Option(min=0.0, help="Microseconds that a collective takes at least.")] = 10.0,
    tokens: Annotated[int, typer.Option(parser=count, metavar="N", help="Tokens of one step, per GPU.")] = 128,
    skew: Annotated[float, typer.Option(min=0.0, help="Loads of experts fall as 1 / rank ** skew; 0 is even.")] = 0.0,
    trace: Annotated[str | None, typer.Option("--trace", help="JSON file of measured loads, in place of a skew.")] = None,
    top: Annotated[int, typer.Option(parser=count, metavar="N", help="Layouts shown for each number of GPUs.")] = 5,
    dtype: DtypeOption = Dtype.auto,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> Answer:
    """Compare the layouts that a model's MoE layers can have, and name the best. Needs neither weights nor GPUs.

    A GPU that is not described is an H200 in bfloat16.
    """
    sizes = ranks_of(ranks)
    quiet_transformers()
    from moerunner.models.expected import read_trace
    from moerunner.models.inspection import bytes_in_words
    from moerunner.planner import Machine, estimates, look_up, reason

    if trace is not None and skew:
        raise SpecError("give either --skew or --trace", where="plan")
    loads = None if trace is None else read_trace(trace).rows
    screen = Screen(quiet=json)
    machine = Machine(
        nvlink=nvlink * 1e9,
        net=net * 1e9,
        hbm=hbm * 1e9,
        flops=tflops * 1e12,
        memory=memory * 1e9,
        gpus_per_node=gpus_per_node,
        latency=latency * 1e-6,
    )
    with screen.progress("reading the config"):
        found = look_up(config, family, dtype_of(dtype))
    rest = bytes_in_words(found.size - found.moe)
    screen.say(f"{found.model_type}, {found.dtype}: MoE weights {bytes_in_words(found.moe)}, the rest {rest} on every rank")
    screen.say(f"A GPU reads {hbm:,g} GB/s, computes {tflops:,g} TFLOP/s and has {memory:,g} GB")
    screen.say(f"One step of {tokens} tokens per rank through all MoE layers, at full speed; attention is not in it")
    answers = []
    for n in sizes:
        made = estimates(found, n, machine, tokens=tokens, skew=skew, trace=loads)
        why = reason(made[0], made)
        answers.append({"ranks": n, "best": made[0].to_dict(), "reason": why, "layouts": [e.to_dict() for e in made]})
        screen.heading(f"{n} ranks")
        screen.table(HEADS, [row(e, bytes_in_words) for e in made[:top]])
        screen.say(f"best: {made[0].name}: {why}")
    return Answer({"ok": True, "model_type": found.model_type, "dtype": found.dtype, "tokens": tokens, "ranks": answers})


HEADS = ("dp x ep x tp", "tokens", "dispatch", "weights", "fits", "busiest / mean", "in order", "ms", "longest")


def row(estimate: Any, size: Any) -> list[str]:
    """One layout for the table."""
    layout = estimate.layout
    return [
        f"{layout.dp} x {layout.ep} x {layout.tp}",
        layout.tokens,
        estimate.dispatch,
        size(estimate.weights),
        "yes" if estimate.fits else "no",
        f"{estimate.even:.2f}",
        f"{estimate.linear:.2f}",
        f"{estimate.seconds * 1e3:.3f}",
        estimate.bound,
    ]
