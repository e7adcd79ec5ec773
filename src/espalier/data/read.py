"""Data files to raw rows with file and 1-based line. Nothing is lost without a BadRow that says why.

expand (globs) -> opened (pipes, compression, UTF-16) -> kind_of (by content) -> one reader a kind -> rows
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from espalier.data.hub import read_hub
from espalier.data.json_document import read_document
from espalier.data.json_lines import read_lines
from espalier.data.rows import BadRow, Notice, Number, RawRow, silent
from espalier.data.sniff import delimiter_of, kind_of
from espalier.data.source import Source, check_encoding, check_head_encoding, expand, opened
from espalier.data.tables import read_csv, read_parquet
from espalier.errors import DataError

__all__ = ["BadRow", "Notice", "Number", "RawRow", "read_rows"]


def read_rows(
    files: Sequence[str], *, encoding: str | None = None, notice: Notice | None = None
) -> Iterator[RawRow | BadRow]:
    """Rows of all files, in order, lazily, in the memory of one row (plus one read of a megabyte).

    files: paths, globs, '-' for standard input, `hub:owner/name[:split]`. encoding: of files without a byte order
    mark; UTF-8 where None, never the locale's. `notice` is told, in one sentence each, what was decided about a file.

    Raises DataError where a whole file cannot be read or holds no row, UsageError for an unknown encoding.
    """
    if encoding is not None:
        encoding = check_encoding(encoding)
    notice = notice or silent
    for name in expand(files):
        if name.startswith("hub:"):
            yield from read_hub(name, notice)
            continue
        with opened(name, encoding, notice) as source:
            rows = 0
            for row in _rows_of(source, notice):
                rows += 1
                yield row
            if not rows:
                raise DataError(f"no rows: {_without_rows(source)}", where=source.name)


def _rows_of(source: Source, notice: Notice) -> Iterator[RawRow | BadRow]:
    kind = kind_of(source)
    if kind == "parquet":
        yield from read_parquet(source, notice)
        return
    check_head_encoding(source)
    if kind == "csv":
        yield from read_csv(source, notice, delimiter_of(source, notice))
    elif kind == "lines":
        yield from read_lines(source, notice)
    else:
        yield from read_document(source, notice, wrapped=kind == "wrapped")


def _without_rows(source: Source) -> str:
    if not source.head.strip():
        return "the file holds only blank lines"
    if source.head.lstrip().startswith((b"[", b"{")):
        return "the file holds an empty list"
    return "the file holds only a header"
