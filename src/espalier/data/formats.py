"""Raw row -> Example: a conversation and where it came from. Texts stay verbatim."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from espalier.data.read import BadRow


@dataclass(frozen=True, slots=True)
class Example:
    """One conversation to learn from.

    messages: as a chat template takes them ({"role", "content"} and what the template may know: "tool_calls", ...).
    train: one flag a message; True where the message's own text is to be learnt (only assistant turns can be).
    weight: factor on the loss of the row's tokens; weights: one factor a message, or empty for all 1.
    text: set instead of messages for rows that hold the finished text (`format text`).
    """

    messages: tuple[dict[str, Any], ...]
    train: tuple[bool, ...]
    file: str = ""
    line: int = 0
    weights: tuple[float, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    text: str | None = None


@dataclass(frozen=True, slots=True)
class FormatOptions:
    """How raw rows are understood. `format` None: recognised from the columns. `columns`: our name -> file's name."""

    format: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    encoding: str | None = None
    input_joiner: str = "\n"  # between instruction and a non-empty input


def iter_examples(files: Sequence[str], options: FormatOptions | None = None) -> Iterator[Example | BadRow]:
    """Examples and bad rows of all files in file order, lazily, in bounded memory: read = kept + bad."""
    raise NotImplementedError
