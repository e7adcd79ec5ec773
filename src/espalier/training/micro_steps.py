"""The micro-steps of one optimizer step: forward and backward of each part of this process's rows.

A part is a pack of the tree, or a padded micro-batch of its plain twin. Where the parts of all ranks go together
(a sharded base, ZeRO), a rank that has fewer joins with empty ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from espalier.encode.encode import IGNORE_INDEX, Encoded
from espalier.errors import TrainingError
from espalier.training.checkpoint_files import set_random_state
from espalier.training.memory_guard import is_allocation_failure
from espalier.training.step import StepBatch
from espalier.tree.loss import LossOutput
from espalier.tree.selfcheck import rows_to_check, self_check

if TYPE_CHECKING:
    from espalier.training.trainer import LoraTrainer


class MicroSteps:
    """What a trainer computes between two optimizer steps."""

    def __init__(self, trainer: LoraTrainer):
        self.trainer = trainer
        self._checked = False

    def run(self, model: nn.Module, batch: StepBatch, random: dict[str, Any]) -> tuple[float, float]:
        """(share of the step's mean loss, correct tokens) of this process's rows; their gradients are added up.

        random: the state of the generators before the step, for when it is laid out anew. Raises TrainingError.
        """
        options, together = self.trainer.options, self.trainer.in_lockstep
        if options.self_check and options.tree and (batch.packs or together) and not self._checked:
            self._check_tree(model, batch)
        return self.within_memory(model, batch, random)

    def within_memory(self, model: nn.Module, batch: StepBatch, random: dict[str, Any]) -> tuple[float, float]:
        """As `run`, without the check of the first step: the batch is laid out anew until it fits the memory."""
        trainer = self.trainer
        model.train()
        if trainer.in_lockstep or not batch.rows:  # all ranks go together: one cannot lay its own out anew
            return self._backward(model, batch)
        collator: Any = trainer.data_collator
        batch = trainer.guard.fitting(batch, collator, model)
        while True:
            try:
                with trainer.guard.limited():
                    return self._backward(model, batch)
            except (RuntimeError, MemoryError) as error:
                if not is_allocation_failure(error):
                    raise
                failure = error.with_traceback(None)  # its frames hold the tensors that are in the way
            model.zero_grad(set_to_none=True)  # a step is one call, so these are its own gradients
            set_random_state(random)
            batch = trainer.guard.smaller(batch, collator, model, failure)

    def _backward(self, model: nn.Module, batch: StepBatch) -> tuple[float, float]:
        trainer = self.trainer
        loss = torch.zeros((), device=trainer.args.device)
        correct = torch.zeros((), device=trainer.args.device)
        for part in self.evenly(batch.packs or batch.parts):
            if trainer.stop_signal is not None and not trainer.in_lockstep:
                break  # `settle` ends the step on all ranks
            output = self.loss(model, part)
            part_mean = output.loss_sum / batch.weight_sum
            self._add_gradients(part_mean)
            trainer.guard.tidy()
            loss += part_mean.detach()
            correct += output.num_correct * (part is not self.empty)
        return float(loss), float(correct)

    def loss(self, model: nn.Module, part: Any) -> LossOutput:
        """The trainer's `part_loss`, in its precision, and through DeepSpeed's engine where there is one."""
        trainer = self.trainer
        with trainer.compute_loss_context_manager():
            if trainer.zero is None:
                return trainer.part_loss(model, part)
            return trainer.zero.forward(lambda: trainer.part_loss(model, part))

    def _add_gradients(self, loss: torch.Tensor) -> None:
        if self.trainer.zero is None:
            self.trainer.accelerator.backward(loss)
        else:
            self.trainer.zero.backward(loss)

    def empty_loss(self) -> LossOutput:
        """The forward of a part that weighs nothing; no random number is drawn for it."""
        self.trainer.model.eval()
        return self.trainer.part_loss(self.trainer.model, self.empty)

    def evenly(self, parts: Sequence[Any]) -> Sequence[Any]:
        """The parts of this rank's share, made up with empty ones to as many as any rank has.

        Only in lockstep: every rank must take part in gathering each layer, or gradients, for the others' sake.
        """
        if not self.trainer.in_lockstep:
            return parts
        return [*parts, *[self.empty] * (self.trainer.ranks.most(len(parts)) - len(parts))]

    @cached_property
    def empty(self) -> Any:
        """A part of one token that weighs nothing."""
        ids = np.zeros(2, np.int32)
        row = Encoded(ids, np.array([IGNORE_INDEX, 0], np.int32), np.zeros(2, np.float32), "", 0)
        collator: Any = self.trainer.data_collator
        batch: StepBatch = collator([row])
        return (batch.packs or batch.parts)[0]

    def _check_tree(self, model: nn.Module, batch: StepBatch) -> None:
        """Compute a few rows of the first step plainly too, and stop where the tree does not agree."""
        trainer = self.trainer
        rows = batch.rows
        if trainer.in_lockstep:  # all ranks compute the same
            rows = trainer.first_rows()
        checked = rows_to_check(rows)
        zero = trainer.zero  # stage 3 takes gradients away as they come
        gradients = zero.gradients if zero is not None and zero.stage == 3 else None
        check = self_check(model, checked, trainer.pad_id, attention=trainer.attention, gradients=gradients)
        self._checked = True
        trainer.guard.after_self_check()
        if not check.ok:
            raise TrainingError(
                "the prompt tree does not agree with plain rows on this model",
                where=f"rows {', '.join(f'{row.file}:{row.line}' for row in checked)}",
                details=[str(check)],
                todo="Train with --tree off, and report it: this must not happen (--self_check off skips it).",
            )
        trainer.notice(f"self-check on {len(checked)} rows: {check}")
