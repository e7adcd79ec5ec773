"""Example -> Encoded: token ids, labels, and the length policy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from espalier.data.formats import Example
from espalier.data.read import BadRow
from espalier.encode.align import Aligner, Tokenised
from espalier.encode.length import Fitted, fit
from espalier.encode.spans import Rendered, RowRefused, render_rows, render_text, text_markers, trained_turns
from espalier.encode.template import ChatTemplate, Message
from espalier.errors import UsageError

IGNORE_INDEX = -100
TOO_LONG = "too long"  # how the reason of a row begins that the length policy leaves out
Overlength = Literal["drop", "truncate_prompt", "split", "error"]
TrainOn = Literal["all", "last"]


@dataclass(frozen=True, slots=True)
class Encoded:
    """One row as the model sees it.

    input_ids: int32 [n]. labels: int32 [n]; labels[t] is input_ids[t] where token t is learnt, else IGNORE_INDEX
    (not shifted: the prediction of token t is made at position t - 1; labels[0] is always IGNORE_INDEX).
    weights: float32 [n], factor on the loss of each supervised token, or None for all 1.
    """

    input_ids: npt.NDArray[np.int32]
    labels: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32] | None = None
    file: str = ""
    line: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one example.

    rows, or bad with the reason why there are none; notes: what should be said, in fixed sentences that can be
    counted; num_tokens: the example's length before the length policy (its longest row); key: see prompt_key.
    """

    rows: tuple[Encoded, ...] = ()
    bad: BadRow | None = None
    notes: tuple[str, ...] = ()
    num_tokens: int = 0
    key: int = 0


class Encoder:
    """Turns Examples into Encoded rows. Picklable: worker processes get a copy.

    overlength says what happens to rows longer than max_length tokens: `drop` leaves them out with the reason,
    `error` does the same and the caller stops, `truncate_prompt` takes the oldest turns and then the beginning of the
    user's text away, `split` makes several rows of a conversation. An answer is never cut.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: ChatTemplate,
        *,
        max_length: int | None = None,
        overlength: Overlength = "drop",
        train_on: TrainOn = "all",
    ):
        if overlength not in ("drop", "truncate_prompt", "split", "error"):
            raise UsageError(f"overlength is {overlength!r}", todo="Use drop, truncate_prompt, split or error.")
        if train_on not in ("all", "last"):
            raise UsageError(f"train_on is {train_on!r}", todo="Use all or last.")
        self.tokenizer, self.template = tokenizer, template
        self.max_length, self.overlength, self.train_on = max_length, overlength, train_on
        self.aligner = Aligner(template)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "aligner"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.aligner = Aligner(self.template)

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> list[int]:
        """The ids that chat sends for a conversation: the same that begin the trained row. Raises TemplateError."""
        text = self.template.render(messages, generation_prompt=True, tools=tools)
        return list(self.aligner._ids_of(text))

    def encode(self, example: Example) -> list[Encoded] | BadRow:
        """The rows that one example gives (mostly one), or why it gives none."""
        outcome = self.encode_batch([example])[0]
        return outcome.bad if outcome.bad is not None else list(outcome.rows)

    def encode_batch(self, examples: Sequence[Example]) -> list[Outcome]:
        """One Outcome an example, in order."""
        rendered: list[list[Rendered] | RowRefused] = [self._render(example) for example in examples]
        flat = [row for rows in rendered if not isinstance(rows, RowRefused) for row in rows]
        tokenised = iter(self.aligner.tokenise(flat))
        outcomes = []
        for example, rows in zip(examples, rendered, strict=True):
            if isinstance(rows, RowRefused):
                outcomes.append(Outcome(bad=bad_row(example, str(rows))))
            else:
                outcomes.append(self._outcome(example, [next(tokenised) for _ in rows]))
        return outcomes

    def _render(self, example: Example) -> list[Rendered] | RowRefused:
        try:
            if example.text is not None:
                return [render_text(self.template, example, self.train_on)]
            return render_rows(self.template, example, self.train_on)
        except RowRefused as refusal:
            return refusal

    def _outcome(self, example: Example, parts: list[list[Tokenised] | RowRefused]) -> Outcome:
        rows: list[Tokenised] = []
        for part in parts:
            if isinstance(part, RowRefused):
                return Outcome(bad=bad_row(example, str(part)))
            rows += part
        num_tokens = max(len(row.ids) for row in rows)
        extra: tuple[str, ...] = ()
        if self.max_length is not None and num_tokens > self.max_length:
            fitted = self._fit(example, self.max_length)
            if not fitted.rows:
                reason = f"{TOO_LONG} ({num_tokens} tokens, limit {self.max_length})"
                return Outcome(bad=bad_row(example, reason), num_tokens=num_tokens)
            rows, extra = fitted.rows, fitted.notes
        notes = tuple(dict.fromkeys([*(note for row in rows for note in row.notes), *extra]))
        encoded = tuple(to_encoded(row, example) for row in rows)
        return Outcome(encoded, None, notes, num_tokens, prompt_key(example, self.template))

    def _fit(self, example: Example, limit: int) -> Fitted:
        """Rows within the limit by the length policy; none where the policy leaves the example out."""
        if self.overlength in ("drop", "error") or example.text is not None:
            return Fitted([], ())
        turns = trained_turns(example, self.train_on)
        cut_text = self.overlength == "truncate_prompt"
        return fit(example, turns, limit, self._tokenise_one, self._offsets, cut_text=cut_text)

    def _tokenise_one(self, example: Example) -> list[Tokenised]:
        rows: list[Tokenised] = []
        for part in self.aligner.tokenise(render_rows(self.template, example)):
            if isinstance(part, RowRefused):
                raise part
            rows += part
        return rows

    def _offsets(self, text: str) -> list[tuple[int, int]]:
        return list(self.aligner.backend.encode(text, add_special_tokens=False).offsets)


def bad_row(example: Example, reason: str) -> BadRow:
    """A BadRow for an example, with its content (cut to 2,000 characters) for the rejects file."""
    content = {"text": example.text} if example.text is not None else {"messages": list(example.messages)}
    return BadRow(example.file, example.line, reason, json.dumps(content, ensure_ascii=False, default=str)[:2000])


def prompt_key(example: Example, template: ChatTemplate) -> int:
    """64 bits that are equal for examples with the same prompt: all that stands before the first learnt answer."""
    if example.text is not None:
        marker = text_markers(template)[0]
        prompt: Any = example.text.split(marker, 1)[0]
    else:
        turns = trained_turns(example)
        prompt = [[m["role"], m.get("content")] for m in example.messages[: turns[0] if turns else None]]
    text = json.dumps(prompt, ensure_ascii=False, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode(errors="replace"), digest_size=8).digest(), "little")


def to_encoded(row: Tokenised, example: Example) -> Encoded:
    """Ids and labels of one row; a row without a label is a fault of ours."""
    ids = np.array(row.ids, dtype=np.int32)
    labels = np.full(len(ids), IGNORE_INDEX, dtype=np.int32)
    weights = None
    if any(span.weight != 1.0 for span in row.spans):
        weights = np.ones(len(ids), dtype=np.float32)
    for span in row.spans:
        labels[span.start : span.end] = ids[span.start : span.end]
        if weights is not None:
            weights[span.start : span.end] = span.weight
    labels[0] = IGNORE_INDEX  # nothing stands before the first token that could predict it
    assert (labels != IGNORE_INDEX).any(), f"{example.file}:{example.line}: no supervised token"
    return Encoded(ids, labels, weights, example.file, example.line)
