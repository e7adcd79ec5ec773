"""Where the conversations to answer come from: arguments, a file, or standard input."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from espalier.errors import DataError

Conversation = list[dict[str, Any]]
ROW_FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".gz", ".zst")
# What a row of each format needs to be an example; it is taken out again.
NO_ANSWER = "-"


def from_texts(texts: Iterable[str], system: str | None) -> list[Conversation]:
    """One conversation of one user turn a text; blank texts are left out."""
    return [_with_system([{"role": "user", "content": text}], system) for text in texts if text.strip()]


def from_stdin(system: str | None) -> list[Conversation]:
    """One prompt a line of standard input."""
    conversations = from_texts(sys.stdin.read().splitlines(), system)
    if not conversations:
        raise DataError("no prompt on standard input", todo="Write one a line, or give prompts as arguments.")
    return conversations


def from_file(file: str, system: str | None) -> list[Conversation]:
    """The prompts of a text file (one a line) or of a data file (one a row, read as for training).

    A row's last answer, where it has one, is left out; what stands before it is the prompt. Raises DataError for a
    file that cannot be read, holds no prompt, or has rows that are none (all of them named).
    """
    if Path(file).name.lower().endswith(ROW_FILES):
        return [_with_system(messages, system) for messages in _rows(file)]
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=file) from error
    except UnicodeDecodeError as error:
        raise DataError("not UTF-8", where=file, todo="Save it as UTF-8.") from error
    conversations = from_texts(text.splitlines(), system)
    if not conversations:
        raise DataError("no prompt in the file", where=file, todo="Write one a line.")
    return conversations


def _rows(file: str) -> list[Conversation]:
    from espalier.data.formats import bad_rows_error, to_example
    from espalier.data.read import read_rows
    from espalier.data.rows import BadRow

    conversations, bad, read = [], [], 0
    for row in read_rows([file]):
        read += 1
        example = row if isinstance(row, BadRow) else to_example(_answered(row))
        if isinstance(example, BadRow):
            bad.append(example)
            continue
        last = max(i for i, message in enumerate(example.messages) if message["role"] == "assistant")
        conversations.append([dict(message) for message in example.messages[:last]])
    if bad:
        raise bad_rows_error(bad, read)
    return conversations


def _answered(row: Any) -> Any:
    """The row with an answer in the place where training wants one, so that its reader makes the prompt."""
    fields = dict(row.fields)
    for turns_key in ("messages", "conversations"):
        turns = fields.get(turns_key)
        if isinstance(turns, list) and turns and isinstance(turns[-1], dict):
            role, content = ("from", "value") if "from" in turns[-1] else ("role", "content")
            if str(turns[-1].get(role)).lower() in ("user", "human"):
                fields[turns_key] = [*turns, {role: "assistant", content: NO_ANSWER}]
            return dataclasses.replace(row, fields=fields)
    answer = "completion" if "prompt" in fields else "output"
    if not fields.get(answer):
        fields[answer] = NO_ANSWER
    return dataclasses.replace(row, fields=fields)


def _with_system(messages: Sequence[dict[str, Any]], system: str | None) -> Conversation:
    own = messages and messages[0]["role"] == "system"
    return [*([] if system is None or own else [{"role": "system", "content": system}]), *messages]
