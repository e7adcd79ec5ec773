"""A chat template as fixed texts around the turns, where it is no more than that; found by rendering markers.

user alone            start USER open
with a system text    system SYSTEM after_system USER open
with an empty one     empty_system USER open
over several turns    start USER asked ANSWER answered USER open
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from espalier.encode.template import ChatTemplate, Message, starts_with_bos
from espalier.errors import TemplateError

SYSTEM, FIRST, ANSWER, SECOND = "qSystemq", "qFirstq", "qAnswerq", "qSecondq"

# What a layout must render as the template does, besides the markers.
TEXTS = ("Hi", "Line one\n\n  line two\n", "你好, 🙂 {{ x }} {% y %}", '{"a": [1, 2]}', "The end.")


@dataclass(frozen=True, slots=True)
class Layout:
    """The texts of the table above; the three of a system text are None where the template refuses one."""

    start: str
    open: str
    asked: str
    answered: str
    system: str | None
    after_system: str | None
    empty_system: str | None

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt of a conversation of system (first or not at all), user and assistant turns in alternation."""
        text = ""
        for i, message in enumerate(messages):
            last = i == len(messages) - 1
            if message["role"] == "system":
                text += f"{self.system}{message['content']}" if message["content"] else ""
            elif message["role"] == "user":
                before = self.start if i == 0 else self.answered
                if i == 1 and messages[0]["role"] == "system":
                    before = str(self.after_system if messages[0]["content"] else self.empty_system)
                text += before + message["content"] + (self.open if last else self.asked)
            else:
                text += message["content"]
        return text


def layout_of(template: ChatTemplate) -> Layout | None:
    """The layout that gives what the template gives on every probe, or None where there is none.

    A start token that the tokenizer adds by itself is left out, as servers add it.
    """
    try:
        layout = _probed(template)
        return layout if layout is not None and _agrees(layout, template) else None
    except TemplateError:
        return None


def trims(template: ChatTemplate) -> bool:
    """True where the template takes blanks off the ends of a text, which a layout does not."""
    return "  x  " not in template.render([_user("  x  ")], generation_prompt=True)


def prompt_without_bos(template: ChatTemplate, messages: Sequence[Message]) -> str:
    """The template's prompt, without the start token that the server's tokenizer adds."""
    text = template.render(messages, generation_prompt=True)
    return text.removeprefix(str(template.tokenizer.bos_token)) if server_adds_bos(template) else text


def server_adds_bos(template: ChatTemplate) -> bool:
    """Whether a server's tokenizer should put the start token before a prompt: where the trained prompts begin so.

    A tokenizer that adds one to plain texts must not do it to a layout that was trained without.
    """
    if not starts_with_bos(template.tokenizer):
        return False
    try:
        prompt = template.render([_user("a")], generation_prompt=True)
    except TemplateError:
        return True
    return prompt.startswith(str(template.tokenizer.bos_token))


def _probed(template: ChatTemplate) -> Layout | None:
    long = _split(template, [_user(FIRST), _assistant(ANSWER), _user(SECOND)], FIRST, ANSWER, SECOND)
    if long is None:
        return None
    start, asked, answered, opened = long
    try:
        short = _split(template, [_system(SYSTEM), _user(FIRST)], SYSTEM, FIRST)
        empty = _split(template, [_system(""), _user(FIRST)], FIRST)
    except TemplateError:
        return Layout(start, opened, asked, answered, None, None, None)
    if short is None or empty is None:
        return None
    return Layout(start, opened, asked, answered, short[0], short[1], empty[0])


def _split(template: ChatTemplate, messages: Sequence[Message], *marks: str) -> list[str] | None:
    """The texts around the marks, each of which must be there once and in this order."""
    rest, found = prompt_without_bos(template, messages), []
    for mark in marks:
        if rest.count(mark) != 1:
            return None
        before, rest = rest.split(mark)
        found.append(before)
    return [*found, rest]


def _agrees(layout: Layout, template: ChatTemplate) -> bool:
    plain = [[_user(text)] for text in TEXTS]
    plain.append([_user(TEXTS[1]), _assistant(TEXTS[2]), _user(TEXTS[3])])
    plain.append([_user("a"), _assistant("b"), _user("c"), _assistant(TEXTS[2]), _user(TEXTS[0])])
    with_system = [[_system(text), *turns] for text in (*TEXTS[2:], "") for turns in plain]
    tried = [*plain, *(with_system if layout.system is not None else [])]
    return all(layout.render(turns) == prompt_without_bos(template, turns) for turns in tried)


def _user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def _system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}
