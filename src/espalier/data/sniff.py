"""What kind of data a file holds, told by its first bytes; the name only settles what the bytes leave open."""

from __future__ import annotations

import csv
import json
import re
from typing import Literal

from espalier.data.json_document import WRAPPER_KEY
from espalier.data.json_text import DECODER
from espalier.data.rows import Notice
from espalier.data.source import PARQUET_MAGIC, Source
from espalier.errors import DataError

Kind = Literal["lines", "document", "wrapped", "csv", "parquet"]
_LIST_OF_OBJECTS = re.compile(r"\[\s*[{\]]")
_KNOWN_COLUMNS = {"instruction", "input", "output", "text", "prompt", "completion", "messages", "conversations"}


def kind_of(source: Source) -> Kind:
    """The kind. Raises DataError for what is none of them."""
    if source.head.startswith(PARQUET_MAGIC):
        return "parquet"
    head = source.head.decode(source.encoding, errors="replace")
    text = head.lstrip(" \t\r\n")
    if not text:
        return "lines"
    if text[0] in "[{" and not (source.suffix in (".csv", ".tsv") and text[0] == "[" and not _is_json_list(text)):
        return _kind_of_json(text)
    if source.suffix in (".csv", ".tsv") or _is_header(text):
        return "csv"
    if source.suffix in (".json", ".jsonl", ".ndjson") or _first_value_ends(_lines(text)[0]):
        return "lines"
    if source.suffix == ".parquet":
        raise DataError("no Parquet file (its first bytes are not PAR1)", where=source.name)
    raise DataError(
        f"not recognised as JSON, JSON Lines, CSV or Parquet (it begins with {text[:30]!r})",
        where=source.name,
        todo="Name a CSV file *.csv; other formats are to be converted first.",
    )


def delimiter_of(source: Source, notice: Notice) -> str:
    """The delimiter of a CSV file, from its header line."""
    if source.suffix == ".tsv":
        return "\t"
    header = _lines(source.head.decode(source.encoding, errors="replace").lstrip("\r\n"))[:1] or [""]
    if "," in header[0]:
        return ","
    found = next((char for char in ("\t", ";", "|") if char in header[0]), ",")
    if found != ",":
        notice(f"{source.name}: columns are separated by {found!r}")
    return found


def _lines(text: str) -> list[str]:
    return [line for line in re.split(r"\r\n|\n|\r", text[:200_000]) if line.strip(" \t\r\n")]


def _kind_of_json(text: str) -> Kind:
    lines = re.split(r"\r\n|\n|\r", text, maxsplit=1)
    first, rest = lines[0], lines[1].strip() if len(lines) > 1 else ""
    wrapped: Kind = "wrapped" if _is_wrapped(text) else "document"
    ended = _first_value_ends(first)
    if text[0] == "[":
        # One list a line only where lists do end at their lines' ends and more lines follow.
        return "lines" if ended and rest else "document"
    if ended:
        return wrapped if wrapped == "wrapped" else "lines"
    if ended is None and wrapped != "wrapped":
        return "lines"  # wrong in itself, not merely cut by the line's end
    if _goes_on_well(text):
        return wrapped
    following = _lines(rest)[:1]
    return (
        "lines" if following and following[0].lstrip().startswith("{") and _first_value_ends(following[0]) else wrapped
    )


def _first_value_ends(line: str) -> bool | None:
    """Does a JSON value end with this line? None: no value, whatever follows."""
    line = line.strip()
    try:
        _, end = DECODER.raw_decode(line)
    except json.JSONDecodeError as error:
        return False if not line[error.pos :].strip() and not error.msg.startswith("Unterminated") else None
    except (ValueError, RecursionError):
        return True
    return True if end == len(line) or line[end:].lstrip()[:1] in ("{", "[") else None


def _is_wrapped(text: str) -> bool:
    """Is this {..., "data": [{...}, ...], ...}, and not a row?"""
    at = 1
    try:
        while True:
            key, at = DECODER.raw_decode(text, _after_blanks(text, at))
            colon = _after_blanks(text, at)
            if text[colon : colon + 1] != ":" or not isinstance(key, str) or key in _KNOWN_COLUMNS:
                return False
            at = _after_blanks(text, colon + 1)
            if key == WRAPPER_KEY:
                return _LIST_OF_OBJECTS.match(text, at) is not None
            _, at = DECODER.raw_decode(text, at)
            at = _after_blanks(text, at) + 1
    except (ValueError, RecursionError):
        return False


def _after_blanks(text: str, at: int) -> int:
    while text[at : at + 1] in (" ", "\t", "\r", "\n"):
        at += 1
    return at


def _goes_on_well(text: str) -> bool:
    """Is the first value whole over several lines, or only cut by the end of the head?"""
    try:
        DECODER.raw_decode(text)
    except json.JSONDecodeError as error:
        return error.pos >= len(text.rstrip()) - 16 or error.msg.startswith("Unterminated")
    except (ValueError, RecursionError):
        pass
    return True


def _is_json_list(text: str) -> bool:
    return text[1:].lstrip()[:1] in ("{", "[", "]")


def _is_header(text: str) -> bool:
    """A line of column names of which we know one."""
    first = (_lines(text) or [""])[0]
    if "\0" in first:  # Python 3.10's csv module raises an error
        return False
    cells = {cell.strip().strip('"') for cell in next(csv.reader([first.replace("\t", ",").replace(";", ",")]), [])}
    return bool(cells & _KNOWN_COLUMNS) and (len(cells) > 1 or not first.startswith('"'))
