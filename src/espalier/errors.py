"""Every error that a user can meet. Each says what is wrong (with the value), where, and what to do.

    EspalierError            the base; the command line prints it and exits with `exit_code`
    ├── UsageError           an option or a run file is wrong (unknown name, bad value, options that exclude each other)
    ├── DataError            a data file cannot be read, or rows of it are bad and the policy is to stop
    ├── TemplateError        a chat template is missing, unknown, or refuses a conversation
    ├── ModelError           a base model cannot be found, loaded or trained here
    ├── AdapterError         an adapter is damaged, empty, or does not fit the base
    ├── RunFolderError       the output folder cannot be used: not empty, not writable, full, held by another run
    ├── CheckpointError      a checkpoint is damaged or belongs to other settings
    └── TrainingError        the run itself failed: non-finite loss, self-check, no step done

A user's mistake is one of these; a fault of ours is an `assert`.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "AdapterError",
    "CheckpointError",
    "DataError",
    "EspalierError",
    "ModelError",
    "RunFolderError",
    "TemplateError",
    "TrainingError",
    "UsageError",
]


class EspalierError(Exception):
    """Base of all errors of this package.

    `what` is one sentence that names the value; `where` a place such as `train.jsonl:12`, `run.yaml: lora_rank` or
    a tensor's name; `todo` what to do about it. `details` are further lines of the same kind, shown below as a list.
    `told_elsewhere`: another process of the same run prints it.
    """

    exit_code = 2
    told_elsewhere = False

    def __init__(self, what: str, *, where: str | None = None, todo: str | None = None, details: Sequence[str] = ()):
        self.what, self.where, self.todo, self.details = what, where, todo, tuple(details)
        super().__init__(what)

    def __str__(self) -> str:
        lines = [f"{self.where}: {self.what}" if self.where else self.what]
        lines += [f"  - {detail}" for detail in self.details]
        if self.todo:
            lines.append(f"  {self.todo}")
        return "\n".join(lines)


class UsageError(EspalierError):
    """An option or a run file is wrong."""


class DataError(EspalierError):
    """A data file cannot be read, or holds rows that must not be trained."""


class TemplateError(EspalierError):
    """A chat template is missing, unknown, or refuses a conversation."""


class ModelError(EspalierError):
    """A base model cannot be found, loaded or trained here."""


class AdapterError(EspalierError):
    """An adapter is damaged, empty, or does not fit its base."""


class RunFolderError(EspalierError):
    """The output folder cannot be used."""


class CheckpointError(EspalierError):
    """A checkpoint is damaged, or was made with other settings."""


class TrainingError(EspalierError):
    """The run itself failed."""

    exit_code = 1
