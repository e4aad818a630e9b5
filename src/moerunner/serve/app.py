"""The HTTP side: routes, the key, the size of bodies, clients that leave, and errors as JSON with the right status."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import json
import sys
import time
import traceback
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from moerunner.parallel.balance import LoadCounter
from moerunner.serve.answers import Answer, Answering
from moerunner.serve.bodies import Body, ChatBody, CompletionBody, Limits, Refused, error, parse
from moerunner.serve.metrics import Metrics
from moerunner.serve.work import Engine

_LEFT = 499  # what nginx calls a client that left; no one receives it


def build(
    model: Any,
    tokenizer: Any,
    engine: Engine,
    *,
    name: str,
    limits: Limits,
    loads: Mapping[str, LoadCounter],
    api_key: str | None = None,
) -> Any:
    """The ASGI application around an engine that has been started.

    Args:
        name: of the model, as clients give it. loads: the counters of its MoE layers, see `models.count_loads`.
        api_key: asked for as `Authorization: Bearer ...` by every path but /health. None: no key.
    """
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    answering = Answering(model, tokenizer, name, engine, limits)
    metrics = Metrics(loads, engine.running, lambda: max(0, answering.open - engine.running()), name, engine.name)
    answering.metrics = metrics
    served = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "moerunner"}
    served["max_model_len"] = engine.capacity

    @app.exception_handler(Refused)
    async def refused(_: Request, wrong: Refused) -> JSONResponse:
        headers = {429: {"Retry-After": "1"}, 413: {"Connection": "close"}, 408: {"Connection": "close"}}
        return JSONResponse(wrong.to_dict(), wrong.status, headers.get(wrong.status))

    @app.exception_handler(HTTPException)
    async def not_routed(request: Request, wrong: HTTPException) -> JSONResponse:
        paths = "/v1/chat/completions, /v1/completions, /v1/models, /health and /metrics are served"
        message = f"{request.method} {request.url.path}: {wrong.detail}; {paths}"
        return JSONResponse(error(wrong.status_code, message), wrong.status_code, wrong.headers)

    @app.get("/health")
    async def health() -> JSONResponse:
        problem = engine.problem()
        return JSONResponse({"status": problem or "ok"}, 503 if problem else 200)

    @app.get("/metrics")
    async def read_metrics() -> Response:
        # The counts may lie on a GPU that is busy: waiting for it must not hold up the streams.
        text = await asyncio.to_thread(generate_latest, metrics.registry)
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [served]}

    @app.get("/v1/models/{asked:path}")
    async def one_model(asked: str) -> dict[str, Any]:
        if asked != name:
            message = f"the model {asked!r} is not served here, {name!r} is"
            raise Refused(404, message, param="model", code="model_not_found")
        return served

    async def answered(request: Request, kind: type[Body], endpoint: str) -> Response:
        started, status = time.perf_counter(), 500
        try:
            body = parse(kind, await _read(request, limits))
            answer = await answering.begin(body, started)
            if body.stream:
                status = 0  # told by the stream itself
                return Stream(answer, lambda said: _done(metrics, endpoint, said, started))
            with contextlib.closing(answer):
                whole = await _unless_gone(request.receive, answer.whole())
            status = _LEFT if whole is None else 200
            return Response(status_code=_LEFT) if whole is None else JSONResponse(whole)
        except Refused as wrong:
            status = wrong.status
            raise
        except Exception as wrong:  # noqa: BLE001 - whatever happened, the client gets JSON and the server goes on
            traceback.print_exception(wrong, file=sys.stderr)
            return JSONResponse(error(500, f"the model failed: {' '.join(str(wrong).split())}"), 500)
        finally:
            if status:
                _done(metrics, endpoint, status, started)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await answered(request, ChatBody, "chat")

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answered(request, CompletionBody, "completions")

    return app if api_key is None else Keyed(app, api_key)


def _done(metrics: Metrics, endpoint: str, status: int, started: float) -> None:
    metrics.requests.labels(endpoint, status).inc()
    metrics.request_seconds.labels(endpoint).observe(time.perf_counter() - started)


async def _read(request: Request, limits: Limits) -> bytes:
    """The body, no larger and no slower than allowed."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # a page in a browser can send other kinds to this machine without asking
        raise Refused(415, "the body must be JSON: send the header Content-Type: application/json")
    too_large = Refused(413, f"the body is larger than the {limits.body_bytes} bytes that this server takes")
    declared = request.headers.get("content-length", "0")
    if declared.isdecimal() and int(declared) > limits.body_bytes:
        raise too_large
    found = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for piece in request.stream():
                found += piece
                if len(found) > limits.body_bytes:
                    raise too_large
    except TimeoutError:
        raise Refused(408, f"the body has not come within {limits.body_seconds:g} s") from None
    return bytes(found)


async def _unless_gone(receive: Receive, work: Any) -> Any:
    """What the work gives, None if the client leaves first; then the work is cancelled."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        return None
    finally:
        for one in (task, gone):
            if not one.done():
                one.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(task, gone, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Stream(Response):
    """Server-sent events. A client that leaves ends the answer's work at once, also between two tokens."""

    def __init__(self, answer: Answer, done: Callable[[int], None]) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self.raw_headers = [(key, value) for key, value in self.raw_headers if key != b"content-length"]
        self._answer, self._done = answer, done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status = _LEFT
        try:
            if await _unless_gone(receive, self._send(self._answer.events(), send)):
                status = 500 if self._answer.failed is not None else 200
        except OSError:  # the connection broke while we wrote to it
            pass
        finally:
            self._answer.close()
            self._done(status)
            if self._answer.failed is not None:
                traceback.print_exception(self._answer.failed, file=sys.stderr)

    async def _send(self, events: AsyncGenerator[str], send: Send) -> bool:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with contextlib.aclosing(events):
            async for event in events:
                await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return True


class Keyed:
    """Asks for the key before anything else is looked at, a body least of all."""

    def __init__(self, app: Any, key: str) -> None:
        self._app, self._digest = app, _digest(key.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/health" and not self._allowed(scope["headers"]):
            message = "wrong or no API key: send the header Authorization: Bearer KEY"
            await send(
                {
                    "type": "http.response.start",
                    "status": 401,
                    "headers": [
                        (b"content-type", b"application/json"),
                        (b"www-authenticate", b"Bearer"),
                        (b"connection", b"close"),
                    ],
                }
            )
            body = json.dumps(error(401, message, code="invalid_api_key")).encode()
            await send({"type": "http.response.body", "body": body, "more_body": False})
            return
        await self._app(scope, receive, send)

    def _allowed(self, headers: list[tuple[bytes, bytes]]) -> bool:
        """Compared by digest, in constant time: neither the key nor its length can be found by measuring."""
        given = [value for name, value in headers if name == b"authorization"]
        scheme, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        return hmac.compare_digest(_digest(key), self._digest) and scheme.lower() == b"bearer"


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
