"""What is measured on held-out rows: the loss of their labels, and generated answers against the wanted ones."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from espalier.config import MAX_TOKENS_PER_PACK, MIN_SHARED_TOKENS
from espalier.encode.encode import IGNORE_INDEX, Encoded

# Rows that are laid out together: enough to find what they share, few enough that their ids fit into memory.
WINDOW_ROWS = 8192
_MISSING = object()


@dataclass(frozen=True, slots=True)
class RowScores:
    """By row: sum of weighted token losses and sum of weights, float64 [R]; labels, and how many of them the largest
    logit names, int64 [R]. computed_tokens: positions that went through the model."""

    loss: npt.NDArray[np.float64]
    weight: npt.NDArray[np.float64]
    supervised: npt.NDArray[np.int64]
    correct: npt.NDArray[np.int64]
    computed_tokens: int


def score_rows(model: Any, rows: Sequence[Encoded], *, tree: bool, attention: str = "reference") -> RowScores:
    """Losses through the code of training: shared beginnings once (tree), or padded rows through the stock forward.

    Sums only are kept. attention: a name of espalier.tree.attention. The model is used as it is, in its own mode.
    """
    count = len(rows)
    scores = RowScores(np.zeros(count), np.zeros(count), np.zeros(count, np.int64), np.zeros(count, np.int64), 0)
    computed = 0
    for first in range(0, count, WINDOW_ROWS):
        window = [rows[i] for i in range(first, min(first + WINDOW_ROWS, count))]
        for row, weight, loss, correct, tokens in _parts(model, window, tree, attention):
            at = row + first
            np.add.at(scores.loss, at, loss * weight)
            np.add.at(scores.weight, at, weight)
            np.add.at(scores.supervised, at, 1)
            np.add.at(scores.correct, at, correct)
            computed += tokens
    return RowScores(scores.loss, scores.weight, scores.supervised, scores.correct, computed)


def _parts(model: Any, rows: Sequence[Encoded], tree: bool, attention: str) -> Iterator[tuple[Any, Any, Any, Any, int]]:
    """Of each forward: row, weight, loss and correctness of every label [K], and the tokens computed."""
    from espalier.tree.collate import to_tensors
    from espalier.tree.loss import plain_scores, tree_scores
    from espalier.tree.plan import plan_step

    longest = max(len(row.input_ids) for row in rows)
    budget = max(MAX_TOKENS_PER_PACK, longest)
    if tree:
        for pack in plan_step(rows, max_tokens=budget, min_shared_tokens=MIN_SHARED_TOKENS).packs:
            scores = tree_scores(model, to_tensors(pack, model.device), attention=attention)
            labels = pack.labels
            loss, correct = scores.loss.double().cpu().numpy(), scores.correct.cpu().numpy()
            yield labels.row, labels.weight, loss[labels.target], correct[labels.target], pack.num_tokens
        return
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].input_ids))
    while order:
        width = len(rows[order[-1]].input_ids)
        chosen = order[-max(1, MAX_TOKENS_PER_PACK // width) :]
        del order[-len(chosen) :]
        scores, row, weight = plain_scores(model, [rows[i] for i in chosen], 0)
        loss, correct = scores.loss.double().cpu().numpy(), scores.correct.cpu().numpy()
        yield np.array(chosen)[row], weight.astype(np.float64), loss, correct, len(chosen) * width


@dataclass(frozen=True, slots=True)
class Question:
    """The last answer of a row: the ids before it as they are trained, and its own text and number of tokens."""

    prompt: tuple[int, ...]
    wanted: str
    num_tokens: int


def question_of(row: Encoded, tokenizer: Any, stop_ids: Collection[int]) -> Question:
    """Prompt and wanted answer of a row: its last run of labels, up to the token that ends the turn."""
    from espalier.use.generate import decode

    labelled = np.flatnonzero(row.labels != IGNORE_INDEX)
    breaks = np.flatnonzero(np.diff(labelled) > 1)
    begin = int(labelled[breaks[-1] + 1 if len(breaks) else 0])
    run = row.input_ids[begin : int(labelled[-1]) + 1].tolist()
    end = next((i for i, token in enumerate(run) if token in stop_ids), len(run))
    return Question(tuple(row.input_ids[:begin].tolist()), decode(tokenizer, run[:end]), len(run))


@dataclass(frozen=True, slots=True)
class AnswerScore:
    """exact: the texts are equal but for blanks around them. Where the wanted answer is a JSON object or array: valid,
    the answer is JSON at all; fields, path -> whether the answer has the same value there. Else None and empty."""

    exact: bool
    valid: bool | None
    fields: dict[str, bool]


def score_answer(answer: str, wanted: str) -> AnswerScore:
    """Judge one answer. A field is a value that holds no others; its path is like `order.items[0].name`.

    Fields that only the answer has are not counted (exact match sees them).
    """
    exact = answer.strip() == wanted.strip()
    reference = _json(wanted)
    if not isinstance(reference, dict | list):
        return AnswerScore(exact, None, {})
    given = _json(answer)
    found = dict(_leaves(given)) if given is not _MISSING else {}
    fields = {path: path in found and _equal(found[path], value) for path, value in _leaves(reference)}
    return AnswerScore(exact, given is not _MISSING, fields)


def _json(text: str) -> Any:
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return _MISSING


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list) and value:
        for index, item in enumerate(value):
            yield from _leaves(item, f"{path}[{index}]")
    else:
        yield path, value


def _equal(a: Any, b: Any) -> bool:
    """Equal JSON values: 1 and 1.0 are one number, true is no number."""
    return bool(a == b) and isinstance(a, bool) == isinstance(b, bool)
