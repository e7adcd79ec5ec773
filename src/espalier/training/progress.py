"""progress.json of a checkpoint: where in the data a run is, and the log line in the making.

Steps are counted in two ways that differ once a run has gone on with other rows a step. TrainerState's `global_step`
counts the steps that were done, whatever their rows: checkpoints and the log are numbered by it. Where in the data the
run is, and in which part of its schedule, is counted in steps of as many rows as now: `global_step + step_offset`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from espalier.errors import CheckpointError
from espalier.training.log_window import LogWindow
from espalier.training.step import Begun
from espalier.training.streaming import StreamedSteps

if TYPE_CHECKING:
    from espalier.training.trainer import LoraTrainer


def position(trainer: LoraTrainer) -> dict[str, int]:
    """Where in the data the run is: seed, epoch, rows of that epoch that are consumed."""
    sampler = trainer.train_sampler()
    epoch, steps = divmod(trainer.state.global_step + trainer.step_offset, len(sampler))
    sampler.set_epoch(epoch)
    begun = trainer.begun
    done = begun.rows if begun is not None and (begun.epoch, begun.step) == (epoch, steps) else 0
    return {"seed": trainer.args.seed, "epoch": epoch, "rows": sampler.rows_in(steps) + done}


def progress_of(trainer: LoraTrainer) -> dict[str, Any]:
    """Position in the data and the log line in the making, which a checkpoint between two log lines must hold."""
    return {
        "position": position(trainer),
        "rows_per_step": trainer.rows_per_step,
        "step_offset": trainer.step_offset,
        "loss_sum": float(trainer._tr_loss),
        "total_loss": trainer._total_loss_scalar,
        "last_logged": trainer._globalstep_last_logged,
        "window": trainer.window.to_dict(),
        "memory": trainer.guard.state(),
        "nonfinite": {"in_row": trainer.nonfinite.in_row, "total": trainer.nonfinite.total},
    }


def go_on_by_rows(trainer: LoraTrainer, progress: Mapping[str, Any], global_step: int) -> str | None:
    """Find a checkpoint's place in steps of as many rows as now. Returns what to tell the user; None: nothing changes.

    Where the rows that are done fill no whole number of such steps, the first step takes the rest of the last one, so
    that no row comes twice or not at all, and an epoch has as many steps as ever.
    """
    before, now = progress.get("rows_per_step", trainer.rows_per_step), trainer.rows_per_step
    if before == now:
        trainer.step_offset = progress.get("step_offset", 0)
        return None
    epoch, rows = progress["position"]["epoch"], progress["position"]["rows"]
    steps, rest = divmod(rows, now)
    done = epoch * len(trainer.train_sampler()) + steps
    trainer.step_offset = done - global_step
    trainer.begun = Begun(epoch, steps, rest) if rest else None
    if isinstance(trainer.train_dataset, StreamedSteps):
        trainer.train_dataset.begun = trainer.begun
    trainer.schedule_step = done
    total = trainer.args.max_steps
    begun = f" and {rest} rows of the next" if rest else ""
    return (
        f"{before} rows a step before, {now} now: {rows} rows of epoch {epoch + 1} are done, so {done} of {total} such "
        f"steps{begun}; {total - done} are left, the learning rate goes on at {done}/{total} of its schedule, and the "
        f"count of steps at {global_step}, up to {total - trainer.step_offset}"
    )


def set_progress(trainer: LoraTrainer, progress: Mapping[str, Any]) -> None:
    """Go on with what `progress_of` gave. Raises CheckpointError where the rows would not go on where they stopped."""
    if progress["position"] != position(trainer):
        raise CheckpointError(f"it was saved at {progress['position']} of the rows, this is {position(trainer)}")
    trainer._tr_loss.fill_(progress["loss_sum"])
    trainer._total_loss_scalar = progress["total_loss"]
    trainer._globalstep_last_logged = progress["last_logged"]
    trainer.window = LogWindow(**progress["window"])
    if progress.get("memory"):
        trainer.guard.restore(progress["memory"], trainer.model)
    trainer.nonfinite.in_row = progress["nonfinite"]["in_row"]
    trainer.nonfinite.total = progress["nonfinite"]["total"]
