"""Rows taken apart into the pieces of text that their tokens are: what `espalier inspect` shows."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass

from espalier.data.formats import Example
from espalier.data.read import BadRow
from espalier.encode.encode import Encoded, Encoder

_JOINER = "\u200d"  # zero-width joiner
_MAX_JOINED = 12  # tokens that may make up one character or one run of characters


@dataclass(frozen=True, slots=True)
class Piece:
    """One token, or the tokens that only together are text (parts of a character).

    start: index of the first token; learnt: they carry loss; added: the template wrote them, not the data.
    """

    start: int
    ids: tuple[int, ...]
    text: str
    learnt: bool
    added: bool


@dataclass(frozen=True, slots=True)
class InspectedRow:
    """One row to show. notes: what the template and the length policy did to the example that it comes from."""

    encoded: Encoded
    pieces: tuple[Piece, ...]
    notes: tuple[str, ...]

    @property
    def place(self) -> str:
        """file:line"""
        return f"{self.encoded.file}:{self.encoded.line}"

    @property
    def num_tokens(self) -> int:
        """Tokens of the row."""
        return len(self.encoded.input_ids)

    @property
    def num_learnt(self) -> int:
        """Tokens that carry loss."""
        return int((self.encoded.labels >= 0).sum())

    @property
    def text(self) -> str:
        """The text of all tokens."""
        return "".join(piece.text for piece in self.pieces)

    def token_texts(self) -> list[str]:
        """One text a token; a piece of several tokens has its text at the first."""
        return [text for piece in self.pieces for text in (piece.text, *[""] * (len(piece.ids) - 1))]


@dataclass(frozen=True, slots=True)
class Inspection:
    """What one call shows: rows, the rows that could not be encoded, and the tree of shared beginnings."""

    rows: tuple[InspectedRow, ...]
    bad: tuple[BadRow, ...]
    tree: tuple[str, ...]
    template: str
    notices: tuple[str, ...]


def pieces_of(encoder: Encoder, row: Encoded, example: Example) -> tuple[Piece, ...]:
    """The row's tokens with their texts; joined where a character is spread over several tokens."""
    ids: list[int] = row.input_ids.tolist()
    found: list[tuple[int, int, str]] = []  # first token, end, text
    before: list[int] = []  # the tokens of the piece before: some tokenizers drop a space at the beginning of a text
    start = 0
    for end in range(1, len(ids) + 1):
        text = encoder.aligner.decode([*before, *ids[start:end]])[len(encoder.aligner.decode(before)) :]
        unfinished = "\ufffd" in text and end < len(ids) and end - start < _MAX_JOINED
        if unfinished and row.labels[start] >= 0 and row.labels[end] < 0:
            unfinished = False  # never over the border of what is learnt
        if unfinished:
            continue
        found.append((start, end, text))
        before, start = ids[start:end], end
    found = _graphemes(found, row)
    inside = _contents(example, "".join(text for _, _, text in found))
    pieces, position = [], 0
    for start, end, text in found:
        added = not any(begin < position + max(1, len(text)) and position < stop for begin, stop in inside)
        pieces.append(Piece(start, tuple(ids[start:end]), text, bool(row.labels[start] >= 0), added))
        position += len(text)
    return tuple(pieces)


def _graphemes(found: list[tuple[int, int, str]], row: Encoded) -> list[tuple[int, int, str]]:
    """Pieces joined where they are shown as one character: joined emoji, skin tones, accents of their own."""
    joined: list[tuple[int, int, str]] = []
    for start, end, text in found:
        same = joined and (row.labels[joined[-1][0]] >= 0) == (row.labels[start] >= 0)
        if same and (joined[-1][2].endswith(_JOINER) or (text and _continues(text[0]))):
            joined[-1] = (joined[-1][0], end, joined[-1][2] + text)
        else:
            joined.append((start, end, text))
    return joined


def _continues(char: str) -> bool:
    skin_tone = "\U0001f3fb" <= char <= "\U0001f3ff"
    return char == _JOINER or skin_tone or unicodedata.category(char) in ("Mn", "Me", "Mc")


def _contents(example: Example, text: str) -> list[tuple[int, int]]:
    """Where the data's own texts stand in the row's text."""
    if example.text is not None:
        return [(0, len(text))]
    found, position = [], 0
    for message in example.messages:
        content = message.get("content")
        if not isinstance(content, str) or not content.strip():
            continue
        begin = text.find(content.strip(), position)
        if begin >= 0:
            position = begin + len(content.strip())
            found.append((begin, position))
    return found
