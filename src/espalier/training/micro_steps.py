"""The micro-steps of one optimizer step: forward and backward of each part of this process's rows.

A part is a pack of the tree, or a padded micro-batch of its plain twin. Where the parts of all ranks go together
(a sharded base), a rank that has fewer joins with empty ones.
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
        trainer = self.trainer
        options, sharded = trainer.options, trainer.sharded
        if options.self_check and options.tree and (batch.packs or sharded) and not self._checked:
            self._check_tree(model, batch)
        model.train()
        if sharded or not batch.rows:  # micro-steps of all ranks go together: one cannot lay its own out anew
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
            if trainer.stop_signal is not None and not trainer.sharded:
                break  # `settle` ends the step on all ranks
            with trainer.compute_loss_context_manager():
                output = trainer.part_loss(model, part)
                part_mean = output.loss_sum / batch.weight_sum
            trainer.accelerator.backward(part_mean)
            trainer.guard.tidy()
            loss += part_mean.detach()
            correct += output.num_correct * (part is not self.empty)
        return float(loss), float(correct)

    def evenly(self, parts: Sequence[Any]) -> Sequence[Any]:
        """The parts of this rank's share, made up with empty ones to as many as any rank has.

        Only with a sharded base: every rank must take part in gathering each layer, for the others' sake.
        """
        if not self.trainer.sharded:
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
        if trainer.sharded:  # all ranks compute the same
            rows = trainer.first_rows()
        checked = rows_to_check(rows)
        check = self_check(model, checked, trainer.pad_id, attention=trainer.attention)
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
