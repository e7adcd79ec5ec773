"""CSV, TSV and Parquet to raw rows."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from typing import Any

from espalier.data.rows import MAX_RAW_CHARS, BadRow, Notice, RawRow, json_values
from espalier.data.source import Source
from espalier.errors import DataError

_PANDAS_INDEX = re.compile(r"__index_level_\d+__")
_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")
_LARGEST_FIELD = 2**31 - 1  # characters; csv's own limit is 131,072, and C's long is 32 bits on some systems


def read_csv(source: Source, notice: Notice, delimiter: str) -> Iterator[RawRow | BadRow]:
    """Rows below a header line; cells are texts, verbatim. A row's line is where its record begins.

    A quoted cell may hold line ends. Raises DataError for a header that cannot name columns.
    """
    csv.field_size_limit(_LARGEST_FIELD)
    with source.open() as stream:
        # Bytes that do not decode become surrogates, so that only their own rows are bad.
        text = io.TextIOWrapper(stream, source.encoding, errors="surrogateescape", newline="")
        records = _records(csv.reader(text, delimiter=delimiter, strict=True))
        header: list[str] | None = None
        for line, record in records:
            if header is None:
                if isinstance(record, str):
                    raise DataError(f"the header line is damaged: {record}", where=f"{source.name}:{line}")
                header = _header(record, source, line, notice)
            elif isinstance(record, str):
                yield BadRow(source.name, line, record)
            else:
                yield _csv_row(header, record, source, line, delimiter)


def _records(reader: Any) -> Iterator[tuple[int, list[str] | str]]:
    """(line where the record begins, its cells or what is wrong with it); blank lines are left out."""
    while True:
        line = reader.line_num + 1
        try:
            record = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end" in str(error):
                yield line, f"a quote is never closed (it swallows lines {line} to {reader.line_num})"
            elif "NUL" in str(error):  # Python 3.10's reader stops at one
                yield line, "NUL byte"
            else:
                yield line, f"damaged quotes ({error})"
            continue
        if record:
            yield line, record


def _header(names: list[str], source: Source, line: int, notice: Notice) -> list[str]:
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise DataError(f"column {', '.join(map(repr, twice))} given twice", where=f"{source.name}:{line}")
    if _ESCAPED_BYTE.search("".join(names)):
        raise DataError(f"the header is not {source.encoding}", where=f"{source.name}:{line}", todo="Pass --encoding.")
    if "" in names and len(names) > 1:
        notice(f"{source.name}: a column without a name (an index?) is left out")
    return names


def _csv_row(header: list[str], record: list[str], source: Source, line: int, delimiter: str) -> RawRow | BadRow:
    raw = delimiter.join(record)[:MAX_RAW_CHARS]
    bad_byte = _ESCAPED_BYTE.search(raw) or _ESCAPED_BYTE.search(delimiter.join(record))
    if bad_byte:
        shown = raw.encode("utf-8", errors="surrogateescape").decode("utf-8", errors="backslashreplace")
        return BadRow(source.name, line, f"not {source.encoding} (byte 0x{ord(bad_byte[0]) - 0xDC00:02X})", shown)
    if len(record) != len(header):
        many = "many" if len(record) > len(header) else "few"
        return BadRow(source.name, line, f"too {many} fields ({len(record)}, the header has {len(header)})", raw)
    if any("\0" in cell for cell in record):
        return BadRow(source.name, line, "NUL byte", raw)
    return RawRow({name: cell for name, cell in zip(header, record, strict=True) if name}, source.name, line)


def read_parquet(source: Source, notice: Notice) -> Iterator[RawRow | BadRow]:
    """Rows of a Parquet file, 1,000 at a time; a row's line is its number. The index that pandas stores is left out.

    Raises DataError for a file without its footer, or with damaged pages.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(source.path)
    except (pyarrow.ArrowInvalid, OSError) as error:
        incomplete = "magic bytes" in str(error) or "too small" in str(error) or "footer" in str(error)
        what = "the Parquet file is incomplete (its footer is missing)" if incomplete else f"no Parquet file ({error})"
        raise DataError(what, where=source.name, todo="Copy or download the file again.") from error
    names = [name for name in file.schema_arrow.names if not _PANDAS_INDEX.fullmatch(name)]
    number = 0
    with file:
        try:
            for batch in file.iter_batches(batch_size=1000, columns=names):
                for fields in _batch_rows(batch):
                    number += 1
                    if isinstance(fields, str):
                        yield BadRow(source.name, number, fields)
                    else:
                        yield RawRow(json_values(fields), source.name, number)
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(
                f"the Parquet file is damaged after row {number} ({error})",
                where=source.name,
                todo="Copy or download the file again.",
            ) from error


def _batch_rows(batch: Any) -> Iterator[dict[str, Any] | str]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for index in range(batch.num_rows):
            try:
                yield batch.slice(index, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield f"a text is not UTF-8 (byte 0x{error.object[error.start]:02X})"
