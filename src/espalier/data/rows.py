"""The types of data/: rows as read, examples as understood, bad rows (values) and notices (sentences)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

MAX_RAW_CHARS = 10_000  # of a bad row's text: enough to recognise it, bounded for the rejects file
Notice = Callable[[str], None]
_NUMBER = re.compile(r"\b\d+\b")


class Number(str):
    """A number as it is spelt in the file ('0.10', '1e5'): text for an answer, yet known to have been a number."""

    __slots__ = ()

    def value(self) -> int | float:
        """The number itself, for places that need one (weights, tool arguments)."""
        try:
            return int(self)
        except ValueError:
            return float(self)


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as it stands in the file.

    fields: JSON values, numbers as `Number`. line: 1-based, where the row begins; for Parquet the row's number.
    text: the row's own text where it has one (a JSON line); empty for CSV, Parquet and hub rows.
    """

    fields: dict[str, Any]
    file: str
    line: int
    text: str = ""


@dataclass(frozen=True, slots=True)
class BadRow:
    """One row that cannot be used, and why. `text` is the raw text (cut to a bounded length) for the rejects file.

    `reason` reads "what is wrong (details)": reports group rows by the part before the bracket, numbers apart.
    """

    file: str
    line: int
    reason: str
    text: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"

    @property
    def kind(self) -> str:
        """The reason without its details and numbers: what rows are grouped by."""
        return _NUMBER.sub("N", self.reason.partition(" (")[0])


@dataclass(frozen=True, slots=True)
class Example:
    """One conversation to learn from.

    messages: as a chat template takes them ({"role", "content"} and what the template may know: "tool_calls", ...).
    train: one flag a message; True where the message's own text is to be learnt (only assistant turns can be).
    weights: factor on the loss of each message's tokens, or empty for all 1; for a text row one factor or none.
    tools: the functions that the template may show to the model.
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


def places(rows: Iterable[BadRow], more: bool = False) -> str:
    """'a.jsonl:3, 4, b.jsonl:1': where rows stand, each file named once; `more` says that others follow."""
    shown: list[str] = []
    file = None
    for row in rows:
        shown.append(str(row.line) if row.file == file else f"{row.file}:{row.line}")
        file = row.file
    return ", ".join([*shown, "..."] if more else shown)


def silent(message: str) -> None:
    """The notice of callers who want none."""


def json_values(value: Any) -> Any:
    """Python values of a table (Parquet, a dataset in memory) as the JSON reader would have given them.

    Whole numbers and floats become `Number`; NaN stays a float, because it stands for a missing value there.
    """
    if isinstance(value, bool) or value is None or isinstance(value, str):
        return value
    if isinstance(value, int):
        return Number(value)
    if isinstance(value, float):
        return value if math.isnan(value) or math.isinf(value) else Number(repr(value))
    if isinstance(value, dict):
        return {str(key): json_values(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_values(item) for item in value]
    if hasattr(value, "item") and getattr(value, "shape", None) == ():  # a numpy scalar
        return json_values(value.item())
    return value


def plain_values(value: Any) -> Any:
    """The inverse for structures that templates render (tool calls): `Number` back to int or float."""
    if isinstance(value, Number):
        return value.value()
    if isinstance(value, dict):
        return {key: plain_values(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [plain_values(item) for item in value]
    return value
