"""What a run says: the header, the live line or plain lines, and metrics.jsonl."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text
from transformers import TrainerCallback

from espalier.data.formats import group_bad_rows
from espalier.data.rows import BadRow
from espalier.training.checkpoint_files import replace_text

METRICS = "metrics.jsonl"


class Header:
    """Prints decisions as `topic   decision and reason`, one a line, as they are made."""

    def __init__(self, console: Console):
        self.console = console

    def __call__(self, topic: str, text: str) -> None:
        self.console.print(Text(f"  {topic:<10} ", style="bold"), Text(text), sep="", soft_wrap=True)

    @contextmanager
    def counting(self, what: str) -> Iterator[Callable[[int], None]]:
        """A live count on a terminal while `what` goes on, nothing elsewhere; gives the function that is told it."""
        if not self.console.is_terminal:
            yield lambda count: None
            return
        with self.console.status(what) as status:
            yield lambda count: status.update(f"{what}: {count:,}")


class RunReporter(TrainerCallback):
    """One line a log on the console (a live bar on a terminal) and one object a log in metrics.jsonl.

    resumed_at: logs of later steps in an old metrics.jsonl are dropped, since those steps are done again.
    """

    def __init__(self, folder: Path, console: Console, *, resumed_at: int | None = None):
        self.file, self.console = folder / METRICS, console
        self.progress: Progress | None = None
        self.started = time.perf_counter()
        self.first_step = resumed_at or 0
        self.waiting: list[str] = []
        self.said = False
        if resumed_at is not None and self.file.is_file():
            lines = self.file.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _step_of(line) <= resumed_at]
            self.file.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()
        if self.console.is_terminal:
            self.progress = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.fields[last]}"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self.progress.start()
            self.task = self.progress.add_task("", total=state.max_steps, completed=state.global_step, last="")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.progress is not None:
            self.progress.update(self.task, completed=state.global_step)
        if state.global_step == state.max_steps:
            control.should_log = True  # a run shorter than --logging_steps has a log line too

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or not state.is_world_process_zero or not {"loss", "eval_loss", "nonfinite_steps"} & logs.keys():
            return  # transformers' summary at the end: run.py has its own
        self._write({"step": state.global_step, **logs})
        line = self._line(state, logs)
        if line and self.progress is not None and "loss" in logs:
            self.progress.update(self.task, last=line)
        elif line:
            self.console.print(line, soft_wrap=True, highlight=False, markup=False)

    def _write(self, entry: dict[str, Any]) -> None:
        """Append to the file; what the disk does not take now is kept for the next time."""
        self.waiting.append(json.dumps(entry) + "\n")
        try:
            size = self.file.stat().st_size if self.file.exists() else 0
            try:
                with open(self.file, "a", encoding="utf-8") as handle:
                    handle.writelines(self.waiting)
            except OSError:
                os.truncate(self.file, size)  # no half line stays
                raise
        except OSError as error:
            if not self.said:
                text = f"warning: {self.file} cannot be written: {error.strerror}; its lines are kept for later"
                self.console.print(text, soft_wrap=True, highlight=False, markup=False)
            self.said = True
            return
        self.waiting, self.said = [], False

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Take the live bar away; more than once does no harm."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

    def _line(self, state: Any, logs: dict[str, Any]) -> str:
        if "loss" in logs:
            done = state.global_step - self.first_step
            left = (time.perf_counter() - self.started) / max(1, done) * (state.max_steps - state.global_step)
            return (
                f"step {state.global_step}/{state.max_steps}  loss {logs['loss']:.4f}  lr {logs['learning_rate']:.3g}  "
                f"{logs.get('supervised_tokens_per_second', 0):.0f} supervised tokens/s  {duration(left)} left"
            )
        if "eval_loss" in logs:
            return (
                f"step {state.global_step}/{state.max_steps}  held-out loss {logs['eval_loss']:.4f}  "
                f"perplexity {logs['eval_perplexity']:.3f}  token accuracy {logs['eval_token_accuracy']:.3f}"
            )
        return f"step {state.global_step}/{state.max_steps}  no loss: {logs['nonfinite_steps']} steps were skipped"


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 1 << 62  # a line cut by a kill: dropped


def duration(seconds: float) -> str:
    """Hours, minutes and seconds as 1:02:03; without hours 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class LeftOutLog:
    """The rows of a stream that are left out: said as they are met, and appended to a file with the step.

    resumed_at: step of the checkpoint that the run goes on from; what the file says of later steps is taken away.
    """

    def __init__(self, file: Path, notice: Callable[[str], None], *, resumed_at: int | None):
        self.file, self.notice = file, notice
        if resumed_at is not None and file.exists():
            lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if json.loads(line).get("step", 0) <= resumed_at]
            replace_text(file, "".join(kept))

    def add(self, bad: Sequence[BadRow], step: int) -> None:
        """Note the rows of a step."""
        self.notice(f"step {step}: {len(bad)} rows left out: {'; '.join(group_bad_rows(bad))}")
        lines = (json.dumps({"step": step, **asdict(row)}, ensure_ascii=False) + "\n" for row in bad)
        try:
            with open(self.file, "a", encoding="utf-8", errors="backslashreplace") as handle:
                handle.writelines(lines)
        except OSError as error:
            self.notice(f"warning: {self.file} cannot be written: {error.strerror}")
