"""Rows that are read once, in order, while the run goes on (`--streaming`): nothing is encoded beforehand or kept.

Rows are looked at in windows of a fixed number of rows *as they stand in the files*, so that a step's rows follow from
(seed, step) alone: a resumed run counts rows to its window, and goes on. Within a window the rows are shuffled, or put
beside those with the same beginning (--group_by_prefix), which looks at texts: only the rows of the steps that a loader
worker is asked for are encoded. A row that cannot be used is missing in its step and is named.

Several processes deal the rows of a step by their texts, and each encodes its own. What they must know of each other's
(the divisor of the mean loss, rows that cannot be used) they tell each other once a step.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset, Sampler

from espalier.config import MIN_SHARED_TOKENS
from espalier.data.formats import Example, bad_rows_error, iter_examples
from espalier.data.rows import BadRow, FormatOptions
from espalier.encode.encode import TOO_LONG, Encoded, Encoder
from espalier.errors import DataError
from espalier.training.ranks import Ranks
from espalier.training.step import NO_ROWS, Begun, StepBatch, StepCollator, StepSampler
from espalier.tree.deal import deal_by_beginning

MIN_SHARED_BYTES = 4 * MIN_SHARED_TOKENS  # texts that agree on so many will agree on about MIN_SHARED_TOKENS tokens


@dataclass(frozen=True, slots=True)
class StreamedStep:
    """What the files hold for one step, and this process encodes. bad: rows that cannot be used; ended: the files
    ended before this step."""

    rows: tuple[Encoded, ...]
    bad: tuple[BadRow, ...] = ()
    ended: bool = False


class StreamedSteps(Dataset[StreamedStep]):
    """Steps by their number, from files that are read forwards; picklable, so that each loader worker reads by itself.

    window_rows: rows looked ahead, made up to whole steps. num_steps: length of the run, whatever the files hold.
    rank, world: of a step's rows, the share that this process encodes; the steps are the same for all.
    A number before the last one asked for reads the files from their start again.
    """

    def __init__(
        self,
        files: Sequence[str],
        encoder: Encoder,
        options: FormatOptions,
        *,
        rows_per_step: int,
        num_steps: int,
        window_rows: int,
        seed: int,
        group_by_prefix: bool = False,
        on_bad_row: str = "error",
        rank: int = 0,
        world: int = 1,
    ):
        self.files, self.encoder, self.options = tuple(files), encoder, options
        self.rows_per_step, self.num_steps, self.seed = rows_per_step, num_steps, seed
        self.steps_per_window = -(-window_rows // rows_per_step)
        self.group_by_prefix, self.on_bad_row = group_by_prefix, on_bad_row
        self.rank, self.world = rank, world
        self._first: tuple[Encoded, ...] = ()
        self.begun: Begun | None = None  # a step that holds only the rest of its rows
        self._reader: Iterator[Example | BadRow] | None = None
        self._number = -1  # of the window that is held
        self._window: list[Example | BadRow] = []
        self._steps: list[list[int]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reader": None, "_number": -1, "_window": [], "_steps": [], "_first": ()}

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> StreamedStep:
        """This process's share. Raises DataError where a file cannot be read."""
        found = self._found(step)
        return StreamedStep((), ended=True) if found is None else self._encoded(self._share(found))

    def first_rows(self) -> tuple[Encoded, ...]:
        """All rows of the first step that has any which can be used, within the first window: alike on every process.

        Raises DataError where a row before them stops the run, or where there is none.
        """
        for number in range(0 if self._first else self.steps_per_window):
            step = self._encoded(self._found(number) or [])
            self.check(step.bad, len(step.rows) + len(step.bad))
            if step.rows:
                self._first = step.rows
                break
        if self._first:
            return self._first
        raise DataError(
            f"no row of the first {len(self._window):,} can be used",
            where=", ".join(self.files),
            todo="`espalier check FILE` says why each row was left out.",
        )

    def check(self, bad: Sequence[BadRow], num_read: int) -> None:
        """Raises DataError that lists the rows of a step which must stop the run."""
        stopping = rows_that_stop(bad, on_bad_row=self.on_bad_row, overlength=self.encoder.overlength)
        if stopping:
            raise bad_rows_error(stopping, num_read)

    def _found(self, step: int) -> list[Example | BadRow] | None:
        """The rows of a step as they stand in the files; None where these have ended before."""
        number, within = divmod(step, self.steps_per_window)
        self._go_to(number)
        if within >= len(self._steps):
            return None
        done = self.begun.rows if self.begun is not None and self.begun.step == step else 0
        return [self._window[i] for i in self._steps[within][done:]]

    def _share(self, found: list[Example | BadRow]) -> list[Example | BadRow]:
        """Of a step's rows those that this process encodes: a run of them in the order of their texts.

        As `deal_rows` does with tokens, which nobody has of all rows.
        """
        if self.world == 1:
            return found
        texts = [_text(row).encode("utf-8", "surrogatepass") for row in found]
        codes = [np.frombuffer(text, np.uint8).astype(np.int32) for text in texts]
        shares = deal_by_beginning(codes, self.world, min_shared=MIN_SHARED_BYTES)
        return [found[i] for i in shares[self.rank]]

    def _go_to(self, number: int) -> None:
        if number == self._number:
            return
        if self._reader is None or number < self._number:
            self._reader, self._number = iter_examples(self.files, self.options), -1
        size = self.steps_per_window * self.rows_per_step
        skipped = size * (number - self._number - 1)
        # Skipped rows are read and counted, neither shuffled nor encoded.
        self._window = list(itertools.islice(self._reader, skipped, skipped + size))
        self._number = number
        alike = self._alike() if self.group_by_prefix and self._window else None
        sampler = StepSampler(len(self._window), self.rows_per_step, self.seed, alike=alike)
        sampler.set_epoch(number)
        self._steps = list(sampler) if self._window else []

    def _alike(self) -> npt.NDArray[np.int64]:
        """Row numbers of the window, ordered by the rows' texts."""
        texts = [_text(row) for row in self._window]
        return np.array(sorted(range(len(texts)), key=texts.__getitem__), dtype=np.int64)

    def _encoded(self, found: Sequence[Example | BadRow]) -> StreamedStep:
        examples = [row for row in found if isinstance(row, Example)]
        bad = [row for row in found if isinstance(row, BadRow)]
        rows: list[Encoded] = []
        for outcome in self.encoder.encode_batch(examples):
            rows += outcome.rows
            if outcome.bad is not None:
                bad.append(outcome.bad)
        return StreamedStep(tuple(rows), tuple(bad))


class StepNumbers(Sampler[list[int]]):
    """0, 1, ... one number a step: the sampler of StreamedSteps, which knows itself what is in a step."""

    def __init__(self, steps: StreamedSteps):
        self.steps = steps
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer; a stream has one epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps.num_steps

    def rows_in(self, num_steps: int) -> int:
        """Rows of the files that the first `num_steps` steps take."""
        return num_steps * self.steps.rows_per_step

    def __iter__(self) -> Iterator[list[int]]:
        return ([step] for step in range(self.steps.num_steps))


def tell_shares(
    batch: StepBatch | None, ranks: Ranks, steps: StreamedSteps, problem: Exception | None = None
) -> StepBatch:
    """This process's share with what all shares hold: the step's divisor and counts, and its rows that cannot be used.

    batch: None where `problem` came instead. All processes raise together: `problem`, or DataError for such rows.
    """
    told = batch or NO_ROWS
    sums = (told.weight_sum, told.num_supervised, told.logical_tokens, len(told.rows), len(told.bad))
    weight_sum, supervised, logical, num_rows, num_bad = ranks.settle(sums, error=problem)
    bad = told.bad
    if num_bad and ranks.world > 1:
        bad = tuple(BadRow(**row) for rows in ranks.exchange([asdict(row) for row in bad]) for row in rows)
    if bad:
        steps.check(bad, int(num_rows + num_bad))
    return replace(told, weight_sum=weight_sum, num_supervised=int(supervised), logical_tokens=int(logical), bad=bad)


def rows_that_stop(bad: Sequence[BadRow], *, on_bad_row: str, overlength: str) -> list[BadRow]:
    """Which of the rows that cannot be used must stop the run, by the user's choice for each kind."""
    too_long = [row for row in bad if row.reason.startswith(TOO_LONG)]
    others = [row for row in bad if not row.reason.startswith(TOO_LONG)]
    return (others if on_bad_row == "error" else []) + (too_long if overlength == "error" else [])


@dataclass(frozen=True)
class StreamCollator(StepCollator):
    """A StreamedStep -> its StepBatch; rows as StepCollator takes them (held-out rows) as there."""

    def __call__(self, rows: Sequence[Any]) -> StepBatch:
        if not isinstance(rows[0], StreamedStep):
            return super().__call__(rows)
        (step,) = rows
        batch = self._batch(step.rows) if step.rows else NO_ROWS  # its rows are dealt already
        return replace(batch, bad=step.bad, ended=step.ended)


def stream_digest(files: Sequence[str]) -> str:
    """sha256 over the files' names, sizes and first megabytes: a stream is not read a second time for its own sake."""
    digest = hashlib.sha256()
    for name in files:
        path = Path(name)
        digest.update(path.name.encode())
        if path.is_file():
            digest.update(path.stat().st_size.to_bytes(8, "little"))
            with open(path, "rb") as handle:
                digest.update(handle.read(1 << 20))
    return digest.hexdigest()


def _text(row: Example | BadRow) -> str:
    """A row's texts in the order in which a template writes them."""
    if isinstance(row, BadRow):
        return row.text
    if row.text is not None:
        return row.text
    return json.dumps([*row.tools, *(m.get("content") for m in row.messages)], ensure_ascii=False, default=str)
