"""Data files to raw rows with file and 1-based line. Nothing is lost without a BadRow that says why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from espalier.data.json_lines import read_lines
from espalier.data.rows import BadRow, Notice, Number, RawRow, silent
from espalier.data.source import Source, check_encoding, check_head_encoding, expand, opened
from espalier.errors import DataError

__all__ = ["BadRow", "Notice", "Number", "RawRow", "read_rows"]


def read_rows(
    files: Sequence[str], *, encoding: str | None = None, notice: Notice | None = None
) -> Iterator[RawRow | BadRow]:
    """Rows of all files, in order, lazily. Raises DataError where a whole file cannot be read.

    `notice` is told, in one sentence each, what was decided about a file.
    """
    if encoding is not None:
        encoding = check_encoding(encoding)
    notice = notice or silent
    for name in expand(files):
        with opened(name, encoding, notice) as source:
            rows = 0
            for row in _rows_of(source, notice):
                rows += 1
                yield row
        if not rows:
            raise DataError("no rows: the file holds only blank lines", where=name)


def _rows_of(source: Source, notice: Notice) -> Iterator[RawRow | BadRow]:
    check_head_encoding(source)
    yield from read_lines(source, notice)
