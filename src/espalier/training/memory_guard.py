"""Memory of a run: what a step is predicted to take, a plan of it that fits, and what happens when it did not fit.

A step can be computed in smaller packs, and with layers computed again in the backward: the gradient is the same, the
time is not. So a failed allocation is no end: the same rows run again with the random state they began with.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.utils.checkpoint import checkpoint
from transformers import TrainerCallback
from transformers.modeling_layers import GradientCheckpointingLayer

from espalier.errors import TrainingError
from espalier.model.hardware import data_bytes, release_free_memory, reset_peak, resident_bytes
from espalier.model.memory import MemoryModel, PartBytes, decoder_layers
from espalier.training.step import StepBatch, StepCollator, StepOptions
from espalier.tree.loss import base_of

if TYPE_CHECKING:
    from espalier.encode.encode import Encoded

SMALL_PACK = 512  # below it products are slow: layers are computed again before packs become smaller than this
ALLOCATION_FAILED = (
    "allocate memory", "out of memory", "could not create a memory", "could not create a primitive", "bad_alloc",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class StepPlan:
    """How a step is computed: most unique tokens a pack, and how many layers are computed again in the backward."""

    tokens: int
    recompute: int = 0

    def __str__(self) -> str:
        again = f", {self.recompute} layers computed again" if self.recompute else ""
        return f"packs of up to {self.tokens:,} tokens{again}"


@dataclass
class MemoryGuard:
    """Keeps a run within its memory.

    model: predicts; None: nothing is predicted, and only real failures count. limit: bytes that this process may take
    (None: whatever there is). device: of the run. held: bytes in use when training begins, without gradients and
    optimizer state. notice: where the line of explanation goes.
    """

    plan: StepPlan
    num_layers: int
    model: MemoryModel | None = None
    limit: int | None = None
    device: str = "cpu"
    held: int = 0
    is_reduced: bool = False
    said: int | None = None  # bytes that the header predicted
    kept_below: float = math.inf  # bytes resident between packs, above which freed memory is given back
    largest: StepBatch | None = None  # of the run, where all its rows are known
    tight: float | None = None  # share of what may be used that the largest step is predicted to take
    checked: int = 0  # most bytes resident until the self-check was done
    notice: Callable[[str], None] = field(default=lambda text: print(text, file=sys.stderr))
    _was_tidied: bool = False

    def start(self, model: torch.nn.Module) -> None:
        """Note what is held before the first step, and recompute the layers of the plan."""
        if self.device == "cpu":
            release_free_memory()
        if self.model is None and self.device == "cpu":
            self.held = resident_bytes()
        if self.num_layers:
            recompute_layers(model, self.plan.recompute)
        if self.limit is not None and self.device.startswith("cuda"):
            total = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, self.limit / total))

    def state(self) -> dict[str, int] | None:
        """For a checkpoint, of a plan that memory made smaller: a run that goes on computes its steps by it."""
        return {"tokens": self.plan.tokens, "recompute": self.plan.recompute} if self.is_reduced else None

    def restore(self, state: dict[str, int], model: torch.nn.Module) -> None:
        """Go on with what `state` gave."""
        self.plan = StepPlan(**state)
        self._apply(model)

    def predicted(self, parts: Sequence[Any], recompute: int) -> int:
        """Bytes at the peak of a step of these packs, or of these padded micro-batches."""
        assert self.model is not None
        sizes = [part_bytes(self.model, part, recompute).total for part in parts]
        return self.held + self.model.fixed.adapter // 2 + self.model.fixed.optimizer + max(sizes)

    def fitting(self, batch: StepBatch, collator: StepCollator, model: torch.nn.Module) -> StepBatch:
        """The batch laid out by the plan, which is made smaller until it is predicted to fit the limit."""
        batch = self._laid_out(batch, collator)
        if self.limit is None or self.model is None:
            return batch
        wanted = predicted = self.predicted(batch.packs or batch.parts, self.plan.recompute)
        before = self.plan
        while predicted > self.limit:
            smaller = next_plan(self.plan, batch, self.num_layers)
            if smaller is None:
                raise self._no_plan(predicted)
            self.plan = smaller
            batch = self._laid_out(batch, collator)
            predicted = self.predicted(batch.packs or batch.parts, self.plan.recompute)
        if self.plan != before:
            self._apply(model)
            self.notice(
                f"memory: this step would take {_gb(wanted)} of the {_gb(self.limit)} allowed: planned again with "
                f"{self.plan}, {_gb(predicted)}; the gradient is the same"
            )
        return batch

    def smaller(
        self, batch: StepBatch, collator: StepCollator, model: torch.nn.Module, error: BaseException
    ) -> StepBatch:
        """The same rows in a smaller plan, after an allocation failed. Raises TrainingError where there is none."""
        plan = next_plan(self.plan, batch, self.num_layers)
        if plan is None:
            raise self._no_plan(None) from error
        self.plan = plan
        self._apply(model)
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()
        elif self.device == "cpu":
            release_free_memory()  # what the step that failed has left behind would be in the way
        self.notice(
            f"memory: an allocation failed ({_wanted(error)}): the step runs again from the same rows and random state "
            f"with {plan}; the gradient is the same"
        )
        return self._laid_out(batch, collator)

    def tidy(self) -> None:
        """Between packs: give freed memory back where more of it is resident than was predicted.

        The C library keeps freed blocks, and as packs differ in length it finds ever fewer that fit: a run of small
        packs came to take a fourth more than its live tensors (LOG.md). Giving back costs time, since pages are
        touched anew, so it waits until the prediction is passed; where that is at once again, the prediction was too
        low, and the bound is raised.
        """
        if self.device != "cpu" or resident_bytes() <= self.kept_below:
            self._was_tidied = False
            return
        if self._was_tidied:
            self.kept_below = 1.05 * resident_bytes()
        self._was_tidied = True
        release_free_memory()

    @contextmanager
    def limited(self) -> Iterator[None]:
        """While it is open, an allocation beyond the limit fails, instead of the machine."""
        if self.limit is None or self.device != "cpu" or not sys.platform.startswith("linux"):
            yield
            return
        import resource

        before = resource.getrlimit(resource.RLIMIT_DATA)
        room = max(0, self.limit - max(self.held, resident_bytes()))  # pages of the base come as they are read
        bound = data_bytes() + room
        if before[1] != resource.RLIM_INFINITY:
            bound = min(bound, before[1])
        resource.setrlimit(resource.RLIMIT_DATA, (bound, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_DATA, before)

    def account(self) -> str:
        """One line at the end of a run: what was predicted and what it was."""
        if self.device == "cpu":
            real = f"at most {_gb(resident_bytes(peak=True))} were resident in the steps"
        elif self.device.startswith("cuda"):
            real = f"at most {_gb(torch.cuda.max_memory_allocated())} were allocated on the card"
        else:
            return "memory: not measured on this device"
        said = f", {_gb(self.said)} predicted" if self.said is not None else ""
        check = f"; {_gb(self.checked)} in the self-check before them, which no plan counts" if self.checked else ""
        return f"memory: {real}{said}{check}"

    def after_self_check(self) -> None:
        """Measure the steps by themselves: plain rows take more than a tree of them, once."""
        if self.device == "cpu":
            self.checked = resident_bytes(peak=True)
            release_free_memory()
            reset_peak()

    def _apply(self, model: torch.nn.Module) -> None:
        self.is_reduced = True
        if self.num_layers:
            recompute_layers(model, self.plan.recompute)

    def _laid_out(self, batch: StepBatch, collator: StepCollator) -> StepBatch:
        largest = max((pack.num_tokens for pack in batch.packs), default=0)
        if batch.packs and largest > max(self.plan.tokens, _longest(batch.rows)):
            return _same_step(with_tokens(collator, self.plan.tokens)(batch.rows), batch)
        widths = [len(part) * _longest(part) for part in batch.parts]
        if max(widths, default=0) > max(self.plan.tokens, _longest(batch.rows)):
            rows = max(1, self.plan.tokens // _longest(batch.rows))
            smaller = StepCollator(collator.options, min(rows, collator.micro_batch_rows))
            return _same_step(smaller(batch.rows), batch)
        return batch

    def _no_plan(self, predicted: int | None) -> TrainingError:
        needs = f"needs {_gb(predicted)}" if predicted is not None else "could not be allocated"
        allowed = f", {_gb(self.limit)} are allowed" if self.limit is not None else ""
        return TrainingError(
            f"a step {needs}{allowed}, with the longest row alone in a pack and all {self.num_layers} layers "
            f"computed again ({_gb(self.held)} are held before it)",
            todo="Give it more memory, a smaller --max_seq_length or --lora_rank, or a smaller base.",
        )


def is_allocation_failure(error: BaseException) -> bool:
    """True for what PyTorch and its libraries raise where memory runs out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in ALLOCATION_FAILED)


def next_plan(plan: StepPlan, batch: StepBatch, num_layers: int) -> StepPlan | None:
    """The next smaller plan for this batch: packs half as large, then layers computed again, then smaller packs still.

    None where the longest row is alone and every layer is computed again.
    """
    longest = _longest(batch.rows)
    now = max(
        [pack.num_tokens for pack in batch.packs] or [len(part) * _longest(part) for part in batch.parts], default=0
    )
    half = max(longest, now // 2)
    if now > longest and (half >= SMALL_PACK or plan.recompute >= num_layers):
        return replace(plan, tokens=half)
    if plan.recompute < num_layers:
        return replace(plan, recompute=min(num_layers, plan.recompute + max(1, math.ceil(num_layers / 4))))
    return None


def num_recomputable(model: torch.nn.Module) -> int:
    """How many decoder layers can be computed again: all of them, or none where transformers has no switch for it."""
    layers = decoder_layers(base_of(model))
    return len(layers) if all(isinstance(layer, GradientCheckpointingLayer) for layer in layers) else 0


def recompute_layers(model: torch.nn.Module, count: int) -> None:
    """Compute the first `count` decoder layers again in the backward, by transformers' own switch of each layer.

    The first ones: their turn in the backward comes when what the others kept is freed already.
    """
    for index, layer in enumerate(cast("list[Any]", decoder_layers(base_of(model)))):
        layer.gradient_checkpointing = index < count
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


def with_tokens(collator: StepCollator, tokens: int) -> StepCollator:
    """The same collator with another token budget."""
    options: StepOptions = replace(collator.options, max_tokens_per_pack=tokens)
    return StepCollator(options, collator.micro_batch_rows)


def part_bytes(model: MemoryModel, part: Any, recompute: int) -> PartBytes:
    """The bytes of one pack, or of one padded micro-batch."""
    if not isinstance(part, tuple):
        return model.part(part, recompute)
    supervised = sum(int((row.labels >= 0).sum()) for row in part)
    return model.padded(len(part), _longest(part), supervised, recompute)


def _same_step(share: StepBatch, batch: StepBatch) -> StepBatch:
    """`share` with what `batch` says of the whole step, of which this process may have a part only."""
    return replace(
        share,
        weight_sum=batch.weight_sum,
        num_supervised=batch.num_supervised,
        logical_tokens=batch.logical_tokens,
    )


def _longest(rows: Sequence[Encoded]) -> int:
    return max(len(row.input_ids) for row in rows)


def _wanted(error: BaseException) -> str:
    """What could not be had, in short; else the first line of what the library says."""
    found = re.search(r"tried to allocate ([0-9.]+ ?[A-Za-z]+)", str(error), re.IGNORECASE)
    return found[1] if found else (str(error).splitlines() or [type(error).__name__])[0][:120]


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB"


class MemoryWatch(TrainerCallback):
    """Begins the measurement when training begins."""

    def __init__(self, guard: MemoryGuard):
        self.guard = guard

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.guard.start(model)
        if self.guard.device == "cpu":
            reset_peak()
        elif self.guard.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
