"""What `espalier check` finds: every row kept or left out with a reason, and warnings about the rows that are kept.

Memory is bounded by about 30 bytes a row: texts are looked at once and only their 64-bit keys are kept.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from espalier.data.contents import Contents
from espalier.data.formats import Example, FormatOptions, check_options, iter_pairs
from espalier.data.keys import key, prompt_text, row_text
from espalier.data.output import LinesFile, check_outputs, kept_line, reject_line
from espalier.data.read import read_rows
from espalier.data.rows import MAX_RAW_CHARS, BadRow, RawRow
from espalier.data.source import expand
from espalier.errors import DataError

_BATCH_ROWS = 512
_MAX_KINDS = 1000
NOTE = "note"  # the kind of what is merely said; --strict does not count it
Pairs = Iterator[tuple[RawRow | BadRow, Example | BadRow]]


@dataclass(frozen=True, slots=True)
class CheckWarning:
    """One finding about rows that are kept. `details` are JSON values for scripts (count, places)."""

    kind: str
    message: str
    details: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {"kind": self.kind, "message": self.message, **self.details}


class TokenChecks(Protocol):
    """The part of the check that needs a tokenizer (encode/check.py)."""

    def add(self, examples: Sequence[Example]) -> list[BadRow | None]: ...

    def warnings(self) -> list[CheckWarning]: ...

    def figures(self) -> dict[str, Any]: ...


@dataclass(slots=True)
class Reason:
    """Left-out rows of one kind: how many, and the first five."""

    count: int = 0
    first: list[BadRow] = field(default_factory=list)


@dataclass(slots=True)
class CheckReport:
    """What a check found: read == kept + left out.

    left_out: the rows, without their texts; complete only where the check was asked to keep them all. reasons: kind of
    reason -> count and first rows, always complete. errors: files that could not be read (to their end).
    figures: lengths for the histogram and what the tokenizer told (see `print_report`).
    """

    read: int = 0
    kept: int = 0
    left_out: list[BadRow] = field(default_factory=list)
    reasons: dict[str, Reason] = field(default_factory=dict)
    warnings: list[CheckWarning] = field(default_factory=list)
    errors: list[DataError] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """{"read", "kept", "left_out": [{"file", "line", "reason"}], "warnings": [{"kind", "message", ...}]}."""
        errors = [{"kind": "error", "message": str(error)} for error in self.errors]
        return {
            "read": self.read,
            "kept": self.kept,
            "left_out": [{"file": row.file, "line": row.line, "reason": row.reason} for row in self.left_out],
            "warnings": errors + [warning.to_json() for warning in self.warnings],
        }


def exit_code(report: CheckReport, strict: bool = False) -> int:
    """0 clean, 1 warnings under `strict`, 2 rows left out or files that could not be read."""
    if report.errors or report.reasons:
        return 2
    return int(strict and any(warning.kind != NOTE for warning in report.warnings))


class _Keys:
    """Keys of the kept rows, in reading order, to find equal rows without their texts."""

    def __init__(self) -> None:
        self.prompts, self.rows, self.lines, self.files = array("Q"), array("Q"), array("Q"), array("L")
        self.answer_chars = array("L")
        self.names: list[str] = []

    def add(self, example: Example) -> None:
        if not self.names or self.names[-1] != example.file:
            self.names.append(example.file)
        prompt = prompt_text(example)
        self.prompts.append(key(prompt))
        self.rows.append(key(row_text(example, prompt)))
        self.lines.append(example.line)
        self.files.append(len(self.names) - 1)
        if example.text is not None:
            chars = len(example.text)
        else:
            learnt = zip(example.messages, example.train, strict=True)
            chars = sum(len(message["content"]) for message, train in learnt if train)
        self.answer_chars.append(min(chars, 2**32 - 1))

    def place(self, index: int) -> str:
        return f"{self.names[self.files[index]]}:{self.lines[index]}"


def _first_of_group(keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """[n] index of the first row with the same key."""
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    return np.asarray(first[inverse], dtype=np.int64)


def _equal_rows(keys: _Keys) -> list[CheckWarning]:
    rows, prompts = np.array(keys.rows, dtype=np.uint64), np.array(keys.prompts, dtype=np.uint64)
    found = []
    first = _first_of_group(rows)
    again = np.flatnonzero(first != np.arange(len(first)))
    if len(again):
        shown = ", ".join(f"{keys.place(i)} = {keys.place(int(first[i]))}" for i in again[:5].tolist())
        message = f"{len(again)} rows repeat an earlier row exactly ({shown}{', ...' if len(again) > 5 else ''})"
        found.append(CheckWarning("duplicates", message, {"count": len(again)}))
    once = np.flatnonzero(first == np.arange(len(first)))  # distinct rows
    distinct, counts = np.unique(prompts[once], return_counts=True)
    several = distinct[counts > 1]
    if len(several):
        members = once[np.isin(prompts[once], several[:1])][:5]
        shown = ", ".join(keys.place(i) for i in members.tolist())
        plural = "prompt has" if len(several) == 1 else "prompts have"
        message = f"{len(several)} {plural} different answers (for example {shown})"
        found.append(CheckWarning("conflicting_answers", message, {"count": len(several)}))
    return found


def _overlap(train: _Keys, heldout: _Keys) -> list[CheckWarning]:
    """Held-out rows whose prompt is also trained: their loss tells what was learnt by heart."""
    here = np.flatnonzero(np.isin(np.array(heldout.prompts, np.uint64), np.array(train.prompts, np.uint64)))
    if not len(here):
        return []
    exact = int(np.isin(np.array(heldout.rows, np.uint64), np.array(train.rows, np.uint64)).sum())
    shown = ", ".join(heldout.place(i) for i in here[:5].tolist())
    message = f"{len(here)} held-out rows have a prompt that is also trained, {exact} with the same answer ({shown})"
    return [CheckWarning("overlap", message, {"count": len(here), "exact": exact})]


def _short_answers(keys: _Keys) -> list[CheckWarning]:
    """Answers of one or two characters where the others are long; in a data set of short labels they are right."""
    chars = np.array(keys.answer_chars, dtype=np.int64)
    if not len(chars) or np.median(chars) < 40:
        return []
    short = np.flatnonzero(chars <= 2)
    if not len(short):
        return []
    shown = ", ".join(keys.place(i) for i in short[:5].tolist())
    message = (
        f"{len(short)} answers have at most 2 characters, while half have {int(np.median(chars))} or more ({shown})"
    )
    return [CheckWarning("short_answers", message, {"count": len(short)})]


class _Check:
    """One pass over all files."""

    def __init__(self, options: FormatOptions, tokens: TokenChecks | None, keep_left_out: int | None) -> None:
        self.report = CheckReport()
        self.options, self.tokens, self._keep = options, tokens, keep_left_out
        self.train, self.heldout, self.contents = _Keys(), _Keys(), Contents()
        self.notes: list[str] = []

    def run(self, name: str, keys: _Keys, fix: LinesFile | None, rejects: LinesFile | None) -> None:
        pairs = iter_pairs(
            read_rows([name], encoding=self.options.encoding, notice=self.notes.append), self.options, self.notes.append
        )
        try:
            for batch in _batches(pairs):
                for row, example in self._judged(batch):
                    self.report.read += 1
                    if isinstance(example, BadRow):
                        self._leave_out(example, rejects)
                        continue
                    self.report.kept += 1
                    keys.add(example)
                    self.contents.add(example)
                    if fix is not None:
                        assert isinstance(row, RawRow)
                        fix.write(kept_line(row, example, self.options))
        except DataError as error:
            self.report.errors.append(error)

    def _judged(self, batch: list[tuple[RawRow | BadRow, Example | BadRow]]) -> Pairs:
        """The batch after the tokenizer has seen it."""
        if self.tokens is None:
            yield from batch
            return
        verdicts = iter(self.tokens.add([example for _, example in batch if isinstance(example, Example)]))
        for row, example in batch:
            if isinstance(example, BadRow):
                yield row, example
                continue
            bad = next(verdicts)
            if bad is not None and isinstance(row, RawRow) and row.text:
                bad = BadRow(bad.file, bad.line, bad.reason, row.text[:MAX_RAW_CHARS])
            yield row, example if bad is None else bad

    def _leave_out(self, row: BadRow, rejects: LinesFile | None) -> None:
        kinds = self.report.reasons
        reason = kinds.setdefault(row.kind if row.kind in kinds or len(kinds) < _MAX_KINDS else "other", Reason())
        reason.count += 1
        bare = BadRow(row.file, row.line, row.reason)
        if len(reason.first) < 5:
            reason.first.append(bare)
        if self._keep is None or len(self.report.left_out) < self._keep:
            self.report.left_out.append(bare)
        if rejects is not None:
            rejects.write(reject_line(row))

    def conclude(self) -> CheckReport:
        report = self.report
        report.warnings += _equal_rows(self.train)
        report.warnings += _overlap(self.train, self.heldout)
        report.warnings += _short_answers(self.train)
        for kind, message in self.contents.messages().items():
            finding = self.contents.findings[kind]
            report.warnings.append(CheckWarning(kind, message, {"count": finding.rows, "places": finding.places}))
        report.figures = {
            "answer_chars": np.array(self.train.answer_chars, dtype=np.int64),
            "distinct_prompts": len(np.unique(np.array(self.train.prompts, dtype=np.uint64))),
            "train_rows": len(self.train.rows),
            "heldout_rows": len(self.heldout.rows),
        }
        if self.tokens is not None:
            report.warnings += self.tokens.warnings()
            report.figures.update(self.tokens.figures())
        report.warnings += [CheckWarning(NOTE, note) for note in dict.fromkeys(self.notes)]
        return report


def _batches(pairs: Pairs) -> Iterator[list[tuple[RawRow | BadRow, Example | BadRow]]]:
    """Batches of rows; those before a DataError come first, then the error."""
    batch: list[tuple[RawRow | BadRow, Example | BadRow]] = []
    try:
        for pair in pairs:
            batch.append(pair)
            if len(batch) == _BATCH_ROWS:
                yield batch
                batch = []
    except DataError:
        if batch:
            yield batch
        raise
    if batch:
        yield batch


def check_files(
    files: Sequence[str],
    *,
    options: FormatOptions | None = None,
    heldout: Sequence[str] | None = None,
    tokens: TokenChecks | None = None,
    fix: str | None = None,
    rejects: str | None = None,
    keep_left_out: int | None = 1000,
) -> CheckReport:
    """Reads everything once and reports. Rows of `heldout` files count as rows, and are compared with the others.

    fix, rejects: where to write the kept rows of `files` and all left-out rows; written whole or not at all.
    keep_left_out: how many left-out rows the report lists; None for all (memory grows with them).

    Raises DataError for names that are no file and outputs that cannot be written, UsageError for wrong options and for
    outputs that are inputs; a file that cannot be read is an error in
    the report, and the other files are checked.
    """
    options = options or FormatOptions()
    check_options(options)
    names, heldout_names = expand(files), expand(heldout) if heldout else []
    check_outputs({"--fix": fix, "--rejects": rejects}, names + heldout_names)
    check = _Check(options, tokens, keep_left_out)
    outputs = [LinesFile(path) if path else None for path in (fix, rejects)]
    try:
        for name in names:
            check.run(name, check.train, outputs[0], outputs[1])
        for name in heldout_names:
            check.run(name, check.heldout, None, outputs[1])
    except BaseException:
        for output in outputs:
            if output is not None:
                output.abandon()
        raise
    for output in outputs:
        if output is not None:
            output.finish()
    return check.conclude()
