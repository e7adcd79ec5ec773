"""The rows of one optimizer step: which they are, in which order, and how they are laid out."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Sampler

from espalier.config import MAX_TOKENS_PER_PACK, MIN_SHARED_TOKENS
from espalier.data.rows import BadRow
from espalier.encode.encode import IGNORE_INDEX, Encoded
from espalier.tree.deal import deal_rows
from espalier.tree.plan import Pack, plan_step

if TYPE_CHECKING:
    from transformers import TrainingArguments


@dataclass(frozen=True, slots=True)
class StepOptions:
    """How a step is computed.

    tree: shared beginnings once; else padded rows in micro-batches of micro_batch_rows through the stock forward.
    attention: auto, reference or merged. max_tokens_per_pack: most unique tokens a forward. micro_batch_rows None:
    the trainer's per_device_train_batch_size. lora_forward: fast (one function a LoRA layer) or peft.
    loraplus_lr_ratio: learning rate of every B over that of A (LoRA+).
    norm_forward: fast or stock.
    zero: DeepSpeed's configuration of ZeRO stage 2 or 3, as zero_settings.engine_settings gives it; None: without.
    on_nonfinite: stop, or skip a step whose loss or gradient is not finite, up to max_nonfinite_steps in a row.
    """

    tree: bool = True
    attention: str = "auto"
    max_tokens_per_pack: int = MAX_TOKENS_PER_PACK
    min_shared_tokens: int = MIN_SHARED_TOKENS
    micro_batch_rows: int | None = None
    group_by_prefix: bool = False
    self_check: bool = True
    on_nonfinite: str = "stop"
    max_nonfinite_steps: int = 5
    lora_forward: str = "fast"
    loraplus_lr_ratio: float | None = None
    norm_forward: str = "fast"
    zero: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class StepBatch:
    """This process's share of one optimizer step. Either packs (the tree) or parts (padded rows) is empty.

    rows: those of the share, in order; none where the step has fewer rows than the run has processes.
    weight_sum: the divisor of the step's mean loss. It, num_supervised and logical_tokens are of the whole step;
    unique_tokens are of the share.
    Of a stream only: bad, rows of this step that cannot be used; ended, True where the files hold no such step.
    """

    rows: tuple[Encoded, ...]
    packs: tuple[Pack, ...]
    parts: tuple[tuple[Encoded, ...], ...]
    weight_sum: float
    num_supervised: int
    logical_tokens: int
    unique_tokens: int
    bad: tuple[BadRow, ...] = ()
    ended: bool = False

    def places(self) -> str:
        """file:line of the rows, for messages."""
        names = [f"{row.file}:{row.line}" for row in self.rows if row.file]
        return ", ".join(names[:16]) + (f" and {len(names) - 16} more" if len(names) > 16 else "")


NO_ROWS = StepBatch((), (), (), 0.0, 0, 0, 0)


@dataclass(frozen=True)
class StepCollator:
    """Rows of a step -> StepBatch of one process; picklable, so that loader workers can plan ahead.

    rank, world: which share of the rows, of how many; every process sees all rows of a step and deals them alike.
    """

    options: StepOptions
    micro_batch_rows: int
    rank: int = 0
    world: int = 1

    def __call__(self, rows: Sequence[Encoded]) -> StepBatch:
        if self.world == 1:
            return self._batch(rows)
        shares = deal_rows(rows, self.world, share=self.options.tree, min_shared_tokens=self.options.min_shared_tokens)
        weight_sum, num_supervised = count_supervised(rows)
        return replace(
            self._batch([rows[i] for i in shares[self.rank]]),
            weight_sum=weight_sum,
            num_supervised=num_supervised,
            logical_tokens=sum(len(row.input_ids) for row in rows),
        )

    def _batch(self, rows: Sequence[Encoded]) -> StepBatch:
        logical = sum(len(row.input_ids) for row in rows)
        if self.options.tree:
            plan = plan_step(
                rows,
                max_tokens=max([self.options.max_tokens_per_pack, *(len(row.input_ids) for row in rows)]),
                min_shared_tokens=self.options.min_shared_tokens,
            )
            return StepBatch(
                tuple(rows), plan.packs, (), plan.weight_sum, plan.num_supervised, logical, plan.unique_tokens
            )
        size = self.micro_batch_rows
        parts = tuple(tuple(rows[at : at + size]) for at in range(0, len(rows), size))
        weight_sum, num_supervised = count_supervised(rows)
        computed = sum(len(part) * max(len(row.input_ids) for row in part) for part in parts)
        return StepBatch(tuple(rows), (), parts, weight_sum, num_supervised, logical, computed)


def count_supervised(rows: Sequence[Encoded]) -> tuple[float, int]:
    """(sum of the weights of supervised tokens, how many there are)."""
    weight_sum, count = 0.0, 0
    for row in rows:
        supervised = row.labels != IGNORE_INDEX
        count += int(supervised.sum())
        weight_sum += float(supervised.sum() if row.weights is None else row.weights[supervised].sum(dtype=np.float64))
    return weight_sum, count


@dataclass(frozen=True, slots=True)
class Begun:
    """Step number `step` of epoch `epoch`, of which the first `rows` rows are done already: a run that goes on with
    other rows a step stands in the middle of one."""

    epoch: int
    step: int
    rows: int


class StepSampler(Sampler[list[int]]):
    """Row numbers of each step. The order is a function of (seed, epoch) alone, so any step can be found again.

    shuffle False: file order, for evaluation. alike: the rows in an order where like beginnings are neighbours, for
    --group_by_prefix: an epoch then cuts that order into steps at a random offset and shuffles the steps.
    world: of the steps, every world-th, from number `rank` on: how processes share an evaluation.
    begun: a step that holds only the rest of its rows.
    """

    def __init__(
        self,
        num_rows: int,
        rows_per_step: int,
        seed: int,
        *,
        shuffle: bool = True,
        alike: npt.NDArray[np.int64] | None = None,
        rank: int = 0,
        world: int = 1,
        begun: Begun | None = None,
    ):
        self.num_rows, self.rows_per_step, self.seed, self.shuffle = num_rows, rows_per_step, seed, shuffle
        self.alike = alike
        self.rank, self.world = rank, world
        self.begun = begun
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        steps = math.ceil(self.num_rows / self.rows_per_step)
        return len(range(self.rank, steps, self.world))

    def rows_in(self, num_steps: int) -> int:
        """Rows of the first `num_steps` steps of this epoch."""
        if self.alike is None:
            return min(num_steps * self.rows_per_step, self.num_rows)
        return sum(len(step) for _, step in zip(range(num_steps), self, strict=False))

    def __iter__(self) -> Iterator[list[int]]:
        # RandomState, whose stream numpy has promised never to change.
        random = np.random.RandomState(np.random.MT19937(np.random.SeedSequence([self.seed, self.epoch])))
        if self.alike is not None:
            order = np.roll(self.alike, random.randint(self.num_rows))
        elif self.shuffle:
            order = random.permutation(self.num_rows)
        else:
            order = np.arange(self.num_rows)
        steps = [order[at : at + self.rows_per_step].tolist() for at in range(0, self.num_rows, self.rows_per_step)]
        if self.alike is not None:
            steps = [steps[i] for i in random.permutation(len(steps))]
        if self.begun is not None and self.begun.epoch == self.epoch:
            steps[self.begun.step] = steps[self.begun.step][self.begun.rows :]
        return iter(steps[self.rank :: self.world])


def order_by_prefix(rows: Sequence[Encoded]) -> npt.NDArray[np.int64]:
    """Row numbers sorted by token ids, so that rows with like beginnings are neighbours."""
    keys = [np.ascontiguousarray(rows[i].input_ids, dtype=">u4").tobytes() for i in range(len(rows))]
    return np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.int64)


class StepLoader(DataLoader[Any]):
    """A DataLoader whose batches are whole optimizer steps."""

    def set_epoch(self, epoch: int) -> None:
        """Hand the epoch to the sampler; the Trainer calls this on loaders that have it."""
        sampler: Any = self.batch_sampler
        sampler.set_epoch(epoch)


def step_loader(rows: Any, sampler: Any, collator: Any, args: TrainingArguments) -> StepLoader:
    """Batches of `rows`, by the numbers that `sampler` gives, in the loader's workers if there are some."""
    workers = args.dataloader_num_workers
    return StepLoader(
        rows,
        batch_sampler=sampler,
        collate_fn=collator,
        num_workers=workers,
        # Its own generator: a loader draws a seed whenever its workers start, and dropout must not notice.
        generator=torch.Generator().manual_seed(args.seed),
        prefetch_factor=args.dataloader_prefetch_factor,
        persistent_workers=workers > 0,  # starting them anew for each epoch costs seconds
        multiprocessing_context=args.dataloader_multiprocessing_context or ("spawn" if workers else None),
    )
