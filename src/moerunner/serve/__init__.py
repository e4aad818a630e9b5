"""An OpenAI-compatible endpoint around a patched model, on Transformers' own server parts and continuous batching."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable
from typing import Any

from moerunner.errors import SpecError, UnsupportedError
from moerunner.models import count_loads
from moerunner.serve.bodies import Limits as Limits  # callers find it here too

DEFAULT_TOKENS = 16 * 1024  # cached tokens on a CPU; a GPU gives what it has


def bound(host: str, port: int) -> socket.socket:
    """A socket with this address that does not answer yet. Taken before a model is loaded: a port in use is told at once.

    Raises:
        SpecError: the port is in use or may not be taken, or the host is not this machine.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        sock = socket.socket(family, kind)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            sock.bind(address)
        except OSError:
            sock.close()
            raise
    except OSError as error:
        raise _taken(f"{host}:{port}", error) from error
    return sock


def _taken(where: str, error: OSError) -> SpecError:
    step = "Give another --port, 0 for a free one, or another --host"
    return SpecError(f"cannot listen there: {error.strerror}", where=where, next_step=step)


def engine_for(
    model: Any, tokenizer: Any, *, limits: Limits, cache_tokens: int | None = None, context: int | None = None
) -> tuple[Any, str]:
    """A started engine, and why it is not continuous batching, if so.

    Args:
        cache_tokens: that all requests together may hold; None: what a GPU's memory takes, or `DEFAULT_TOKENS` on a CPU.
        context: tokens of one request; None: the model's.
    """
    from moerunner.serve.alone import Alone
    from moerunner.serve.batching import Batching, check

    text = model.config.get_text_config()
    most = context or getattr(text, "max_position_embeddings", None) or DEFAULT_TOKENS
    if cache_tokens is None and model.device.type == "cpu":
        cache_tokens = max(DEFAULT_TOKENS, most)
    try:
        engine = Batching(
            model, capacity=min(most, cache_tokens or most), cache_tokens=cache_tokens, max_running=limits.running
        )
        check(engine, model, text.vocab_size)
    except UnsupportedError as reason:
        alone = Alone(model, capacity=most)
        alone.start()
        return alone, str(reason)
    return engine, ""


def run(app: Any, sock: socket.socket, ready: Callable[[], None]) -> int:
    """Serves until SIGINT or SIGTERM, then finishes what runs; a second signal ends at once. Returns the signal's number.

    ready: called when requests are answered.
    """
    import uvicorn

    seen: list[int] = []

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets=sockets)
            self.should_exit |= bool(seen)
            if self.started and not self.should_exit:
                ready()

    try:
        sock.listen(512)
    except OSError as error:  # another server took the port while the model was loaded
        raise _taken(":".join(map(str, sock.getsockname()[:2])), error) from error
    server = Server(uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off"))
    # uvicorn raises the signals that it saw once more when it has ended: they come here.
    before = {number: signal.signal(number, lambda n, _: seen.append(n)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run(sockets=[sock])
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return seen[0] if seen else 0


__all__ = ["DEFAULT_TOKENS", "Limits", "bound", "count_loads", "engine_for", "run"]
