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
from espalier.model.memory import FixedBytes, MemoryModel, PartBytes
from espalier.training.memory_guard import SMALL_PACK, StepPlan, part_bytes, with_tokens
from espalier.training.step import StepBatch, StepCollator, StepOptions, StepSampler
from espalier.tree.attention import choose_attention
from espalier.tree.support import tree_support

if TYPE_CHECKING:
    from espalier.training.trainer import LoraTrainer

Say = Callable[[str, str], None]

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
    of `num_steps`."""

    largest: StepBatch
    num_steps: int
    num_laid_out: int
    unique_tokens: int
    logical_tokens: int
    num_pairs: int
    num_packs: int


@dataclass(frozen=True)
class Prediction:
    """Bytes at the peak of the largest step. process: Python, PyTorch with its kernels, all else that is no model."""

    process: int
    fixed: FixedBytes
    part: PartBytes

    @property
    def total(self) -> int:
        return self.process + self.fixed.total + self.part.total


def survey(rows: EncodedDataset, config: RunConfig, collator: StepCollator, num_steps: int) -> Survey:
    """Lay out the steps that the run's own sampler draws, or the MOST_STEPS longest of them."""
    sampler = StepSampler(len(rows), config.rows_per_step, config.seed)
    lengths = np.asarray(rows.lengths)
    steps: list[list[int]] = []
    while len(steps) < min(num_steps, len(sampler)):
        sampler.set_epoch(0)
        steps += list(sampler)
    steps = steps[:num_steps]
    by_length = sorted(steps, key=lambda step: int(lengths[step].sum()), reverse=True)
    every = max(1, 2 * len(steps) // MOST_STEPS)
    chosen = steps if len(steps) <= MOST_STEPS else by_length[: MOST_STEPS // 2] + by_length[MOST_STEPS // 2 :: every]
    batches = [collator([rows[index] for index in step]) for step in chosen]
    return Survey(
        largest=max(batches, key=largest_part),
        num_steps=len(steps),
        num_laid_out=len(batches),
        unique_tokens=sum(batch.unique_tokens for batch in batches),
        logical_tokens=sum(batch.logical_tokens for batch in batches),
        num_pairs=sum(pack.num_pairs for batch in batches for pack in batch.packs),
        num_packs=sum(len(batch.packs or batch.parts) for batch in batches),
    )


def kernel_bytes(seen: Survey) -> int:
    """What the kernels of PyTorch and oneDNN, and the C library's heap, take in a run on a CPU."""
    packs = seen.num_packs * seen.num_steps // seen.num_laid_out
    return FIRST_STEP_BYTES + HEAP_BYTES + KERNEL_BYTES * min(KERNELS_KEPT, KERNELS_A_PACK * packs)


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


def memory_model(config: RunConfig, model_config: Any, *, dtype: Any, attention: str, bits: int = 16) -> MemoryModel:
    """The predictor for a run's base, adapter and optimizer."""
    from espalier.model.lora import lora_config

    settings = lora_config(
        rank=config.lora_rank,
        alpha=config.lora_alpha,
        dropout=config.lora_dropout,
        target_modules=config.target_modules,
        layers_to_transform=config.layers_to_transform,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        modules_to_save=config.modules_to_save,
    )
    return MemoryModel(
        model_config,
        settings,
        dtype=dtype,
        attention=attention,
        optim=config.optim,
        bits=bits,
        lora_forward=config.lora_forward,
        trust_remote_code=config.trust_remote_code,
    )


@dataclass(frozen=True)
class MemoryChoice:
    """What `plan_memory` settled. model None: this model could not be traced, and `reason` says why."""

    plan: StepPlan
    model: MemoryModel | None
    prediction: Prediction | None
    survey: Survey | None
    room: int
    reason: str


def plan_memory(
    config: RunConfig,
    model_config: Any,
    rows: Any,
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
    or what is free on `device`). Rows of a stream are not known, so nothing is chosen for them.
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
    fallback = StepPlan(tokens, 0)
    try:
        model = memory_model(config, model_config, dtype=dtype, attention=attention, bits=bits)
        model.spare = HEAP_SHARE if device == "cpu" else 0.0
        if not isinstance(rows, EncodedDataset):
            return MemoryChoice(fallback, model, None, None, room, "the rows of a stream are not known beforehand")
        collator = StepCollator(
            StepOptions(tree=is_tree, max_tokens_per_pack=tokens, min_shared_tokens=config.min_shared_tokens),
            config.per_device_train_batch_size,
        )
        found = survey(rows, config, collator, num_steps)
        if device == "cpu":
            process += kernel_bytes(found)
        every = model.num_layers if config.gradient_checkpointing else 0
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
        # Mixtures of experts route by numbers, which the meta device has not got.
        return MemoryChoice(fallback, None, None, None, room, f"not predicted for this model: {_first(error)}")
    reason = f"{prediction.total / 1e9:.2f} GB of {room / 1e9:.2f} GB"
    return MemoryChoice(plan, model, prediction, found, room, reason)


def guard_memory(trainer: LoraTrainer, memory: MemoryChoice, config: RunConfig, say: Say) -> None:
    """Give the trainer the plan, and say it with its reason."""
    guard = trainer.guard
    guard.model = memory.model
    guard.limit = parse_bytes(config.memory_limit, where="--memory_limit") if config.memory_limit else None
    guard.plan = replace(guard.plan, recompute=min(memory.plan.recompute, guard.num_layers))
    if guard.plan.tokens > memory.plan.tokens:
        guard.plan = replace(guard.plan, tokens=memory.plan.tokens)
    found = memory.prediction
    if found is None or memory.survey is None:
        say("memory", memory.reason)
        return
    guard.said = guard.kept_below = found.total
    guard.held = found.process + found.fixed.base + found.fixed.adapter // 2
    asked = config.max_tokens_per_pack or MAX_TOKENS_PER_PACK
    guard.is_reduced = memory.plan.tokens < asked or (memory.plan.recompute > 0 and not config.gradient_checkpointing)
    allowed = "allowed by --memory_limit" if config.memory_limit else "free here"
    told = f"largest step {memory.reason} {allowed}: {describe(found)}"
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


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def _first(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
