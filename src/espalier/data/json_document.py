"""JSON that is not one object a line: an array, pretty-printed objects one after another, or {"data": [...]}.

Read in pieces, so that an array of any size needs the memory of its largest row. After a syntax error nobody can know
where the next row begins: such a file is refused, with line and column.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any, NoReturn

from espalier.data.json_lines import check_value, type_name
from espalier.data.json_text import DECODER, DuplicateKeyError, explain
from espalier.data.rows import MAX_RAW_CHARS, BadRow, Notice, RawRow
from espalier.data.source import Source, not_utf8
from espalier.errors import DataError

_PIECE_CHARS = 1 << 18
_LONGEST_WORD = 16  # an error this near to the end of the window may only be a cut word or escape
WRAPPER_KEY = "data"


def read_document(source: Source, notice: Notice, *, wrapped: bool) -> Iterator[RawRow | BadRow]:
    """Rows of the document; a row's line is where its object begins. Raises DataError at the first syntax error."""
    with source.open() as stream:
        text = io.TextIOWrapper(stream, source.encoding, newline=None)
        window = _Window(source, text)
        if wrapped:
            yield from _unwrap(window, notice)
        while window.next_char():
            if window.next_char() == "[":
                yield from _elements(window)
            else:
                yield _row(window)


def _elements(window: _Window) -> Iterator[RawRow | BadRow]:
    window.take("[")
    if window.next_char() == "]":
        window.take("]")
        return
    while True:
        yield _row(window)
        if window.next_char() == "]":
            window.take("]")
            return
        window.take(",")
        if window.next_char() == "]":
            window.fail("trailing comma", back=True)


def _unwrap(window: _Window, notice: Notice) -> Iterator[RawRow | BadRow]:
    """{"version": 1, "data": [rows]}: the rows; the other keys are named aloud."""
    others = []
    window.take("{")
    while window.next_char() != "}":
        key, _, _ = window.value()
        window.take(":")
        if key == WRAPPER_KEY and window.next_char() == "[":
            yield from _elements(window)
        else:
            window.value()
            others.append(key)
        if window.next_char() != "}":
            window.take(",")
            if window.next_char() == "}":
                window.fail("trailing comma", back=True)
    window.take("}")
    beside = f"; ignored beside it: {', '.join(map(str, others))}" if others else ""
    notice(f"{window.name}: the rows are the list under {WRAPPER_KEY!r}{beside}")


def _row(window: _Window) -> RawRow | BadRow:
    value, line, text = window.value()
    if isinstance(value, DuplicateKeyError):
        return BadRow(window.name, line, str(value), text[:MAX_RAW_CHARS])
    row = check_value(value, text, window.name, line)
    if isinstance(row, list):  # only whole lines may be one-element lists
        return BadRow(window.name, line, f"{type_name(value)} where an object is expected", text[:MAX_RAW_CHARS])
    return row


class _Window:
    """The part of the text between what is read and what is not needed any more, and its place in the file."""

    def __init__(self, source: Source, stream: io.TextIOWrapper) -> None:
        self.name, self._source, self._stream = source.name, source, stream
        self._buffer, self._at, self._ended = "", 0, False
        self._line, self._column = 1, 0  # of self._buffer[self._at]; the line is 1-based, the column 0-based
        self._comma = (1, 0)

    def next_char(self) -> str:
        """The next character that is no blank, not consumed; '' at the end."""
        while True:
            rest = self._at
            while rest < len(self._buffer) and self._buffer[rest] in " \t\r\n":
                rest += 1
            self._advance(rest - self._at)
            if self._at < len(self._buffer):
                return self._buffer[self._at]
            if not self._more():
                return ""

    def take(self, char: str) -> None:
        found = self.next_char()
        if found != char:
            if not found:
                self.fail("the file ends too early (cut short?)")
            error = json.JSONDecodeError(f"Expecting {char!r}", self._buffer, self._at)
            self._explain(error)
        if char == ",":
            self._comma = (self._line, self._column)
        self._advance(1)

    def value(self) -> tuple[Any, int, str]:
        """(value, line where it begins, its text). A key given twice comes back as the DuplicateKeyError itself."""
        if not self.next_char():
            self.fail("the file ends too early (cut short?)")
        while True:
            value: Any
            try:
                value, end = DECODER.raw_decode(self._buffer, self._at)
            except DuplicateKeyError as error:
                # The whole object is in the window, else its end could not have been reached: read on after it.
                value, end = error, self._end_of_value()
                if not end:
                    continue
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self._buffer) - _LONGEST_WORD
                if cut and self._more():
                    continue
                self._explain(error)
            except RecursionError:
                self.fail("nested too deeply")
            if end == len(self._buffer) and self._more():
                continue  # a number may go on
            line, text = self._line, self._buffer[self._at : end]
            self._advance(end - self._at)
            return value, line, text

    def _end_of_value(self) -> int:
        """The end of a value that has a key twice somewhere; 0 where more text was fetched first."""
        try:
            return json.JSONDecoder().raw_decode(self._buffer, self._at)[1]
        except json.JSONDecodeError as error:
            if self._more():
                return 0
            self._explain(error)

    def fail(self, what: str, *, back: bool = False) -> NoReturn:
        """Refuses the file here, or (`back`) at the comma taken last."""
        line, column = self._comma if back else (self._line, self._column)
        raise DataError(
            f"{what} (line {line}, column {column + 1})",
            where=f"{self.name}:{line}",
            todo="Correct it and run again: rows after a syntax error cannot be found. (JSON Lines, one object a line, "
            "can be read past bad lines.)",
        )

    def _explain(self, error: json.JSONDecodeError) -> NoReturn:
        reason, position = explain(error, self._buffer, base=self._at)
        self._advance(position - self._at)
        self.fail("the file ends too early (cut short?)" if reason == "ends too early" else reason)

    def _advance(self, count: int) -> None:
        if count <= 0:
            return
        passed = self._buffer[self._at : self._at + count]
        breaks = passed.count("\n")
        self._line += breaks
        self._column = len(passed) - passed.rfind("\n") - 1 if breaks else self._column + count
        self._at += count

    def _more(self) -> bool:
        """Fetches text, doubling the window, so that a row of any length costs linear time. False at the end."""
        if self._ended:
            return False
        rest = self._buffer[self._at :]
        try:
            piece = self._stream.read(max(_PIECE_CHARS, len(rest)))
        except UnicodeDecodeError as error:
            raise self._bad_bytes(error) from error
        if not piece:
            self._ended = True
            return False
        self._buffer, self._at = rest + piece, 0
        return True

    def _bad_bytes(self, error: UnicodeDecodeError) -> DataError:
        """Reads the file once more to say at which line and byte it is not what it should be."""
        offset = self._source.mark
        with self._source.open() as stream:
            for number, line in enumerate(stream, 1):
                try:
                    line.decode(self._source.encoding)
                except UnicodeDecodeError as found:
                    return DataError(not_utf8(found, offset, self._source.encoding), where=f"{self.name}:{number}")
                offset += len(line)
        return DataError(not_utf8(error, 0, self._source.encoding), where=self.name)
