"""Short conversations that every comparison is made on, where no rows of the user's own are given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from espalier.encode.template import ChatTemplate
from espalier.errors import TemplateError

QUESTIONS = (
    "Summarise in one sentence why the sky looks blue.",
    "Write a Python function that returns the larger of two numbers.",
    "用一句话介绍北京。",
    "List three fruits as a JSON array of strings.",
)


def prompt_ids(tokenizer: Any, template: ChatTemplate, messages: Sequence[dict[str, Any]]) -> list[int]:
    """The ids that training puts before the answer of this conversation."""
    text = template.render(messages, generation_prompt=True)
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def probe_prompts(tokenizer: Any, template: ChatTemplate) -> list[list[int]]:
    """The ids of QUESTIONS as prompts; what the template refuses is left out."""
    found = []
    for question in QUESTIONS:
        try:
            found.append(prompt_ids(tokenizer, template, [{"role": "user", "content": question}]))
        except TemplateError:
            continue
    return found
