"""JSON Lines: one object a line. A bad line is a BadRow, and reading goes on with the next."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from espalier.data.json_text import DECODER, explain, half_character, parse
from espalier.data.rows import MAX_RAW_CHARS, BadRow, Notice, Number, RawRow
from espalier.data.source import Source, not_utf8

_TYPES = {dict: "an object", list: "a list", str: "a text", bool: "true/false", type(None): "null", float: "NaN"}


def type_name(value: Any) -> str:
    """The JSON type in words; numbers are `Number`, a str, so they come first."""
    return "a number" if isinstance(value, Number) else _TYPES.get(type(value), type(value).__name__)


def read_lines(source: Source, notice: Notice) -> Iterator[RawRow | BadRow]:
    """Rows of a JSON Lines file. Line ends are \\n, \\r\\n or \\r; blank lines are skipped and counted."""
    arrays = 0
    number, offset = 0, source.mark
    with source.open() as stream:
        for chunk in stream:
            for raw in chunk.splitlines(keepends=True):
                number += 1
                try:
                    text = raw.decode(source.encoding).rstrip(" \t\r\n")
                except UnicodeDecodeError as error:
                    shown = raw.decode(source.encoding, errors="backslashreplace")[:MAX_RAW_CHARS]
                    yield BadRow(source.name, number, not_utf8(error, offset, source.encoding), shown.rstrip("\r\n"))
                    continue
                finally:
                    offset += len(raw)
                if not text:
                    continue
                for row in parse_line(text, source.name, number):
                    if isinstance(row, list):
                        arrays += 1
                        row = RawRow(row[0], source.name, number, text.strip()[1:-1].strip())
                    yield row
    if arrays:
        notice(f"{source.name}: {arrays} lines are lists of one object; read as that object")


def parse_line(text: str, file: str, line: int) -> Iterator[RawRow | BadRow | list[dict[str, Any]]]:
    """The row of one line; several where objects follow each other on it. A list stands for a one-element array."""
    try:
        value = parse(text.lstrip(" \t"))
    except (ValueError, RecursionError) as error:
        yield from _several(text, file, line, error)
        return
    yield check_value(value, text, file, line)


def check_value(value: Any, text: str, file: str, line: int) -> RawRow | BadRow | list[dict[str, Any]]:
    """A parsed value as a row, or why it is none."""
    half = half_character(value, text)
    if half:
        return BadRow(file, line, half, text[:MAX_RAW_CHARS])
    if isinstance(value, dict):
        return RawRow(value, file, line, text)
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        return value
    return BadRow(file, line, f"{type_name(value)} where an object is expected", text[:MAX_RAW_CHARS])


def _several(text: str, file: str, line: int, error: Exception) -> Iterator[RawRow | BadRow | list[dict[str, Any]]]:
    """Objects one after another on a line, or the one reason why the line is bad."""
    values: list[tuple[Any, str]] = []
    at = len(text) - len(text.lstrip(" \t"))
    try:
        while at < len(text):
            start = at
            value, at = DECODER.raw_decode(text, at)
            if not isinstance(value, dict):
                break
            values.append((value, text[start:at]))
            at += len(text[at:]) - len(text[at:].lstrip(" \t"))
        else:
            for value, part in values:
                yield check_value(value, part, file, line)
            return
    except (ValueError, RecursionError):
        pass
    shift = len(text) - len(text.lstrip(" \t"))
    reason, position = explain(error, text[shift:])
    yield BadRow(file, line, f"{reason} (column {shift + position + 1})", text[:MAX_RAW_CHARS])
