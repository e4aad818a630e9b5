"""What comes out of a batch: each row's tokens up to its end, its text as it grows, and the time of the first token."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_BESIDE = 8  # tokens more than a stop text has characters: some are no character of their own


class Rows:
    """Collects the tokens of every row; Transformers' loop calls it as its streamer.

    ends: tokens that end a row. stops: texts that do. stream: called with each piece of a row's text; if there are several
    prompts with the row's number and the piece, and with an empty piece when the row ends.
    """

    def __init__(
        self,
        tokenizer: Any,
        count: int,
        ends: set[int],
        stops: Sequence[str],
        stream: Callable[..., None] | None,
        *,
        several: bool,
    ) -> None:
        self.began, self.first_token = False, 0.0
        self._rows = [_Row(tokenizer, ends, stops, _stream_of(tokenizer, stream, i if several else None)) for i in range(count)]

    def put(self, tokens: Tensor) -> None:
        """The next token of every row, [B]; Transformers puts the prompts first, [B, T]."""
        if tokens.ndim > 1:
            return
        if not self.began:
            self.began, self.first_token = True, time.perf_counter()
        for row, token in zip(self._rows, tokens.tolist(), strict=True):
            row.add(token)

    def end(self) -> None:
        for row in self._rows:
            row.end()

    def finish(self, new: Tensor) -> None:
        """new: [B, T], all that was made; only where nothing was put one by one is it looked at."""
        if not self.began:
            for tokens in new.mT.cpu():
                self.put(tokens)
        self.end()

    @property
    def new_tokens(self) -> int:
        return sum(len(row.tokens) for row in self._rows)

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(row.text() for row in self._rows)


class _Row:
    def __init__(self, tokenizer: Any, ends: set[int], stops: Sequence[str], stream: Any) -> None:
        self.tokens: list[int] = []
        self._tokenizer, self._ends, self._stops, self._done = tokenizer, ends, stops, False
        self._tail = max((len(text) for text in stops), default=0) + _BESIDE
        self._stream = stream

    def add(self, token: int) -> None:
        if self._done:
            return
        self.tokens.append(token)
        if self._stream is not None:
            self._stream.put(torch.tensor([token]))
        if token in self._ends or (self._stops and self._stopped()):
            self.end()

    def end(self) -> None:
        if not self._done and self._stream is not None:
            self._stream.end()
        self._done = True

    def text(self) -> str:
        return "" if self._tokenizer is None else self._tokenizer.decode(self.tokens, skip_special_tokens=True)

    def _stopped(self) -> bool:
        tail = self._tokenizer.decode(self.tokens[-self._tail :])
        return any(stop in tail for stop in self._stops)


def _stream_of(tokenizer: Any, stream: Callable[..., None] | None, row: int | None) -> Any:
    """Transformers' text streamer with a callback instead of print; row: its number, where there are several."""
    if tokenizer is None or stream is None:
        return None
    from transformers import TextStreamer

    class Streamer(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            if row is None:
                if text:
                    stream(text)
                return
            if text:
                stream(row, text)
            if stream_end:
                stream(row, "")

    return Streamer(tokenizer, skip_special_tokens=True)
