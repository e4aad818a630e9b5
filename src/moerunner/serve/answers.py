"""From a checked body to the model and back: the handlers of Transformers' own server, with our engine behind them.

Kept of Transformers': messages to the chat template's form, reasoning and tool calls out of the text, the shapes of the
answers. Ours: everything between, so that no field is ignored, a stop string stops, and a client that leaves ends its work.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import time
import uuid
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from openai.types import CompletionUsage
from openai.types.chat import ChatCompletionMessageToolCall
from openai.types.chat.chat_completion_chunk import ChoiceDeltaToolCall
from transformers.cli.serving import utils as theirs
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler

from moerunner.serve.bodies import Body, ChatBody, CompletionBody, Limits, Refused, error
from moerunner.serve.metrics import Metrics
from moerunner.serve.text import Pieces
from moerunner.serve.work import Engine, Wanted, Work, ends_of

_COMPLETION_TOKENS = 16  # OpenAI's default for plain text; a chat may fill the context


@dataclass
class Said:
    """A piece of an answer: text, reasoning or a whole tool call."""

    text: str = ""
    reasoning: str = ""
    tool: Any = None


class Answering:
    """One model's answers."""

    def __init__(self, model: Any, tokenizer: Any, name: str, engine: Engine, limits: Limits) -> None:
        self.model, self.tokenizer, self.name, self.engine, self.limits = model, tokenizer, name, engine, limits
        self._ends, self._defaults = ends_of(model, tokenizer), _defaults(model.generation_config)
        self._words = ThreadPoolExecutor(1, "tokenizer")  # one: a tokenizer may not be used from two threads
        self.metrics: Metrics
        self.open = 0  # requests that have come in and are not over

    async def begin(self, body: Body, started: float) -> Answer:
        """Tokenizes and admits. Raises `Refused`."""
        if body.model not in (None, self.name):
            message = f"the model {body.model!r} is not served here, {self.name!r} is"
            raise Refused(404, message, param="model", code="model_not_found")
        stops = body.stops()
        if self.open >= self.limits.running + self.limits.waiting:
            raise Refused(429, f"{self.open} requests are running or waiting: try again later", code="overloaded")
        problem = self.engine.problem()
        if problem == "stopped":
            raise Refused(503, "the server is stopping", code="stopping")
        self.open += 1
        try:
            prompt = await asyncio.get_running_loop().run_in_executor(self._words, self._prompt, body)
            return Answer(self, body, self._wanted(body, prompt), stops, started)
        except BaseException:
            self.open -= 1
            raise

    def _prompt(self, body: Body) -> list[int]:
        try:
            if isinstance(body, ChatBody):
                return self._chat(body)
            assert isinstance(body, CompletionBody)
            given: Any = body.prompt
            if given and isinstance(given, list) and not isinstance(given[0], int):
                if len(given) > 1:
                    raise Refused(400, "one prompt in a request, please: send several requests at once", param="prompt")
                given = given[0]
            if isinstance(given, str):
                given.encode()
                return self.tokenizer(given or self.tokenizer.bos_token or "")["input_ids"]
        except UnicodeEncodeError as wrong:
            raise Refused(400, f"the text holds half of a surrogate pair: {wrong.reason}", param="prompt") from wrong
        vocabulary = self.model.config.get_text_config().vocab_size
        outside = next((i for i in given if not 0 <= i < vocabulary), None)
        if outside is not None:
            raise Refused(400, f"{outside} is no token: the model has {vocabulary}", param="prompt")
        return given

    def _chat(self, body: ChatBody) -> list[int]:
        if not getattr(self.tokenizer, "chat_template", None):
            message = f"{self.name} has no chat template: ask /v1/completions, or start the server with --chat-template FILE"
            raise Refused(400, message, param="messages", code="no_chat_template")
        try:
            messages = ChatCompletionHandler.get_processor_inputs_from_messages(
                [message.model_dump(exclude_none=True) for message in body.messages], theirs.Modality.LLM
            )
            return self.tokenizer.apply_chat_template(
                messages,
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                tools=None if body.tool_choice == "none" else body.tools,
                **(body.chat_template_kwargs or {}),
            )["input_ids"]
        except UnicodeEncodeError:
            raise
        except Exception as wrong:  # a template is a program of the model's authors; it may raise anything
            raise Refused(400, f"the chat template refuses this: {wrong}", param="messages") from wrong

    def _wanted(self, body: Body, prompt: list[int]) -> Wanted:
        asked, most, room = body.asked_tokens(), self.limits.new_tokens, self.engine.capacity - len(prompt)
        if not prompt:
            raise Refused(400, "the prompt is empty", param="prompt")
        if asked is not None and asked > most:
            raise Refused(400, f"max_tokens is {asked}, this server gives at most {most}", param="max_tokens")
        if room < (asked or 1):
            message = (
                f"{len(prompt)} tokens in the prompt and {asked or 1} new ones are more than the {self.engine.capacity} "
                f"that fit. Shorten the prompt" + (f", or ask for at most {room} new tokens" if room > 0 else "")
            )
            raise Refused(400, message, param="prompt", code="context_length_exceeded")
        if asked is None:
            asked = min(room, most if isinstance(body, ChatBody) else _COMPLETION_TOKENS)
        given = {name: getattr(body, name) for name in ("temperature", "top_p", "top_k")}
        sampling = {**self._defaults, **{name: value for name, value in given.items() if value is not None}}
        sampling["top_k"] = max(0, int(sampling["top_k"]))
        return Wanted(prompt, asked, seed=body.seed, ends=self._ends, **sampling)


class Answer:
    """One answer, being written."""

    def __init__(self, to: Answering, body: Body, wanted: Wanted, stops: list[str], started: float) -> None:
        self.to, self.body, self.wanted, self.started = to, body, wanted, started
        chat = isinstance(body, ChatBody)
        self.id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._work = Work(self.id, wanted, asyncio.get_running_loop())
        self._parser = self._parser_of(body) if isinstance(body, ChatBody) else None
        self._pieces = Pieces(to.tokenizer, stops, special=self._parser is not None)
        self.new, self.tools = 0, 0
        self._last, self._closed = -1, False
        self.failed: BaseException | None = None

    def _parser_of(self, body: ChatBody) -> Any:
        template = theirs.get_response_template(self.to.tokenizer, self.to.model)
        if template is None:
            return None
        prompt = self.wanted.prompt
        return theirs.build_response_parser(self.to.tokenizer, self.to.model, prompt, **_tools(body))

    async def said(self) -> AsyncGenerator[Said]:
        """The answer, piece by piece. However it ends, the engine is done with it afterwards."""
        metrics, now = self.to.metrics, time.perf_counter
        try:
            self.to.engine.submit(self._work)
            metrics.prompt_tokens.inc(len(self.wanted.prompt))
            for piece in self._parsed(None):
                yield piece
            last = self.started
            while not self._pieces.stopped:
                item = await self._work.arrivals.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    break
                (metrics.between_tokens_seconds if self.new else metrics.first_token_seconds).observe(now() - last)
                self.new, self._last, last = self.new + len(item), item[-1], now()
                metrics.new_tokens.inc(len(item))
                for piece in self._parsed(self._pieces.add(item)):
                    yield piece
            for piece in self._parsed(self._pieces.end(), end=True):
                yield piece
        finally:
            self.close()

    def close(self) -> None:
        """Forgets the request, whether it has ended or not; once."""
        if not self._closed:
            self._closed = True
            self.to.open -= 1
            self.to.engine.cancel(self._work)

    def _parsed(self, text: str | None, *, end: bool = False) -> list[Said]:
        """What a piece of text says. text: None at the start."""
        if self._parser is None:
            return [Said(text)] if text else []
        events = self._parser.initial_events if text is None else self._parser.feed(text) if text else []
        if end:
            with contextlib.suppress(ValueError, RuntimeError):  # the text ended inside a tool call
                events = [*events, *self._parser.finalize()[1]]
        found = [_said(item) for item in theirs.response_events_to_chunks(events)]
        self.tools += sum(piece.tool is not None for piece in found)
        return found

    @property
    def reason(self) -> str:
        """Why it ended."""
        if self.tools:
            return "tool_calls"
        return "stop" if self._pieces.stopped or self._last in self.wanted.ends else "length"

    @property
    def usage(self) -> CompletionUsage:
        prompt = len(self.wanted.prompt)
        return CompletionUsage(prompt_tokens=prompt, completion_tokens=self.new, total_tokens=prompt + self.new)

    # ---- in OpenAI's shapes

    async def whole(self) -> dict[str, Any]:
        """All at once."""
        pieces = [piece async for piece in self.said()]
        text = "".join(piece.text for piece in pieces)
        if not isinstance(self.body, ChatBody):
            choice = {"text": text, "index": 0, "logprobs": None, "finish_reason": self.reason}
            return self._text_chunk([choice], self.usage)
        tools = [piece.tool for piece in pieces if piece.tool is not None]
        calls = [ChatCompletionMessageToolCall(**self._tool(i, tool)) for i, tool in enumerate(tools)]
        return _CHAT._build_completion(
            self.id,
            text,
            self.to.name,
            finish_reason=self.reason,
            usage=self.usage,
            tool_calls=calls or None,  # type: ignore[arg-type] - theirs says dicts, and takes these
            reasoning_content="".join(piece.reasoning for piece in pieces) or None,
        )

    async def events(self) -> AsyncGenerator[str]:
        """As server-sent events; the last is [DONE]. An error on the way is an event too, as the status has been sent."""
        chat = isinstance(self.body, ChatBody)
        try:
            if chat:
                yield _CHAT._build_chunk_sse(self.id, role="assistant", content="", model=self.to.name)
            async for piece in self.said():
                yield self._chat_event(piece) if chat else _TEXT._build_chunk_sse(self.id, self.to.name, text=piece.text)
            if chat:
                yield _CHAT._build_chunk_sse(self.id, finish_reason=self.reason, model=self.to.name)
            else:
                yield _TEXT._build_chunk_sse(self.id, self.to.name, finish_reason=self.reason)
            if self.body.stream_options and self.body.stream_options.include_usage:
                yield _event(self._usage_chunk(chat))
        except Exception as wrong:  # noqa: BLE001 - the client is told, and the server goes on
            self.failed = wrong
            yield _event(error(500, f"the model failed: {wrong}"))
        yield "data: [DONE]\n\n"

    def _chat_event(self, piece: Said) -> str:
        tools = None
        if piece.tool is not None:
            tools = [ChoiceDeltaToolCall(index=self.tools - 1, **self._tool(self.tools - 1, piece.tool))]
        return _CHAT._build_chunk_sse(
            self.id,
            content=piece.text or None,
            model=self.to.name,
            tool_calls=tools,
            reasoning_content=piece.reasoning or None,
        )

    def _tool(self, index: int, tool: Any) -> dict[str, Any]:
        function = {"name": tool.name, "arguments": tool.arguments}
        return {"id": f"{self.id}-{index}", "type": "function", "function": function}

    def _text_chunk(self, choices: list[Any], usage: CompletionUsage | None) -> dict[str, Any]:
        answer = {"id": self.id, "object": "text_completion", "created": int(time.time()), "model": self.to.name}
        return {**answer, "choices": choices, "usage": usage and usage.model_dump(exclude_none=True)}

    def _usage_chunk(self, chat: bool) -> dict[str, Any]:
        chunk = self._text_chunk([], self.usage)
        return {**chunk, "object": "chat.completion.chunk"} if chat else chunk


_CHAT: Any = ChatCompletionHandler(None, None)  # type: ignore[arg-type] - only its shapes are used
_TEXT: Any = CompletionHandler(None, None)  # type: ignore[arg-type]


def _said(item: Any) -> Said:
    if isinstance(item, theirs.ToolCall):
        return Said(tool=item)
    return Said(reasoning=str(item)) if isinstance(item, theirs.ReasoningText) else Said(item)


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


def _tools(body: ChatBody) -> dict[str, Any]:
    """Newer releases cast the arguments of a tool call by its schema."""
    takes = inspect.signature(theirs.build_response_parser).parameters
    return {"tools": body.tools} if "tools" in takes else {}


def _defaults(config: Any) -> dict[str, Any]:
    """How the model's own generation config samples; without a word on it, as OpenAI's API does."""
    sampled = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}
    if not getattr(config, "do_sample", False):
        return sampled
    return {name: value if getattr(config, name, None) is None else getattr(config, name) for name, value in sampled.items()}
