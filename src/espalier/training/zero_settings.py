"""The JSON file of --deepspeed: what DeepSpeed is told of it, and what of it cannot be honoured.

Its sections also name what flags of ours decide (batch sizes, learning rate, clipping, precision): there a value must
be "auto" or the flag's own. Every other key is passed on, taken because it asks for what is done anyway, or refused.
https://www.deepspeed.ai/docs/config-json/ describes the file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from espalier.config import RunConfig
from espalier.errors import UsageError
from espalier.training.ranks import place

INSTALL = "Install it: DS_BUILD_OPS=0 pip install 'espalier-lm[deepspeed]'."
AUTO = "auto"
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")  # each element by itself, in tensors of the parameter's shape

# Keys of zero_optimization that are passed on. They change how the pieces travel, not what is computed.
PASSED = frozenset(
    {
        "allgather_bucket_size",
        "allgather_partitions",
        "contiguous_gradients",
        "overlap_comm",
        "reduce_bucket_size",
        "reduce_scatter",
    }
)
PASSED_STAGE_3 = frozenset(
    {
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_model_persistence_threshold",
        "stage3_param_persistence_threshold",
        "stage3_prefetch_bucket_size",
        "sub_group_size",
    }
)
ONLY_STAGE_2 = frozenset({"allgather_bucket_size", "allgather_partitions"})
# Keys that ask for what is done anyway, and the values that do.
DONE_ANYWAY: dict[str, tuple[Any, ...]] = {
    "zero_allow_untested_optimizer": (True,),
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": (True, AUTO),
    "zero_optimization.offload_optimizer.device": ("none",),
    "zero_optimization.offload_param.device": ("none",),
    "wall_clock_breakdown": (False,),
    "fp16.enabled": (False, AUTO),
}
SCHEDULES = {"WarmupLR": "constant_with_warmup", "WarmupDecayLR": "linear"}


def engine_settings(config: RunConfig) -> dict[str, Any] | None:
    """What the engine is given; None without --deepspeed.

    Raises UsageError: DeepSpeed is missing, one process, other options in the way, a file that cannot be read, keys
    that are contradicted by flags or change nothing here. All of the file's problems are told together.
    """
    if config.deepspeed is None:
        return None
    _check_options(config)
    given = _read(config.deepspeed)
    problems = [*_stage_problems(given), *_contradictions(given, config), *_without_effect(given)]
    if problems:
        raise UsageError(
            "settings that cannot be honoured",
            where=f"--deepspeed {config.deepspeed}",
            details=problems,
            todo='Change them in the file; "auto" stands for what the flags say.',
        )
    if find_spec("deepspeed") is None:
        raise UsageError("DeepSpeed is not installed", where="--deepspeed", todo=INSTALL)
    zero = given["zero_optimization"]
    return {
        "train_micro_batch_size_per_gpu": 1,  # for its reports only: how a step is cut into micro-steps is the plan's
        "gradient_accumulation_steps": 1,
        "managed_gradient_accumulation": False,  # a step ends where we say so
        "gradient_clipping": config.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "memory_efficient_linear": False,  # it would exchange torch's own linear() for good, and saves nothing here
            **{k: v for k, v in zero.items() if k in PASSED | PASSED_STAGE_3 | {"stage"} and v != AUTO},
        },
    }


def _check_options(config: RunConfig) -> None:
    """Raises UsageError for what does not go with --deepspeed at all."""
    problems = []
    if place().world == 1:
        problems.append("one process: there is nobody to share with (start it with torchrun --nproc_per_node N)")
    if config.fsdp:
        problems.append("--fsdp: both say how the base lies on the processes")
    if config.load_in_4bit or config.load_in_8bit:
        problems.append(
            f"--load_in_{4 if config.load_in_4bit else 8}bit: a quantized base under ZeRO is not supported here"
        )
    if config.fp16:
        problems.append("--fp16: its gradient scaler is not supported with ZeRO here; bfloat16 and float32 are")
    if config.optim not in OPTIMIZERS:
        problems.append(f"--optim {config.optim}: ZeRO steps on flat pieces; {' and '.join(OPTIMIZERS)} are supported")
    if config.streaming and config.self_check == "on":
        problems.append("--streaming: the self-check needs all rows at hand (add --self_check off)")
    if problems:
        raise UsageError(
            "it cannot be used like this",
            where=f"--deepspeed {config.deepspeed}",
            details=problems,
            todo="Leave out --deepspeed, or change these.",
        )


def _read(file: str) -> dict[str, Any]:
    try:
        given = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(
            f"{file} cannot be read: {error}", where="--deepspeed", todo="Name a JSON file of DeepSpeed's settings."
        ) from error
    if not isinstance(given, dict):
        raise UsageError(
            "this is no JSON object", where=f"--deepspeed {file}", todo='Write {"zero_optimization": ...}.'
        )
    return given


def _stage_problems(given: Mapping[str, Any]) -> Iterator[str]:
    zero = given.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if not isinstance(zero, dict):
        yield 'zero_optimization: missing; {"stage": 2} or {"stage": 3} says what is to lie in pieces'
    elif stage not in (2, 3) or isinstance(stage, bool):
        yield f"zero_optimization.stage: {stage!r}; 2 (gradients, optimizer state) and 3 (the base too) are supported"


def _contradictions(given: Mapping[str, Any], config: RunConfig) -> Iterator[str]:
    """Where file and flags decide the same thing, and differently."""
    further = config.training_arguments
    betas = [float(further.get("adam_beta1", 0.9)), float(further.get("adam_beta2", 0.999))]
    decided: dict[str, tuple[Any, str]] = {
        "train_micro_batch_size_per_gpu": (config.per_device_train_batch_size, "--per_device_train_batch_size"),
        "gradient_accumulation_steps": (config.gradient_accumulation_steps, "--gradient_accumulation_steps"),
        "train_batch_size": (
            config.rows_per_step * place().world,
            "batch size x accumulation x processes",
        ),
        "gradient_clipping": (config.max_grad_norm, "--max_grad_norm"),
        "bf16.enabled": (config.bf16, "--bf16"),
        "optimizer.type": ("AdamW", f"--optim {config.optim}"),
        "optimizer.params.lr": (config.learning_rate, "--learning_rate"),
        "optimizer.params.betas": (betas, "--adam_beta1, --adam_beta2"),
        "optimizer.params.eps": (float(further.get("adam_epsilon", 1e-8)), "--adam_epsilon"),
        "optimizer.params.weight_decay": (config.weight_decay, "--weight_decay"),
    }
    flat = dict(_flat(given))
    for key, (ours, flag) in decided.items():
        if key in flat and flat[key] not in (AUTO, ours):
            yield f'{key}: {flat[key]!r}, but {flag} says {ours!r}; write {json.dumps(ours)} or "auto"'
    schedule = flat.get("scheduler.type")
    if schedule is not None and SCHEDULES.get(str(schedule)) != config.lr_scheduler_type:
        yield (
            f"scheduler.type: {schedule!r}, but --lr_scheduler_type says {config.lr_scheduler_type!r}; "
            "leave the section out"
        )


def _without_effect(given: Mapping[str, Any]) -> Iterator[str]:
    """Keys that nothing here would follow."""
    section_zero = given.get("zero_optimization")
    zero: dict[str, Any] = section_zero if isinstance(section_zero, dict) else {}
    stage = zero.get("stage")
    for key, value in _flat(given):
        section, _, name = key.partition(".")
        if key in DONE_ANYWAY:
            if value not in DONE_ANYWAY[key]:
                yield f"{key}: {value!r} is not supported; {_or(DONE_ANYWAY[key])} is taken"
        elif section == "zero_optimization" and name:
            if name in PASSED_STAGE_3 and stage == 2:
                yield f"{key}: changes nothing with stage 2"
            elif name in ONLY_STAGE_2 and stage == 3:
                yield f"{key}: changes nothing with stage 3"
            elif name not in PASSED | PASSED_STAGE_3 | {"stage"} and not name.startswith("offload_"):
                yield f"{key}: unknown, or not supported here"
            elif name.startswith("offload_") and not _is_off(zero, name):
                yield f"{key}: keeping pieces in the machine's memory is not supported here"
        elif section == "scheduler" and name.startswith("params."):
            if value != AUTO:
                yield f'{key}: {value!r}, but --lr_scheduler_type and --warmup_steps decide it; write "auto"'
        elif section == "fp16":
            continue  # it is off, or named above
        elif key not in _DECIDED:
            yield f"{key}: changes nothing here, or is not supported; leave it out"


_DECIDED = frozenset(
    {
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "train_batch_size",
        "gradient_clipping",
        "bf16.enabled",
        "optimizer.type",
        "optimizer.params.lr",
        "optimizer.params.betas",
        "optimizer.params.eps",
        "optimizer.params.weight_decay",
        "scheduler.type",
        "zero_optimization",
    }
)


def _is_off(zero: Mapping[str, Any], name: str) -> bool:
    """True for a key of an offload section whose device is none."""
    section = zero[name.split(".")[0]]
    return isinstance(section, dict) and section.get("device") == "none"


def _flat(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(key with its sections, value) of everything in the file."""
    for key, value in section.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _or(values: tuple[Any, ...]) -> str:
    return " or ".join(json.dumps(value) for value in values)
