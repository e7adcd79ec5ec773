"""What must be the same when a run goes on, and what may differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from espalier.config import RunConfig, options
from espalier.errors import CheckpointError

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
        "num_encode_workers",
        "dataloader_num_workers",
        "gradient_checkpointing",
        "tree",
        "attention",
        "lora_forward",
        "max_tokens_per_pack",
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


def compare_settings(stored: RunConfig, given: RunConfig, *, where: str) -> None:
    """Raise CheckpointError that names every setting which must not differ between stop and resume."""
    names = [f.name for f in options()]
    pairs = [(name, getattr(stored, name), getattr(given, name)) for name in names]
    further = {**stored.training_arguments, **given.training_arguments}
    pairs += [(n, stored.training_arguments.get(n), given.training_arguments.get(n)) for n in further]
    changed = [f"--{name}: {old} -> {new}" for name, old, new in pairs if old != new and name not in MAY_CHANGE]
    if changed:
        raise CheckpointError(
            "the run was started with other settings",
            where=where,
            details=changed,
            todo="Resume with the run's own settings, or start a new run from its adapter with --continue_training.",
        )


def check_record(file: Path, now: dict[str, Any]) -> None:
    """Compare what the run was made of with what it would go on with: base and rows. Raises CheckpointError."""
    try:
        then = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the run's record cannot be read: {error}", where=str(file)) from error
    changed = []
    if then.get("base", {}).get("fingerprint") != now["base"]["fingerprint"]:
        changed.append(f"the base: {then.get('base', {}).get('name')} -> {now['base']['name']}, or its weights differ")
    if then.get("data", {}).get("fingerprint") != now["data"]["fingerprint"]:
        changed.append("the rows as they are encoded: data, tokenizer, template or length policy")
    if changed:
        raise CheckpointError(
            "this is not what the run was started with",
            where=str(file),
            details=changed,
            todo="Bring it back, or start a new run from the run's adapter with --continue_training.",
        )
