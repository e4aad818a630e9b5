"""One request on its way: what it asks for, and where its tokens arrive."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True)
class Wanted:
    """What a request asks of the model.

    prompt: token ids. max_new_tokens: at most so many. temperature: 0 takes the likeliest token. top_p, top_k: narrow the
    sampling. seed: makes it repeatable, whatever else is in the batch. ends: ids that end the text. bias: (id, what is added
    to its logit). presence, frequency: taken from the logit of a token that has come, once and for each time. logprobs: of
    the tokens written and of so many likeliest ones; None: of none.
    """

    prompt: list[int]
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    ends: frozenset[int] = frozenset()
    bias: tuple[tuple[int, float], ...] = ()
    presence: float = 0.0
    frequency: float = 0.0
    logprobs: int | None = None


@dataclass(frozen=True)
class Scored:
    """A token that was written: the natural logarithm of the model's own probability of it, and the likeliest (id, same)."""

    id: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...]


@dataclass(eq=False)
class Work:
    """A request inside an engine. `put` may be called from any thread; `arrivals` is read on the loop.

    arrivals: lists of new token ids, then None at the end, or the error that ended it. scores: of the tokens that have
    arrived and maybe more, if they were asked for.
    """

    id: str
    wanted: Wanted
    loop: asyncio.AbstractEventLoop
    arrivals: asyncio.Queue[list[int] | BaseException | None] = field(default_factory=asyncio.Queue)
    scores: list[Scored] = field(default_factory=list)
    seen: int = 0
    over: bool = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Work:
        """Itself: Transformers copies a request that lost its place in the cache, and its tokens still go here."""
        return self

    def put(self, item: list[int] | BaseException | None) -> None:
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.arrivals.put_nowait, item)


class Engine(Protocol):
    """Runs many requests on one model. name: how, in words. capacity: tokens that one request may have, prompt and answer."""

    name: str
    capacity: int

    def start(self) -> None: ...

    def submit(self, work: Work) -> None:
        """Begins a request. Raises RuntimeError if the engine has stopped."""
        ...

    def cancel(self, work: Work) -> None:
        """Forgets a request; what it holds is freed. One that is over is left alone."""
        ...

    def running(self) -> int:
        """Requests that are being computed now."""
        ...

    def problem(self) -> str | None:
        """Why no request can be run, None while they can."""
        ...

    def stop(self) -> None:
        """Ends the engine at once."""
        ...


def ends_of(model: Any, tokenizer: Any) -> frozenset[int]:
    """The ids that end a text, by the generation config, else by the tokenizer."""
    given = getattr(model.generation_config, "eos_token_id", None)
    if given is None:
        given = getattr(tokenizer, "eos_token_id", None)
    return frozenset(() if given is None else given if isinstance(given, Sequence) else (given,))
