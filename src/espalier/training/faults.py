"""What interrupts a run from outside or from within: signals, and numbers that are not finite."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from espalier.errors import TrainingError

# A float16 scaler halves its scale after each overflow: from 2^16 it is below 1 after this many, and the cause is then
# not the scale.
MOST_SCALER_SKIPS = 20


class Interrupted(BaseException):  # like KeyboardInterrupt: no `except Exception` may swallow it
    """A signal asked the run to end; raised between two micro-steps. `signum` is the signal's number."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum = signum


class _Stoppable(Protocol):
    stop_signal: int | None


@contextmanager
def stop_on_signals(trainer: _Stoppable) -> Iterator[None]:
    """Ctrl-C and SIGTERM end the run after the current micro-step; a second one ends the process at once.

    The handler only takes a note, so that a save in progress is finished first.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(signum: int, frame: Any) -> None:
        if trainer.stop_signal is not None:
            os._exit(128 + signum)
        trainer.stop_signal = signum

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class NonFinite:
    """Counts steps whose loss or gradient is not finite, and says when the run must stop.

    skip False: at the first one. Else after `most_in_row` skipped steps in a row; a skipped step changes no weight.
    """

    skip: bool
    most_in_row: int
    notice: Callable[[str], None]
    in_row: int = 0
    total: int = 0
    scaler_in_row: int = 0

    def met(self, what: str, value: float, step: int, rows: str, last: Path | None, where: str | None = None) -> None:
        """The step `step` is bad: `what` (loss, gradient norm) is `value`. Raises TrainingError where the run stops.

        where: the ranks on which it is so, if there are several.
        """
        self.in_row += 1
        self.total += 1
        if not self.skip or self.in_row > self.most_in_row:
            raise self._error(what, value, step, rows, last, self.in_row - 1, where)
        self.notice(
            f"step {step} is skipped ({self.in_row} in a row, at most {self.most_in_row}): "
            f"the {what} is {value}{f' on {where}' if where else ''}; rows: {rows or 'from memory'}"
        )

    def met_by_scaler(self, step: int, rows: str, last: Path | None) -> None:
        """float16: the scaler skips the step and tries a smaller scale. Raises TrainingError if that is no help."""
        self.scaler_in_row += 1
        if self.scaler_in_row >= MOST_SCALER_SKIPS:
            raise self._error("gradient norm", float("inf"), step, rows, last, self.scaler_in_row - 1)

    def passed(self) -> None:
        """A step was sound."""
        self.in_row = self.scaler_in_row = 0

    @staticmethod
    def _error(
        what: str, value: float, step: int, rows: str, last: Path | None, skipped: int, where: str | None = None
    ) -> TrainingError:
        after = f", after {skipped} skipped steps in a row" if skipped else ""
        return TrainingError(
            f"the {what} of step {step} is {value}{after}",
            where=where,
            details=[f"rows of the step: {rows}" if rows else "the rows come from memory"],
            todo=f"Nothing was saved after it; last checkpoint: {last or 'none'}. "
            "Try a lower --learning_rate, or --fp32; look at these rows with `espalier inspect`.",
        )
