"""One answer: from a request to text in pieces, cut at the request's stop texts; and the forms it is given in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from espalier.errors import TemplateError
from espalier.use.generate import Generated, model_length, stream
from espalier.use.probes import prompt_ids
from espalier.use.serving.models import Served
from espalier.use.serving.requests import ApiError, Ask


@dataclass(frozen=True, slots=True)
class Answer:
    """text: all of it. num_tokens: generated, the end token included. reason: "stop" or "length", as in the API."""

    text: str
    num_tokens: int
    reason: str


class StopText:
    """Lets text through up to the first of `stops`; holds back an end that may become one."""

    def __init__(self, stops: Sequence[str]):
        self._stops, self._held = stops, ""
        self.hit = False

    def push(self, piece: str) -> str:
        """What can be given out now."""
        if self.hit:
            return ""
        held = self._held + piece
        found = [place for stop in self._stops if (place := held.find(stop)) >= 0]
        if found:
            self.hit, self._held = True, ""
            return held[: min(found)]
        keep = max((_overlap(held, stop) for stop in self._stops), default=0)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def flush(self) -> str:
        """What was held back and became no stop text."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with, shorter than `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def prompt_of(served: Served, ask: Ask) -> list[int]:
    """The prompt's ids, those of training. Raises ApiError: the template refuses, or the model has no room."""
    layout = served.layouts[ask.model]
    try:
        ids = prompt_ids(layout.tokenizer, layout.template, ask.messages)
    except TemplateError as error:
        raise ApiError(400, f"the chat template refuses these messages: {error.what}", param="messages") from error
    if not ids:
        raise ApiError(400, "the messages make an empty prompt", param="messages")
    length = model_length(served.model)
    if len(ids) >= length:
        raise ApiError(
            400,
            f"the messages have {len(ids):,} tokens and the model holds {length:,}, the answer included",
            param="messages",
            code="context_length_exceeded",
        )
    return ids


def answer(
    served: Served, ask: Ask, ids: Sequence[int], given_up: Callable[[], bool], say: Callable[[str], None]
) -> Answer | None:
    """Generate the answer to `ids`; each piece of text goes to `say`. None where `given_up` said True before its end.

    For one thread at a time, since adapters share the model.
    """
    layout, stops, texts = served.layouts[ask.model], StopText(ask.stop), list[str]()

    def give(text: str) -> None:
        if text:
            texts.append(text)
            say(text)

    with served.active(ask.model) as model:
        pieces = stream(
            model,
            layout.tokenizer,
            ids,
            max_new_tokens=ask.max_new_tokens,
            stop_ids=layout.stop_ids,
            sampling=ask.sampling,
            ended=lambda: stops.hit or given_up(),
        )
        while True:
            try:
                give(stops.push(next(pieces)))
            except StopIteration as end:
                done: Generated = end.value
                break
    give(stops.flush())
    natural = done.stopped or stops.hit
    num_tokens = len(done.ids) + done.stopped
    if given_up() and not natural and num_tokens < ask.max_new_tokens:
        return None
    return Answer("".join(texts), num_tokens, "stop" if natural else "length")


def usage(num_prompt: int, num_answer: int) -> dict[str, int]:
    """Token counts as in the API."""
    return {"prompt_tokens": num_prompt, "completion_tokens": num_answer, "total_tokens": num_prompt + num_answer}


def completion(head: dict[str, Any], found: Answer, num_prompt: int) -> dict[str, Any]:
    """The API's `chat.completion`. head: id, created, model."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": found.text, "refusal": None},
        "logprobs": None,
        "finish_reason": found.reason,
    }
    return {**head, "object": "chat.completion", "choices": [choice], "usage": usage(num_prompt, found.num_tokens)}


def chunk(head: dict[str, Any], delta: dict[str, str], reason: str | None = None) -> dict[str, Any]:
    """The API's `chat.completion.chunk` with one choice."""
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
    return {**head, "object": "chat.completion.chunk", "choices": [choice]}
