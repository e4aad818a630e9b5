"""One text of an answer, being written: from tokens to text, reasoning and tool calls, and OpenAI's shapes for them."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transformers.cli.serving import utils as theirs

from moerunner.serve.text import Pieces
from moerunner.serve.work import Scored, Work

if TYPE_CHECKING:
    from moerunner.serve.answers import Answering


@dataclass
class Said:
    """A piece of a text: its words, reasoning or a whole tool call.

    scores: of the tokens that brought it, if asked for, each with the token before it.
    """

    text: str = ""
    reasoning: str = ""
    tool: Any = None
    scores: list[tuple[int, Scored]] = field(default_factory=list)


class Choice:
    """A text with the place that it has in its answer."""

    def __init__(self, index: int, to: Answering, work: Work, stops: Sequence[str], parser: Any, *, chat: bool) -> None:
        """parser: of reasoning and tool calls, None for plain text."""
        self.index, self.wanted, self.chat = index, work.wanted, chat
        self._to, self._work, self._parser = to, work, parser
        self._pieces = Pieces(to.tokenizer, stops, special=parser is not None)
        self.new, self._tools = 0, 0
        self._last, self._offset, self._closed = work.wanted.prompt[-1], 0, False

    async def said(self, started: float) -> AsyncGenerator[Said]:
        """The text, piece by piece. However it ends, the engine is done with it afterwards. started: when it was asked for."""
        metrics, now = self._to.metrics, time.perf_counter
        try:
            self._to.engine.submit(self._work)
            metrics.prompt_tokens.inc(len(self.wanted.prompt))
            for piece in self._parsed(None):
                yield piece
            last = started
            while not self._pieces.stopped:
                item = await self._work.arrivals.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    break
                (metrics.between_tokens_seconds if self.new else metrics.first_token_seconds).observe(now() - last)
                scores = zip([self._last, *item], self._work.scores[self.new : self.new + len(item)], strict=False)
                self.new, self._last, last = self.new + len(item), item[-1], now()
                metrics.new_tokens.inc(len(item))
                pieces = self._parsed(self._pieces.add(item))
                if likely := [(before, score) for before, score in scores if score.id not in self.wanted.ends]:
                    pieces = pieces or [Said()]  # the text waits for the rest of a character or of a stop string
                    pieces[0].scores = likely
                for piece in pieces:
                    yield piece
            for piece in self._parsed(self._pieces.end(), end=True):
                yield piece
        finally:
            self.close()

    def close(self) -> None:
        """Forgets the request, whether it has ended or not; once."""
        if not self._closed:
            self._closed = True
            self._to.open -= 1
            self._to.engine.cancel(self._work)

    def _parsed(self, text: str | None, *, end: bool = False) -> list[Said]:
        """What a piece of text says. text: None at the start."""
        if self._parser is None:
            return [Said(text)] if text else []
        events = self._parser.initial_events if text is None else self._parser.feed(text) if text else []
        if end:
            with contextlib.suppress(ValueError, RuntimeError):  # the text ended inside a tool call
                events = [*events, *self._parser.finalize()[1]]
        found = [_said(item) for item in theirs.response_events_to_chunks(events)]
        self._tools += sum(piece.tool is not None for piece in found)
        return found

    # ---- in OpenAI's shapes

    async def whole(self, started: float) -> dict[str, Any]:
        """All at once."""
        found = [piece async for piece in self.said(started)]
        text = "".join(piece.text for piece in found)
        logprobs = self._logprobs([score for piece in found for score in piece.scores])
        if not self.chat:
            return self._shape({"text": text}, logprobs, self._reason)
        message: dict[str, Any] = {"role": "assistant", "content": text}
        tools = [piece.tool for piece in found if piece.tool is not None]
        if tools:
            message["tool_calls"] = [self._call(i, tool) for i, tool in enumerate(tools)]
        if reasoning := "".join(piece.reasoning for piece in found):
            message["reasoning_content"] = reasoning
        return self._shape({"message": message}, logprobs, self._reason)

    def first(self) -> dict[str, Any]:
        """What a chat's stream begins with."""
        return self._shape({"delta": {"role": "assistant", "content": ""}})

    def piece(self, said: Said) -> dict[str, Any]:
        """A piece in a stream."""
        logprobs = self._logprobs(said.scores) if said.scores else None
        if not self.chat:
            return self._shape({"text": said.text}, logprobs)
        delta: dict[str, Any] = {}
        if said.tool is not None:
            delta["tool_calls"] = [{"index": self._tools - 1, **self._call(self._tools - 1, said.tool)}]
        if said.reasoning:
            delta["reasoning_content"] = said.reasoning
        if said.text or not delta:
            delta["content"] = said.text
        return self._shape({"delta": delta}, logprobs)

    def last(self) -> dict[str, Any]:
        """What a stream ends with."""
        return self._shape({"delta": {}} if self.chat else {"text": ""}, reason=self._reason)

    @property
    def _reason(self) -> str:
        """Why the text ended."""
        if self._tools:
            return "tool_calls"
        return "stop" if self._pieces.stopped or (self._last in self.wanted.ends and self.new) else "length"

    def _shape(self, said: dict[str, Any], logprobs: Any = None, reason: str | None = None) -> dict[str, Any]:
        return {"index": self.index, **said, "logprobs": logprobs, "finish_reason": reason}

    def _call(self, number: int, tool: Any) -> dict[str, Any]:
        function = {"name": tool.name, "arguments": tool.arguments}
        return {"id": f"{self._work.id}-{number}", "type": "function", "function": function}

    def _logprobs(self, scores: list[tuple[int, Scored]]) -> dict[str, Any] | None:
        if self.wanted.logprobs is None:
            return None
        if self.chat:
            content = [
                self._token(before, s.id, s.logprob) | {"top_logprobs": [self._token(before, *one) for one in s.likeliest]}
                for before, s in scores
            ]
            return {"content": content, "refusal": None}
        words = [self._word(before, s.id) for before, s in scores]
        *offsets, self._offset = itertools.accumulate(map(len, words), initial=self._offset)
        return {
            "tokens": words,
            "token_logprobs": [s.logprob for _, s in scores],
            "top_logprobs": [
                {self._word(before, id): logprob for id, logprob in (*s.likeliest, (s.id, s.logprob))} for before, s in scores
            ],
            "text_offset": offsets,
        }

    def _token(self, before: int, id: int, logprob: float) -> dict[str, Any]:
        word = self._word(before, id)
        return {"token": word, "logprob": logprob, "bytes": None if _CUT in word else list(word.encode())}

    def _word(self, before: int, id: int) -> str:
        """A token's text behind another: alone it may lose a space, and a part of a character is none."""
        context = self._to.tokenizer.decode([before])
        if _CUT in context:
            return self._to.tokenizer.decode([id])
        return self._to.tokenizer.decode([before, id])[len(context) :]


_CUT = "\ufffd"


def _said(item: Any) -> Said:
    if isinstance(item, theirs.ToolCall):
        return Said(tool=item)
    return Said(reasoning=str(item)) if isinstance(item, theirs.ReasoningText) else Said(item)
