"""Checkpoints: complete or invisible, read back, resumed exactly. safetensors and JSON only.

    checkpoint-<step>/
      adapter_model.safetensors, adapter_config.json   a PEFT folder, usable as it is
      optimizer.safetensors, optimizer.json            tensors by "<parameter>.<key>", everything else as JSON
      scheduler.json, scaler.json, random.safetensors, random.json
      trainer_state.json                               HF's TrainerState: step, epoch, log so far
      progress.json                                    position in the data, the log line in the making
      run.yaml, espalier.json, tokenizer files         the run file, and fingerprints of data, base and template
      manifest.json                                    the run's id, size and sha256 of every file; written last

A checkpoint is written into a hidden folder beside, flushed to disk and renamed. One without a manifest that fits is
never picked, and is named. What the disk refuses is a RunFolderError, and leaves older checkpoints as they are.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.optim.lr_scheduler import LambdaLR
from transformers import set_seed
from transformers.trainer_callback import ExportableState, TrainerState

from espalier.errors import CheckpointError, RunFolderError
from espalier.training import checkpoint_files as files
from espalier.training.checkpoint_files import (
    MANIFEST,
    PROGRESS,
    STATE,
    damage,
    plain_random,
    random_state,
    read_json,
    run_of,
)
from espalier.training.progress import progress_of, set_progress

if TYPE_CHECKING:
    from torch import nn

    from espalier.training.trainer import LoraTrainer

__all__ = [
    "MANIFEST",
    "STATE",
    "CheckpointKeeper",
    "check_writable",
    "damage",
    "plain_random",
    "random_state",
    "run_of",
    "step_of",
]


class CheckpointKeeper:
    """Writes, counts, checks and reads the checkpoints of one run folder.

    keep: how many to keep besides the best (None: all). companions: small files of the run folder that every
    checkpoint gets a copy of (tokenizer, template, run file), so that it can be used by itself. run: the run's id,
    which stands in each manifest: checkpoints of other runs in the same folder are neither taken nor deleted.
    last_whole: the newest checkpoint that this process has written or resumed from.
    """

    def __init__(self, folder: Path, *, keep: int | None = None):
        self.folder, self.keep = folder, keep
        self.companions: tuple[str, ...] = ()
        self.run = uuid.uuid4().hex
        self.last_whole: Path | None = None

    def path(self, step: int) -> Path:
        """Where the checkpoint of `step` lies."""
        return self.folder / f"checkpoint-{step}"

    def all(self) -> list[Path]:
        """Folders that look like checkpoints of this run, oldest first; a manifest must be there."""
        found = [p for p in self.folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
        return sorted((p for p in found if run_of(p) == self.run), key=lambda p: int(p.name.split("-")[1]))

    def newest(self) -> Path | None:
        """The newest complete checkpoint by its manifest, without reading it whole."""
        return next(reversed(self.all()), None)

    # ---- writing -------------------------------------------------------------------------------------------------

    def save(self, trainer: LoraTrainer, random: Sequence[Mapping[str, Any]], optimizer: Mapping[str, Any]) -> Path:
        """Write the checkpoint of the trainer's step. random: every rank's state to go on with, see `plain_random`.
        optimizer: its state_dict().

        Raises RunFolderError where the disk does not take it; nothing is left behind then, and older ones are
        untouched. Older ones that `keep` does not cover are deleted only after the new one is whole.
        """
        step = trainer.state.global_step
        target = self.path(step)
        with self.beside(target, f"the checkpoint of step {step} could not be saved") as partial:
            self.write_parts(trainer, partial, random, optimizer)
            self._put(partial, target)
        self.last_whole = target
        self._forget(trainer.state)
        return target

    def write_parts(
        self,
        trainer: LoraTrainer,
        folder: Path,
        random: Sequence[Mapping[str, Any]],
        optimizer: Mapping[str, Any],
    ) -> None:
        """All files of a checkpoint of the trainer as it is now, into `folder`, its manifest last."""
        for name in self.companions:
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, folder / name)
        self.save_adapter(trainer.model, folder)
        files.save_optimizer(optimizer, folder)
        files.write_json(folder / "scheduler.json", files.plain(_scheduler(trainer).state_dict()))
        if trainer.accelerator.scaler is not None:
            files.write_json(folder / "scaler.json", files.plain(trainer.accelerator.scaler.state_dict()))
        files.save_random(random, folder)
        files.write_json(folder / PROGRESS, progress_of(trainer))
        self._write_state(trainer, folder)

    def rewrite_state(self, trainer: LoraTrainer, checkpoint: Path) -> None:
        """Put the trainer's present state into a whole checkpoint, which stays whole at every moment."""
        with self.beside(checkpoint, "the checkpoint could not be completed") as partial:
            shutil.copytree(checkpoint, partial, dirs_exist_ok=True)
            self._write_state(trainer, partial)
            self._put(partial, checkpoint)

    def save_adapter(self, model: nn.Module, folder: Path, tokenizer: Any = None) -> None:
        """The adapter in PEFT's form, checked after writing; the tokenizer beside it. Raises OSError."""
        from espalier.training.readback import read_back

        folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(str(folder), save_embedding_layers=False)  # type: ignore[operator]
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty form of a model card
        os.chmod(folder / "adapter_model.safetensors", 0o666 & ~_umask())  # safetensors leaves it to the owner alone
        read_back(model, folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(folder))

    def publish_adapter(self, model: nn.Module, folder: Path, tokenizer: Any = None) -> None:
        """`save_adapter` into a folder in use: each file is there whole, or as it was before.

        Raises RunFolderError where the disk does not take it.
        """
        with self.beside(folder / "adapter", "the adapter could not be saved", parents=True) as partial:
            self.save_adapter(model, partial, tokenizer)
            written = sorted(partial.iterdir())
            for file in written:
                files.flush(file)
            for file in written:
                os.replace(file, folder / file.name)
            files.flush(folder)

    def sweep(self) -> None:
        """Delete what a killed process has left half-written in the run's folder."""
        for left in self.folder.glob(".*.partial"):
            shutil.rmtree(left) if left.is_dir() else left.unlink()

    def _write_state(self, trainer: LoraTrainer, folder: Path) -> None:
        _export_callbacks(trainer)
        trainer.state.save_to_json(str(folder / STATE))
        files.write_manifest(folder, self.run)

    @contextmanager
    def beside(self, target: Path, problem: str, *, parents: bool = False) -> Iterator[Path]:
        """A hidden folder beside `target` to write into; gone afterwards. OSErrors become RunFolderErrors."""
        partial = target.with_name(f".{target.name}.partial")
        try:
            shutil.rmtree(partial, ignore_errors=True)
            # Without parents: where the run's folder has vanished (a disk was unmounted), none is made in its place.
            partial.mkdir(parents=parents)
            yield partial
        except (OSError, SafetensorError) as error:
            whole = self.newest()
            raise RunFolderError(
                f"{problem}: {_reason(error, target.parent)}",
                where=str(target.parent),
                todo=f"The last whole checkpoint is {whole.name}." if whole else "There is no checkpoint yet.",
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _put(self, partial: Path, target: Path) -> None:
        """Rename `partial` to `target`; one of the same run and step, which is made again, steps aside first."""
        aside = target.with_name(f".{target.name}.old.partial")
        if target.exists():
            if run_of(target) not in (self.run, None):
                raise FileExistsError(0, f"{target.name} of another run is in its place")
            os.rename(target, aside)
        try:
            os.rename(partial, target)
        except OSError:
            if aside.exists():
                os.rename(aside, target)
            raise
        shutil.rmtree(aside, ignore_errors=True)
        files.flush(target.parent)

    def _forget(self, state: TrainerState) -> None:
        """Delete what --save_total_limit no longer keeps: never the newest, never the best, nothing of other runs."""
        if self.keep is None:
            return
        others = [p for p in self.all() if str(p) != str(state.best_model_checkpoint)]
        for old in others[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)

    # ---- reading -------------------------------------------------------------------------------------------------

    def find(self, wanted: str, say: Any = None) -> Path | None:
        """The checkpoint that --resume_from_checkpoint means: a folder, or 'last' for the newest whole one.

        Damaged ones are named through `say` and passed over. None where 'last' is wanted and the run has never saved
        one. Raises CheckpointError where there are some, but none is whole, and for a folder of another run.
        """
        if wanted.lower() not in ("last", "true"):
            folder = Path(wanted)
            problem = damage(folder)
            if problem is None and run_of(folder) != self.run:
                problem = "it belongs to another run"
            if problem:
                raise CheckpointError(
                    f"this is no whole checkpoint of the run: {problem}",
                    where=str(folder),
                    todo="`--resume_from_checkpoint last` takes the newest whole one of the run.",
                )
            return folder
        passed_over = False
        for folder in self._candidates():
            problem = damage(folder)
            if problem is None and run_of(folder) == self.run:
                return folder
            if problem is not None:
                passed_over = True
                if say is not None:
                    say(f"{folder} is passed over: {problem}")
        if passed_over:
            raise CheckpointError(
                "there is no whole checkpoint to resume from",
                where=str(self.folder),
                todo="Start the run anew in another --output_dir.",
            )
        return None

    def _candidates(self) -> list[Path]:
        """Folders with a checkpoint's name, newest first, with damaged and foreign ones."""
        found = [p for p in self.folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
        return sorted(found, key=lambda p: int(p.name.split("-")[1]), reverse=True)

    def load_adapter(self, model: nn.Module, checkpoint: Path) -> None:
        """Copy the checkpoint's adapter into the live one, tensor by tensor. Raises CheckpointError if they differ."""
        from peft import set_peft_model_state_dict
        from peft.utils import get_peft_model_state_dict

        stored = load_file(str(checkpoint / "adapter_model.safetensors"))
        live = get_peft_model_state_dict(model, save_embedding_layers=False)
        wrong = [k for k in {*stored, *live} if k not in stored or k not in live or stored[k].shape != live[k].shape]
        if wrong:
            raise CheckpointError(
                f"{len(wrong)} tensors of this adapter do not fit the model, {sorted(wrong)[0]} among them",
                where=str(checkpoint),
                todo="Resume with the rank and the target modules that the run was started with.",
            )
        set_peft_model_state_dict(model, stored)

    def load_optimizer(self, trainer: LoraTrainer, checkpoint: Path) -> None:
        """Optimizer and schedule as they were; where the run is longer now, the next step has its new rate already."""
        optimizer, scheduler = trainer.optimizer, _scheduler(trainer)
        assert optimizer is not None, "there is an optimizer once training has begun"
        trainer.load_optimizer_state(files.load_optimizer(checkpoint, optimizer.param_groups))
        scheduler.load_state_dict(read_json(checkpoint / "scheduler.json"))
        if trainer.schedule_step is not None:
            scheduler.last_epoch = trainer.schedule_step
        if isinstance(scheduler, LambdaLR):  # by its own formula: with an unchanged plan, to the same number
            parts = zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
            for group, base, factor in parts:
                group["lr"] = base * factor(scheduler.last_epoch)
            scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]  # what the log says of the next step

    def load_scaler(self, trainer: LoraTrainer, checkpoint: Path) -> None:
        """The gradient scaler, where float16 has one."""
        if trainer.accelerator.scaler is not None and (checkpoint / "scaler.json").is_file():
            trainer.accelerator.scaler.load_state_dict(read_json(checkpoint / "scaler.json"))

    def load_random(self, trainer: LoraTrainer, checkpoint: Path) -> None:
        """Random states and the log line in the making; the Trainer asks for this right before the first step."""
        rank = trainer.ranks.rank
        if rank and not (checkpoint / f"{files.random_stem(rank)}.json").is_file():  # there were fewer ranks
            set_seed(trainer.args.seed + rank + trainer.state.global_step)
        else:
            files.set_random_state(files.load_random(checkpoint, rank))
        set_progress(trainer, read_json(checkpoint / PROGRESS))


def step_of(checkpoint: Path) -> int:
    """The optimizer step after which a checkpoint was saved."""
    return int(read_json(checkpoint / STATE)["global_step"])


def check_writable(folder: Path) -> None:
    """Raises RunFolderError where files cannot be created in `folder`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write-probe"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as error:
        raise RunFolderError(
            f"this folder cannot be written to: {error.strerror or error}",
            where=str(folder),
            todo="Choose another --output_dir, or mend its permissions.",
        ) from error


def _reason(error: BaseException, folder: Path) -> str:
    """What stopped a write, in the system's words and without a path inside a hidden folder."""
    if not folder.is_dir():
        return "the run's folder is gone"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    found = re.search(r"I/O error: (.*?) \(os error", str(error))  # safetensors' writer
    return found.group(1) if found else str(error)


def _scheduler(trainer: LoraTrainer) -> Any:
    assert trainer.lr_scheduler is not None, "there is a schedule once training has begun"
    return trainer.lr_scheduler


def _export_callbacks(trainer: LoraTrainer) -> None:
    """Put the callbacks' states (early stopping's counter) into the TrainerState, as HF's own saving does."""
    states: dict[str, Any] = {}
    for callback in [*trainer.callback_handler.callbacks, trainer.control]:
        if isinstance(callback, ExportableState):
            states.setdefault(type(callback).__name__, []).append(callback.state())
    trainer.state.stateful_callbacks = cast(Any, {k: v if len(v) > 1 else v[0] for k, v in states.items()})


def _umask() -> int:
    """The process's file mode mask; it can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
