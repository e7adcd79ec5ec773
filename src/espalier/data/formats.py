"""Raw row -> Example: a conversation and where it came from. Texts stay verbatim.

Which format a row has is told by its keys, in this order: messages, sharegpt (`conversations`), prompt_completion
(`prompt` and `completion`), alpaca (`instruction`, `input`, `output`), text. The rules for turns are in turns.py.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from espalier.data.read import read_rows
from espalier.data.rows import BadRow, Notice, RawRow, json_values, silent
from espalier.data.turns import Refused, Said, conversation, from_columns, number_of, pairs, text_of, tool_list
from espalier.errors import DataError, UsageError

_KEYS = {  # format -> the keys it knows; the first ones tell the format
    "messages": ("messages", "tools", "system", "weight"),
    "sharegpt": ("conversations", "tools", "system", "weight"),
    "prompt_completion": ("prompt", "completion", "system", "tools", "weight"),
    "alpaca": ("instruction", "output", "input", "system", "history", "weight"),
    "text": ("text", "weight"),
}
FORMATS = tuple(_KEYS)
_ALIASES = {"openai": "messages", "prompt/completion": "prompt_completion", "prompt-completion": "prompt_completion"}
_MAPPABLE = {key for keys in _KEYS.values() for key in keys}
_LOOK_AHEAD = 1000  # rows without one known column, after which a file is refused as a whole
_SURE, _LIKELY = 0.75, 0.8  # likeness (difflib) of a key to a missing needed one, to a missing optional one


@dataclass(frozen=True, slots=True)
class Example:
    """One conversation to learn from.

    messages: as a chat template takes them ({"role", "content"} and what the template may know: "tool_calls", ...).
    train: one flag a message; True where the message's own text is to be learnt (only assistant turns can be).
    weights: factor on the loss of each message's tokens, or empty for all 1; for a text row one factor or none.
    tools: the functions that the template may show to the model.
    text: set instead of messages for rows that hold the finished text (`format text`).
    """

    messages: tuple[dict[str, Any], ...]
    train: tuple[bool, ...]
    file: str = ""
    line: int = 0
    weights: tuple[float, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()
    text: str | None = None


@dataclass(frozen=True, slots=True)
class FormatOptions:
    """How raw rows are understood. `format` None: recognised from the columns. `columns`: our name -> file's name."""

    format: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    encoding: str | None = None
    input_joiner: str = "\n"  # between instruction and a non-empty input


@dataclass(frozen=True, slots=True)
class _Layout:
    """What the keys of a row say. One is made for each distinct list of keys, not for each row."""

    formats: tuple[str, ...]  # those that the keys allow, the preferred one first
    ignored: tuple[str, ...] = ()
    problem: str = ""  # a misspelt or missing key
    unknown: bool = False  # no known key at all, and none that is near


class Understanding:
    """Turns rows into examples and counts what it had to decide, to be said once at the end.

    columns: all columns seen. One object serves one file, so that what it says names that file.
    """

    def __init__(self, options: FormatOptions) -> None:
        check_options(options)
        self._options, self._format = options, _format_name(options.format)
        self._renamed = {theirs: ours for ours, theirs in options.columns.items()}
        self._layouts: dict[tuple[str, ...], _Layout] = {}
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
            layout = self._layouts[keys] = self._lay_out(keys)
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

    def _convert(self, row: RawRow, layout: _Layout) -> Example:
        fields = row.fields
        if self._renamed:
            # A column that gives its name away to another mapping must not stand in for itself.
            fields = {
                self._renamed.get(k, k): v
                for k, v in fields.items()
                if self._renamed.get(k, k) not in self._options.columns or k in self._renamed
            }
        name = next((f for f in layout.formats if fields.get(_KEYS[f][0]) is not None), layout.formats[0])
        if name not in self._used:
            self._used[name] = {}
        used = self._used[name]
        for key in _KEYS[name]:
            if key in fields:
                used[key] = None
        return _READERS[name](fields, row, self._options, self._said)

    def _lay_out(self, keys: tuple[str, ...]) -> _Layout:
        if not keys:
            return _Layout((), problem="an empty object", unknown=True)
        ours = [self._renamed.get(key, key) for key in keys]
        formats = (self._format,) if self._format else _recognise(ours)
        known = set(_KEYS[formats[0]]) if formats else _MAPPABLE
        strange = [key for key, our in zip(keys, ours, strict=True) if our not in known]
        problem = _misspelt(strange, ours, formats, self._options.columns)
        if not problem and not formats:
            return _Layout((), tuple(strange), f"no known column (found {', '.join(map(repr, keys))})", unknown=True)
        if not problem and _KEYS[formats[0]][0] not in ours and formats[0] != "alpaca":
            problem = f"no {_KEYS[formats[0]][0]!r} (found {', '.join(map(repr, keys))})"
        return _Layout(formats, tuple(key for key in strange if key is not None), problem)

    def summary(self, file: str) -> list[str]:
        """What was decided about the file, one sentence each."""
        lines = [f"{file}: format {name} ({', '.join(used)})" for name, used in self._used.items()]
        used_somewhere = {key for used in self._used.values() for key in used}
        ignored = [key for key in self._ignored if self._renamed.get(key, key) not in used_somewhere]
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


def check_options(options: FormatOptions) -> None:
    """Raises UsageError for a format or a column name that does not exist."""
    _format_name(options.format)
    wrong = [name for name in options.columns if name not in _MAPPABLE]
    if wrong:
        raise UsageError(
            f"unknown name {', '.join(map(repr, wrong))} on the left side of '='",
            where="--columns",
            todo=f"Write OURS=THEIRS; ours are {', '.join(sorted(_MAPPABLE))}.",
        )


def _format_name(name: str | None) -> str | None:
    if name is None:
        return None
    name = _ALIASES.get(name.lower(), name.lower())
    if name not in _KEYS:
        raise UsageError(f"unknown format {name!r}", where="--format", todo=f"Known: {', '.join(FORMATS)}.")
    return name


def _recognise(keys: Sequence[str]) -> tuple[str, ...]:
    found = [name for name in ("messages", "sharegpt") if _KEYS[name][0] in keys]
    if "prompt" in keys and "completion" in keys:
        found.append("prompt_completion")
    if "instruction" in keys or "output" in keys:
        found.append("alpaca")
    if not found and ("prompt" in keys or "completion" in keys):
        found.append("prompt_completion")
    if "text" in keys:
        found.append("text")
    return tuple(found)


def _misspelt(strange: Sequence[str], ours: Sequence[str], formats: Sequence[str], columns: Mapping[str, str]) -> str:
    """The reason why a row's keys cannot be trusted: one that is nearly a known and absent one."""
    needed = {"alpaca": ("instruction", "output"), "prompt_completion": ("prompt", "completion")}
    wanted = needed.get(formats[0], _KEYS[formats[0]][:1]) if formats else tuple(sorted(_MAPPABLE))
    optional = _KEYS[formats[0]] if formats else ()
    for key in strange:
        plain = key.strip().casefold()
        if plain in _MAPPABLE and plain not in ours and plain not in columns:
            what = "a blank around the name" if key.strip() == plain else "letter case"
            return f"key {key!r}: did you mean {plain!r}? ({what})"
        for names, cutoff in ((wanted, _SURE), (optional, _LIKELY)):
            absent = [name for name in names if name not in ours and name not in columns]
            near = difflib.get_close_matches(plain, absent, n=1, cutoff=cutoff)
            if near:
                return f"key {key!r}: did you mean {near[0]!r}?"
    return ""


def _raw_text(row: RawRow) -> str:
    from espalier.data.rows import MAX_RAW_CHARS

    if row.text:
        return row.text[:MAX_RAW_CHARS]
    import json

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
        places = ", ".join(f"{row.file}:{row.line}" for row in rows[:first])
        more = f", and {len(rows) - first} more" if len(rows) > first else ""
        shown = rows[0].reason if len(rows) == 1 else kind
        lines.append(f"{places}{more}: {shown}")
    return lines


def bad_rows_error(bad: Sequence[BadRow], read: int) -> DataError:
    """The error that lists all bad rows: each by itself up to 20, else by reason with the first places of each."""
    details = [str(row) for row in bad] if len(bad) <= 20 else group_bad_rows(bad)
    return DataError(
        f"{len(bad)} of {read} rows cannot be used",
        details=details,
        todo="Correct them, or leave them out with --on_bad_row skip. `espalier check` shows all.",
    )
