"""From a checked body to the model and back: the handlers of Transformers' own server, with our engine behind them.

Kept of Transformers': messages to the chat template's form, reasoning and tool calls out of the text. Ours: everything
between, so that no field is ignored, a stop string stops, and a client that leaves ends its work.
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
from typing import Any

from transformers.cli.serving import utils as theirs
from transformers.cli.serving.chat_completion import ChatCompletionHandler

from moerunner.serve.bodies import Body, ChatBody, CompletionBody, Limits, Refused, error
from moerunner.serve.choices import Choice, Said
from moerunner.serve.metrics import Metrics
from moerunner.serve.work import Engine, Wanted, Work, ends_of

_COMPLETION_TOKENS = 16  # OpenAI's default for plain text; a chat may fill the context


class Answering:
    """One model's answers."""

    def __init__(self, model: Any, tokenizer: Any, name: str, engine: Engine, limits: Limits) -> None:
        self.model, self.tokenizer, self.name, self.engine, self.limits = model, tokenizer, name, engine, limits
        self._ends, self._defaults = ends_of(model, tokenizer), _defaults(model.generation_config)
        self._words = ThreadPoolExecutor(1, "tokenizer")  # one: a tokenizer may not be used from two threads
        self.metrics: Metrics
        self.open = 0  # texts that have been asked for and are not over

    async def begin(self, body: Body, started: float) -> Answer:
        """Tokenizes and admits. Raises `Refused`."""
        if body.model not in (None, self.name):
            message = f"the model {body.model!r} is not served here, {self.name!r} is"
            raise Refused(404, message, param="model", code="model_not_found")
        count, most = body.count() * (body.n or 1), self.limits.running + self.limits.waiting
        if count > most:
            raise Refused(400, f"{count} texts in one request: this server writes at most {most} at once", param="n")
        if self.open + count > most:
            raise Refused(429, f"{self.open} texts are being written or wait for it: try again later", code="overloaded")
        problem = self.engine.problem()
        if problem == "stopped":
            raise Refused(503, "the server is stopping", code="stopping")
        self.open += count
        try:
            prompts = await asyncio.get_running_loop().run_in_executor(self._words, self._prompts, body)
            return Answer(self, body, prompts, started)
        except BaseException:
            self.open -= count
            raise

    def _prompts(self, body: Body) -> list[list[int]]:
        try:
            if isinstance(body, ChatBody):
                return [self._chat(body)]
            assert isinstance(body, CompletionBody)
            return [self._tokens(given) for given in body.prompts()]
        except UnicodeEncodeError as wrong:
            raise Refused(400, f"the text holds half of a surrogate pair: {wrong.reason}", param="prompt") from wrong

    def _tokens(self, given: str | list[int]) -> list[int]:
        if isinstance(given, str):
            given.encode()
            return self.tokenizer(given or self.tokenizer.bos_token or "")["input_ids"]
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

    def parser(self, body: Body, prompt: list[int]) -> Any:
        """Of reasoning and tool calls in the text of a chat, None where the model has none."""
        if not isinstance(body, ChatBody) or theirs.get_response_template(self.tokenizer, self.model) is None:
            return None
        return theirs.build_response_parser(self.tokenizer, self.model, prompt, **_tools(body))

    def wanted(self, body: Body, prompt: list[int], number: int) -> Wanted:
        """What the engine is asked for. number: of this text among those of the prompt; each draws by a seed of its own."""
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
        return Wanted(
            prompt,
            asked,
            seed=None if body.seed is None else body.seed + number,
            ends=self._ends,
            bias=body.bias(self.model.config.get_text_config().vocab_size),
            presence=body.presence_penalty or 0.0,
            frequency=body.frequency_penalty or 0.0,
            logprobs=body.asked_logprobs(),
            **sampling,
        )


class Answer:
    """One answer: a text, or several for `n` and for several prompts, which are written at the same time."""

    def __init__(self, to: Answering, body: Body, prompts: list[list[int]], started: float) -> None:
        self.body, self._started = body, started
        chat = isinstance(body, ChatBody)
        name = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        wanted = [to.wanted(body, prompt, number) for prompt in prompts for number in range(body.n or 1)]
        stops, loop = body.stops(), asyncio.get_running_loop()
        self._choices = [
            Choice(i, to, Work(f"{name}-{i}", one, loop), stops, to.parser(body, one.prompt), chat=chat)
            for i, one in enumerate(wanted)
        ]
        self._prompt_tokens = sum(map(len, prompts))
        self._head = {"id": name, "created": int(time.time()), "model": to.name}
        self._object = "chat.completion" if chat else "text_completion"
        self.failed: BaseException | None = None

    def close(self) -> None:
        """Forgets the request, whether it has ended or not."""
        for choice in self._choices:
            choice.close()

    async def whole(self) -> dict[str, Any]:
        """All at once."""
        tasks = [asyncio.ensure_future(choice.whole(self._started)) for choice in self._choices]
        try:
            choices = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        return {**self._head, "object": self._object, "choices": choices, "usage": self._usage()}

    async def events(self) -> AsyncGenerator[str]:
        """As server-sent events; the last is [DONE]. An error on the way is an event too, as the status has been sent."""
        try:
            if isinstance(self.body, ChatBody):
                for choice in self._choices:
                    yield self._chunk([choice.first()])
            async with contextlib.aclosing(self._said()) as said:
                async for choice, piece in said:
                    yield self._chunk([choice.last() if piece is None else choice.piece(piece)])
            if self.body.stream_options and self.body.stream_options.include_usage:
                yield self._chunk([], usage=self._usage())
        except Exception as wrong:  # noqa: BLE001 - the client is told, and the server goes on
            self.failed = wrong
            yield _event(error(500, f"the model failed: {wrong}"))
        yield "data: [DONE]\n\n"

    async def _said(self) -> AsyncGenerator[tuple[Choice, Said | None]]:
        """The pieces of all texts as they come, None for the end of one."""
        arrived: asyncio.Queue[tuple[Choice, Said | Exception | None]] = asyncio.Queue()

        async def read(choice: Choice) -> None:
            end = None
            try:
                async for piece in choice.said(self._started):
                    arrived.put_nowait((choice, piece))
            except Exception as wrong:  # noqa: BLE001 - raised where it is read
                end = wrong
            arrived.put_nowait((choice, end))

        tasks = [asyncio.ensure_future(read(choice)) for choice in self._choices]
        try:
            left = len(tasks)
            while left:
                choice, piece = await arrived.get()
                if isinstance(piece, Exception):
                    raise piece
                left -= piece is None
                yield choice, piece
        finally:
            for task in tasks:
                task.cancel()

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> str:
        kind = self._object + ".chunk" * isinstance(self.body, ChatBody)
        return _event({**self._head, "object": kind, "choices": choices, **more})

    def _usage(self) -> dict[str, int]:
        new = sum(choice.new for choice in self._choices)
        return {"prompt_tokens": self._prompt_tokens, "completion_tokens": new, "total_tokens": self._prompt_tokens + new}


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
