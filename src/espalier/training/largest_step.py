"""Before step 1, the run's largest step is tried: what would not fit after hours does not fit now.

Forward and backward only, with room kept for the optimizer's state. Nothing of it stays but a smaller plan, if one was
needed: gradients are dropped, and the random state is put back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from espalier.training.checkpoint_files import random_state, read_json, set_random_state

if TYPE_CHECKING:
    from espalier.training.trainer import LoraTrainer

TIGHT = 0.6  # of what may be used: below it a prediction may be off by half and the step still fits


class LargestStep(TrainerCallback):
    """Runs `try_largest_step` right before the first step, where there is a reason to."""

    def __init__(self, trainer: LoraTrainer):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer = self.trainer
        if state.global_step and trainer.keeper.last_whole is not None:  # else restored after this
            stored = read_json(trainer.keeper.last_whole / "progress.json").get("memory")
            if stored:
                trainer.guard.restore(stored, trainer.model)
        reason = why_try(trainer)
        if trainer.ranks.most(int(reason is not None)) and trainer.guard.largest is not None:
            try_largest_step(trainer, reason or "another process has little memory")


def why_try(trainer: LoraTrainer) -> str | None:
    """The reason to try the largest step, or None."""
    guard = trainer.guard
    if guard.largest is None or not guard.largest.weight_sum:  # a stream's rows are not known
        return None
    if trainer.in_lockstep:  # all ranks' micro-steps go together: one cannot lay its own out anew
        return None
    if guard.device.startswith("cuda"):
        return "on a GPU it is known only by trying"
    if guard.tight is None:
        return None if guard.limit is None else "nothing is predicted for this model, and there is a limit"
    return f"it is predicted to take {guard.tight:.0%} of what there is" if guard.tight > TIGHT else None


def try_largest_step(trainer: LoraTrainer, reason: str) -> None:
    """Forward and backward of the run's largest step. Raises TrainingError where no plan of it fits."""
    guard, model = trainer.guard, trainer.model
    batch, plan, before = guard.largest, guard.plan, random_state()
    assert batch is not None
    problem = None
    try:
        kept = _for_optimizer(trainer)
        trainer.micro_steps.within_memory(model, batch, before)
        del kept
    except Exception as error:  # the other ranks must hear of it
        problem = error
    finally:
        model.zero_grad(set_to_none=True)
        set_random_state(before)
    trainer.ranks.settle((), error=problem, stop_signal=trainer.stop_signal)
    what = f"the largest step, {len(batch.rows)} rows of {batch.unique_tokens:,} tokens, was tried"
    told = "it fits" if guard.plan == plan else f"it fits with {guard.plan}"
    trainer.notice(f"memory: {what}, because {reason}: {told}")


def _for_optimizer(trainer: LoraTrainer) -> torch.Tensor | None:
    """As much memory as the optimizer's state will take, which the first step makes; None where it is there."""
    model, optimizer = trainer.guard.model, trainer.optimizer
    if model is None or (optimizer is not None and optimizer.state):
        return None
    return torch.empty(model.fixed.optimizer, dtype=torch.uint8, device=trainer.args.device)
