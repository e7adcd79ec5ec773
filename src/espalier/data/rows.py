"""The types that reading hands on, and the two ways it speaks: a bad row (a value) and a notice (a sentence)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
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
