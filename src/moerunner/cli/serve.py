"""`moerunner serve`: a model folder behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from moerunner.cli.generate import left_alone, load_tokenizer, refuse_without_a_block
from moerunner.cli.shell import (
    INTERRUPTED,
    OK,
    Answer,
    DebugOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    JsonOption,
    Screen,
    count,
    print_json,
    quiet_transformers,
    torch_device,
    torch_dtype,
    verb,
)
from moerunner.errors import CheckpointError, SpecError, UnsupportedError

_LOOPBACK = ("localhost", "127.", "::1")


@verb
def run(
    path: Annotated[str, typer.Argument(help="Folder of a model: config.json, safetensors, tokenizer.")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="What clients call the model; the folder's name by default.")] = None,
    api_key: Annotated[
        str | None, typer.Option(envvar="MOERUNNER_API_KEY", help="Ask every client for this key; better set by the variable.")
    ] = None,
    chat_template: Annotated[str | None, typer.Option(help="File with a Jinja chat template, in place of the model's.")] = None,
    max_new_tokens: Annotated[int, typer.Option(parser=count, metavar="N", help="Most tokens of one answer.")] = 4096,
    max_running: Annotated[int, typer.Option(parser=count, metavar="N", help="Most requests in one batch.")] = 64,
    max_waiting: Annotated[int, typer.Option(parser=count, metavar="N", help="Most requests behind them; then 429.")] = 256,
    max_body: Annotated[int, typer.Option(parser=count, metavar="N", help="Most bytes of one request; 4M works.")] = 4 * 2**20,
    context: Annotated[
        int | None, typer.Option(min=16, help="Most tokens of prompt and answer; the model's by default.")
    ] = None,
    cache_tokens: Annotated[
        int | None, typer.Option(min=64, help="Tokens that all requests may hold together; a GPU's memory decides by default.")
    ] = None,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = None,
    allow_unpatched: Annotated[
        bool, typer.Option("--allow-unpatched", help="Serve a model without a block that moerunner knows, too.")
    ] = False,
    json: JsonOption = False,
    debug: DebugOption = False,
) -> Answer:
    """Serve a model over HTTP: /v1/chat/completions, /v1/completions, /v1/models, /health, /metrics. Ctrl-C finishes what
    runs, twice ends at once."""
    quiet_transformers()
    from moerunner import serve
    from moerunner.models import count_loads, load
    from moerunner.models.inspection import inspect

    try:
        from moerunner.serve.app import build
    except ImportError as error:
        raise UnsupportedError(str(error), where="serve", next_step="pip install 'moerunner[serve]'") from error

    if api_key is not None and not (api_key and api_key.isascii() and api_key.isprintable() and " " not in api_key):
        raise SpecError("must be printable ASCII without spaces, and not empty", where="--api-key")
    sock = serve.bound(host, port)
    weights, where = torch_dtype(dtype), torch_device(device)
    found = inspect(path, dtype=weights, device=where)
    if not allow_unpatched:
        refuse_without_a_block(found)
    tokenizer = load_tokenizer(path)
    if chat_template is not None:
        tokenizer.chat_template = template(chat_template)
    model = load(path, dtype=weights, device=where)
    limits = serve.Limits(body_bytes=max_body, new_tokens=max_new_tokens, running=max_running, waiting=max_waiting)
    name = name or Path(path).resolve().name
    screen = Screen(quiet=json)
    with screen.progress("starting the engine"):
        engine, why = serve.engine_for(model, tokenizer, limits=limits, cache_tokens=cache_tokens, context=context)
    address = sock.getsockname()
    shown = f"[{address[0]}]" if ":" in address[0] else address[0]
    url = f"http://{shown}:{address[1]}"
    facts = {"url": f"{url}/v1", "model": name, "engine": engine.name, "why": why or None, "context": engine.capacity}

    def ready() -> None:
        screen.say(f"{name} at {url}/v1, {engine.name}, {engine.capacity} tokens a request. Ctrl-C stops.")
        if why:
            screen.say(f"note: {why}")
        if not getattr(tokenizer, "chat_template", None):
            screen.say("note: the model has no chat template: /v1/completions works, chats need --chat-template FILE")
        for line in left_alone(model.moerunner_report):
            screen.say(f"note: {line}")
        if api_key is None and not address[0].startswith(_LOOPBACK):
            print(f"warning: anyone who reaches {url} may use it; set MOERUNNER_API_KEY", file=sys.stderr, flush=True)
        if json:
            print_json({"ok": True, **facts, "report": model.moerunner_report.to_dict()})

    try:
        app = build(model, tokenizer, engine, name=name, limits=limits, loads=count_loads(model), api_key=api_key)
        ended = serve.run(app, sock, ready)
    finally:
        engine.stop()
        sock.close()
    screen.say("stopped")
    return Answer(None, INTERRUPTED if ended == signal.SIGINT else OK)


def template(file: str) -> str:
    """A chat template that can be compiled."""
    from jinja2 import TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        text = Path(file).read_text(encoding="utf-8")
        ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols"]).parse(text)
    except (UnicodeDecodeError, OSError, TemplateSyntaxError) as error:
        reason: Any = getattr(error, "strerror", None) or error
        raise CheckpointError(f"is no chat template: {reason}", where=file) from error
    return text
