"""RunConfig -> transformers' TrainingArguments, and the options of the latter that cannot be honoured here."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from espalier.config import RunConfig
from espalier.errors import UsageError
from espalier.model.quantized import INSTALL
from espalier.runfile import nearest

if TYPE_CHECKING:
    from transformers import TrainingArguments


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why an option has no effect here. `accepts`: values that ask for what is done anyway, and so are taken."""

    reason: str
    accepts: tuple[Any, ...] = ()


_LOGITS = "evaluation keeps sums only (loss, tokens, hits), never logits"
_HUB = "runs do no uploads; use `huggingface-cli upload` on the finished folder"
_DDP = "processes add up their gradients once a step, without DistributedDataParallel"
_AUTOCAST = "the base is loaded in the chosen precision and the adapter stays float32: there is no autocast to switch"

REFUSED: dict[str, Refusal] = {
    "remove_unused_columns": Refusal("the model gets exactly the encoded rows: there is no column to remove", (False,)),
    "label_smoothing_factor": Refusal("the loss is the plain cross-entropy of the answer tokens", (0.0, 0)),
    "label_names": Refusal("labels come from the conversation's answers"),
    "train_sampling_strategy": Refusal(
        "row order is a function of seed and epoch, so that a run can be resumed exactly (see --group_by_prefix)",
        ("random",),
    ),
    "length_column_name": Refusal("lengths are known from the encoded rows"),
    "auto_find_batch_size": Refusal(
        "the rows of a step are fixed by you; --max_tokens_per_pack bounds memory", (False,)
    ),
    "average_tokens_across_devices": Refusal("the loss is always averaged over the tokens of all processes", (True,)),
    "logging_nan_inf_filter": Refusal("a loss that is not a number is never hidden: it stops the run", (False,)),
    "include_num_input_tokens_seen": Refusal(
        "metrics.jsonl holds supervised, unique and logical tokens", ("no", False)
    ),
    "prediction_loss_only": Refusal(_LOGITS, (True,)),
    "eval_do_concat_batches": Refusal(_LOGITS, (False,)),
    "eval_use_gather_object": Refusal(_LOGITS, (False,)),
    "eval_accumulation_steps": Refusal(_LOGITS),
    "include_for_metrics": Refusal(_LOGITS, ([],)),
    "batch_eval_metrics": Refusal(_LOGITS, (False,)),
    "bf16_full_eval": Refusal("evaluation runs in the precision of training", (False,)),
    "fp16_full_eval": Refusal("evaluation runs in the precision of training", (False,)),
    "torch_compile": Refusal("compiling the model is not supported yet", (False,)),
    "torch_compile_backend": Refusal("compiling the model is not supported yet"),
    "torch_compile_mode": Refusal("compiling the model is not supported yet"),
    "use_liger_kernel": Refusal("its kernels replace the model's own forward and loss, which the tree needs", (False,)),
    "liger_kernel_config": Refusal("see --use_liger_kernel"),
    "use_cache": Refusal("training keeps no key-value cache", (False,)),
    "neftune_noise_alpha": Refusal("noise on the embeddings would differ between rows that share a beginning"),
    "activation_checkpointing": Refusal("it is called --gradient_checkpointing here"),
    "activation_checkpointing_kwargs": Refusal(
        "--gradient_checkpointing recomputes all layers, else as many as needed"
    ),
    "gradient_checkpointing_kwargs": Refusal("--gradient_checkpointing recomputes all layers, else as many as needed"),
    "ignore_data_skip": Refusal("a resumed run goes on with the next row, always", (False,)),
    "restore_callback_states_from_checkpoint": Refusal("a resumed run restores all of its state, always", (True,)),
    "save_only_model": Refusal("a checkpoint without optimizer state could not be resumed", (False,)),
    "enable_jit_checkpoint": Refusal("SIGTERM and Ctrl-C always save a checkpoint before the run ends", (False,)),
    "save_on_each_node": Refusal("one process writes", (False,)),
    "dataloader_drop_last": Refusal("no row is dropped without a word", (False,)),
    "dataloader_in_order": Refusal("steps come in the order that seed and epoch give", (True,)),
    "dataloader_persistent_workers": Refusal("workers always live for the whole run", (True,)),
    "dataloader_pin_memory": Refusal("plans are made of numpy arrays and are small: nothing is pinned", (False,)),
    "data_seed": Refusal("one seed orders the rows: --seed"),
    "push_to_hub": Refusal(_HUB, (False,)),
    "hub_token": Refusal(_HUB),
    "hub_private_repo": Refusal(_HUB),
    "hub_model_id": Refusal(_HUB),
    "hub_strategy": Refusal(_HUB),
    "hub_always_push": Refusal(_HUB, (False,)),
    "hub_revision": Refusal(_HUB),
    "optim_target_modules": Refusal("the optimizer trains the adapter; --target_modules says where it sits"),
    "accelerator_config": Refusal("how batches are formed is fixed here: rows a step = batch size x accumulation"),
    "parallelism_config": Refusal("processes share the rows of a step, and with --fsdp the base: nothing else yet"),
    "ddp_find_unused_parameters": Refusal(_DDP),
    "ddp_bucket_cap_mb": Refusal(_DDP),
    "ddp_broadcast_buffers": Refusal(_DDP),
    "ddp_static_graph": Refusal(_DDP),
    "ddp_backend": Refusal("NCCL between GPUs, gloo between CPUs"),
    "ddp_timeout": Refusal("a process that is lost is missed within a minute; one that works may take its time"),
    "do_train": Refusal("`espalier train` trains", (True,)),
    "do_eval": Refusal("held-out rows are evaluated where --eval_strategy says so"),
    "do_predict": Refusal("`espalier chat` answers prompts", (False,)),
    "debug": Refusal("the first number that is not finite stops the run by itself", ("",)),
    "disable_tqdm": Refusal("progress is a live line on a terminal and plain lines elsewhere"),
    "local_rank": Refusal("ranks come from the launcher's environment"),
    "log_level": Refusal("the header, the log lines and metrics.jsonl say what happens"),
    "log_level_replica": Refusal("one process speaks"),
    "log_on_each_node": Refusal("one process speaks"),
}


def refused_options(given: Mapping[str, Any]) -> list[str]:
    """One line an option of `given` that cannot be honoured, with the reason."""
    return [
        f"--{name} {value}: {REFUSED[name].reason}"
        for name, value in given.items()
        if name in REFUSED and value is not None and value not in REFUSED[name].accepts
    ]


def check_optimizer(config: RunConfig) -> None:
    """Raise UsageError for an optimizer that cannot be had: by name, by what is installed, by the device."""
    from transformers.training_args import OptimizerNames

    from espalier.model.hardware import choose_device

    names = [str(name.value) for name in OptimizerNames]
    if config.optim not in names:
        near = difflib.get_close_matches(config.optim, names, n=3)
        raise UsageError(
            f"there is no optimizer {config.optim!r}",
            where="--optim",
            todo=f"Near names: {', '.join(near)}" if near else f"There are: {', '.join(names)}",
        )
    parts = config.optim.split("_")
    if {"torch", "galore", "apollo"} & set(parts) or not {"bnb", "8bit", "paged"} & set(parts):
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError("bitsandbytes is not installed", where=f"--optim {config.optim}", todo=INSTALL)
    if "paged" in parts and not choose_device(config.use_cpu)[0].startswith("cuda"):
        raise UsageError(
            "a paged optimizer moves its state out of a GPU's memory, and there is no GPU",
            where=f"--optim {config.optim}",
            todo=f"Use {'adamw_bnb_8bit' if '8bit' in parts else 'adamw_torch_fused'}.",
        )


def check_continued(config: RunConfig) -> None:
    """Raise UsageError for LoRA options that --continue_training would not heed: the adapter has its own.

    An option at its default is taken as not set. Raises AdapterError where the folder is no adapter.
    """
    from espalier.model.adapter_settings import CONFIG, read_json
    from espalier.model.load_adapter import check_adapter_folder

    if not config.continue_training or config.checkpoint is None:
        return
    folder, default = check_adapter_folder(config.checkpoint), RunConfig()
    settings = read_json(folder / CONFIG)
    problems = [
        f"--{ours} {getattr(config, ours)}: the adapter has {settings.get(theirs)}"
        for ours, theirs in _LORA_SETTINGS.items()
        if getattr(config, ours) not in (getattr(default, ours), settings.get(theirs))
    ]
    if problems:
        raise UsageError(
            "the adapter that the run starts from has its own settings",
            where=f"--checkpoint {config.checkpoint}",
            details=problems,
            todo="Leave these options out, or start a new adapter without --continue_training.",
        )


# Ours -> PEFT's name. The targets are left out: they are written in several ways.
_LORA_SETTINGS = {
    "lora_rank": "r",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
    "use_rslora": "use_rslora",
    "use_dora": "use_dora",
}


def check_trackers(config: RunConfig) -> None:
    """Raise UsageError for a name in --report_to that transformers does not know, or whose package is not installed."""
    names = [name for name in config.report_to if name not in ("none", "all")]
    if not names:
        return
    from transformers.integrations import integration_utils

    known = sorted(integration_utils.INTEGRATION_TO_CALLBACK)
    problems = []
    for name in names:
        asks = (f"is_{spelt}_available" for spelt in (name, name.replace("_", ""), name.removesuffix("_ml")))
        installed = next((ask for it in asks if (ask := getattr(integration_utils, it, None)) is not None), None)
        if name not in known:
            problems.append(f"there is no tracker {name!r}{nearest(name, known)}")
        elif installed is not None and not installed():
            problems.append(f"{name} is not installed: pip install {name.replace('_', '-')}")
    if problems:
        todo = f"There are none, all (that are installed), {', '.join(known)}."
        raise UsageError("what should be reported to cannot be", where="--report_to", details=problems, todo=todo)


def training_arguments(config: RunConfig, *, fp16_scaler: bool = False, on_cpu: bool = False) -> TrainingArguments:
    """What HF's Trainer gets. fp16_scaler: the base is float16, so gradients are scaled. on_cpu: there is no
    accelerator; accelerate looks for other processes only where it knows.

    Raises UsageError for values that TrainingArguments itself refuses.
    """
    from transformers import TrainingArguments

    passed: dict[str, Any] = {name: value for name, value in config.training_arguments.items() if name not in REFUSED}
    epochs = config.num_train_epochs
    if config.max_steps is None and epochs is None:
        epochs = 3.0
    fields = {f.name for f in dataclasses.fields(TrainingArguments)}
    recompute: str = "activation_checkpointing" if "activation_checkpointing" in fields else "gradient_checkpointing"
    try:
        return TrainingArguments(
            output_dir=config.output_dir,
            per_device_train_batch_size=config.per_device_train_batch_size,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            per_device_eval_batch_size=config.per_device_eval_batch_size or config.rows_per_step,
            num_train_epochs=epochs if epochs is not None else 3.0,
            max_steps=config.max_steps if config.max_steps is not None else -1,
            learning_rate=config.learning_rate,
            lr_scheduler_type=config.lr_scheduler_type,
            warmup_steps=config.warmup_steps,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            optim=config.optim,
            seed=config.seed,
            eval_strategy=config.eval_strategy,
            eval_steps=config.eval_steps,
            load_best_model_at_end=config.load_best_model_at_end,
            metric_for_best_model=passed.pop("metric_for_best_model", None)
            or ("loss" if config.load_best_model_at_end or config.early_stopping_patience else None),
            logging_steps=config.logging_steps,
            save_strategy=config.save_strategy,
            save_steps=config.save_steps,
            save_total_limit=config.save_total_limit,
            report_to=config.report_to,
            fp16=fp16_scaler,
            use_cpu=config.use_cpu or on_cpu,
            dataloader_num_workers=config.dataloader_num_workers,
            disable_tqdm=True,
            remove_unused_columns=False,
            logging_nan_inf_filter=False,
            restore_callback_states_from_checkpoint=True,
            **{recompute: config.gradient_checkpointing, **passed},
        )
    except (ValueError, TypeError, ImportError) as error:
        raise UsageError(
            f"transformers refuses these options: {error}", todo="`espalier train --help-all` lists all options."
        ) from error
