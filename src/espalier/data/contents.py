"""What texts hold that a person would not see or not expect. Reported, never changed."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from espalier.data.formats import Example

# Joiners (U+200C, U+200D) and variation selectors are left out: emoji and several scripts need them.
_INVISIBLE = "\u00ad\u115f\u1160\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\u3164\ufeff\ufff9-\ufffb"
_CONTROL = "\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f"
# Kangxi radicals, compatibility ideographs, Latin ligatures, mathematical letters, Roman numeral signs.
_LOOK_ALIKE = "\u2e80-\u2fdf\uf900-\ufaff\ufb00-\ufb06\U0001d400-\U0001d7ff\U0002f800-\U0002fa1f\u2160-\u217f"
_MIXED_SCRIPT = "[A-Za-z][\u0370-\u03ff\u0400-\u04ff]|[\u0370-\u03ff\u0400-\u04ff][A-Za-z]"
_SPECIAL = (
    r"<\|[^|<>\s]{1,40}\|>|<｜[^<>｜]{1,40}｜>|</?s>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|<(?:bos|eos|pad|unk)>"
)
_KINDS = {
    "control_characters": re.compile(f"[{_CONTROL}]"),
    "invisible_characters": re.compile(f"[{_INVISIBLE}]"),
    "replacement_characters": re.compile("\ufffd"),
    "look_alikes": re.compile(f"[{_LOOK_ALIKE}]|{_MIXED_SCRIPT}"),
    "special_tokens": re.compile(_SPECIAL),
}
_WORDS = {
    "control_characters": "hold control characters",
    "invisible_characters": "hold invisible characters",
    "replacement_characters": "hold U+FFFD, the mark of text that was decoded wrongly",
    "look_alikes": "hold characters that look like others",
    "special_tokens": "hold the text of a special token, which a tokenizer may take for the token itself",
}
# One pass over most texts: the characters that any of the kinds needs.
_MAYBE_ASCII = re.compile(f"[{_CONTROL}]|<[|/sSbepu]|\\[/?INST|<<")
_MAYBE = re.compile(f"[{_CONTROL}{_INVISIBLE}\ufffd{_LOOK_ALIKE}\u0370-\u03ff\u0400-\u04ff｜]|<[|/sSbepu]|\\[/?INST|<<")
PLACEHOLDERS = {"none", "null", "nan", "n/a", "na", "todo", "tbd", "undefined", "...", "…", "无", "nil", "-", "?"}


@dataclass(slots=True)
class Finding:
    """How many rows have something, in which rows first, and what it looks like."""

    rows: int = 0
    places: list[str] = field(default_factory=list)
    samples: dict[str, None] = field(default_factory=dict)

    def add(self, example: Example, sample: str) -> None:
        self.rows += 1
        if len(self.places) < 5:
            self.places.append(f"{example.file}:{example.line}")
        if len(self.samples) < 5:
            self.samples[sample] = None


class Contents:
    """Looks at the texts of many rows. `findings`: kind -> Finding."""

    def __init__(self) -> None:
        self.findings: dict[str, Finding] = {}

    def add(self, example: Example) -> None:
        texts = [message["content"] for message in example.messages]
        if example.text is not None:
            texts.append(example.text)
        for text in texts:
            if (_MAYBE_ASCII if text.isascii() else _MAYBE).search(text):
                self._look(example)
                break
        if True in example.train:
            answer = example.messages[len(example.train) - 1 - example.train[::-1].index(True)]["content"]
            if len(answer) < 12 and answer.strip().lower().rstrip(".") in PLACEHOLDERS:
                self._found("placeholder_answers", example, repr(answer))

    def _look(self, example: Example) -> None:
        is_text = example.text is not None
        for kind, pattern in _KINDS.items():
            if kind == "special_tokens" and is_text:
                continue  # a finished text is meant to hold the markers
            for text in [message["content"] for message in example.messages] if not is_text else [example.text or ""]:
                found = pattern.search(text)
                if found:
                    self._found(kind, example, found[0] if kind == "special_tokens" else _name(found[0]))
                    break

    def _found(self, kind: str, example: Example, sample: str) -> None:
        self.findings.setdefault(kind, Finding()).add(example, sample)

    def messages(self) -> dict[str, str]:
        """kind -> one sentence."""
        lines = {}
        for kind, finding in self.findings.items():
            words = _WORDS.get(kind, "have an answer that is only a placeholder")
            what = ", ".join(finding.samples)
            lines[kind] = f"{finding.rows} rows {words} ({what}): {', '.join(finding.places)}"
        return lines


def _name(characters: str) -> str:
    return "+".join(f"U+{ord(character):04X}" for character in characters)
