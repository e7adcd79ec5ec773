"""What must be the same when a run goes on, and what may differ; a run that was stopped at its very end.

docs/resume.md says the same to the user, and a test holds both together.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier.config import RunConfig, options
from espalier.errors import CheckpointError
from espalier.training.checkpoint_files import PROGRESS, read_json
from espalier.training.progress import go_on_by_rows
from espalier.training.ranks import place

if TYPE_CHECKING:
    from transformers import TrainerState

    from espalier.training.trainer import LoraTrainer

Say = Callable[[str, str], None]

# May differ: how long, how often things are written, and how the same step is computed.
MAY_CHANGE = frozenset(
    {
        "resume_from_checkpoint",
        "output_dir",
        "num_train_epochs",
        "max_steps",
        "logging_steps",
        "save_strategy",
        "save_steps",
        "save_total_limit",
        "report_to",
        "eval_strategy",
        "eval_steps",
        "per_device_eval_batch_size",
        "load_best_model_at_end",
        "early_stopping_patience",
        "eval_samples",
        "probe_prompts",
        "num_encode_workers",
        "dataloader_num_workers",
        "gradient_checkpointing",
        "fsdp",
        "fsdp_config",
        "deepspeed",
        "tree",
        "attention",
        "lora_forward",
        "norm_forward",
        "on_nonfinite",
        "max_nonfinite_steps",
        "max_tokens_per_pack",
        "memory_limit",
        "min_shared_tokens",
        "self_check",
        "on_bad_row",
        "model_path",  # the base's fingerprint is compared instead: a folder may have moved
        "dataset_path",  # so are the rows' contents
        "trust_remote_code",
        "skip_overlength",
        "logging_first_step",
        "run_name",
        "dataloader_prefetch_factor",
    }
)


# Their product, the rows of a step, must not differ; how it is made up may.
ROWS_A_STEP = ("per_device_train_batch_size", "gradient_accumulation_steps")


def compare_settings(stored: RunConfig, given: RunConfig, folder: Path, *, where: str) -> None:
    """Raise CheckpointError that names every setting which must not differ between stop and resume.

    folder: the run's, for how far it has come.
    """
    names = [f.name for f in options()]
    pairs = [(name, getattr(stored, name), getattr(given, name)) for name in names]
    further = {**stored.training_arguments, **given.training_arguments}
    pairs += [(n, stored.training_arguments.get(n), given.training_arguments.get(n)) for n in further]
    before, now = stored.rows_per_step * _recorded(folder, "processes", 1), given.rows_per_step * place().world
    free = MAY_CHANGE | (frozenset(ROWS_A_STEP) if before == now else frozenset())
    changed = [f"--{name}: {old} -> {new}" for name, old, new in pairs if old != new and name not in free]
    in_the_way = _bound_to_rows(stored, given, before, now)
    if before != now and in_the_way:
        changed.append(f"{_other_rows(before, now, folder)}: {in_the_way}")
    if changed:
        raise CheckpointError(
            "the run was started with other settings",
            where=where,
            details=changed,
            todo="Resume with the run's own settings, or start a new run from its adapter with --continue_training.",
        )


def rows_counted_in(stored: RunConfig, folder: Path) -> int:
    """How many rows a step of --max_steps and --warmup_steps has: as when the run was started."""
    return _recorded(folder, "steps_of", stored.rows_per_step * _recorded(folder, "processes", 1))


def _recorded(folder: Path, name: str, default: int) -> int:
    try:
        return int(json.loads((folder / "espalier.json").read_text(encoding="utf-8"))[name])
    except (OSError, ValueError, KeyError, TypeError):
        return default


def _bound_to_rows(stored: RunConfig, given: RunConfig, before: int, now: int) -> str | None:
    """Why a run cannot go on with other rows a step; None where only the number of processes has changed."""
    if any(getattr(stored, name) != getattr(given, name) for name in ROWS_A_STEP):
        return "only another number of processes may change them"
    if given.group_by_prefix:
        return "--group_by_prefix cuts an epoch into other steps"
    windows = [-(-given.streaming_window // rows) * rows for rows in (before, now)]
    if given.streaming and windows[0] != windows[1]:
        return f"--streaming_window would hold {windows[1]} rows instead of {windows[0]}, in another order"
    if any(name.endswith("_steps") for name in given.training_arguments.get("lr_scheduler_kwargs") or {}):
        return "--lr_scheduler_kwargs counts steps"
    return None


def _other_rows(before: int, now: int, folder: Path) -> str:
    """What another number of rows a step would mean for this run, in rows (case C05)."""
    said = f"rows a step: {before} -> {now}"
    try:
        newest = max(folder.glob("checkpoint-*/progress.json"), key=lambda p: int(p.parent.name.split("-")[1]))
        position = json.loads(newest.read_text(encoding="utf-8"))["position"]
        record = json.loads((folder / "espalier.json").read_text(encoding="utf-8"))
        done, rows = int(position["rows"]), int(record["data"]["trained"])
    except (OSError, ValueError, KeyError, TypeError):
        return said
    left = rows - done
    return (
        f"{said}: {done} of {rows} rows of epoch {position['epoch'] + 1} are done, the {left} left would be "
        f"{math.ceil(left / now)} steps instead of {math.ceil(left / before)}, under another schedule"
    )


def check_record(then: dict[str, Any], now: dict[str, Any], *, where: str) -> None:
    """Compare what the run was made of with what it would go on with. Raises CheckpointError that names all of it."""
    changed = []
    base = then.get("base", {})
    if base.get("fingerprint") != now["base"]["fingerprint"]:
        changed.append(f"the base: {base.get('name')} -> {now['base']['name']}, or its weights differ")
    prints = then.get("fingerprints", {})
    changed += [f"the {name}" for name, value in now["fingerprints"].items() if prints.get(name) != value]
    if then.get("data", {}).get("fingerprint") != now["data"]["fingerprint"]:
        changed.append("the rows as they are encoded: data, tokenizer, template or length policy")
    if changed:
        raise CheckpointError(
            "this is not what the run was started with",
            where=where,
            details=changed,
            todo="Bring it back, or start a new run from the run's adapter with --continue_training.",
        )


def resume_point(trainer: LoraTrainer, wanted: str, folder: Path, now: dict[str, Any], say: Say) -> Path | None:
    """The checkpoint to go on from, after all comparisons; None where the run was killed before it saved one.

    now: the record of what would be trained. Raises CheckpointError: other base or data, nothing whole, nothing left.
    """
    keeper, file = trainer.keeper, folder / "espalier.json"
    try:
        then = json.loads(file.read_text(encoding="utf-8"))
        keeper.run = then["run"]
    except FileNotFoundError:
        then = None  # killed while the folder was made
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"the run's record cannot be read: {error}", where=str(file)) from error
    checkpoint = keeper.find(wanted, lambda text: say("", text))
    if then is not None:
        check_record(then, now, where=str(file))
    if checkpoint is None:
        if (folder / "adapter_model.safetensors").is_file():
            raise CheckpointError(
                "the run is finished and has no checkpoint to go on from",
                where=str(folder),
                todo="Start a new run from its adapter with --continue_training.",
            )
        say("resume", "the run was stopped before its first checkpoint: it begins again at step 1")
        return None
    state = stored_state(checkpoint)
    say("resume", f"from {checkpoint.name}, step {state.global_step}")
    told = go_on_by_rows(trainer, read_json(checkpoint / PROGRESS), state.global_step)
    total = trainer.args.max_steps - trainer.step_offset
    if told is not None:
        say("", told)
    elif state.max_steps != total:
        say("", f"{total} steps in all, {state.max_steps} before: the learning rate follows the new plan")
    return checkpoint


def stored_state(checkpoint: Path) -> TrainerState:
    """HF's TrainerState as the checkpoint holds it."""
    from transformers import TrainerState

    state: TrainerState = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    return state


def complete_evaluation(trainer: LoraTrainer, checkpoint: Path) -> None:
    """Make up for the evaluation that a signal cut off, and put its result into the checkpoint."""
    state = stored_state(checkpoint)
    if not _stored(state, "TrainerControl").get("should_evaluate"):
        return
    trainer.load_adapter(checkpoint)
    trainer.state = state
    trainer.keeper.last_whole = checkpoint
    trainer._load_callback_state()
    metrics = trainer.evaluate()
    trainer._determine_best_metric(metrics, None)
    trainer.name_best(saved=False)
    trainer.ranks.led(lambda: trainer.keeper.rewrite_state(trainer, checkpoint))


def has_ended(state: TrainerState, max_steps: int, patience: int | None) -> bool:
    """True where no step is left: all are done, or early stopping with the same patience ended the run."""
    if state.global_step >= max_steps:
        return True
    stopped = _stored(state, "TrainerControl").get("should_training_stop", False)
    same_patience = _stored(state, "EarlyStoppingCallback").get("early_stopping_patience") == patience
    return bool(stopped) and state.global_step < state.max_steps and same_patience


def load_ending(trainer: LoraTrainer, checkpoint: Path, folder: Path) -> None:
    """Bring a run that was killed between its last checkpoint and its adapter to its end: state and final weights.

    Raises CheckpointError where the adapter is there already: nothing is left to do (case C24).
    """
    from espalier.training.checkpoint_files import sha256

    trainer.state = stored_state(checkpoint)
    trainer.name_best(saved=False)
    best = trainer.state.best_model_checkpoint if trainer.args.load_best_model_at_end else None
    final = Path(best) if best else checkpoint
    name = "adapter_model.safetensors"
    if (folder / name).is_file() and sha256(folder / name) == sha256(final / name):
        raise CheckpointError(
            f"nothing is left to do: all {trainer.state.global_step} steps are done and the adapter is saved",
            where=str(folder),
            todo="Give more --num_train_epochs or --max_steps, or start a new run from its adapter with "
            "--continue_training.",
        )
    trainer.load_adapter(final)


def _stored(state: TrainerState, callback: str) -> dict[str, Any]:
    """The arguments of a callback as the checkpoint holds them; empty where it has none."""
    callbacks: Any = state.stateful_callbacks or {}
    stored = callbacks.get(callback, {})
    return dict(stored.get("args", {})) if isinstance(stored, dict) else {}
