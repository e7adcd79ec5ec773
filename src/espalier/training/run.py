"""One training run from options to a finished adapter: straight-line set-up, the run's folder, the run's report."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from espalier import __version__
from espalier.config import MAX_TOKENS_PER_PACK, RunConfig
from espalier.errors import AdapterError, DataError, RunFolderError, TrainingError, UsageError
from espalier.model.hardware import keep_few_kernels
from espalier.runfile import build_config
from espalier.training.prepare import Prepared, fsdp_settings, prepare
from espalier.training.ranks import Ranks, join
from espalier.training.record import record

if TYPE_CHECKING:
    from espalier.training.trainer import LoraTrainer

RUN_FILE = "run.yaml"
RECORD = "espalier.json"
LEFT_OUT = "left_out.jsonl"  # the rows that are not trained, each with file, line, reason and its text
LOCK = ".lock"


@dataclass(frozen=True)
class RunResult:
    """What a finished run left: its folder, the number of steps, the seconds of training, the last metrics."""

    output_dir: Path
    num_steps: int
    seconds: float
    metrics: dict[str, Any]


def train(config: RunConfig | None = None, *, console: Console | None = None, **options: Any) -> RunResult:
    """Train an adapter and save it in `output_dir`.

    Options are those of `espalier train`, as a RunConfig or by name: train(dataset_path=["a.jsonl"], output_dir="r").
    Raises EspalierError for bad input; SystemExit 130 or 143 after Ctrl-C or SIGTERM, when a checkpoint was saved.
    Started by torchrun or accelerate, every process calls this, and rank 0 speaks and writes (docs/distributed.md).
    """
    config = config if config is not None else build_config(options)
    keep_few_kernels()
    ranks = join(use_cpu=config.use_cpu)
    return _train(config, ranks, console)


def _train(config: RunConfig, ranks: Ranks, console: Console | None) -> RunResult:
    from espalier.training.report import Header

    console = (console or Console(highlight=False)) if ranks.leads else Console(quiet=True)
    with ranks.together():
        console.print(f"espalier {__version__}")
        say = Header(console)
        config = restarted_config(config, ranks, say)
        folder = Path(config.output_dir or "")
        ranks.led(partial(check_run_folder, config))
        steps_of = None
        if config.resume_from_checkpoint:
            steps_of = check_resumed(config, folder)
        with quiet_libraries(), held_folder(folder) if ranks.leads else nullcontext():
            with ranks.in_turn():  # what rank 0 has encoded, the others read
                prepared = prepare(config, say, steps_of)
            check_same_rows(prepared, ranks)
            return _run(prepared, folder, console, say, ranks)


def restarted_config(config: RunConfig, ranks: Ranks, say: Any) -> RunConfig:
    """Where the launcher starts the job again after a failure, the run goes on from its last whole checkpoint."""
    if not ranks.restarts or not config.output_dir or not (Path(config.output_dir) / RUN_FILE).is_file():
        return config
    say("restart", f"number {ranks.restarts} by the launcher: the run goes on")
    return dataclasses.replace(config, resume_from_checkpoint="last")


def check_same_rows(prepared: Prepared, ranks: Ranks) -> None:
    """Raises DataError where the ranks, on several machines, have read different rows."""
    digests = ranks.exchange(prepared.rows_digest)
    others = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if others:
        raise DataError(
            f"rank {others[0]} reads other rows than rank 0",
            where=", ".join(prepared.config.dataset_path),
            todo="Give every machine the same files and the same version of this package.",
        )


def check_run_folder(config: RunConfig) -> Path:
    """The run's folder. Raises RunFolderError: not given, a file, not empty for a new run, nothing there to resume."""
    if not config.output_dir:
        raise UsageError("no folder for the run", where="--output_dir", todo="Name a new folder, as runs/first.")
    folder = Path(config.output_dir)
    if folder.exists() and not folder.is_dir():
        raise RunFolderError("this is a file", where=str(folder), todo="Name a folder with --output_dir.")
    held = sorted(p.name for p in folder.iterdir() if p.name != LOCK) if folder.is_dir() else []
    if held and not config.resume_from_checkpoint:
        is_run = RUN_FILE in held or "adapter_config.json" in held
        raise RunFolderError(
            "this folder already holds a run" if is_run else f"this folder is not empty ({held[0]} is in it)",
            where=str(folder),
            todo="Go on with it by --resume_from_checkpoint last, or name another --output_dir."
            if is_run
            else "Name another --output_dir.",
        )
    if config.resume_from_checkpoint and RUN_FILE not in held:
        raise RunFolderError(
            "there is no run to resume here", where=str(folder), todo="Leave --resume_from_checkpoint out to start one."
        )
    return folder


def check_resumed(config: RunConfig, folder: Path) -> int:
    """Compare the settings that must not change between stop and resume. Returns the rows a step of --max_steps."""
    from espalier.training.resume import compare_settings, rows_counted_in

    stored = build_config({}, str(folder / RUN_FILE))
    compare_settings(stored, config, folder, where=str(folder / RUN_FILE))
    return rows_counted_in(stored, folder)


@contextmanager
def held_folder(folder: Path) -> Iterator[None]:
    """Keep the run's folder for this process. Raises RunFolderError where another run has it, or it is not writable."""
    from filelock import FileLock, Timeout

    from espalier.training.checkpoint import check_writable

    is_new = not folder.exists()
    check_writable(folder)
    lock = FileLock(folder / LOCK, timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise RunFolderError(
            "another run is writing to this folder",
            where=str(folder),
            todo="Wait for it, or name another --output_dir.",
        ) from None
    try:
        yield
    finally:
        lock.release()
        with suppress(OSError):  # the folder may be gone or read-only by now
            (folder / LOCK).unlink(missing_ok=True)
            if is_new and not any(folder.iterdir()):  # the run ended before it had anything to write
                folder.rmdir()


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Our own header says what is done: libraries report errors only, and their old settings come back."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # what libraries will rename is no news for our user
            yield
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()


def _run(prepared: Prepared, folder: Path, console: Console, say: Any, ranks: Ranks) -> RunResult:
    from espalier.training.faults import Interrupted, stop_on_signals
    from espalier.training.largest_step import LargestStep
    from espalier.training.memory_guard import MemoryWatch
    from espalier.training.rehearsal import Rehearsal
    from espalier.training.report import METRICS, LeftOutLog, RunReporter
    from espalier.training.resume import complete_evaluation, has_ended, load_ending, resume_point, stored_state
    from espalier.training.samples import SAMPLES, Samples

    config = prepared.config
    trainer = build_trainer(prepared, say, ranks)
    trainer.keeper.run = ranks.share(trainer.keeper.run)
    ranks.hint = lambda: (
        f"Last checkpoint: {trainer.keeper.newest() or 'none'}. Go on with the same command and "
        "--resume_from_checkpoint last."
    )
    trainer.notice = lambda text: console.print(text, soft_wrap=True, markup=False, highlight=False)
    made_of = record(prepared, trainer)
    checkpoint = None
    if config.resume_from_checkpoint:
        checkpoint = resume_point(trainer, config.resume_from_checkpoint, folder, made_of, say)
    ranks.led(partial(write_companions, prepared, trainer, folder, made_of))
    say("output", str(folder) + (f"; the rows left out are listed in {LEFT_OUT}" if prepared.left_out else ""))
    resumed_at = stored_state(checkpoint).global_step if checkpoint else 0 if config.resume_from_checkpoint else None
    reporter = RunReporter(folder, console, resumed_at=resumed_at if ranks.leads else None)
    trainer.add_callback(reporter)
    if config.streaming and ranks.leads:
        trainer.left_out = LeftOutLog(folder / LEFT_OUT, trainer.notice, resumed_at=resumed_at).add
    samples = None
    if prepared.probes and trainer.sharded:
        say("samples", "none: no process holds the whole model")
    elif prepared.probes:
        samples = Samples(trainer, prepared.probes, prepared.stop_ids, folder, trainer.notice, resumed_at=resumed_at)
        trainer.add_callback(samples)
    trainer.add_callback(Rehearsal(trainer, samples))
    trainer.add_callback(MemoryWatch(trainer.guard))
    trainer.add_callback(LargestStep(trainer))
    started = time.perf_counter()
    try:
        with stop_on_signals(trainer):
            if checkpoint is not None:
                complete_evaluation(trainer, checkpoint)
            patience = config.early_stopping_patience
            num_steps = prepared.max_steps - trainer.step_offset
            if checkpoint is not None and has_ended(stored_state(checkpoint), num_steps, patience):
                load_ending(trainer, checkpoint, folder)
            else:
                trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except Interrupted as stop:
        reporter.close()
        _say_stopped(trainer, folder, console)
        raise SystemExit(128 + stop.signum) from None
    except BaseException as error:
        reporter.close()
        if (
            isinstance(error, DataError) and config.streaming and trainer.state.global_step
        ):  # a row of a stream: what is trained is kept
            _say_stopped(trainer, folder, console)
        if ranks.leads and not config.resume_from_checkpoint and trainer.state.global_step == 0:
            for name in (*trainer.keeper.companions, LEFT_OUT, METRICS, SAMPLES):
                (folder / name).unlink(missing_ok=True)
        raise
    return _finish(prepared, trainer, folder, console, time.perf_counter() - started)


def build_trainer(prepared: Prepared, say: Any, ranks: Ranks | None = None) -> LoraTrainer:
    """Load the weights, add the adapter, and set up the trainer: the device, precision and tree are said here."""
    import torch
    from transformers import EarlyStoppingCallback, PrinterCallback, set_seed

    from espalier.model.fingerprint import base_fingerprint
    from espalier.model.load import choose_device, choose_dtype, load_model
    from espalier.model.quantized import describe
    from espalier.model.shard import shard_base
    from espalier.training.arguments import training_arguments
    from espalier.training.describe import describe_norms, describe_tree
    from espalier.training.memory_plan import guard_memory, plan_memory
    from espalier.training.step import StepOptions
    from espalier.training.trainer import LoraTrainer
    from espalier.training.zero import tell_device

    config = prepared.config
    device, device_reason = choose_device(config.use_cpu)
    requested = next((name for name in ("bf16", "fp16", "fp32") if getattr(config, name)), None)
    dtype, dtype_reason = choose_dtype(device, requested)
    if prepared.zero is not None:
        tell_device(device)
    say("device", f"{device}: {device_reason}" + (f", {torch.get_num_threads()} threads" if device == "cpu" else ""))
    form = f"base {describe(prepared.quantization)}; computed in" if prepared.quantization else "base"
    say("precision", f"{form} {str(dtype).removeprefix('torch.')}: {dtype_reason}; adapter float32")
    if config.modules_to_save and dtype != torch.float32:
        raise UsageError(
            "modules that are trained in full need a float32 base",
            where="--modules_to_save",
            todo="Add --fp32, or leave it out.",
        )
    memory = plan_memory(
        config,
        prepared.model_config,
        prepared.train_rows,
        device=device,
        dtype=dtype,
        num_steps=prepared.max_steps,
        bits={"nf4": 4, "int8": 8}.get(prepared.quantization or "", 16),
    )
    in_pieces = config.fsdp or (prepared.zero is not None and prepared.zero["zero_optimization"]["stage"] == 3)
    set_seed(config.seed)
    base = load_model(
        prepared.model,
        device="cpu" if in_pieces else device,  # in pieces to its device: the whole may not fit there
        dtype=dtype,
        trust_remote_code=config.trust_remote_code,
        quantization=prepared.quantization,
    )
    fingerprint = base_fingerprint(base)  # before PiSSA or OLoRA takes a part out of it
    model = _with_adapter(base, prepared, say)
    if config.fsdp:
        say("sharded", shard_base(model, device, fsdp_settings(config)))
    args = training_arguments(config, fp16_scaler=dtype == torch.float16, on_cpu=device == "cpu")
    args.max_steps, args.warmup_steps = prepared.max_steps, prepared.warmup_steps
    trainer = LoraTrainer(
        model=model,
        args=args,
        train_dataset=prepared.train_rows,
        eval_dataset=prepared.eval_rows,
        processing_class=prepared.tokenizer,
        options=StepOptions(
            tree=config.tree == "on",
            attention=config.attention,
            max_tokens_per_pack=min(memory.plan.tokens, config.max_tokens_per_pack or MAX_TOKENS_PER_PACK),
            min_shared_tokens=config.min_shared_tokens,
            group_by_prefix=config.group_by_prefix,
            self_check=config.self_check == "on",
            lora_forward=config.lora_forward,
            loraplus_lr_ratio=config.loraplus_lr_ratio,
            norm_forward=config.norm_forward,
            on_nonfinite=config.on_nonfinite,
            max_nonfinite_steps=config.max_nonfinite_steps,
            zero=prepared.zero,
        ),
        callbacks=[EarlyStoppingCallback(config.early_stopping_patience)] if config.early_stopping_patience else None,
        ranks=ranks,
    )
    trainer.base_fingerprint = fingerprint
    trainer.remove_callback(PrinterCallback)
    if trainer.zero is not None:
        say("sharded", trainer.zero.described)
    say("lora", f"{trainer.lora_counts}{describe_norms(trainer)}")
    say("tree", describe_tree(trainer))
    guard_memory(trainer, memory, config, say)
    return trainer


def _with_adapter(base: Any, prepared: Prepared, say: Any) -> Any:
    from espalier.model.load_adapter import load_adapter
    from espalier.model.lora import add_adapter, describe_adapter, run_lora_config

    config = prepared.config
    if config.continue_training:
        assert config.checkpoint is not None
        model = load_adapter(base, config.checkpoint, is_trainable=True)
        say("adapter", f"goes on from {config.checkpoint}")
    else:
        settings = run_lora_config(config)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*tie_word_embeddings.*")  # said below in our words
            model = add_adapter(base, settings)
    for peft_config in model.peft_config.values():
        # A name that others understand, never a path of this machine (case D05).
        peft_config.base_model_name_or_path = prepared.model.name
    say("adapter", str(describe_adapter(model)))
    tied = sorted({"lm_head", "embed_tokens", "wte", "embed_out"} & set(config.modules_to_save))
    if tied and getattr(base.config, "tie_word_embeddings", False):
        other = "the embeddings" if "lm_head" in tied else "the head"
        say(
            "",
            f"warning: {tied[0]} and {other} are one tensor in this base: the trained copy is saved apart, and a "
            "merged model has to be untied",
        )
    return model


def write_companions(prepared: Prepared, trainer: LoraTrainer, folder: Path, made_of: dict[str, Any]) -> None:
    """Everything of the final folder but the weights, before step 1: what cannot be saved is found out now.

    Each file is there whole or not at all. Raises RunFolderError where the disk does not take them.
    """
    from espalier.training.checkpoint_files import replace_text

    trainer.keeper.sweep()
    made_of["run"] = trainer.keeper.run
    try:
        replace_text(folder / RUN_FILE, prepared.config.to_yaml())
        replace_text(folder / RECORD, json.dumps(made_of, ensure_ascii=False, indent=1) + "\n")
        if prepared.left_out:
            rows = (json.dumps(dataclasses.asdict(row), ensure_ascii=False) + "\n" for row in prepared.left_out)
            # A text may hold half a character, which UTF-8 cannot write.
            replace_text(folder / LEFT_OUT, "".join(rows).encode("utf-8", "backslashreplace").decode("utf-8"))
        with tempfile.TemporaryDirectory(prefix=".companions-", suffix=".partial", dir=folder) as beside:
            prepared.tokenizer.save_pretrained(beside)
            prepared.generation.save_pretrained(beside)
            names = sorted(os.listdir(beside))
            for name in names:
                os.replace(Path(beside) / name, folder / name)
    except OSError as error:
        raise RunFolderError(
            f"the run's files cannot be written: {error.strerror or error}",
            where=str(folder),
            todo="Make room, or name another --output_dir.",
        ) from error
    trainer.keeper.companions = (RUN_FILE, RECORD, *names)


def _say_stopped(trainer: LoraTrainer, folder: Path, console: Console) -> None:
    try:
        saved = trainer.save_interrupted()
    except RunFolderError as error:
        console.print(f"stopped after step {trainer.state.global_step}; warning: {error}", soft_wrap=True, markup=False)
        return
    if saved is None:
        for name in (*trainer.keeper.companions, LEFT_OUT) if trainer.ranks.leads else ():
            (folder / name).unlink(missing_ok=True)
        console.print("stopped before the first step was finished: nothing to save", soft_wrap=True)
        return
    console.print(f"stopped after step {trainer.state.global_step}; checkpoint: {saved}", soft_wrap=True)
    console.print(
        f"go on with: espalier train --config {folder / RUN_FILE} --resume_from_checkpoint last", soft_wrap=True
    )


def _finish(prepared: Prepared, trainer: LoraTrainer, folder: Path, console: Console, seconds: float) -> RunResult:
    steps = trainer.state.global_step
    if steps == 0:
        raise TrainingError("no step was done", todo="Check --max_steps and the number of rows.")
    try:
        trainer.save_model(str(folder))
    except RunFolderError as error:
        raise TrainingError(
            f"all {steps} steps are done, but {error.what}",
            where=error.where,
            todo=f"{error.todo} Make room, then: "
            f"espalier train --config {folder / RUN_FILE} --resume_from_checkpoint last",
        ) from error
    if trainer.sharded:
        _check_saved(prepared, trainer, folder)
    else:
        trainer.ranks.led(partial(_check_saved, prepared, trainer, folder))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    metrics = {"loss": losses[-1] if losses else None}
    metrics |= next((e for e in reversed(trainer.state.log_history) if "eval_loss" in e), {})
    if trainer.ranks.leads or trainer.sharded:  # a sharded base computes with all ranks
        _say_finished(prepared, trainer, folder, console, seconds)
    return RunResult(folder, steps, seconds, metrics)


def _check_saved(prepared: Prepared, trainer: LoraTrainer, folder: Path) -> None:
    from espalier.training.readback import check_forward, effect_of

    check_forward(trainer.model, folder, prepared.sample_ids, trainer.written_adapter())
    if effect_of(folder) == 0.0:
        raise AdapterError("every lora_B is zero after training: the adapter has no effect", where=str(folder))


def _say_finished(prepared: Prepared, trainer: LoraTrainer, folder: Path, console: Console, seconds: float) -> None:
    from espalier.training.model_card import write_model_card
    from espalier.use.verify import checked_lines

    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    if best is not None:
        console.print(
            f"the adapter is that of step {trainer.state.best_global_step}, the best evaluation", soft_wrap=True
        )
    elif trainer.args.load_best_model_at_end and trainer.state.best_global_step:
        console.print(
            f"warning: the best evaluation was at step {trainer.state.best_global_step}, but its checkpoint "
            "could not be saved: the adapter is that of the last step",
            soft_wrap=True,
        )
    if trainer.nonfinite.total:
        console.print(f"{trainer.nonfinite.total} steps were skipped: their loss or gradient was not finite")
    console.print(trainer.guard.account(), soft_wrap=True, highlight=False)
    size = (folder / "adapter_model.safetensors").stat().st_size
    console.print(
        f"{trainer.state.global_step} steps in {seconds:.1f} s; adapter of {size / 1e6:.1f} MB in {folder}, "
        "read back and equal",
        soft_wrap=True,
    )
    for line in checked_lines(trainer.model, folder, str(prepared.model.path), prepared.config.trust_remote_code):
        console.print(line, soft_wrap=True, markup=False)
    for line in write_model_card(prepared, trainer, folder) if trainer.ranks.leads else ():
        console.print(line, soft_wrap=True, markup=False)
    console.print(f"try it: espalier chat --adapter {folder}", soft_wrap=True)
