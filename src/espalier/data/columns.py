"""Which format a row has, told by its keys, and which keys cannot be what their writer meant.

In this order: messages, sharegpt (`conversations`), prompt_completion (`prompt` and `completion`), alpaca
(`instruction` or `output`), text. A row with keys of several has the first one whose own key is not null.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from espalier.data.rows import FormatOptions
from espalier.errors import UsageError

KEYS = {  # format -> the keys it knows; the first one tells the format
    "messages": ("messages", "tools", "system", "weight"),
    "sharegpt": ("conversations", "tools", "system", "weight"),
    "prompt_completion": ("prompt", "completion", "system", "tools", "weight"),
    "alpaca": ("instruction", "output", "input", "system", "history", "weight"),
    "text": ("text", "weight"),
}
FORMATS = tuple(KEYS)
_NEEDED = {"alpaca": ("instruction", "output"), "prompt_completion": ("prompt", "completion")}
_ALIASES = {"openai": "messages", "prompt/completion": "prompt_completion", "prompt-completion": "prompt_completion"}
_OURS = {key for keys in KEYS.values() for key in keys}
_SURE, _LIKELY = 0.75, 0.8  # likeness (difflib) of a key to a missing needed one, to a missing optional one


@dataclass(frozen=True, slots=True)
class Layout:
    """What the keys of a row say. One is made for each distinct list of keys, not for each row."""

    formats: tuple[str, ...]  # those that the keys allow, the preferred one first
    ignored: tuple[str, ...] = ()
    problem: str = ""  # why no row with these keys can be used
    unknown: bool = False  # no known key at all, and none that is near


class Columns:
    """The names that a run's options give to columns. Raises UsageError for wrong options."""

    def __init__(self, options: FormatOptions) -> None:
        check_options(options)
        self._format, self._columns = _format_name(options.format), options.columns
        self._ours = {theirs: ours for ours, theirs in options.columns.items()}

    def our_name(self, key: str) -> str | None:
        """Our name of a file's column; None where `--columns` gives that name to another column."""
        return self._ours.get(key) or (None if key in self._columns else key)

    def rename(self, fields: dict[str, Any]) -> dict[str, Any]:
        """The row's fields under our names."""
        if not self._ours:
            return fields
        return {name: value for key, value in fields.items() if (name := self.our_name(key)) is not None}

    def layout(self, keys: Sequence[str]) -> Layout:
        """What rows with these keys are."""
        if not keys:
            return Layout((), problem="an empty object", unknown=True)
        ours = [self.our_name(key) for key in keys]
        formats = (self._format,) if self._format else self._mapped_first(_recognise(ours))
        known = set(KEYS[formats[0]]) if formats else _OURS
        strange = tuple(key for key, our in zip(keys, ours, strict=True) if our not in known)
        found = f"found {', '.join(map(repr, keys))}"
        absent = [
            theirs for our, theirs in self._columns.items() if theirs not in keys and (not formats or our in known)
        ]
        if absent and (not formats or self._columns.keys() & set(_needed(formats[0])) - set(ours)):
            return Layout(formats, strange, f"no column {absent[0]!r}, which --columns names ({found})", not formats)
        problem = _misspelt(strange, ours, formats, self._columns)
        if problem:
            return Layout(formats, strange, problem)
        if not formats:
            return Layout((), strange, f"no known column ({found})", unknown=True)
        if formats[0] != "alpaca" and KEYS[formats[0]][0] not in ours:
            return Layout(formats, strange, f"no {KEYS[formats[0]][0]!r} ({found})")
        return Layout(formats, strange)

    def _mapped_first(self, formats: tuple[str, ...]) -> tuple[str, ...]:
        """Who maps a column to a format's own key wants that format, whatever other columns the file has."""
        return tuple(sorted(formats, key=lambda name: not self._columns.keys() & set(_needed(name))))


def check_options(options: FormatOptions) -> None:
    """Raises UsageError for a format or a column name that does not exist."""
    _format_name(options.format)
    wrong = [name for name in options.columns if name not in _OURS]
    if wrong:
        raise UsageError(
            f"unknown name {', '.join(map(repr, wrong))} on the left side of '='",
            where="--columns",
            todo=f"Write OURS=THEIRS; ours are {', '.join(sorted(_OURS))}.",
        )


def _format_name(name: str | None) -> str | None:
    if name is None:
        return None
    plain = _ALIASES.get(name.lower(), name.lower())
    if plain not in KEYS:
        raise UsageError(f"unknown format {name!r}", where="--format", todo=f"Known: {', '.join(FORMATS)}.")
    return plain


def _recognise(keys: Sequence[str | None]) -> tuple[str, ...]:
    found = [name for name in ("messages", "sharegpt") if KEYS[name][0] in keys]
    if "prompt" in keys and "completion" in keys:
        found.append("prompt_completion")
    if "instruction" in keys or "output" in keys:
        found.append("alpaca")
    if "text" in keys:
        found.append("text")
    if "prompt_completion" not in found and ("prompt" in keys or "completion" in keys):
        found.append("prompt_completion")
    return tuple(found)


def _needed(name: str) -> tuple[str, ...]:
    return _NEEDED.get(name, KEYS[name][:1])


def _misspelt(
    strange: Sequence[str], ours: Sequence[str | None], formats: Sequence[str], columns: Mapping[str, str]
) -> str:
    """The reason why a row's keys cannot be trusted: one that is nearly a known and absent one."""
    wanted = _needed(formats[0]) if formats else tuple(sorted(_OURS))
    optional = KEYS[formats[0]] if formats else ()
    for key in strange:
        plain = key.strip().casefold()
        if plain in _OURS and key != plain and plain not in ours and plain not in columns:
            what = "a blank around the name" if key.strip() == plain else "letter case"
            return f"key {key!r}: did you mean {plain!r}? ({what})"
        for names, cutoff in ((wanted, _SURE), (optional, _LIKELY)):
            absent = [name for name in names if name not in ours and name not in columns]
            near = difflib.get_close_matches(plain, absent, n=1, cutoff=cutoff)
            if near:
                return f"key {key!r}: did you mean {near[0]!r}?"
    return ""
