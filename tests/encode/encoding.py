"""Short ways of making examples and reading labels, for the tests of this folder."""

from __future__ import annotations

from typing import Any

from espalier.data.formats import Example
from espalier.encode.encode import IGNORE_INDEX, Encoded, Encoder
from espalier.encode.template import resolve_template


def load(folder: Any) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def encoder_for(tokenizer: Any, template: str | None = None, **options: Any) -> Encoder:
    return Encoder(tokenizer, resolve_template(tokenizer, template), **options)


def chat(*texts: str, system: str | None = None, line: int = 1) -> Example:
    """A conversation of user and assistant texts in turn, all answers to be learnt."""
    messages = [{"role": "system", "content": system}] if system is not None else []
    for i, text in enumerate(texts):
        messages.append({"role": ("user", "assistant")[i % 2], "content": text})
    return example(messages, line=line)


def example(messages: list[dict[str, Any]], line: int = 1, **fields: Any) -> Example:
    train = tuple(message["role"] == "assistant" for message in messages)
    return Example(**{"messages": tuple(messages), "train": train, "file": "rows.jsonl", "line": line, **fields})


def spans(row: Encoded) -> list[tuple[int, int]]:
    """Runs of learnt tokens; the answers of a conversation never touch."""
    found: list[tuple[int, int]] = []
    for t, label in enumerate(row.labels):
        if label == IGNORE_INDEX:
            continue
        assert label == row.input_ids[t]
        if found and found[-1][1] == t:
            found[-1] = (found[-1][0], t + 1)
        else:
            found.append((t, t + 1))
    return found


def learnt(tokenizer: Any, row: Encoded) -> list[str]:
    """The text of each learnt span, read in its place."""
    ids = row.input_ids.tolist()
    texts = []
    for start, end in spans(row):
        before, through = (tokenizer.decode(ids[:stop], skip_special_tokens=False) for stop in (start, end))
        assert through.startswith(before)
        texts.append(through[len(before) :])
    return texts


def chat_ids(tokenizer: Any, messages: Any, **options: Any) -> list[int]:
    """What transformers sends for a conversation whose next turn is the assistant's."""
    made = tokenizer.apply_chat_template(
        list(messages), add_generation_prompt=True, tokenize=True, return_dict=False, **options
    )
    return list(made)
