"""Before step 1, everything that happens later is tried on a small scale: saving, evaluation, choosing the best.

What would fail after hours fails here, within a second or two. Nothing of it stays, and no random number is drawn
from the run's generators.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from espalier.errors import RunFolderError, UsageError
from espalier.training.checkpoint_files import plain_random, random_state, set_random_state

if TYPE_CHECKING:
    from espalier.encode.encode import Encoded
    from espalier.training.samples import Samples
    from espalier.training.trainer import LoraTrainer

EVAL_ROWS, EVAL_TOKENS = 64, 512  # the evaluation takes the shortest of so many rows, and so many tokens at most


class Rehearsal(TrainerCallback):
    """Runs `rehearse` once the optimizer exists, right before the first step."""

    def __init__(self, trainer: LoraTrainer, samples: Samples | None = None):
        self.trainer, self.samples = trainer, samples

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        rehearse(self.trainer, self.samples)


def rehearse(trainer: LoraTrainer, samples: Samples | None = None) -> None:
    """Save all parts of a checkpoint and delete them, evaluate a few rows, look for the metric of the best, begin the
    answer to a prompt.

    Raises RunFolderError: cannot be written, or no room for a checkpoint; UsageError: no such metric.
    """
    before = random_state()
    try:
        if trainer.args.save_strategy != "no":
            with trainer.whole_adapter():
                optimizer = trainer.optimizer_state()
                trainer.ranks.led(lambda: _try_saving(trainer, optimizer))
        if trainer.args.eval_strategy != "no" and not isinstance(trainer.eval_dataset, dict):
            _try_evaluation(trainer)
        if samples is not None:
            trainer.ranks.led(lambda: samples.answers(1, max_new_tokens=2))
    finally:
        set_random_state(before)


def _try_saving(trainer: LoraTrainer, optimizer: dict[str, Any]) -> None:
    folder = trainer.keeper.folder
    with trainer.keeper.beside(folder / "rehearsal", "a checkpoint could not be saved, tried before step 1") as partial:
        states = [plain_random(random_state())] * trainer.ranks.world
        trainer.keeper.write_parts(trainer, partial, states, optimizer)
        written = sum(file.stat().st_size for file in partial.iterdir())
        # Adam's two moments, which the first step creates, are as large as the adapter.
        needed = written + (0 if trainer.state.global_step else 2 * _bytes_of(partial))
        free = shutil.disk_usage(partial).free + written
    if free < needed:
        raise RunFolderError(
            f"{free / 1e6:,.1f} MB are free here, and one checkpoint takes {needed / 1e6:,.1f} MB",
            where=str(folder),
            todo="Make room, or name another --output_dir.",
        )


def _bytes_of(folder: Path) -> int:
    return (folder / "adapter_model.safetensors").stat().st_size


def _try_evaluation(trainer: LoraTrainer) -> None:
    rows = [trainer.eval_dataset[i] for i in range(min(EVAL_ROWS, len(trainer.eval_dataset)))]
    rows.sort(key=lambda row: len(row.input_ids))
    total = 0
    few: list[Encoded] = []
    for row in rows:
        total += len(row.input_ids)
        if few and total > EVAL_TOKENS:
            break
        few.append(row)
    collate: Any = trainer.data_collator
    metrics = trainer.evaluation_loop([collate(few)], "rehearsal").metrics or {}
    wanted = trainer.args.metric_for_best_model
    name = wanted if wanted is None or wanted.startswith("eval_") else f"eval_{wanted}"
    if name is not None and name not in metrics and trainer.compute_metrics is None:
        raise UsageError(
            f"{wanted!r} is no result of an evaluation",
            where="--metric_for_best_model",
            todo=f"There are: {', '.join(key.removeprefix('eval_') for key in metrics)}.",
        )
