"""`moerunner generate`: a model folder and a prompt to text."""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer

from moerunner.cli.ranks import DpOption, EpOption, TimeoutOption, TpOption, bound_layout, device_of_rank
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
    verb_of_ranks,
)
from moerunner.errors import CheckpointError, UnsupportedError

TIMEOUT = 600.0  # seconds that a rank may wait for the others, one of which may read its weights more slowly


@verb_of_ranks
def run(
    path: Annotated[str, typer.Argument(help="Folder of a model: config.json, safetensors, tokenizer.")],
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(parser=count, metavar="N", help="At most so many tokens; 1k works.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token, above it samples.")] = 0.0,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Sample from this share of the mass.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample from so many likeliest tokens.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Makes sampling repeatable.")] = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = None,
    allow_unpatched: Annotated[
        bool, typer.Option("--allow-unpatched", help="Run a model without a block that moerunner knows, too.")
    ] = False,
    tp: TpOption = None,
    ep: EpOption = None,
    dp: DpOption = None,
    timeout: TimeoutOption = TIMEOUT,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> Answer:
    """Continue a prompt. The text streams to stdout, the speed is said on stderr."""
    quiet_transformers()
    from moerunner.generate import generate
    from moerunner.models import load
    from moerunner.models.inspection import inspect

    screen = Screen(quiet=json)
    bound = bound_layout(tp, ep, dp, timeout=timeout)
    weights, where = torch_dtype(dtype), torch_device(device_of_rank(device, bound))
    looked_at = inspect(path, dtype=weights, device=where)
    if not allow_unpatched:
        refuse_without_a_block(looked_at)
    tokenizer = load_tokenizer(path)
    model = load(path, dtype=weights, device=where, layout=bound)  # draws a bar of its own
    made = generate(
        model,
        tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        seed=seed,
        stream=screen.write,
        layout=bound,
    )
    screen.say()
    report = model.moerunner_report
    if not json:
        print(speed(made), file=sys.stderr)
        for line in left_alone(report):
            print(f"note: {line}", file=sys.stderr)
    return Answer({"ok": True, "model": path, "prompt": prompt, **made.to_dict(), "report": report.to_dict()})


def refuse_without_a_block(
    found: Any, step: str | None = "Give --allow-unpatched to run it with Transformers' own code"
) -> None:
    """Working with a model of which moerunner would run nothing is not what was asked for. step: the way round, if any."""
    if not found.kinds:
        reasons = [f"{name}: {reason}" for name, reason in found.left_alone.items()]
        raise UnsupportedError(
            f"moerunner would run no layer of this model ({'; '.join(reasons) or 'it has no MoE block'})",
            where=found.path,
            next_step=step or "moerunner families lists what it runs",
        )


def left_alone(report: Any) -> list[str]:
    """The blocks that Transformers' own code ran, and why."""
    skipped = [f"{s.name}: {s.reason}" for s in report.skipped]
    return skipped if report.replaced or skipped else ["the model has no MoE block: Transformers' own code ran all of it"]


def speed(made: Any) -> str:
    """One line on how fast a text came."""
    return (
        f"{made.new_tokens} tokens, {made.tokens_per_second:.1f} tokens/s, "
        f"the first after {made.first_token_seconds:.2f} s ({made.prompt_tokens} tokens in the prompt)"
    )


def load_tokenizer(path: Any) -> Any:
    """The tokenizer of a model folder; text cannot be made without one."""
    from moerunner.models.checkpoint import read_tokenizer

    found = read_tokenizer(path)
    if found is None:
        raise CheckpointError(
            "has no tokenizer that Transformers can read",
            where=str(path),
            next_step="Put tokenizer.json and tokenizer_config.json beside the weights",
        )
    return found
