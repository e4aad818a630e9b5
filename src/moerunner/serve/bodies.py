"""What clients may send, checked field by field, and the errors they get in OpenAI's form."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

MOST_STOPS = 4
MOST_MESSAGES = 4096
MOST_CHOICES = 128
MOST_LOGPROBS = 20


class Refused(Exception):
    """A request that is not served. status: of HTTP; the others as OpenAI's errors have them."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def to_dict(self) -> dict[str, Any]:
        return error(self.status, self.message, self.param, self.code)


def error(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """OpenAI's error object."""
    kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class Limits:
    """What the server takes. body_bytes: of one request. new_tokens: of one answer. waiting: requests beyond the running ones.

    body_seconds: in which a body must have come.
    """

    body_bytes: int = 4 * 2**20
    new_tokens: int = 4096
    running: int = 64
    waiting: int = 256
    body_seconds: float = 60.0


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True)
    include_usage: bool = False


class Body(BaseModel):
    """The fields that chat and text have in common. What changes nothing here may come; what would be ignored may not."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    n: int | None = Field(None, ge=1, le=MOST_CHOICES)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    # About the caller, not about the text.
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: Literal[False] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def stops(self) -> list[str]:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > MOST_STOPS or not all(stops):
            raise Refused(400, f"stop takes up to {MOST_STOPS} strings, none of them empty", param="stop")
        return stops

    def asked_tokens(self) -> int | None:
        return self.max_tokens

    def count(self) -> int:
        """Prompts in it."""
        return 1

    def asked_logprobs(self) -> int | None:
        """Of how many of the likeliest tokens beside the one written; None: of none at all."""
        raise NotImplementedError

    def bias(self, vocabulary: int) -> tuple[tuple[int, float], ...]:
        """What is added to the logits of some token ids."""
        found = self.logit_bias or {}
        for key in found:
            if not (key.isascii() and key.isdecimal() and len(key) <= 10 and int(key) < vocabulary):
                raise Refused(400, f"{key[:20]!r} is no token: the model has {vocabulary}", param="logit_bias")
        return tuple((int(key), value) for key, value in found.items())


class CompletionBody(Body):
    """Of /v1/completions."""

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    # Accepted in the one value that is what happens anyway.
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None
    suffix: None = None

    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, list) and self.prompt and not isinstance(self.prompt[0], int):
            return self.prompt  # type: ignore[return-value]
        return [self.prompt]  # type: ignore[list-item]

    def count(self) -> int:
        return len(self.prompts())

    def asked_logprobs(self) -> int | None:
        return self.logprobs


class TextPart(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")
    type: Literal["text"]
    text: str


class Function(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")
    name: str
    arguments: str


class ToolCallPart(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore")
    id: str | None = None
    type: Literal["function"] = "function"
    function: Function


class Message(BaseModel):
    """One of a chat's. Other keys, such as a name, go to the chat template."""

    model_config = ConfigDict(strict=True, extra="allow")
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    tool_calls: list[ToolCallPart] | None = None
    tool_call_id: str | None = None


class ResponseFormat(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")
    type: Literal["text"]


class ChatBody(Body):
    """Of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: int | None = Field(None, ge=1)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)

    def asked_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def asked_logprobs(self) -> int | None:
        if self.top_logprobs and not self.logprobs:
            raise Refused(400, "top_logprobs needs logprobs to be true", param="top_logprobs")
        return (self.top_logprobs or 0) if self.logprobs else None


B = TypeVar("B", bound=Body)


def parse(kind: type[B], raw: bytes) -> B:
    """The body, or the reason for which it is refused."""
    try:
        data = json.loads(raw, parse_constant=_no_constant)
    except (ValueError, RecursionError) as wrong:  # UnicodeDecodeError is a ValueError too
        raise Refused(400, f"the body is not JSON: {str(wrong) or 'it is nested too deeply'}") from wrong
    if not isinstance(data, dict):
        raise Refused(400, f"the body must be a JSON object, not {type(data).__name__}")
    try:
        return kind.model_validate(data)
    except ValidationError as wrong:
        raise _refusal(kind, wrong) from None
    except RecursionError:
        raise Refused(400, "the body is nested too deeply") from None


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON number")


def _refusal(kind: type[Body], wrong: ValidationError) -> Refused:
    """The first field at fault. Of a union every member complains: the first complaint is as good as any."""
    first = wrong.errors(include_url=False, include_context=False)[0]
    path = [
        str(p) for p in first["loc"] if p not in ("str", "int", "float") and not str(p).startswith(("list[", "constrained"))
    ]
    field = ".".join(path) or "body"
    if first["type"] == "extra_forbidden":
        message = f"{field} is not known here; known are {', '.join(sorted(kind.model_fields))}"
    elif first["type"] in ("literal_error", "none_required", "too_long"):
        message = f"{field} is not supported with this value: {first['msg']}"
    else:
        message = f"{field}: {first['msg']}"
    return Refused(400, message, param=field)
