"""JSON text to values, strictly: numbers as spelt, no key twice, and errors that a person can act on."""

from __future__ import annotations

import json
import re
from typing import Any

from espalier.data.rows import Number

_FULL_WIDTH = {
    "“": "quote",
    "”": "quote",
    "‘": "quote",
    "’": "quote",
    "＂": "quote",
    "「": "quote",
    "」": "quote",
    "：": "colon",
    "，": "comma",
    "｛": "bracket",
    "｝": "bracket",
    "［": "bracket",
    "］": "bracket",
}
_PYTHON_WORDS = re.compile(r"None|True|False|nan|undefined")
_SURROGATE = re.compile("[\ud800-\udfff]")


class DuplicateKeyError(ValueError):
    """The same key stands twice in one object."""

    def __init__(self, key: str) -> None:
        super().__init__(f"{key!r} given twice")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise DuplicateKeyError(key)
            seen.add(key)
    return fields


# NaN and Infinity are no JSON, but Python writes them: they stay floats, and formats.py treats NaN as missing.
DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=Number, parse_float=Number, parse_constant=float)


def parse(text: str) -> Any:
    """One JSON value. Raises ValueError (JSONDecodeError, DuplicateKeyError) or RecursionError."""
    return DECODER.decode(text)


def half_character(value: Any, text: str) -> str | None:
    """The reason why a value cannot be written as UTF-8, or None. Only `\\ud...` escapes can bring such halves."""
    if "\\ud" not in text and "\\uD" not in text:
        return None
    found = _SURROGATE.search(json.dumps(value, ensure_ascii=False))
    return f"lone surrogate U+{ord(found[0]):04X}" if found else None


def explain(error: Exception, text: str, *, base: int = 0) -> tuple[str, int]:
    """(what is wrong in words, position in text). `base` is where in `text` the failed value begins."""
    if isinstance(error, DuplicateKeyError):
        return str(error), base
    if isinstance(error, RecursionError):
        return "nested too deeply", base
    if not isinstance(error, json.JSONDecodeError):
        return str(error), base
    at = error.pos
    here = text[at : at + 1]
    comma = _comma_before_end(text, at)
    if comma is not None and error.msg.startswith(("Expecting", "Illegal trailing comma")):
        return "trailing comma", comma
    if here == "\ufeff":
        return "a byte order mark (U+FEFF) where a value begins - files that were joined have one in the middle", at
    if here == "\0":
        return "NUL byte", at
    if here == "'":
        return "single quotes - Python text, not JSON", at
    if here in _FULL_WIDTH:
        return f"full-width {_FULL_WIDTH[here]} U+{ord(here):04X}", at
    word = _PYTHON_WORDS.match(text, at)
    if word:
        return f"{word[0]} is no JSON word - Python text, not JSON", at
    if error.msg.startswith("Unterminated string"):
        return "unterminated string", at
    if error.msg.startswith("Invalid control character"):
        name = {"\n": "line break", "\r": "line break", "\t": "tab"}.get(here, f"control character U+{ord(here):04X}")
        return f"raw {name} inside a string", at
    if error.msg.startswith("Extra data") and here == ",":
        return "a comma after the object - lines of JSON Lines have none", at
    if text[at:].startswith(("//", "/*", "#")):
        return "a comment - JSON has none", at
    if error.msg.startswith("Extra data"):
        return "text after the end of the value", at
    if not text[at:].strip():
        return "ends too early", at
    return f"not JSON: {error.msg[0].lower()}{error.msg[1:]}", at


def _comma_before_end(text: str, at: int) -> int | None:
    """Position of a comma that stands before } or ], where the parser stopped at or after it."""
    if text[at : at + 1] == ",":  # Python 3.13 points at the comma
        return at if text[at + 1 :].lstrip()[:1] in ("}", "]") else None
    if text[at : at + 1] not in ("}", "]"):  # older ones at or before the bracket
        after = text[at:].lstrip()
        if after[:1] not in ("}", "]"):
            return None
        at += len(text[at:]) - len(after)
    before = text[:at].rstrip()
    return len(before) - 1 if before.endswith(",") else None
