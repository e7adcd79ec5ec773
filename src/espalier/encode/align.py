"""Token ids of rendered rows, and which of them are learnt.

Two things hold for every row that leaves here:

    ids[:k] == the ids that chat sends for the prompt of each learnt answer (k: the answer's first token)
    decode(answer's ids, after its prompt) == the answer's rendered text

The whole text is tokenised at once. Where that merges characters over the border between prompt and answer, or gives
the prompt other ids than chat sends, prompt and answer are tokenised apart; where neither way holds, the row is
refused. Special tokens cut a text into sections that are tokenised independently, so the prompt's ids need comparing
only from its last special token on.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from espalier.encode.spans import Rendered, RowRefused, Span, one_turn, render_rows
from espalier.encode.template import ChatTemplate, common_prefix_length

SPLIT_MERGE = "tokens merge over the border between prompt and answer: each answer became a row of its own"
NORMALISED = "the tokenizer writes some characters of an answer in another Unicode form (NFC or NFKC)"
UNKNOWN_IN_PROMPT = "a prompt holds characters that the tokenizer cannot write"


@dataclass(frozen=True, slots=True)
class TokenSpan:
    """Tokens [start, end) are learnt, with this weight; message is the turn's index."""

    start: int
    end: int
    weight: float = 1.0
    message: int = 0


@dataclass(frozen=True, slots=True)
class Tokenised:
    """Ids of one row and its learnt spans in order."""

    ids: list[int]
    spans: tuple[TokenSpan, ...]
    row: Rendered
    notes: tuple[str, ...] = ()


class Aligner:
    """Tokenises rendered rows. Holds the tokenizer's fast form; not shared between processes (each makes its own)."""

    def __init__(self, template: ChatTemplate):
        self.template = template
        self.backend: Any = template.tokenizer.backend_tokenizer
        self.unk_id: int | None = template.tokenizer.unk_token_id
        self.specials = frozenset(i for i, t in template.tokenizer.added_tokens_decoder.items() if t.special)
        self.ids_of = lru_cache(maxsize=4096)(self._ids_of)
        self.decoded = lru_cache(maxsize=4096)(lambda text: self.decode(self.ids_of(text)))

    def _ids_of(self, text: str) -> tuple[int, ...]:
        return tuple(self.backend.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.backend.decode(list(ids), skip_special_tokens=False))

    def tokenise(self, rows: Sequence[Rendered]) -> list[list[Tokenised] | RowRefused]:
        """One entry a row: its token rows (several where its answers had to be set apart), or why it is refused."""
        encodings = self.backend.encode_batch([row.text for row in rows], add_special_tokens=False)
        row_ids = [encoding.ids for encoding in encodings]  # each access copies
        joint = [self._spans(row, e, ids) for row, e, ids in zip(rows, encodings, row_ids, strict=True)]
        checks = [(row, ids, spans) for row, ids, spans in zip(rows, row_ids, joint, strict=True) if spans]
        faithful = iter(self._faithful(checks))
        result: list[list[Tokenised] | RowRefused] = []
        for row, ids, spans in zip(rows, row_ids, joint, strict=True):
            try:
                good = next(faithful) if spans else None
                if spans and good is not None:
                    self._check_ends(ids, spans)
                    notes = (*row.notes, *good, *self._prompt_notes(row, ids))
                    result.append([Tokenised(ids, tuple(spans), row, notes)])
                else:
                    result.append(self._apart(row))
            except RowRefused as refusal:
                result.append(refusal)
        return result

    def _spans(self, row: Rendered, encoding: Any, ids: list[int]) -> list[TokenSpan] | None:
        """Token spans in the row tokenised as a whole, or None where a border falls inside a token."""
        spans = []
        for span in row.spans:
            first, last = encoding.char_to_token(span.start), encoding.char_to_token(span.end - 1)
            if first is None or last is None:
                return None
            # A turn end may be marked to swallow the whitespace after it (Phi-3's are).
            if encoding.token_to_chars(last)[1] > span.end and ids[last] not in self.specials:
                return None
            if first == 0 and span.start > 0:
                return None
            # A character may be several tokens: char_to_token names one of them, the border is the first.
            while first > 0 and encoding.token_to_chars(first - 1)[1] > span.start:
                first -= 1
            while last + 1 < len(encoding) and encoding.token_to_chars(last + 1)[0] < span.end:
                last += 1
            if encoding.token_to_chars(first)[0] != span.start and span.start > 0:
                return None
            if not self._prompt_holds(row, span, ids, first):
                return None
            spans.append(TokenSpan(first, last + 1, span.weight, span.message))
        return spans

    def _tail(self, row: Rendered, span: Span) -> str:
        """The prompt from its last special token on (all of it without one)."""
        start = 0
        window = max(0, span.start - 128)  # mostly the answer's own header, right before it
        for found in self.template.special_pattern.finditer(row.text, window, span.start):
            start = found.start()
        if not start and window:
            for found in self.template.special_pattern.finditer(row.text, 0, span.start):
                start = found.start()
        return row.text[start : span.start]

    def _prompt_holds(self, row: Rendered, span: Span, ids: list[int], first: int) -> bool:
        tail = self.ids_of(self._tail(row, span))
        return tuple(ids[first - len(tail) : first]) == tail

    def _faithful(self, rows: list[tuple[Rendered, list[int], list[TokenSpan]]]) -> list[tuple[str, ...] | None]:
        """Per row, notes where each answer decodes to its rendered text, None where one does not."""
        sequences, wanted = [], []
        for row, ids, spans in rows:
            for span, place in zip(row.spans, spans, strict=True):
                tail = self._tail(row, span)
                sequences.append(ids[place.start - len(self.ids_of(tail)) : place.end])
                wanted.append((self.decoded(tail), row.text[span.start : span.end]))
        texts = iter(self.backend.decode_batch(sequences, skip_special_tokens=False))
        answers = iter(wanted)
        found: list[tuple[str, ...] | None] = []
        for _, _, spans in rows:
            notes: tuple[str, ...] | None = ()
            for _ in spans:
                text, (prompt, answer) = next(texts), next(answers)
                if text != prompt + answer:
                    same = text.startswith(prompt) and _same_but_form(text[len(prompt) :], answer)
                    notes = (NORMALISED,) if same and notes is not None else None
            found.append(notes)
        return found

    def _check_ends(self, ids: list[int], spans: Sequence[TokenSpan]) -> None:
        """Exactly one turn end an answer: a text that holds the end token would teach to stop in the middle."""
        for span in spans:
            end = ids[span.end - 1]
            if end in self.specials and ids.count(end) > len(spans) and end in ids[span.start : span.end - 1]:
                raise RowRefused(f"the answer holds the end token ({self.template.tokenizer.decode([end])!r})")

    def _prompt_notes(self, row: Rendered, ids: list[int]) -> tuple[str, ...]:
        if self.unk_id is None or self.unk_id not in ids:
            return ()
        return (UNKNOWN_IN_PROMPT,) if self._unknown(row.text) else ()

    def _unknown(self, text: str) -> str:
        """The characters of `text` that become the unknown token, each once, in order."""
        if self.unk_id is None:
            return ""
        encoding = self.backend.encode(text, add_special_tokens=False)
        pieces = [text[a:b] for i, (a, b) in zip(encoding.ids, encoding.offsets, strict=True) if i == self.unk_id]
        unknown = "".join(piece for piece in pieces if piece != self.template.tokenizer.unk_token)
        return "".join(dict.fromkeys(unknown))

    def _apart(self, row: Rendered) -> list[Tokenised]:
        """The row with its prompt and answer tokenised apart; one row an answer. Raises RowRefused."""
        if len(row.spans) > 1:
            return self._one_row_each(row)
        span = row.spans[0]
        prompt, answer = row.text[: span.start], row.text[span.start : span.end]
        unknown = self._unknown(answer)
        if unknown:
            raise RowRefused(f"the answer holds characters that the tokenizer cannot write ({unknown!r})")
        prompt_ids = list(self._ids_of(prompt))
        tail = self._tail(row, span)
        for answer_ids in (list(self._ids_of(answer)), self._after_newline(answer)):
            text = self.decode([*self.ids_of(tail), *answer_ids])
            notes = row.notes
            if text != self.decoded(tail) + answer:
                if not _same_but_form(text.removeprefix(self.decoded(tail)), answer):
                    continue
                notes = (*notes, NORMALISED)
            ids = prompt_ids + answer_ids
            place = TokenSpan(len(prompt_ids), len(ids), span.weight, span.message)
            self._check_ends(ids, [place])
            return [Tokenised(ids, (place,), row, notes)]
        raise RowRefused(
            f"the tokenizer does not give the answer's text back ({_difference(answer, text, self.decoded(tail))})"
        )

    def _after_newline(self, answer: str) -> list[int]:
        """Ids of the answer as it stands after a newline: tokenizers that mark a text's beginning then do not."""
        newline, ids = list(self.ids_of("\n")), list(self._ids_of("\n" + answer))
        return ids[len(newline) :] if ids[: len(newline)] == newline else ids

    def _one_row_each(self, row: Rendered) -> list[Tokenised]:
        """A row a learnt answer, each rendered as chat will send it."""
        result: list[Tokenised] = []
        for part in _single_answer_rows(self.template, row):
            tokenised = self.tokenise([part])[0]
            if isinstance(tokenised, RowRefused):
                raise tokenised
            result += tokenised
        return result


def _single_answer_rows(template: ChatTemplate, row: Rendered) -> list[Rendered]:
    notes = (*row.notes, SPLIT_MERGE)
    if row.example.text is not None:
        return [Rendered(row.text[: span.end], (span,), row.example, notes) for span in row.spans]
    rows: list[Rendered] = []
    for span in row.spans:
        for part in render_rows(template, one_turn(row.example, span.message)):
            rows.append(Rendered(part.text, part.spans, row.example, notes))
    return rows


def _difference(answer: str, text: str, prompt: str) -> str:
    """Where the decoded text (with its prompt) first differs from the answer, a few characters of both."""
    decoded = text[len(prompt) :] if text.startswith(prompt) else text
    at = max(0, common_prefix_length(answer, decoded) - 5)
    return f"{answer[at : at + 15]!r} comes back as {decoded[at : at + 15]!r}"


def _same_but_form(decoded: str, wanted: str) -> bool:
    return any(decoded == unicodedata.normalize(form, wanted) for form in ("NFC", "NFKC"))
