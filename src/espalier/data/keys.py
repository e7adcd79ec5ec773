"""Keys of a row's prompt and of the whole row: what the check of data files compares instead of the texts.

The prompt is everything before the first answer that is learnt.
"""

from __future__ import annotations

import hashlib
import json
import re

from espalier.data.formats import Example

# In a row of finished text the template's markers divide prompt and answer; these are the common ones.
_TEXT_ANSWER = re.compile(
    r"<s>Assistant:|<\|im_start\|>assistant|<\|start_header_id\|>assistant|\[/INST\]|<\|assistant\|>"
)
_ENCODER = json.JSONEncoder(ensure_ascii=False, sort_keys=True)


def prompt_text(example: Example) -> str:
    """The prompt in one string; different prompts give different strings."""
    if example.text is not None:
        marker = _TEXT_ANSWER.search(example.text)
        return example.text[: marker.end()] if marker else example.text
    first = example.train.index(True) if True in example.train else len(example.train)
    return _canonical(example, 0, first)


def row_text(example: Example, prompt: str | None = None) -> str:
    """Prompt and answers in one string; different conversations give different strings. `prompt`: known already."""
    if example.text is not None:
        return example.text
    prompt = prompt_text(example) if prompt is None else prompt
    first = example.train.index(True) if True in example.train else len(example.train)
    return prompt + _canonical(example, first, len(example.messages))


def _canonical(example: Example, start: int, end: int) -> str:
    """Messages one behind the other. A text follows its length, JSON begins with a bracket: unambiguous."""
    parts = []
    if example.tools and start == 0:
        parts.append(_ENCODER.encode(example.tools))
    for message in example.messages[start:end]:
        content = message["content"]
        parts.append(f"{message['role']} {len(content)} {content}" if len(message) == 2 else _ENCODER.encode(message))
    return "".join(parts)


def key(text: str) -> int:
    """64 bits of BLAKE2b: the same on every machine. A million rows collide with a chance of 3 in 10^8."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
