"""The checks that need a tokenizer, and `run_check`, which is the command `espalier check`."""

from __future__ import annotations

import heapq
import json
import random
import sys
from array import array
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from espalier.data.check import CheckWarning, check_files, exit_code
from espalier.data.formats import Example, FormatOptions
from espalier.data.report import print_report, safe_console
from espalier.data.rows import BadRow
from espalier.encode.encode import IGNORE_INDEX, Encoded, Encoder
from espalier.encode.stops import turn_end_ids

ROWS_A_STEP = 16  # of the step whose sharing is shown
_SAMPLE_ROWS = 200 * ROWS_A_STEP
_WORST = 5


class TokenCheck:
    """Encodes rows as training will and keeps counts: lengths, notes, what has no turn end, a sample for sharing.

    Implements `espalier.data.check.TokenChecks`. Memory: 4 bytes a row, and the ids of 3,200 rows.
    """

    def __init__(self, encoder: Encoder, *, seed: int = 0) -> None:
        self.encoder = encoder
        self._lengths = array("I")
        self._learnt = 0
        self._notes: dict[str, tuple[int, list[str]]] = {}
        self._stops = set(turn_end_ids(encoder.tokenizer, encoder.template))
        self._without_stop: tuple[int, list[str]] = (0, [])
        self._worst: list[tuple[int, str]] = []  # a heap: (tokens, place) of the longest refused rows
        self._num_overlong = self._num_examples = 0
        self._sample: list[npt.NDArray[np.int32]] = []
        self._random = random.Random(seed)

    def add(self, examples: Sequence[Example]) -> list[BadRow | None]:
        """Per example, why it is left out, or None."""
        verdicts = []
        self._num_examples += len(examples)
        for example, outcome in zip(examples, self.encoder.encode_batch(examples), strict=True):
            place = f"{example.file}:{example.line}"
            verdicts.append(outcome.bad)
            for note in outcome.notes:
                self._notes[note] = _counted(self._notes.get(note, (0, [])), place)
            limit = self.encoder.max_length
            if limit is not None and outcome.num_tokens > limit:
                self._num_overlong += 1
                heapq.heappush(self._worst, (outcome.num_tokens, place))
                if len(self._worst) > _WORST:
                    heapq.heappop(self._worst)
            for row in outcome.rows:
                self._count(row, place)
        return verdicts

    def _count(self, row: Encoded, place: str) -> None:
        self._lengths.append(len(row.input_ids))
        learnt = np.flatnonzero(row.labels != IGNORE_INDEX)
        self._learnt += len(learnt)
        if self._stops and int(row.labels[learnt[-1]]) not in self._stops:
            self._without_stop = _counted(self._without_stop, place)
        # Reservoir sampling: every row has the same chance, whatever their number.
        if len(self._sample) < _SAMPLE_ROWS:
            self._sample.append(row.input_ids)
        elif (slot := self._random.randrange(len(self._lengths))) < _SAMPLE_ROWS:
            self._sample[slot] = row.input_ids

    def warnings(self) -> list[CheckWarning]:
        """What training on these rows with this tokenizer would do that one may not expect."""
        found = [CheckWarning("template", notice) for notice in self.encoder.template.notices()]
        if not self._stops:
            message = "the template ends an answer with no token of its own: the model will not learn to stop"
            found.append(CheckWarning("missing_stop", message))
        count, places = self._without_stop
        if count:
            message = f"{count} rows do not end with a learnt turn end ({', '.join(places)})"
            found.append(CheckWarning("untrained_stop", message, {"count": count, "places": places}))
        if self._num_overlong:
            worst = [{"place": place, "tokens": tokens} for tokens, place in sorted(self._worst, reverse=True)]
            shown = ", ".join(f"{row['place']} ({row['tokens']:,} tokens)" for row in worst)
            share = self._num_overlong / self._num_examples
            message = (
                f"{self._num_overlong} rows are longer than {self.encoder.max_length:,} tokens "
                f"({share:.1%}; policy {self.encoder.overlength}); the longest: {shown}"
            )
            found.append(CheckWarning("overlong", message, {"count": self._num_overlong, "worst": worst}))
        for note, (count, places) in self._notes.items():
            message = f"{count} rows: {note} ({', '.join(places)})"
            found.append(CheckWarning("encoding", message, {"count": count, "places": places}))
        return found

    def figures(self) -> dict[str, Any]:
        """row_tokens: int64 [rows]; learnt_tokens; sharing: see `prompt_sharing`, None for fewer rows than a step."""
        return {
            "row_tokens": np.array(self._lengths, dtype=np.int64),
            "learnt_tokens": self._learnt,
            "sharing": prompt_sharing(self._sample, self._random),
        }


def _counted(so_far: tuple[int, list[str]], place: str) -> tuple[int, list[str]]:
    count, places = so_far
    return count + 1, [*places, place] if len(places) < 5 else places


def unique_tokens(rows: Sequence[npt.NDArray[np.int32]]) -> int:
    """Tokens of the tree of these rows: the sum of their lengths, less what sorted neighbours have in common.

    Rows are sorted by token ids, compared as big-endian bytes; each then shares the longest beginning with its
    neighbour, so the sum over neighbours counts every shared token once for each row that need not compute it.
    """
    ordered = sorted(rows, key=lambda ids: ids.astype(">i4").tobytes())
    shared = 0
    for one, other in pairwise(ordered):
        length = min(len(one), len(other))
        differs = np.flatnonzero(one[:length] != other[:length])
        shared += int(differs[0]) if len(differs) else length
    return sum(map(len, rows)) - shared


def prompt_sharing(
    rows: Sequence[npt.NDArray[np.int32]], chance: random.Random, rows_a_step: int = ROWS_A_STEP
) -> dict[str, Any] | None:
    """What a tree saves in steps of random rows: mean logical and unique tokens a step, and the share saved."""
    steps = len(rows) // rows_a_step
    if not steps:
        return None
    order = list(range(len(rows)))
    chance.shuffle(order)
    groups = [[rows[i] for i in order[s * rows_a_step : (s + 1) * rows_a_step]] for s in range(steps)]
    logical = sum(len(row) for group in groups for row in group)
    unique = sum(unique_tokens(group) for group in groups)
    return {
        "rows_a_step": rows_a_step,
        "steps": steps,
        "logical_tokens": logical / steps,
        "unique_tokens": unique / steps,
        "saved": 1 - unique / logical,
    }


def run_check(
    files: Sequence[str],
    *,
    heldout: Sequence[str] | None = None,
    options: FormatOptions | None = None,
    encoder_factory: Callable[[], Encoder] | None = None,
    strict: bool = False,
    fix: str | None = None,
    rejects: str | None = None,
    as_json: bool = False,
) -> int:
    """The command `espalier check`: prints the report and returns the exit code (0 clean, 1 warnings, 2 errors).

    encoder_factory: makes the encoder of `--model_path`; None checks without a tokenizer. as_json prints one object
    with all left-out rows instead of tables. Raises EspalierError for wrong names and options.
    """
    tokens = TokenCheck(encoder_factory()) if encoder_factory is not None else None
    report = check_files(
        files,
        options=options,
        heldout=heldout,
        tokens=tokens,
        fix=fix,
        rejects=rejects,
        keep_left_out=None if as_json else 0,
    )
    if as_json:
        # ASCII only, because a console that escapes characters itself would make the JSON unreadable.
        sys.stdout.write(json.dumps(report.to_json()) + "\n")
    else:
        console = safe_console()
        print_report(report, console)
        for path, what in ((fix, "kept rows of the training files"), (rejects, "left-out rows")):
            if path:
                console.print(f"{what} written to {path}")
    return exit_code(report, strict)
