"""Data files to raw rows with file and 1-based line. Nothing is lost without a BadRow that says why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as it stands in the file. `line` is 1-based: where the row begins; for Parquet the row's number."""

    fields: dict[str, Any]
    file: str
    line: int


@dataclass(frozen=True, slots=True)
class BadRow:
    """One row that cannot be used, and why. `text` is the raw text (cut to a bounded length) for the rejects file."""

    file: str
    line: int
    reason: str
    text: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


def read_rows(files: Sequence[str], *, encoding: str | None = None) -> Iterator[RawRow | BadRow]:
    """Rows of all files, in order, lazily. Raises DataError where a whole file cannot be read."""
    raise NotImplementedError
