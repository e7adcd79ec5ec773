"""What a run will take, from its rows' layout: its largest step, and how to compute it where memory is short."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from espalier.config import MAX_TOKENS_PER_PACK, RunConfig
from espalier.encode.store import EncodedDataset
from espalier.model.hardware import KERNELS_KEPT, memory_here, parse_bytes, resident_bytes
from espalier.model.lora import run_lora_config
from espalier.model.memory import FixedBytes, MemoryModel, PartBytes
from espalier.training.memory_guard import SMALL_PACK, StepPlan, part_bytes, with_tokens
from espalier.training.ranks import place
from espalier.training.step import StepBatch, StepCollator, StepOptions, StepSampler, order_by_prefix
from espalier.training.streaming import StreamedSteps
from espalier.tree.attention import choose_attention
from espalier.tree.support import tree_support

if TYPE_CHECKING:
    from espalier.training.trainer import LoraTrainer

Say = Callable[[str, str], None]

MOST_STEPS_SEEN = 20_000  # of a longer run the first ones are looked at, by their rows' lengths alone
MOST_STEPS = 200  # of a long run so many are laid out: the longest by their rows' tokens, and others for the averages
FIRST_STEP_BYTES = 100_000_000  # pages of PyTorch's own kernels and buffers, which a first step brings in (LOG.md)
# Of freed blocks that the C library cannot use again within a step, and the share of kept tensors: measured (LOG.md).
HEAP_BYTES = 120_000_000
HEAP_SHARE = 0.2
KERNEL_BYTES = 450_000  # of oneDNN's kernel for one shape
KERNELS_A_PACK = 50  # shapes that a pack of a new length brings
SHARE_OF_FREE = 0.9  # of the machine's free memory: other programs want some, and a prediction may be 10 % off


@dataclass(frozen=True)
class Survey:
    """The steps of a run. largest: the batch whose largest part is largest; tokens are sums over `num_laid_out` steps
    of `num_steps`. first_window: of a stream, of which no more is known."""

    largest: StepBatch
    num_steps: int
    num_laid_out: int
    unique_tokens: int
    logical_tokens: int
    num_pairs: int
    num_packs: int
    first_window: bool = False


@dataclass(frozen=True)
class Prediction:
    """Bytes at the peak of the largest step. process: Python, PyTorch with its kernels, all else that is no model."""

    process: int
    fixed: FixedBytes
    part: PartBytes

    @property
    def total(self) -> int:
        return self.process + self.fixed.total + self.part.total


def survey(rows: EncodedDataset | StreamedSteps, config: RunConfig, collator: StepCollator, num_steps: int) -> Survey:
    """Lay out the steps that the run's own sampler draws, or the MOST_STEPS longest of them; of a stream, the first
    ones of its first window. Raises DataError: no row of a stream's can be used."""
    if isinstance(rows, StreamedSteps):
        batches = _first_batches(rows, collator)
    else:
        steps = [[rows[index] for index in step] for step in _longest_steps(rows, config, num_steps)]
        batches = [batch for step in steps if (batch := collator(step)).rows]
        batches = batches or [replace(collator, rank=0)(steps[0])]  # a process may have no row of any step
    return Survey(
        largest=max(batches, key=largest_part),
        num_steps=num_steps,
        num_laid_out=len(batches),
        unique_tokens=sum(batch.unique_tokens for batch in batches),
        logical_tokens=sum(batch.logical_tokens for batch in batches),
        num_pairs=sum(pack.num_pairs for batch in batches for pack in batch.packs),
        num_packs=sum(len(batch.packs or batch.parts) for batch in batches),
        first_window=isinstance(rows, StreamedSteps),
    )


def kernel_bytes(seen: Survey) -> int:
    """What the kernels of PyTorch and oneDNN, and the C library's heap, take in a run on a CPU."""
    packs = seen.num_packs * seen.num_steps // seen.num_laid_out
    return FIRST_STEP_BYTES + HEAP_BYTES + KERNEL_BYTES * min(KERNELS_KEPT, KERNELS_A_PACK * packs)


def _longest_steps(rows: EncodedDataset, config: RunConfig, num_steps: int) -> list[list[int]]:
    """Row numbers of the run's steps; of more than MOST_STEPS the longest half of them, and a sample of the rest."""
    alike = order_by_prefix(rows) if config.group_by_prefix else None
    sampler = StepSampler(len(rows), config.rows_per_step * place().world, config.seed, alike=alike)
    lengths = np.asarray(rows.lengths)
    steps: list[list[int]] = []
    while len(steps) < min(num_steps, MOST_STEPS_SEEN):
        sampler.set_epoch(len(steps) // len(sampler))
        steps += list(sampler)
    steps = steps[:num_steps]
    if len(steps) <= MOST_STEPS:
        return steps
    by_length = sorted(steps, key=lambda step: int(lengths[step].sum()), reverse=True)
    return by_length[: MOST_STEPS // 2] + by_length[MOST_STEPS // 2 :: max(1, 2 * len(steps) // MOST_STEPS)]


def _first_batches(rows: StreamedSteps, collator: StepCollator) -> list[StepBatch]:
    """Of this process's own rows, which a stream has dealt already."""
    collator = replace(collator, rank=0, world=1)
    first = rows.first_rows()  # raises before anything is laid out
    steps = (rows[number].rows for number in range(min(rows.steps_per_window, rows.num_steps, MOST_STEPS)))
    return [collator(step) for step in steps if step] or [collator(first)]


def largest_part(batch: StepBatch) -> int:
    """Tokens computed at once."""
    if batch.packs:
        return max(pack.num_tokens for pack in batch.packs)
    return max(len(part) * max(len(row.input_ids) for row in part) for part in batch.parts)


def predict(model: MemoryModel, batch: StepBatch, recompute: int, process: int) -> Prediction:
    """The peak of a step of this batch."""
    parts = [part_bytes(model, part, recompute) for part in batch.packs or batch.parts]
    return Prediction(process, model.fixed, max(parts, key=lambda part: part.total))


def choose(
    model: MemoryModel,
    batch: StepBatch,
    collator: StepCollator,
    *,
    room: int,
    process: int,
    recompute: int = 0,
    may_shrink: bool = True,
) -> tuple[StepPlan, Prediction]:
    """(plan, its prediction) of the step `batch` within `room` bytes: packs half as large while they stay large enough
    for fast products, then as few recomputed layers as will do, then smaller packs still.

    may_shrink False: the token budget is the user's. Where nothing fits, the smallest plan is given.
    """
    longest = max(len(row.input_ids) for row in batch.rows)
    tokens = collator.options.max_tokens_per_pack
    plan = StepPlan(tokens, recompute)
    found = predict(model, batch, recompute, process)
    shrinks = may_shrink and bool(batch.packs)
    floors = ([max(SMALL_PACK, longest), longest] if shrinks else [tokens]) if found.total > room else []
    for floor in floors:
        while found.total > room and shrinks and largest_part(batch) > floor:
            tokens = max(floor, largest_part(batch) // 2)
            batch = with_tokens(collator, tokens)(batch.rows)
            plan, found = replace(plan, tokens=tokens), predict(model, batch, plan.recompute, process)
        if found.total > room and plan.recompute < model.num_layers:
            every = predict(model, batch, model.num_layers, process)
            none = predict(model, batch, 0, process)
            a_layer = (none.part.kept - every.part.kept) / model.num_layers
            count = min(model.num_layers, math.ceil((none.total - room) / a_layer))
            plan, found = replace(plan, recompute=count), predict(model, batch, count, process)
    return plan, found


@dataclass(frozen=True)
class MemoryChoice:
    """What `plan_memory` settled. asked: the prediction of the run as it was asked for; prediction: of `plan`.

    model None: this model could not be traced, and `reason` says why.
    """

    plan: StepPlan
    model: MemoryModel | None
    asked: Prediction | None
    prediction: Prediction | None
    survey: Survey
    collator: StepCollator
    room: int
    reason: str

    def changed(self, *, tokens: int | None = None, recompute: int | None = None, bits: int | None = None) -> int:
        """Bytes at the peak with another token budget, number of recomputed layers, or base."""
        assert self.model is not None
        assert self.asked is not None
        batch = self.survey.largest
        if tokens is not None and batch.packs:
            batch = with_tokens(self.collator, tokens)(batch.rows)
        model = self.model if bits is None else self.model.with_bits(bits)
        again = self.asked.part.recomputed if recompute is None else recompute
        return predict(model, batch, again, self.asked.process).total


def plan_memory(
    config: RunConfig,
    model_config: Any,
    rows: EncodedDataset | StreamedSteps,
    *,
    device: str,
    dtype: torch.dtype,
    num_steps: int,
    bits: int = 16,
    process: int | None = None,
    room: int | None = None,
) -> MemoryChoice:
    """Predict the run's largest step and choose its token budget and recomputed layers, before a weight is read.

    process: bytes in use before the base (None: this process now). room: bytes allowed in all (None: --memory_limit,
    or what is free on `device`). Of a stream the rows of its first window count.
    """
    if process is None:
        process = resident_bytes() if device == "cpu" else 0
    limit = parse_bytes(config.memory_limit, where="--memory_limit") if config.memory_limit else None
    if room is None:
        room = limit if limit is not None else process + int(SHARE_OF_FREE * memory_here(device))
    tokens = config.max_tokens_per_pack or MAX_TOKENS_PER_PACK
    attention, _ = choose_attention(model_config, device=device, requested=config.attention)
    is_tree = config.tree == "on" and tree_support(model_config).mode == "tree"
    if not is_tree:
        tokens = sys.maxsize
    here = place()
    collator = StepCollator(
        StepOptions(tree=is_tree, max_tokens_per_pack=tokens, min_shared_tokens=config.min_shared_tokens),
        config.per_device_train_batch_size,
        here.rank,
        here.world,
    )
    found = survey(rows, config, collator, num_steps)
    try:
        model = MemoryModel(
            model_config,
            run_lora_config(config),
            dtype=dtype,
            attention=attention,
            optim=config.optim,
            bits=bits,
            lora_forward=config.lora_forward,
            trust_remote_code=config.trust_remote_code,
        )
        model.spare = HEAP_SHARE if device == "cpu" else 0.0
        if device == "cpu":
            process += kernel_bytes(found)
        every = model.num_layers if config.gradient_checkpointing else 0
        asked = predict(model, found.largest, every, process)
        plan, prediction = choose(
            model,
            found.largest,
            collator,
            room=room,
            process=process,
            recompute=every,
            may_shrink=config.max_tokens_per_pack is None,
        )
    except (NotImplementedError, RuntimeError, TypeError, AttributeError, IndexError) as error:
        # Code that asks for numbers, which the meta device has not got.
        reason = f"not predicted for this model: {_first(error)}"
        return MemoryChoice(StepPlan(tokens, 0), None, None, None, found, collator, room, reason)
    reason = f"{prediction.total / 1e9:.2f} GB of {room / 1e9:.2f} GB"
    return MemoryChoice(plan, model, asked, prediction, found, collator, room, reason)


def guard_memory(trainer: LoraTrainer, memory: MemoryChoice, config: RunConfig, say: Say) -> None:
    """Give the trainer the plan, and say it with its reason."""
    guard = trainer.guard
    guard.model = memory.model
    guard.limit = parse_bytes(config.memory_limit, where="--memory_limit") if config.memory_limit else None
    guard.plan = replace(guard.plan, recompute=min(memory.plan.recompute, guard.num_layers))
    if guard.plan.tokens > memory.plan.tokens:
        guard.plan = replace(guard.plan, tokens=memory.plan.tokens)
    found = memory.prediction
    if not memory.survey.first_window:
        guard.largest = memory.survey.largest
    if found is None:
        say("memory", memory.reason)
        return
    guard.tight = found.total / memory.room
    guard.said = guard.kept_below = found.total
    guard.held = found.process + found.fixed.base + found.fixed.adapter // 2
    asked = config.max_tokens_per_pack or MAX_TOKENS_PER_PACK
    guard.is_reduced = memory.plan.tokens < asked or (memory.plan.recompute > 0 and not config.gradient_checkpointing)
    allowed = "allowed by --memory_limit" if config.memory_limit else "free here"
    told = f"largest step{_of_what(memory)} {memory.reason} {allowed}: {describe(found)}"
    if guard.is_reduced:
        told += f"; planned smaller to fit: {memory.plan}"
    elif memory.plan.recompute:
        told += "; all layers computed again, by --gradient_checkpointing"
    else:
        told += "; it fits, so nothing is computed again"
    if found.total > memory.room:
        told += "; warning: it does not fit"
    say("memory", told)


def describe(found: Prediction) -> str:
    """The parts of a prediction."""
    parts = {
        "process": found.process,
        "base": found.fixed.base,
        "adapter": found.fixed.adapter,
        "optimizer": found.fixed.optimizer,
        "activations": found.part.kept + found.part.outside,
        "logits and one layer's backward": found.part.working,
    }
    return ", ".join(f"{name} {_size(count)}" for name, count in parts.items() if count)


def unpredicted(memory: MemoryChoice) -> list[str]:
    """What a prediction leaves out, in words."""
    said = ["evaluation, samples and saving, which take less than a step as a rule"]
    if memory.survey.first_window:
        said.insert(0, f"rows of the stream after the {memory.survey.num_laid_out} steps that were looked at")
    if memory.model is not None and memory.model.is_moe:
        said.insert(0, "which experts are met: all rows of a pack are counted, wherever the router sends them")
    return said


def _of_what(memory: MemoryChoice) -> str:
    seen = memory.survey
    return f" of the first {seen.num_laid_out} (of a stream no more is known)" if seen.first_window else ""


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _first(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
