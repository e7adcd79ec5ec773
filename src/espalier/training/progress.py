"""progress.json of a checkpoint: where in the data a run is, and the log line in the making."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from espalier.errors import CheckpointError
from espalier.training.log_window import LogWindow

if TYPE_CHECKING:
    from espalier.training.trainer import LoraTrainer


def position(trainer: LoraTrainer) -> dict[str, int]:
    """Where in the data the run is: seed, epoch, rows of that epoch that are consumed."""
    sampler = trainer.train_sampler()
    epoch, steps = divmod(trainer.state.global_step, len(sampler))
    sampler.set_epoch(epoch)
    return {"seed": trainer.args.seed, "epoch": epoch, "rows": sampler.rows_in(steps)}


def progress_of(trainer: LoraTrainer) -> dict[str, Any]:
    """Position in the data and the log line in the making, which a checkpoint between two log lines must hold."""
    return {
        "position": position(trainer),
        "loss_sum": float(trainer._tr_loss),
        "total_loss": trainer._total_loss_scalar,
        "last_logged": trainer._globalstep_last_logged,
        "window": trainer.window.to_dict(),
        "memory": trainer.guard.state(),
        "nonfinite": {"in_row": trainer.nonfinite.in_row, "total": trainer.nonfinite.total},
    }


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
