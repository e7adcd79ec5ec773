"""Loss, perplexity and token accuracy over held-out rows: sums only, through the code of training."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers.trainer_utils import EvalLoopOutput

from espalier.training.step import NO_ROWS, StepBatch

if TYPE_CHECKING:
    from espalier.training.trainer import LoraTrainer


def evaluate_rows(trainer: LoraTrainer, batches: Any, prefix: str) -> EvalLoopOutput:
    """Metrics named `<prefix>_loss` and so on, over the batches of all ranks. batches: this rank's, with a length."""
    model = trainer.model
    was_training = model.training
    model.eval()
    sums, problem = [0.0] * 5, None
    try:
        with trainer.ranks.gathering(trainer.sharded):
            sums = _sums(trainer, batches)
    except Exception as error:  # the other ranks must hear of it
        if trainer.sharded:
            raise  # in vain: they wait for pieces of a layer
        problem = error
    sums = trainer.ranks.settle(sums, error=problem, stop_signal=trainer.stop_signal)
    loss_sum, weight_sum, supervised, correct, rows = sums
    model.train(was_training)
    loss = loss_sum / weight_sum
    metrics = {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "token_accuracy": correct / supervised,
        "supervised_tokens": int(supervised),
    }
    named = {f"{prefix}_{name}": value for name, value in metrics.items()}
    return EvalLoopOutput(predictions=cast(Any, None), label_ids=None, metrics=named, num_samples=int(rows))


@torch.no_grad()
def _sums(trainer: LoraTrainer, batches: Any) -> list[float]:
    """(loss, weights, supervised tokens, correct tokens, rows) of this rank; cut short where the run is to stop."""
    steps, sums = trainer.micro_steps, [0.0] * 5
    own: Iterator[StepBatch] = iter(batches)
    num_batches = trainer.ranks.most(len(batches)) if trainer.in_lockstep else len(batches)
    for batch in (next(own, NO_ROWS) for _ in range(num_batches)):
        if trainer.stop_signal is not None and not trainer.in_lockstep:
            break
        for part in steps.evenly(batch.packs or batch.parts):
            out = steps.loss(trainer.model, part)
            if part is steps.empty:
                continue
            found: tuple[Any, ...] = (out.loss_sum, out.weight_sum, out.num_supervised, out.num_correct, 0)
            sums = [total + float(value) for total, value in zip(sums, found, strict=True)]
        sums[-1] += len(batch.rows)
    return sums
