"""Raw row -> Example: a conversation and where it came from. Texts stay verbatim.

Which format a row has is told by its keys (columns.py); the rules for turns are in turns.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from espalier.data.columns import FORMATS, KEYS, Columns, Layout, check_options
from espalier.data.read import read_rows
from espalier.data.rows import (
    MAX_RAW_CHARS,
    BadRow,
    Example,
    FormatOptions,
    Notice,
    RawRow,
    json_values,
    places,
    silent,
)
from espalier.data.turns import Refused, Said, conversation, from_columns, number_of, pairs, text_of, tool_list
from espalier.errors import DataError, UsageError

__all__ = [
    "FORMATS",
    "Example",
    "FormatOptions",
    "bad_rows_error",
    "check_options",
    "examples_from_records",
    "group_bad_rows",
    "iter_examples",
    "iter_pairs",
    "read_examples",
    "to_example",
]
_LOOK_AHEAD = 1000  # rows without one known column, after which a file is refused as a whole


class Understanding:
    """Turns rows into examples and counts what it had to decide, to be said once at the end.

    columns: all columns seen. One object serves one file, so that what it says names that file.
    """

    def __init__(self, options: FormatOptions) -> None:
        self._options, self._columns = options, Columns(options)
        self._layouts: dict[tuple[str, ...], Layout] = {}
        self._ignored: dict[str, None] = {}
        self._used: dict[str, dict[str, None]] = {}
        self._said = Said()
        self.columns: dict[str, None] = {}
        self.rows = self.unknown = 0

    def example(self, row: RawRow) -> Example | BadRow:
        """The example of a row, or why there is none."""
        self.rows += 1
        keys = tuple(row.fields)
        layout = self._layouts.get(keys)
        if layout is None:
            layout = self._layouts[keys] = self._columns.layout(keys)
            self.columns.update(dict.fromkeys(keys))
            if not layout.problem:
                self._ignored.update(dict.fromkeys(layout.ignored))
        self.unknown += layout.unknown
        try:
            if layout.problem:
                raise Refused(layout.problem)
            return self._convert(row, layout)
        except Refused as refused:
            return BadRow(row.file, row.line, str(refused), _raw_text(row))

    def _convert(self, row: RawRow, layout: Layout) -> Example:
        fields = self._columns.rename(row.fields)
        name = next((f for f in layout.formats if fields.get(KEYS[f][0]) is not None), layout.formats[0])
        used = self._used.setdefault(name, {})
        for key in KEYS[name]:
            if key in fields:
                used[key] = None
        return _READERS[name](fields, row, self._options, self._said)

    def summary(self, file: str) -> list[str]:
        """What was decided about the file, one sentence each."""
        lines = [f"{file}: format {name} ({', '.join(used)})" for name, used in self._used.items()]
        used_somewhere = {key for used in self._used.values() for key in used}
        ignored = [key for key in self._ignored if self._columns.our_name(key) not in used_somewhere]
        if ignored and self._used:
            lines[-1] += f"; ignored columns: {', '.join(ignored)}"
        return lines + [f"{file}: {line}" for line in self._said.sentences()]

    def refuse_unknown(self, file: str) -> None:
        """Raises DataError where not one row had a known column."""
        if not self.rows or self.unknown < self.rows or self.columns.keys() <= {""}:
            return
        columns = ", ".join(map(repr, self.columns))
        first = [*self.columns, "..."]
        raise DataError(
            f"no known columns (found {columns})",
            where=file,
            todo=f"Known are instruction/input/output, messages, conversations, prompt/completion and text. Map yours "
            f"with --columns, for example --columns prompt={first[0]},completion={first[1]}",
        )


def _raw_text(row: RawRow) -> str:
    if row.text:
        return row.text[:MAX_RAW_CHARS]
    return json.dumps(row.fields, ensure_ascii=False, default=str)[:MAX_RAW_CHARS]


def _alpaca(fields: Mapping[str, Any], row: RawRow, options: FormatOptions, said: Said) -> Example:
    instruction = text_of(fields.get("instruction"), "instruction", said)
    extra = text_of(fields.get("input"), "input", said)
    output = text_of(fields.get("output"), "output", said, answer=True)
    if not output.strip():
        raise Refused(_no_answer(fields, "output", output))
    if not instruction.strip() and not extra.strip():
        raise Refused("no prompt (instruction and input are both empty)")
    prompt = f"{instruction}{options.input_joiner}{extra}" if instruction and extra else instruction or extra
    turns = [*pairs(fields.get("history")), ("user", prompt), ("assistant", output)]
    return _example(from_columns(turns, fields, said), fields, row)


def _no_answer(fields: Mapping[str, Any], key: str, text: str) -> str:
    if key not in fields:
        return f"no answer (key {key!r} is missing)"
    if text:
        return f"no answer ({key!r} holds only blanks)"
    value = fields[key]
    return f"no answer ({key!r} is {'null' if value is None else 'empty' if value == '' else 'NaN'})"


def _messages(fields: Mapping[str, Any], row: RawRow, options: FormatOptions, said: Said) -> Example:
    turns = fields.get("messages") if "messages" in fields else fields.get("conversations")
    return _example(conversation(turns, fields, said, row.line), fields, row)


def _prompt_completion(fields: Mapping[str, Any], row: RawRow, options: FormatOptions, said: Said) -> Example:
    prompt, completion = fields.get("prompt"), fields.get("completion")
    if isinstance(prompt, list) or isinstance(completion, list):
        if not isinstance(prompt, list) or not isinstance(completion, list):
            raise Refused("prompt and completion must be both texts or both lists of messages")
        return _example(conversation(prompt + completion, fields, said, row.line, first=len(prompt)), fields, row)
    question = text_of(prompt, "prompt", said)
    answer = text_of(completion, "completion", said, answer=True)
    if not answer.strip():
        raise Refused(_no_answer(fields, "completion", answer))
    if not question.strip():
        raise Refused("no prompt ('prompt' is empty)")
    return _example(from_columns([("user", question), ("assistant", answer)], fields, said), fields, row)


def _text(fields: Mapping[str, Any], row: RawRow, options: FormatOptions, said: Said) -> Example:
    text = text_of(fields.get("text"), "text", said, answer=True)
    if not text.strip():
        raise Refused(_no_answer(fields, "text", text))
    weight = number_of(fields.get("weight"), "weight")
    if weight == 0:
        raise Refused("nothing to learn (weight 0)")
    return Example((), (), row.file, row.line, () if weight == 1 else (weight,), (), text)


_READERS = {
    "alpaca": _alpaca,
    "messages": _messages,
    "sharegpt": _messages,
    "prompt_completion": _prompt_completion,
    "text": _text,
}


def _example(turns: Any, fields: Mapping[str, Any], row: RawRow) -> Example:
    messages, train, weights = turns
    return Example(messages, train, row.file, row.line, weights, tool_list(fields.get("tools")))


def to_example(row: RawRow, format: str | None = None, options: FormatOptions | None = None) -> Example | BadRow:
    """One row by itself; `format` None recognises it from the keys."""
    options = options or FormatOptions()
    chosen = FormatOptions(format or options.format, options.columns, options.encoding, options.input_joiner)
    return Understanding(chosen).example(row)


def iter_pairs(
    rows: Iterable[RawRow | BadRow], options: FormatOptions, notice: Notice
) -> Iterator[tuple[RawRow | BadRow, Example | BadRow]]:
    """Each row with what became of it. After a file's last row `notice` hears what was decided about the file.

    Raises DataError where no row of a file (of its first 1,000) has a known column.
    """
    file: str | None = None
    understanding = Understanding(options)
    for row in rows:
        if row.file != file:
            if file is not None:
                _finish(understanding, file, notice)
            file, understanding = row.file, Understanding(options)
        if isinstance(row, BadRow):
            yield row, row
            continue
        yield row, understanding.example(row)
        if understanding.rows == _LOOK_AHEAD:
            understanding.refuse_unknown(file)
    if file is not None:
        _finish(understanding, file, notice)


def _finish(understanding: Understanding, file: str, notice: Notice) -> None:
    understanding.refuse_unknown(file)
    for line in understanding.summary(file):
        notice(line)


def iter_examples(
    files: Sequence[str], options: FormatOptions | None = None, *, notice: Notice | None = None
) -> Iterator[Example | BadRow]:
    """Examples and bad rows of all files in file order, lazily, in bounded memory: read = kept + bad."""
    options, notice = options or FormatOptions(), notice or silent
    check_options(options)
    rows = read_rows(files, encoding=options.encoding, notice=notice)
    return (result for _, result in iter_pairs(rows, options, notice))


def examples_from_records(
    records: Iterable[Mapping[str, Any]],
    name: str = "dataset",
    options: FormatOptions | None = None,
    *,
    notice: Notice | None = None,
) -> Iterator[Example | BadRow]:
    """The same for rows already in memory (a Hugging Face Dataset, a list of dicts); line = index + 1."""
    options, notice = options or FormatOptions(), notice or silent
    check_options(options)
    rows = (RawRow(json_values(dict(record)), name, line) for line, record in enumerate(records, 1))
    return (result for _, result in iter_pairs(rows, options, notice))


def read_examples(
    files: str | Sequence[str],
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    encoding: str | None = None,
    on_bad_row: str = "error",
    notice: Notice | None = None,
) -> list[Example]:
    """All examples of the files.

    on_bad_row: "error" raises one DataError that lists the bad rows, grouped by reason; "skip" leaves them out and
    tells `notice` how many. Raises DataError where nothing is left.
    """
    if on_bad_row not in ("error", "skip"):
        raise UsageError(f"on_bad_row is {on_bad_row!r}", todo="Use 'error' or 'skip'.")
    options = FormatOptions(format, dict(columns or {}), encoding)
    names = [files] if isinstance(files, str) else list(files)
    kept: list[Example] = []
    bad: list[BadRow] = []
    for row in iter_examples(names, options, notice=notice):
        if isinstance(row, BadRow):
            bad.append(row)
        else:
            kept.append(row)
    if bad and on_bad_row == "error":
        raise bad_rows_error(bad, len(kept) + len(bad))
    if bad:
        (notice or silent)(f"{len(bad)} of {len(kept) + len(bad)} rows left out: {'; '.join(group_bad_rows(bad))}")
    if not kept:
        raise DataError(f"no row is left of {len(bad)}", details=group_bad_rows(bad))
    return kept


def group_bad_rows(bad: Iterable[BadRow], *, first: int = 5) -> list[str]:
    """One line a reason: what, how many rows, and the first places."""
    groups: dict[str, list[BadRow]] = {}
    for row in bad:
        groups.setdefault(row.kind, []).append(row)
    lines = []
    for kind, rows in groups.items():
        more = f" and {len(rows) - first} more" if len(rows) > first else ""
        shown = rows[0].reason if len(rows) == 1 else kind
        lines.append(f"{places(rows[:first])}{more}: {shown}")
    return lines


def bad_rows_error(bad: Sequence[BadRow], read: int) -> DataError:
    """The error that lists all bad rows: each by itself up to 20, else by reason with the first places of each."""
    details = [str(row) for row in bad] if len(bad) <= 20 else group_bad_rows(bad)
    return DataError(
        f"{len(bad)} of {read} rows cannot be used",
        details=details,
        todo="Correct them, or leave them out with --on_bad_row skip. `espalier check` shows all.",
    )
