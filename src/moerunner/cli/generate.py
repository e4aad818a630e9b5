"""`moerunner generate`: a model folder and prompts to text."""

from __future__ import annotations

import json as jsonlib
import sys
from typing import Annotated, Any

import typer

from moerunner.cli import files
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
    prompt: Annotated[list[str] | None, typer.Argument(help="The text to continue; several run as one batch.")] = None,
    prompts: Annotated[str | None, typer.Option(metavar="FILE", help="Also each line of this file; - reads stdin.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="A prompt is a user's message: use the chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(parser=count, metavar="N", help="At most so many tokens; 1k works.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token, above it samples.")] = 0.0,
    top_p: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Sample from this share of the mass.")] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Sample from so many likeliest tokens.")] = None,
    min_p: Annotated[float | None, typer.Option(min=0.0, max=1.0, help="Sample from this share of the likeliest up.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(min=0.0, help="Above 1: tokens come again less often.")] = None,
    option: Annotated[list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="More of GenerationConfig.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End a text after this; may be given again.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Makes sampling repeatable.")] = None,
    prefill_chunk: Annotated[
        int | None, typer.Option(parser=count, metavar="N", help="Tokens of the prompts to run at once; all by default.")
    ] = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = None,
    allow_unpatched: Annotated[
        bool, typer.Option("--allow-unpatched", help="Run a model without a block that moerunner knows, too.")
    ] = False,
    tp: TpOption = None,
    ep: EpOption = None,
    dp: DpOption = None,
    attention: AttentionOption = Attention.replicate,
    timeout: TimeoutOption = TIMEOUT,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> Answer:
    """Continue prompts. The text streams to stdout, the speed is said on stderr."""
    texts = list(prompt or []) + (lines_of(prompts) if prompts is not None else [])
    if not texts:
        raise typer.BadParameter("give a PROMPT, or a file of them with --prompts")
    sampling = {"top_p": top_p, "top_k": top_k, "min_p": min_p, "repetition_penalty": repetition_penalty}
    sampling |= dict(parameter(text) for text in option or [])
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
    model = load(path, dtype=weights, device=where, layout=bound, attention=attention)  # draws a bar of its own
    in_turn = InTurn(screen, texts)
    made = generate(
        model,
        tokenizer,
        texts if len(texts) > 1 else texts[0],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        stop=stop or (),
        chat=chat,
        prefill_chunk=prefill_chunk,
        stream=in_turn.put if len(texts) > 1 else screen.write,
        layout=bound,
        **sampling,
    )
    screen.say()
    report = model.moerunner_report
    if not json:
        print(speed(made), file=sys.stderr)
        for line in [f"decoding by {made.decode}: {made.note}"] * bool(made.note) + left_alone(report):
            print(f"note: {line}", file=sys.stderr)
    asked = {"prompt": texts[0]} if len(texts) == 1 else {"prompts": texts}
    return Answer({"ok": True, "model": path, **asked, **made.to_dict(), "report": report.to_dict()})


class InTurn:
    """Prints the texts of several prompts one below the other: the first that is not finished as it grows, those behind it
    as far as they are when it is their turn."""

    def __init__(self, screen: Screen, prompts: list[str]) -> None:
        self._screen, self._turn = screen, 0
        self._waiting, self._ended = list(prompts), [False] * len(prompts)

    def put(self, row: int, piece: str) -> None:
        """A piece of a row's text; an empty one is its end."""
        self._waiting[row] += piece
        self._ended[row] = self._ended[row] or not piece
        while self._turn < len(self._waiting):
            self._screen.write(self._waiting[self._turn])
            self._waiting[self._turn] = ""
            if not self._ended[self._turn]:
                return
            self._turn += 1
            if self._turn < len(self._waiting):
                self._screen.write("\n\n")


def lines_of(file: str) -> list[str]:
    """The lines of a text file that are not empty."""
    return [line for line in files.text_of(file, "--prompts").splitlines() if line.strip()]


def parameter(text: str) -> tuple[str, Any]:
    """NAME=VALUE; the value is JSON, or else a text."""
    name, equals, value = text.partition("=")
    if not equals:
        raise typer.BadParameter(f"{text!r} is not NAME=VALUE", param_hint="--set")
    try:
        return name.strip().replace("-", "_"), jsonlib.loads(value)
    except ValueError:
        return name.strip().replace("-", "_"), value


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
    prompts = "the prompt" if len(made.texts) == 1 else f"{len(made.texts)} prompts"
    return (
        f"{made.new_tokens} tokens, {made.tokens_per_second:.1f} tokens/s, "
        f"the first after {made.first_token_seconds:.2f} s ({made.prompt_tokens} tokens in {prompts})"
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
