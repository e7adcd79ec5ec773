"""LoraTrainer: transformers' Trainer whose micro-steps are packs of a prompt tree. The step is `training_step`.

A batch of its loader is one whole optimizer step: batch size x accumulation rows, drawn by (seed, epoch) and laid out
by the planner. So the loop of transformers sees one batch a step and no accumulation, and everything around it
(schedules, callbacks, trackers, evaluation) is unchanged.
"""

from __future__ import annotations

import copy
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import nn
from transformers import EarlyStoppingCallback, Trainer, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput

from espalier.data.formats import group_bad_rows
from espalier.data.rows import BadRow
from espalier.errors import RunFolderError, UsageError
from espalier.model.shard import is_sharded
from espalier.training.checkpoint import CheckpointKeeper, plain_random, random_state, run_of
from espalier.training.evaluation import evaluate_rows
from espalier.training.faults import NonFinite
from espalier.training.inputs import as_encoded, model_and_tokenizer, pad_id
from espalier.training.log_window import LogWindow
from espalier.training.memory_guard import MemoryGuard, StepPlan, num_recomputable
from espalier.training.micro_steps import MicroSteps
from espalier.training.ranks import Ranks, join
from espalier.training.step import (
    Begun,
    StepBatch,
    StepLoader,
    StepOptions,
    StepSampler,
    order_by_prefix,
    step_loader,
)
from espalier.training.streaming import StepNumbers, StreamCollator, StreamedSteps, tell_shares
from espalier.tree.attention import choose_attention
from espalier.tree.collate import to_tensors
from espalier.tree.loss import LossOutput, plain_loss, tree_loss
from espalier.tree.support import tree_support

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import numpy.typing as npt
    from peft import LoraConfig
    from transformers import PreTrainedTokenizerBase, TrainerCallback

    from espalier.encode.encode import Encoded
    from espalier.training.zero import Zero


class LoraTrainer(Trainer):
    """Train a LoRA adapter; a drop-in for TRL's SFTTrainer.

    model: a causal language model, a PeftModel, or a name for `resolve_model`. train_dataset, eval_dataset: rows with
    `prompt`/`completion`, `messages` or alpaca columns (a datasets.Dataset, a list of dicts), rows with `input_ids`
    and `labels`, or an EncodedDataset. processing_class: the tokenizer. peft_config: a LoraConfig, unless the model
    has an adapter. options: how a step is computed. template, max_length: as --template and --max_seq_length.
    Raises EspalierError for rows, models and options that cannot be used.
    """

    model: Any
    train_dataset: Any
    eval_dataset: Any

    def __init__(
        self,
        model: nn.Module | str | None = None,
        args: TrainingArguments | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        peft_config: LoraConfig | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        *,
        options: StepOptions | None = None,
        template: str | None = None,
        max_length: int | None = None,
        ranks: Ranks | None = None,
    ):
        from espalier.model.fast_lora import fast_lora, peft_lora
        from espalier.model.fast_norm import fast_norms, stock_norms

        peft_model, processing_class = model_and_tokenizer(model, processing_class, peft_config)
        args = copy.copy(args) if args is not None else TrainingArguments(output_dir="runs/trainer")
        self.options = options or StepOptions()
        self.lora_counts = fast_lora(peft_model) if self.options.lora_forward == "fast" else peft_lora(peft_model)
        stock_norms(peft_model)
        zero = self.options.zero
        self.sharded = is_sharded(peft_model) or (zero is not None and zero["zero_optimization"]["stage"] == 3)
        self.in_lockstep = self.sharded or zero is not None  # each micro-step is one of all ranks
        self.zero: Zero | None = None
        # Which formula a norm has is tried on it, and a piece of it cannot be tried.
        norms_are_fast = self.options.norm_forward == "fast" and not self.sharded
        self.fast_norms, self.stock_norms = fast_norms(peft_model) if norms_are_fast else (0, 0)
        self.ranks = ranks or join(use_cpu=args.use_cpu)
        self.micro_batch_rows = self.options.micro_batch_rows or args.per_device_train_batch_size
        rows_here = args.per_device_train_batch_size * args.gradient_accumulation_steps
        self.rows_per_step = rows_here * self.ranks.world
        self.keep_checkpoints = args.save_total_limit
        _one_batch_a_step(args, rows_here, next(peft_model.parameters()).dtype)
        encode = partial(
            as_encoded, tokenizer=processing_class, template=template, max_length=max_length, model=peft_model
        )
        train_dataset = encode(train_dataset)
        if isinstance(eval_dataset, Mapping):
            eval_dataset = {name: encode(rows) for name, rows in eval_dataset.items()}
        else:
            eval_dataset = encode(eval_dataset)
        self._num_parameters = sum(parameter.numel() for parameter in peft_model.parameters())
        self.pad_id = pad_id(processing_class, peft_model)
        support = tree_support(peft_model.config)
        if support.mode == "padded" and self.options.tree:
            self.options = replace(self.options, tree=False)
        self.support = support
        self.attention, self.attention_reason = choose_attention(
            peft_model.config, device=str(args.device), requested=self.options.attention
        )
        self.base_fingerprint: dict[str, Any] | None = None  # of the base as it was loaded, for the record of a run
        self.left_out: Callable[[Sequence[BadRow], int], None] = self._say_left_out  # told of rows of a stream
        self.keeper = CheckpointKeeper(Path(args.output_dir or "."), keep=self.keep_checkpoints)
        self.stop_signal: int | None = None
        self.notice: Callable[[str], None] = _to_stderr  # where warnings of a running run go
        self.nonfinite = NonFinite(
            self.options.on_nonfinite == "skip", self.options.max_nonfinite_steps, lambda text: self.notice(text)
        )
        self.guard = MemoryGuard(
            StepPlan(
                self.options.max_tokens_per_pack if self.options.tree else sys.maxsize,
                num_recomputable(peft_model) if args.gradient_checkpointing else 0,
            ),
            num_recomputable(peft_model),
            device=str(args.device),
            notice=lambda text: self.notice(text),
        )
        self.micro_steps = MicroSteps(self)
        # Where a run goes on with other rows a step than before, see progress.py.
        self.step_offset = 0
        self.begun: Begun | None = None
        self.schedule_step: int | None = None
        self.window = LogWindow()
        self._random_at_step: tuple[int, dict[str, Any]] | None = None  # (steps done, state before the next one)
        self._step_has_loss = True
        super().__init__(
            model=peft_model,
            args=args,
            data_collator=cast(Any, StreamCollator(self.options, self.micro_batch_rows)),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if self.args.world_size != self.ranks.world:
            raise UsageError(
                f"the launcher has started {self.ranks.world} processes, and TrainingArguments sees one",
                where="use_cpu",
                todo="Without an accelerator, pass TrainingArguments(use_cpu=True).",
            )

        if zero is not None:
            self.zero = self._start_zero(zero)
            self.zero.make_state(self.micro_steps.empty_loss)

    def _start_zero(self, settings: dict[str, Any]) -> Zero:
        from espalier.training.zero import Zero

        self.ranks.send_from_0(p for p in self.model.parameters() if p.requires_grad)
        return Zero(self.model, self.create_optimizer(), settings, str(self.args.device))

    # ---- the step ------------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """One optimizer step's gradient: forward and backward of each part, scaled by the step's own divisor.

        loss = sum of token losses / supervised tokens of the whole step, whatever the parts. Returns that mean.
        """
        batch: StepBatch = inputs
        self._random_at_step = (self.state.global_step, random_state())
        if not batch.weight_sum:  # of a stream, and all of them were named
            self._batch, self._step_has_loss = batch, False
            self.window.add_lost()
            return torch.zeros((), device=self.args.device)
        started = time.perf_counter()
        loss, correct, problem = 0.0, 0.0, None
        try:
            with self.ranks.gathering(self.sharded):
                loss, correct = self.micro_steps.run(model, batch, self._random_at_step[1])
        except Exception as error:  # the other ranks must hear of it, and wait for this one's numbers
            if self.sharded:
                raise  # in vain: they wait for pieces of a layer
            problem = error
        sums = (loss, correct, batch.unique_tokens)
        total, correct, unique = self.ranks.settle(sums, error=problem, stop_signal=self.stop_signal)
        self._batch = batch
        self._step_has_loss = math.isfinite(total)
        if not self._step_has_loss:
            self._skip_step(model, "loss", total, *self._who_has(not math.isfinite(loss)))
            self.window.add_lost()
            return torch.zeros((), device=self.args.device)  # left out of the mean that is logged, see LogWindow
        if self.zero is None:
            self.ranks.sum_gradients(model.parameters())
        self.window.add(batch, correct, int(unique), time.perf_counter() - started)
        return torch.tensor(total, device=self.args.device)

    def _who_has(self, it: bool) -> tuple[str, str | None]:
        """The rows of the ranks for which `it` is true, and which ranks these are where there are several."""
        if self.ranks.world == 1:
            return self._batch.places(), None
        told = self.ranks.exchange(self._batch.places() if it else None)
        where = [rank for rank, places in enumerate(told) if places is not None]
        return ", ".join(told[rank] for rank in where), f"rank {', '.join(map(str, where))}"

    def part_loss(self, model: nn.Module, part: Any) -> LossOutput:
        """Loss of one pack (the tree) or of one padded micro-batch (its plain twin)."""
        if isinstance(part, tuple):
            return plain_loss(model, part, self.pad_id)
        return tree_loss(model, to_tensors(part, self.args.device), attention=self.attention)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        return None if self.zero is not None else super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """As HF's, and what follows from a norm that is not finite.

        DeepSpeed tells the norm once it has stepped: so this is its step, and the one that follows finds no gradient.
        """
        if self.zero is not None:
            norm: Any = self.zero.step() if self._step_has_loss else None
        else:
            norm = super()._get_grad_norm(model, grad_norm=grad_norm)  # type: ignore[no-untyped-call]
        if not self._step_has_loss:
            return None
        if math.isfinite(float(norm)):
            self.nonfinite.passed()
            return norm
        if self.accelerator.scaler is not None:
            self.nonfinite.met_by_scaler(self.state.global_step + 1, self._batch.places(), self.keeper.newest())
            return norm
        self._skip_step(model, "gradient norm", float(norm), *self._who_has(True))
        return None

    def _skip_step(self, model: nn.Module, what: str, value: float, rows: str, where: str | None) -> None:
        """Make this step change nothing: parameters without a gradient are passed over by the optimizer.

        A float16 scaler wants to see the bad gradient, and skips by itself. Raises TrainingError where the run stops.
        """
        self.nonfinite.met(what, value, self.state.global_step + 1, rows, self.keeper.newest(), where)
        self.window.skipped += 1
        if self.zero is not None:
            if not self._step_has_loss:  # else its own step has met the norm, and left out the step
                self.zero.discard(self.micro_steps.empty_loss)
        elif self.accelerator.scaler is None:
            model.zero_grad(set_to_none=True)

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        """No DistributedDataParallel: the tree calls the inner model, which that wrapper would not see, and packs are
        uneven. Ranks start with equal adapters and add up their gradients once a step (`Ranks.sum_gradients`)."""
        if self.ranks.world > 1:
            if self.zero is None:
                self.ranks.send_from_0(p for p in model.parameters() if p.requires_grad)
            self.accelerator.prepare_model(model, evaluation_mode=True)
            cast(Any, model)._is_accelerate_prepared = True
        return model

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """As HF's; for LoRA+ with PEFT's groups, of which those of B have their own learning rate."""
        if self.optimizer is not None or self.options.loraplus_lr_ratio is None:
            return super().create_optimizer(model)
        from peft.optimizers import create_loraplus_optimizer

        optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        self.optimizer = create_loraplus_optimizer(
            model=self.model,
            optimizer_cls=optimizer_class,
            loraplus_lr_ratio=self.options.loraplus_lr_ratio,
            loraplus_weight_decay=self.args.weight_decay,
            loraplus_lr_embedding=settings["lr"],  # its own default is 1e-6, whatever the learning rate is
            **settings,
        )
        return self.optimizer

    # ---- data ----------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> StepLoader:
        """One batch a step."""
        collator = replace(cast(Any, self.data_collator), rank=self.ranks.rank, world=self.ranks.world)
        return step_loader(self.train_dataset, self.train_sampler(), collator, self.args)

    def train_sampler(self) -> StepSampler | StepNumbers:
        if isinstance(self.train_dataset, StreamedSteps):
            return StepNumbers(self.train_dataset)
        rows = self.train_dataset
        return StepSampler(len(rows), self.rows_per_step, self.args.seed, alike=self._alike, begun=self.begun)

    def first_rows(self) -> tuple[Encoded, ...]:
        """All rows of the first step, alike on every rank."""
        if isinstance(self.train_dataset, StreamedSteps):
            return self.train_dataset.first_rows()
        return tuple(self.train_dataset[i] for i in next(iter(self.train_sampler())))

    @cached_property
    def _alike(self) -> npt.NDArray[np.int64] | None:
        return order_by_prefix(self.train_dataset) if self.options.group_by_prefix else None

    def get_eval_dataloader(self, eval_dataset: Any = None) -> StepLoader:
        """The held-out rows in their order."""
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        size = self.args.per_device_eval_batch_size
        sampler = StepSampler(len(rows), size, 0, shuffle=False, rank=self.ranks.rank, world=self.ranks.world)
        return step_loader(rows, sampler, self.data_collator, self.args)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """As HF's, one step at a time. What a stream says beside its rows is heard here: bad rows, and its end."""
        if not isinstance(self.train_dataset, StreamedSteps):
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        problem = share = None
        try:
            (share,), _ = super().get_batch_samples(epoch_iterator, 1, device)
        except Exception as error:  # the other ranks must hear of it
            problem = error
        batch = tell_shares(share, self.ranks, self.train_dataset, problem)
        if batch.bad:
            self.left_out(batch.bad, self.state.global_step + 1)
        if batch.ended:
            self.notice(f"the rows ended after step {self.state.global_step}: the run ends here")
            self.control.should_training_stop = True
            return [], None
        return [batch], None

    def _say_left_out(self, bad: Sequence[BadRow], step: int) -> None:
        self.notice(f"step {step}: {len(bad)} rows left out: {'; '.join(group_bad_rows(bad))}")

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> None:
        """The step's divisor is in the batch itself."""

    def num_examples(self, dataloader: Any) -> int:
        """Rows, not steps."""
        rows = dataloader.dataset
        return rows.num_steps * rows.rows_per_step if isinstance(rows, StreamedSteps) else len(rows)

    def floating_point_ops(self, inputs: Any) -> int:
        """4 x parameters x computed tokens: forward 2, backward through frozen weights 2."""
        return int(4 * self._num_parameters * inputs.unique_tokens)

    # ---- evaluation ----------------------------------------------------------------------------------------------

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As `evaluate_rows` says; batches of all ranks together."""
        return evaluate_rows(self, dataloader, metric_key_prefix)

    # ---- log, save, resume ---------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As HF's; a log of training also says tokens a second and token accuracy since the last one."""
        if "loss" in logs:
            logs.update(self.window.report())
            if self.window.lost:  # steps without a loss are left out of the mean, never counted as 0
                self.window.mean_of_the_rest(logs)
            self.window = LogWindow()
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """The adapter as a PEFT folder, with the tokenizer: no pickle. Raises RunFolderError where it cannot be."""
        folder = Path(output_dir or self.args.output_dir or ".")
        with self.whole_adapter():
            self.ranks.led(lambda: self.keeper.publish_adapter(self.model, folder, self.processing_class))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self.name_best()
        try:
            self._write_checkpoint()
        except RunFolderError as error:
            self.name_best(saved=False)
            self.notice(f"warning: {error}\n  The run goes on, and tries again at the next save.")

    def _write_checkpoint(self, random: dict[str, Any] | None = None) -> Path:
        """Rank 0 writes the checkpoint of this step, with the random states of all ranks."""
        states = self.ranks.exchange(plain_random(random if random is not None else random_state()))
        with self.whole_adapter():
            optimizer = self.optimizer_state()
            self.ranks.led(lambda: self.keeper.save(self, states, optimizer))
        self.keeper.last_whole = self.keeper.path(self.state.global_step)
        return self.keeper.last_whole

    def name_best(self, *, saved: bool = True) -> None:
        """Say where the best checkpoint is; None where it could not be saved. saved: that of this step will be."""
        best = self.state.best_global_step
        if best:
            path = self.keeper.path(best)
            is_there = path.is_dir() or (saved and best == self.state.global_step)
            self.state.best_model_checkpoint = str(path) if is_there else None

    def save_interrupted(self) -> Path | None:
        """A checkpoint of the last finished step, after `Interrupted`; None where no step was finished.

        Raises RunFolderError where the disk does not take it.
        """
        step = self.state.global_step
        if step == 0:
            return None
        if self.keeper.last_whole == self.keeper.path(step):
            return self.keeper.last_whole
        before = self._random_at_step
        # Stopped inside a step: go on with the random numbers that it began with. Inside an evaluation: with these.
        return self._write_checkpoint(before[1] if before is not None and before[0] == step else None)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self.load_adapter(Path(resume_from_checkpoint))
        self.keeper.run = run_of(Path(resume_from_checkpoint)) or self.keeper.run
        self.keeper.last_whole = Path(resume_from_checkpoint)

    def _init_training_state(self, max_steps: int, steps_per_epoch: int, *args: Any) -> Any:
        super()._init_training_state(max_steps, steps_per_epoch, *args)
        # What transformers takes from the checkpoint although the user may have changed it since.
        self.state.compute_steps(self.args, max_steps)
        self.state.max_steps = max_steps - self.step_offset
        self.name_best(saved=False)
        return divmod(self.state.global_step + self.step_offset, steps_per_epoch)

    def _load_callback_state(self) -> None:
        wanted = {type(c): c.early_stopping_patience for c in self._early_stopping()}
        super()._load_callback_state()
        for callback in self._early_stopping():  # the count so far is restored, the limit is what is asked for now
            callback.early_stopping_patience = wanted[type(callback)]

    def _early_stopping(self) -> list[EarlyStoppingCallback]:
        return [c for c in self.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback)]

    def _load_best_model(self) -> None:
        assert self.state.best_model_checkpoint is not None
        self.load_adapter(Path(self.state.best_model_checkpoint))

    def load_adapter(self, checkpoint: Path) -> None:
        """Take the weights of a checkpoint; every rank reads it. Raises CheckpointError where they do not fit."""
        with self.written_adapter():
            self.keeper.load_adapter(self.model, checkpoint)

    def whole_adapter(self) -> AbstractContextManager[None]:
        """While it lasts, each rank can read the whole adapter; all ranks must be there."""
        return nullcontext() if self.zero is None else self.zero.whole()

    def written_adapter(self) -> AbstractContextManager[None]:
        """While it lasts, all ranks write the same values into the adapter."""
        return nullcontext() if self.zero is None else self.zero.written()

    def optimizer_state(self) -> dict[str, Any]:
        """The optimizer's state_dict(), by whole parameters; all ranks must be there."""
        assert self.optimizer is not None, "there is an optimizer once training has begun"
        return self.optimizer.state_dict() if self.zero is None else self.zero.optimizer_state()

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Go on with what `optimizer_state` gave."""
        assert self.optimizer is not None, "there is an optimizer once training has begun"
        if self.zero is None:
            self.optimizer.load_state_dict(state)
        else:
            self.zero.load_optimizer_state(state)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.keeper.load_optimizer(self, Path(checkpoint))

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.keeper.load_scaler(self, Path(checkpoint))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.keeper.load_random(self, Path(checkpoint))


def _one_batch_a_step(args: TrainingArguments, rows: int, dtype: torch.dtype) -> None:
    """What HF's loop is told: a batch is a step of `rows` rows, and what we do ourselves is not done twice."""
    args.per_device_train_batch_size, args.gradient_accumulation_steps = rows, 1
    args.save_total_limit = None  # our keeper counts: HF's may delete the newest checkpoint in favour of the best
    args.logging_nan_inf_filter = False
    args.restore_callback_states_from_checkpoint = True
    args.remove_unused_columns = False
    if args.bf16 and dtype == torch.bfloat16:
        args.bf16 = False  # the base is bfloat16 already and the adapter stays float32: autocast would only add casts


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr)
