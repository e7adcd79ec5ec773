"""How long a row may be, and what happens to longer ones. An answer is never cut, nor its end token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from espalier.data.formats import Example
from espalier.encode.align import Tokenised
from espalier.encode.spans import RowRefused
from espalier.errors import UsageError

SPLIT = "a conversation longer than the limit became several rows, each with as many earlier turns as fit"
TURNS_CUT = "the oldest turns of a conversation longer than the limit were left away"
TEXT_CUT = "the beginning of a user's text was cut: its row was longer than the limit"
ANSWER_LEFT_OUT = "an answer that fits no row was left out, the rest of its conversation was kept"

_PLACEHOLDER = 10**9  # transformers writes 1e30 where a tokenizer knows no limit


def length_limit(user: int | None, tokenizer: Any, model_config: Any = None) -> tuple[int | None, str]:
    """(longest row in tokens or None, whose limit that is): the smallest of the user's, the model's, the tokenizer's.

    Raises UsageError for a user's limit below 1.
    """
    if user is not None and user < 1:
        raise UsageError(f"{user} is not 1 or more", where="--max_seq_length")
    inner = getattr(model_config, "text_config", None) or model_config
    model = getattr(inner, "max_position_embeddings", None)
    own = getattr(tokenizer, "model_max_length", None)
    limits = [
        (user, "as asked"),
        (model, "the model's max_position_embeddings"),
        (int(own) if own is not None and own < _PLACEHOLDER else None, "the tokenizer's model_max_length"),
    ]
    known = [(limit, whose) for limit, whose in limits if limit is not None]
    if not known:
        return None, "no limit: neither you, the model nor the tokenizer names one"
    limit, whose = min(known, key=lambda pair: pair[0])
    if user is not None and limit < user:
        return limit, f"{whose}; you asked for {user:,}"
    return limit, whose


@dataclass(frozen=True, slots=True)
class Fitted:
    """Rows that fit, and what was done for it. No rows: not even one answer with its own question fits."""

    rows: list[Tokenised]
    notes: tuple[str, ...]


@dataclass
class _Fitter:
    example: Example
    limit: int
    tokenise: Callable[[Example], list[Tokenised]]
    offsets: Callable[[str], Sequence[tuple[int, int]]]
    cut_text: bool

    def window(self, start: int, turns: Sequence[int]) -> Example:
        """System text, then messages from `start` through the last of `turns`; only `turns` are learnt."""
        head = self.head
        kept = [*range(min(head, start)), *range(start, turns[-1] + 1)]
        return replace(
            self.example,
            messages=tuple(self.example.messages[i] for i in kept),
            train=tuple(i in turns for i in kept),
            weights=tuple(self.example.weights[i] for i in kept) if self.example.weights else (),
        )

    @property
    def head(self) -> int:
        """Number of leading system messages, which every row keeps."""
        count = 0
        while count < len(self.example.messages) and self.example.messages[count]["role"] == "system":
            count += 1
        return count

    def fits(self, example: Example) -> list[Tokenised] | None:
        rows = self.tokenise(example)
        return rows if all(len(row.ids) <= self.limit for row in rows) else None

    def starts(self, turn: int) -> list[int]:
        """Where a row that learns `turn` may begin: at the first message or any user turn up to its own question."""
        messages = self.example.messages
        found = [self.head] + [i for i in range(self.head + 1, turn) if messages[i]["role"] == "user"]
        return found if found[-1] <= turn else [turn]

    def earliest_start(self, turn: int) -> int | None:
        """The earliest start from which a row that learns `turn` fits, or None."""
        starts = self.starts(turn)
        at = _first(len(starts), lambda i: self.fits(self.window(starts[i], [turn])) is not None)
        return starts[at] if at < len(starts) else None

    def longest_run(self, start: int, turns: Sequence[int]) -> int:
        """How many of `turns`, in order, a row from `start` can learn (at least the first)."""
        return _first(len(turns), lambda n: self.fits(self.window(start, turns[: n + 1])) is None)


def fit(
    example: Example,
    turns: Sequence[int],
    limit: int,
    tokenise: Callable[[Example], list[Tokenised]],
    offsets: Callable[[str], Sequence[tuple[int, int]]],
    *,
    cut_text: bool,
) -> Fitted:
    """Rows of at most `limit` tokens that together learn the answers `turns`, each once and whole.

    Every row keeps the system text and as many earlier turns as fit. With `cut_text`, an answer that does not fit with
    its own question alone gets the question without its beginning. tokenise gives the rows of a conversation (may
    raise RowRefused), offsets the character ranges of a text's tokens.
    """
    fitter = _Fitter(example, limit, tokenise, offsets, cut_text)
    rows: list[Tokenised] = []
    notes: dict[str, None] = {}
    rest = list(turns)
    while rest:
        start = fitter.earliest_start(rest[0])
        if start is None:
            part = _cut_question(fitter, fitter.starts(rest[0])[-1], rest[0]) if cut_text else None
            notes[TEXT_CUT if part else ANSWER_LEFT_OUT] = None
            learnt = 1
        else:
            if start > fitter.head:
                notes[TURNS_CUT] = None
            learnt = fitter.longest_run(start, rest)
            part = tokenise(fitter.window(start, rest[:learnt]))
        rows += part or []
        rest = rest[learnt:]
    if len(rows) > 1:
        notes[SPLIT] = None
    return Fitted(rows, tuple(notes))


def _first(count: int, holds: Callable[[int], bool]) -> int:
    """The smallest i in range(count) for which holds(i), where holds is monotone; count if none."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        if holds(middle):
            high = middle
        else:
            low = middle + 1
    return low


def _cut_question(fitter: _Fitter, start: int, turn: int) -> list[Tokenised] | None:
    """The answer with the end of its question: the longest text before it that is not an answer loses its beginning."""
    example = fitter.window(start, [turn])
    candidates = [
        i
        for i, message in enumerate(example.messages[:-1])
        if message["role"] not in ("system", "assistant") and isinstance(message.get("content"), str)
    ]
    if not candidates:
        return None
    longest = max(candidates, key=lambda i: len(example.messages[i]["content"]))
    text = example.messages[longest]["content"]
    borders = [begin for begin, _ in fitter.offsets(text)]
    cut = 0
    while True:
        messages = list(example.messages)
        messages[longest] = {**messages[longest], "content": text}
        try:
            rows = fitter.tokenise(replace(example, messages=tuple(messages)))
        except RowRefused:
            return None
        over = max(len(row.ids) for row in rows) - fitter.limit
        if over <= 0:
            return rows
        if cut >= len(borders):
            return None
        cut += over
        text = example.messages[longest]["content"][borders[cut] if cut < len(borders) else len(text) :]
