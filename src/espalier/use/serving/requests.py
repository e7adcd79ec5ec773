"""The body of a chat request: read, and refused by field where it asks for what is not done here.

The form is that of OpenAI's chat completions API.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from espalier.use.generate import Sampling

MAX_STOPS = 4  # OpenAI's own limit
# Below this a temperature would overflow in the division, and its answers are the greedy ones.
GREEDY_BELOW = 1e-4
ROLES = ("system", "developer", "user", "assistant")
# Fields without effect on the answer: for the provider's records and caches.
RECORDS = {"user", "metadata", "safety_identifier", "prompt_cache_key"}
# Values of other fields that ask for what is done anyway.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "store": (False,),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
}


class ApiError(Exception):
    """An error as OpenAI's API gives it: {"error": {"message", "type", "param", "code"}}, with an HTTP status."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers or {}
        kind = "server_error" if status >= 500 else "authentication_error" if status == 401 else "invalid_request_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Fields(BaseModel):
    """Values of exactly their type; other fields are kept, so that they can be refused by name."""

    model_config = ConfigDict(strict=True, extra="allow")


class Message(Fields):
    role: str
    content: Any = None


class StreamOptions(Fields):
    include_usage: bool | None = None


class ChatRequest(Fields):
    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    stop: Any = None
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


@dataclass(frozen=True, slots=True)
class Ask:
    """A request that can be answered. max_new_tokens: the request's limit or the server's, whichever is lower."""

    model: str
    messages: tuple[dict[str, str], ...]
    max_new_tokens: int
    sampling: Sampling
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool


def checked(request: ChatRequest, models: Collection[str], limit: int) -> Ask:
    """The request in our terms. limit: the server's --max_new_tokens. Raises ApiError that names the field."""
    if request.model not in models:
        there = ", ".join(models)
        message = f"there is no model {request.model[:80]!r} here; there is {there}"
        raise ApiError(404, message, param="model", code="model_not_found")
    _refuse_extra(request, "")
    if request.stream_options is not None:
        _refuse_extra(request.stream_options, "stream_options.")
        if not request.stream:
            raise _wrong("stream_options", "it is for answers that are streamed: set 'stream' to true or leave it out")
    most, also = request.max_tokens, request.max_completion_tokens
    if most is not None and also is not None and most != also:
        raise _wrong("max_tokens", f"it is {most} and max_completion_tokens is {also}; give one of them")
    temperature = request.temperature or 0.0
    return Ask(
        model=request.model,
        messages=tuple(_message(message, number) for number, message in enumerate(request.messages)),
        max_new_tokens=min(limit, most or also or limit),
        sampling=Sampling(
            temperature=0.0 if temperature < GREEDY_BELOW else temperature,
            top_p=1.0 if request.top_p is None else request.top_p,
            seed=secrets.randbits(63) if request.seed is None else request.seed,
        ),
        stop=_stops(request.stop),
        stream=bool(request.stream),
        include_usage=bool(request.stream_options and request.stream_options.include_usage),
    )


def _wrong(field: str, message: str) -> ApiError:
    return ApiError(400, f"{field}: {message}", param=field)


def _refuse_extra(fields: Fields, prefix: str) -> None:
    for name, value in (fields.model_extra or {}).items():
        if value is None or value in ([], {}) or (not prefix and (name in RECORDS or value in NEUTRAL.get(name, ()))):
            continue
        what = f"{value!r} is not done here" if name in NEUTRAL else "it is not done here"
        raise ApiError(
            400, f"{prefix}{name}: {what[:200]}; leave it out", param=prefix + name, code="unsupported_value"
        )


def _message(message: Message, number: int) -> dict[str, str]:
    place = f"messages[{number}]"
    if message.role not in ROLES:
        raise _wrong(f"{place}.role", f"unknown role {message.role[:80]!r}; there are {', '.join(ROLES)}")
    _refuse_extra(message, f"{place}.")
    return {"role": message.role, "content": _text(message.content, f"{place}.content")}


def _text(content: Any, place: str) -> str:
    """The text of a message; text parts are put one behind the other, as in rows for training."""
    if isinstance(content, list):
        return "".join(_part(part, f"{place}[{number}]") for number, part in enumerate(content))
    if not isinstance(content, str):
        raise _wrong(place, "a text is expected, or a list of text parts")
    return _whole(content, place)


def _part(part: Any, place: str) -> str:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise _wrong(place, 'a part {"type": "text", "text": ...} is expected')
    if part["type"] != "text":
        raise ApiError(400, f"{place}.type: {part['type'][:40]!r} parts are not done here; only text is", param=place)
    if not isinstance(part.get("text"), str):
        raise _wrong(f"{place}.text", "a text is expected")
    return _whole(part["text"], f"{place}.text")


def _whole(text: str, place: str) -> str:
    """`text`, unless it holds half a character, which JSON can spell and no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise _wrong(place, "it holds half of a surrogate pair, which is no character") from None
    return text


def _stops(stop: Any) -> tuple[str, ...]:
    stops = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(stops, list) or not all(isinstance(text, str) and text for text in stops):
        raise _wrong("stop", "a text is expected, or a list of texts, none of them empty")
    if len(stops) > MAX_STOPS:
        raise _wrong("stop", f"{len(stops)} texts; {MAX_STOPS} at most")
    return tuple(stops)
