"""Which characters of a rendered conversation are learnt, on any chat template, without marker tokens.

For each trained assistant turn i:

    prompt_i = render(messages[:i], generation prompt)       what chat sends at that moment
    upto_i   = render(messages[:i + 1])                      the conversation once the answer is there

prompt_i must begin upto_i; what follows, through exactly one turn-end token, is learnt. Several turns share one row
where each upto_i begins the whole text. Where a template rewrites earlier turns (drops their reasoning), that fails
and each trained turn becomes a row of its own, as chat will send it.

Rendering a prefix for every turn of every row would be slow. So the fixed pieces that a template writes between the
texts are found once for a sequence of roles, with placeholders for the texts. A row of a template that only copies
texts needs no rendering then; one of any other template needs two, which prove that the pieces hold for it. Rows for
which they do not hold (trimmed texts, tools) are rendered turn by turn.

Where prompt_i does not begin upto_i, because the prompt opens the reasoning ('<think>\\n') and history leaves it out,
an answer that begins with that opening is continued from the prompt, verbatim; any other is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from espalier.data.formats import Example
from espalier.encode.template import ChatTemplate, Message, common_prefix_length
from espalier.errors import TemplateError

REWRITES = "the template rewrites earlier turns: each answer became a row of its own, as chat will send it"
TRIMMED = "the template trims or changes a text; learnt is what the template writes"
EMPTY_ANSWER = "an empty assistant turn is not learnt"

# Contents that a template may look into (<think>, [TOOL], /no_think); their rows are rendered turn by turn.
_MARKUP = re.compile(r"[<\[]|/\w*think")


@dataclass(frozen=True, slots=True)
class Span:
    """Characters [start, end) of a text are learnt, with this weight; message is the turn's index."""

    start: int
    end: int
    weight: float = 1.0
    message: int = 0


@dataclass(frozen=True, slots=True)
class Rendered:
    """The text of one row, cut after its last learnt character, and its learnt spans in order."""

    text: str
    spans: tuple[Span, ...]
    example: Example
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Skeleton:
    """Fixed pieces around the texts of a sequence of roles: text = pieces[0] + content[0] + pieces[1] + ...

    lead[i]: characters at the end of pieces[i] that belong to answer i; tail[i]: characters of pieces[i + 1] through
    the turn end. One entry for each trained turn.
    """

    pieces: tuple[str, ...]
    lead: dict[int, int]
    tail: dict[int, int]


class RowRefused(Exception):
    """This row cannot be encoded; the message is the reason of its BadRow."""


def trained_turns(example: Example, train_on: str = "all") -> list[int]:
    """Indices of the assistant turns to learn: flagged, and not empty; with train_on 'last' the last of them."""
    turns = [
        i
        for i, message in enumerate(example.messages)
        if message["role"] == "assistant" and example.train[i] and has_substance(message)
    ]
    return turns[-1:] if train_on == "last" else turns


def has_substance(message: Message) -> bool:
    """False for an answer that says nothing: learning it would teach to stop at once."""
    content = message.get("content")
    return bool(message.get("tool_calls")) or bool(content.strip() if isinstance(content, str) else content)


def render_rows(template: ChatTemplate, example: Example, train_on: str = "all") -> list[Rendered]:
    """The row or rows that one conversation gives. Raises RowRefused with the reason."""
    turns = trained_turns(example, train_on)
    if not turns:
        raise RowRefused("no answer (no assistant turn with a text to learn)")
    flagged = sum(m["role"] == "assistant" and flag for m, flag in zip(example.messages, example.train, strict=True))
    notes = (EMPTY_ANSWER,) if train_on == "all" and flagged > len(turns) else ()
    try:
        return _render(template, example, turns, notes)
    except TemplateError as error:
        raise RowRefused(f"the template refuses the conversation ({error.what})") from error


def one_turn(example: Example, turn: int) -> Example:
    """The conversation as it stands when answer `turn` is due, with nothing else to learn."""
    train = tuple(i == turn for i in range(turn + 1))
    return replace(example, messages=example.messages[: turn + 1], train=train, weights=example.weights[: turn + 1])


def _render(template: ChatTemplate, example: Example, turns: list[int], notes: tuple[str, ...]) -> list[Rendered]:
    row = _by_skeleton(template, example, turns, notes) or _by_turns(template, example, turns, notes)
    if row is not None:
        return [row]
    rows = []
    for turn in turns:
        rows += _render(template, one_turn(example, turn), [turn], (*notes, REWRITES))
    return rows


def _weight(example: Example, turn: int) -> float:
    return example.weights[turn] if example.weights else 1.0


def _by_skeleton(template: ChatTemplate, example: Example, turns: list[int], notes: tuple[str, ...]) -> Rendered | None:
    """The row by its fixed pieces, or None where they do not hold for it."""
    messages = example.messages[: turns[-1] + 1]
    simple = all(len(m) == 2 and isinstance(m.get("content"), str) for m in messages) and not example.tools
    if not simple or (len(turns) > 1 and any(_MARKUP.search(m["content"]) for m in messages)):
        return None
    skeleton = _skeleton(template, tuple(m["role"] for m in messages), tuple(turns))
    if skeleton is None:
        return None
    parts, spans, position = [], [], 0
    for i, message in enumerate(messages):
        piece, content = skeleton.pieces[i], message["content"]
        start = position + len(piece)
        if i in skeleton.lead:
            end = start + len(content) + skeleton.tail[i]
            spans.append(Span(start - skeleton.lead[i], end, _weight(example, i), i))
        parts += [piece, content]
        position = start + len(content)
    text = "".join([*parts, skeleton.pieces[-1]])
    last = spans[-1]
    if not (template.only_copies and all(m["content"] for m in messages)):
        if template.render(messages) != text:
            return None
        if turns[-1] > 0 and template.render(messages[:-1], generation_prompt=True) != text[: last.start]:
            return None
    return Rendered(text[: last.end], tuple(spans), example, notes)


def _skeleton(template: ChatTemplate, roles: tuple[str, ...], turns: tuple[int, ...]) -> _Skeleton | None:
    cache = template._skeletons
    key = (roles, turns)
    if key not in cache:
        if len(cache) > 1000:  # conversations of ever new shapes must not fill the memory
            cache.clear()
        cache[key] = _find_skeleton(template, roles, turns)
    found: _Skeleton | None = cache[key]
    return found


def _find_skeleton(template: ChatTemplate, roles: tuple[str, ...], turns: tuple[int, ...]) -> _Skeleton | None:
    marks = [f"\ue000{i}\ue001" for i in range(len(roles))]
    messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
    full = template.render(messages)
    pieces = re.split("\ue000\\d+\ue001", full)
    if re.findall("\ue000\\d+\ue001", full) != marks:
        return None
    lead, tail = {}, {}
    for turn in turns:
        place = _place(template, messages, turn, ())
        if place is None or not full.startswith(place.text[: place.end]):
            return None
        content = full.index(marks[turn])
        lead[turn] = content - place.start
        tail[turn] = place.end - content - len(marks[turn])
    return _Skeleton(tuple(pieces), lead, tail)


@dataclass(frozen=True, slots=True)
class _Place:
    text: str
    start: int
    end: int


def _place(template: ChatTemplate, messages: Sequence[Message], turn: int, tools: Sequence[Any]) -> _Place | None:
    """Answer `turn` in upto_turn; None where the prompt does not begin it. Raises RowRefused without an end token."""
    text = template.render(messages[: turn + 1], tools=tools)
    if turn > 0:
        prompt = template.render(messages[:turn], generation_prompt=True, tools=tools)
        if not text.startswith(prompt):
            return _place_after_opening(template, messages[turn], prompt, text)
        start = len(prompt)
    else:  # chat never sends an empty conversation: the answer's own text says where it begins
        content = messages[0].get("content")
        start = text.find(content.strip()) if isinstance(content, str) else -1
        if start < 0:
            return None
    end = template.turn_end(text[start:])
    if end is None:
        raise RowRefused(f"no end token (the template writes none after the answer: ...{text[-20:]!r})")
    return _Place(text, start, start + end)


def _place_after_opening(template: ChatTemplate, message: Message, prompt: str, text: str) -> _Place | None:
    """An answer whose opening the prompt already writes ('<think>\\n'), while the template leaves it out of history.

    What the prompt has beyond the conversation is that opening; an answer that begins with it is continued verbatim.
    """
    shared = prompt[: common_prefix_length(prompt, text)]
    content, opening = message.get("content"), prompt[len(shared) :]
    end = template.turn_end(text)
    if end is None or not isinstance(content, str) or not content.startswith(opening):
        return None
    end_token = list(template.special_pattern.finditer(text, 0, end))[-1].group()
    whole = shared + content + end_token
    return _Place(whole, len(prompt), len(whole))


def _by_turns(template: ChatTemplate, example: Example, turns: list[int], notes: tuple[str, ...]) -> Rendered | None:
    """The row by rendering each turn, or None where several turns do not fit in one row."""
    spans = []
    full = ""
    for turn in reversed(turns):  # the last turn's text is that of the row
        place = _place(template, example.messages, turn, example.tools)
        if place is None:
            if len(turns) > 1:
                return None
            raise RowRefused("the template's prompt does not begin the conversation that it renders")
        full = full or place.text
        if not full.startswith(place.text[: place.end]):
            return None
        spans.append(Span(place.start, place.end, _weight(example, turn), turn))
    spans.reverse()
    changed = False
    for message in example.messages[: turns[-1] + 1]:
        content = message.get("content")
        changed = changed or (isinstance(content, str) and content not in full)
    text = full[: spans[-1].end]
    return Rendered(text, tuple(spans), example, (*notes, TRIMMED) if changed else notes)


def render_text(template: ChatTemplate, example: Example, train_on: str = "all") -> Rendered:
    """A row that holds its finished text: the answers stand between the template's answer marker and its end token.

    The text stays verbatim but for its start: exactly one start token where the template writes one. Raises
    RowRefused where a marker or an end token is missing.
    """
    text = example.text
    assert text is not None
    marker, end_token, start_token = text_markers(template)
    while start_token and text.startswith(start_token * 2):
        text = text[len(start_token) :]
    if start_token and not text.startswith(start_token):
        text = start_token + text
    spans, position = [], 0
    while (found := text.find(marker, position)) >= 0:
        start = found + len(marker)
        end = text.find(end_token, start)
        if end < 0:
            raise RowRefused(f"no end token (an answer has no {end_token!r} after it)")
        if text[start:end].strip():
            spans.append(Span(start, end + len(end_token), example.weights[0] if example.weights else 1.0))
        position = end + len(end_token)
    if not spans:
        raise RowRefused(f"no answer (the text holds no {marker!r} with a text after it)")
    if train_on == "last":
        spans = spans[-1:]
    return Rendered(text[: spans[-1].end], tuple(spans), example)


@lru_cache(maxsize=8)
def text_markers(template: ChatTemplate) -> tuple[str, str, str]:
    """(answer marker, end token, start token or '') of a template: '<s>Assistant:', '</s>', '<s>' for atom."""
    mark = "\ue0000\ue001"
    user, answer = {"role": "user", "content": mark}, {"role": "assistant", "content": "\ue0001\ue001"}
    try:
        prompt = template.render([user], generation_prompt=True)
        whole = template.render([user, answer])
    except TemplateError as error:
        raise RowRefused(f"the template refuses the conversation ({error.what})") from error
    after = prompt[prompt.index(mark) + len(mark) :]
    specials = list(template.special_pattern.finditer(after))
    marker = after[specials[-1].start() :] if specials else after.lstrip("\n")
    region = whole[len(prompt) :]
    end = template.turn_end(region)
    assert end is not None  # resolve_template has seen to it
    last = list(template.special_pattern.finditer(region[:end]))[-1]
    bos = template.tokenizer.bos_token
    return marker, last.group(), bos if bos and prompt.startswith(bos) else ""
