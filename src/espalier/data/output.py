"""Files that appear whole or not at all, and rows written so that they read back as the same examples."""

from __future__ import annotations

import glob
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from espalier.data.formats import Example, FormatOptions
from espalier.data.rows import BadRow, RawRow
from espalier.errors import DataError, UsageError

_LINE_BREAKS = re.compile(r"\s*[\r\n]\s*")


def check_outputs(outputs: Mapping[str, str | None], inputs: Iterable[str]) -> None:
    """Find out before the work whether the files named by options can be written; by option: the file, or None.

    Raises UsageError for one that is among the inputs (names or globs), or that two options name, DataError for a
    folder and for one whose folder is not there or may not be written to.
    """
    given = {option: Path(name) for option, name in outputs.items() if name}
    read = [path for name in inputs for path in ([name] if os.path.exists(name) else glob.glob(name, recursive=True))]
    for number, (option, path) in enumerate(given.items()):
        where = f"{option} {path}"
        if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
            what = "this is a folder" if path.is_dir() else "its folder is not there or cannot be written to"
            raise DataError(what, where=where, todo="Name another file.")
        if path.exists() and any(path.samefile(name) for name in read):
            raise UsageError("this file is read here, and would be overwritten", where=where, todo="Name another file.")
        for other in list(given)[:number]:
            if path.resolve() == given[other].resolve():
                raise UsageError(f"{other} is the same file", where=where, todo="Name another file.")


class LinesFile:
    """A JSON Lines file written beside its final name and moved there by `finish`; `abandon` leaves nothing."""

    def __init__(self, path: str) -> None:
        self.path, self._part = path, f"{path}.part-{os.getpid()}"
        try:
            # Nothing that a row holds may stop the writing: halves of characters are written as escapes.
            self._stream = open(self._part, "w", encoding="utf-8", errors="backslashreplace", newline="\n")  # noqa: SIM115
        except OSError as error:
            raise DataError(f"cannot be written: {error.strerror}", where=path) from error

    def write(self, line: str) -> None:
        self._stream.write(line + "\n")

    def finish(self) -> None:
        try:
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
            os.replace(self._part, self.path)
        except OSError as error:
            self.abandon()
            raise DataError(f"cannot be written: {error.strerror}", where=self.path) from error

    def abandon(self) -> None:
        self._stream.close()
        if os.path.exists(self._part):
            os.unlink(self._part)


def kept_line(row: RawRow, example: Example, options: FormatOptions) -> str:
    """The row as one JSON line that reads back, without options, as the same example.

    A JSON row keeps its own text, columns that we ignore included (line breaks between its parts become blanks); rows
    of other files, and rows that options gave another meaning, become {"messages": [...]} or {"text": ...}.
    """
    plain = FormatOptions(encoding=options.encoding)
    if row.text and options == plain:
        # A JSON string holds no raw line break, so every one of them stands between the parts.
        return _LINE_BREAKS.sub(" ", row.text.strip())
    return json.dumps(as_fields(example), ensure_ascii=False)


def as_fields(example: Example) -> dict[str, Any]:
    """The example in the messages format (a text row in the text format)."""
    weights = example.weights or (1.0,) * max(len(example.messages), 1)
    if example.text is not None:
        return {"text": example.text} if weights[0] == 1 else {"text": example.text, "weight": weights[0]}
    messages = []
    for message, learnt, weight in zip(example.messages, example.train, weights, strict=True):
        fields = dict(message)
        if message["role"] == "assistant" and not learnt:
            fields["train"] = False
        elif learnt and weight != 1:
            fields["weight"] = weight
        messages.append(fields)
    return {"messages": messages, "tools": list(example.tools)} if example.tools else {"messages": messages}


def reject_line(row: BadRow) -> str:
    """A rejected row for the rejects file: file, line, reason and its raw text."""
    fields = {"file": row.file, "line": row.line, "reason": row.reason, "text": row.text}
    return json.dumps(fields, ensure_ascii=False)
