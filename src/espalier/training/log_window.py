"""What is counted between two log lines."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from espalier.training.step import StepBatch


@dataclass
class LogWindow:
    """Counts since the last log line. lost: steps without a finite loss; skipped: those and bad gradients."""

    supervised: int = 0
    logical: int = 0
    unique: int = 0
    seconds: float = 0.0
    correct: float = 0.0
    steps: int = 0
    lost: int = 0
    skipped: int = 0

    def add(self, batch: StepBatch, correct: float, unique: int, seconds: float) -> None:
        """A step. batch: this rank's share of it; correct, unique: tokens of the whole step; seconds: of this rank."""
        self.supervised += batch.num_supervised
        self.logical += batch.logical_tokens
        self.unique += unique
        self.seconds += seconds
        self.correct += correct
        self.steps += 1

    def add_lost(self) -> None:
        self.steps += 1
        self.lost += 1

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def mean_of_the_rest(self, logs: dict[str, float]) -> None:
        """Make the mean loss that of the steps which have one; take it away where none has."""
        if self.steps > self.lost:
            logs["loss"] *= self.steps / (self.steps - self.lost)
        else:
            del logs["loss"]

    def report(self) -> dict[str, float]:
        counted: dict[str, float] = {"nonfinite_steps": self.skipped} if self.skipped else {}
        if not self.supervised:
            return counted
        return {
            "token_accuracy": self.correct / self.supervised,
            "supervised_tokens": self.supervised,
            "logical_tokens": self.logical,
            "unique_tokens": self.unique,
            "supervised_tokens_per_second": round(self.supervised / max(self.seconds, 1e-9), 2),
            **counted,
        }
