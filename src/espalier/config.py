"""Every option of a training run, once: its name, type, default and help text.

The command line, the run file (`--config run.yaml`, read by runfile.py), the help, the docs and the run file that is
saved beside the adapter all come from `RunConfig`. Options of transformers' TrainingArguments that are not listed here
are accepted too, with their own defaults; training/arguments.py says which cannot be honoured, and why.
No torch is imported here: `espalier train --help` must answer at once.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

DEFAULT_MODEL = "smollm2-135m"
MAX_TOKENS_PER_PACK = 4096
MIN_SHARED_TOKENS = 16  # below it a branch of its own costs what it saves (LOG.md, 2026-11-25)

GROUPS = ("Data", "Model", "LoRA", "Training", "Prompt tree", "Evaluation", "Saving and logging", "Hardware")


def option(default: Any, help: str, group: str, *, common: bool = False, hf: bool = False, many: bool = False) -> Any:
    """A field of RunConfig. common: shown by `--help`; hf: one of TrainingArguments; many: takes several values."""
    assert group in GROUPS, group
    metadata = {"help": help, "group": group, "common": common, "hf": hf, "many": many}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: type(default)(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class RunConfig:
    """The resolved options of one run. None means not set."""

    # Data
    dataset_path: list[str] = option(
        [], "training rows: files, globs, '-' or hub:owner/name[:split]", "Data", common=True, many=True
    )
    format: Literal["alpaca", "messages", "sharegpt", "prompt_completion", "text"] | None = option(
        None, "format of the rows; not set: recognised from the columns", "Data", common=True
    )
    columns: dict[str, str] = option({}, "names of the columns, as prompt=q,completion=a", "Data")
    encoding: str | None = option(None, "text encoding of the files; not set: UTF-8, others are named", "Data")
    input_sentence: str = option(
        "none",
        "text between instruction and input: none (a line break), en or zh (the published Atom sentences), or a text",
        "Data",
    )
    on_bad_row: Literal["error", "skip"] = option(
        "error", "a row that cannot be used: stop before the model loads, or skip it and list it", "Data", common=True
    )
    max_seq_length: int | None = option(
        None, "longest row in tokens; not set: the model's own limit", "Data", common=True
    )
    overlength: Literal["drop", "truncate_prompt", "split", "error"] = option(
        "drop", "what happens to a row longer than that", "Data", common=True
    )
    skip_overlength: bool = option(False, "the same as --overlength drop", "Data")
    train_on: Literal["all", "last"] = option("all", "which assistant turns are learnt", "Data", common=True)
    eval_dataset_path: list[str] = option([], "held-out rows", "Data", common=True, many=True)
    eval_fraction: float = option(
        0.0, "share of the prompts of --dataset_path to hold out, chosen by content", "Data", common=True
    )
    streaming: bool = option(
        False, "read the rows once, while the run goes on, and keep none; needs --max_steps", "Data", common=True
    )
    streaming_window: int = option(4096, "with --streaming: rows looked ahead, within which they are shuffled", "Data")
    num_encode_workers: int | None = option(None, "processes that encode rows; not set: all cores", "Data")

    # Model
    model_path: str = option(
        DEFAULT_MODEL, "base model: smollm2-135m, a folder, a .gguf file or a hub name", "Model", common=True
    )
    template: str | None = option(
        None, "chat template: atom, chatml, plain or a jinja file; not set: the model's own", "Model", common=True
    )
    load_in_4bit: bool = option(
        False, "hold the base in 4 bits (NF4) while it is trained on; needs bitsandbytes", "Model", common=True
    )
    load_in_8bit: bool = option(
        False, "hold the base in 8 bits (int8) while it is trained on; needs bitsandbytes", "Model", common=True
    )
    trust_remote_code: bool = option(False, "run code that comes with the model", "Model")

    # LoRA
    lora_rank: int = option(8, "rank r of the adapter", "LoRA", common=True)
    lora_alpha: float = option(32.0, "scale: the adapter's output is multiplied by alpha / r", "LoRA", common=True)
    lora_dropout: float = option(0.0, "dropout on the adapter's input", "LoRA", common=True)
    target_modules: list[str] = option(
        ["all-linear"], "names of the linear layers that get an adapter", "LoRA", common=True, many=True
    )
    layers_to_transform: list[int] = option([], "numbers of the layers that get one; not set: all", "LoRA", many=True)
    use_rslora: bool = option(False, "scale by alpha / sqrt(r)", "LoRA")
    use_dora: bool = option(False, "learn magnitude and direction apart", "LoRA")
    init_lora_weights: str = option("true", "how A and B start: true, gaussian, pissa, olora, orthogonal", "LoRA")
    lora_forward: Literal["fast", "peft"] = option(
        "fast", "arithmetic of the LoRA layers: one function of ours where it applies, or PEFT's own forward", "LoRA"
    )
    norm_forward: Literal["fast", "stock"] = option(
        "fast", "arithmetic of RMSNorm on a CPU: torch's fused kernels where they apply, or the model's own", "LoRA"
    )
    modules_to_save: list[str] = option([], "further modules trained in full and saved", "LoRA", many=True)
    continue_training: bool = option(False, "start from the adapter in --checkpoint, as a new run", "LoRA", common=True)
    checkpoint: str | None = option(None, "adapter folder for --continue_training", "LoRA", common=True)

    # Training
    num_train_epochs: float | None = option(
        None, "passes over the rows; not set: 3, or as many as --max_steps takes", "Training", common=True, hf=True
    )
    max_steps: int | None = option(
        None, "optimizer steps; with --num_train_epochs too, the smaller wins", "Training", common=True, hf=True
    )
    per_device_train_batch_size: int = option(16, "rows a micro-step", "Training", common=True, hf=True)
    gradient_accumulation_steps: int = option(
        1, "micro-steps a step: rows a step = batch size x this", "Training", common=True, hf=True
    )
    learning_rate: float = option(1e-4, "peak learning rate", "Training", common=True, hf=True)
    lr_scheduler_type: str = option(
        "linear", "linear, cosine, constant, constant_with_warmup, ...", "Training", common=True, hf=True
    )
    warmup_steps: float = option(
        0.0, "steps of warm-up; below 1, a share of all steps", "Training", common=True, hf=True
    )
    weight_decay: float = option(0.0, "weight decay of the adapter", "Training", hf=True)
    max_grad_norm: float = option(1.0, "gradients are clipped to this norm; 0 switches it off", "Training", hf=True)
    optim: str = option(
        "adamw_torch_fused", "optimizer; adamw_bnb_8bit and its like need bitsandbytes", "Training", hf=True
    )
    loraplus_lr_ratio: float | None = option(
        None, "LoRA+: learning rate of B over that of A; not set: the same for both", "Training"
    )
    on_nonfinite: Literal["stop", "skip"] = option(
        "stop", "a step whose loss or gradient is not finite: stop the run, or skip the step and count it", "Training"
    )
    max_nonfinite_steps: int = option(5, "most steps in a row that --on_nonfinite skip passes over", "Training")
    seed: int = option(42, "seed of row order, adapter start and dropout", "Training", common=True, hf=True)
    gradient_checkpointing: bool = option(
        False,
        "compute all activations again in backward: less memory, more time; not set: of as many layers as memory needs",
        "Training",
        common=True,
        hf=True,
    )
    resume_from_checkpoint: str | None = option(
        None,
        "go on with the run in --output_dir exactly: 'last' or a checkpoint folder",
        "Training",
        common=True,
        hf=True,
    )

    # Prompt tree
    tree: Literal["on", "off"] = option(
        "on", "compute shared beginnings once; off: padded rows through the stock forward", "Prompt tree", common=True
    )
    attention: Literal["auto", "reference", "merged"] = option(
        "auto", "attention over the tree", "Prompt tree", common=True
    )
    max_tokens_per_pack: int | None = option(
        None,
        "most unique tokens in one forward pass (at least the longest row); not set: "
        f"{MAX_TOKENS_PER_PACK:,}, or fewer where memory is short",
        "Prompt tree",
        common=True,
    )
    min_shared_tokens: int = option(MIN_SHARED_TOKENS, "shortest beginning that is worth sharing", "Prompt tree")
    group_by_prefix: bool = option(
        False, "draw rows with the same beginning into the same step (changes the sampling)", "Prompt tree"
    )
    self_check: Literal["on", "off"] = option(
        "on", "before step 1, compute a few rows both ways and stop where they disagree", "Prompt tree"
    )

    # Evaluation
    eval_strategy: Literal["no", "steps", "epoch"] = option(
        "no", "when the held-out rows are evaluated during training", "Evaluation", common=True, hf=True
    )
    eval_steps: float | None = option(None, "steps between two evaluations", "Evaluation", common=True, hf=True)
    per_device_eval_batch_size: int | None = option(
        None, "rows at a time in evaluation; not set: as in training", "Evaluation", hf=True
    )
    eval_samples: int = option(
        3,
        "held-out prompts whose answers are shown at every evaluation, and kept in samples.jsonl; 0: none",
        "Evaluation",
    )
    probe_prompts: str | None = option(None, "file of prompts to answer instead, one a line or rows", "Evaluation")
    load_best_model_at_end: bool = option(False, "end with the adapter of the best evaluation", "Evaluation", hf=True)
    early_stopping_patience: int | None = option(
        None, "stop after this many evaluations without a better one", "Evaluation"
    )

    # Saving and logging
    output_dir: str | None = option(
        None, "folder of the run and its adapter", "Saving and logging", common=True, hf=True
    )
    logging_steps: float = option(10.0, "steps between two log lines", "Saving and logging", common=True, hf=True)
    save_strategy: Literal["no", "steps", "epoch", "best"] = option(
        "steps", "when checkpoints are saved", "Saving and logging", hf=True
    )
    save_steps: float = option(500.0, "steps between two checkpoints", "Saving and logging", common=True, hf=True)
    save_total_limit: int | None = option(
        None, "checkpoints kept besides the best one; not set: all", "Saving and logging", common=True, hf=True
    )
    report_to: list[str] = option(
        ["none"], "trackers: tensorboard, wandb, trackio, ...", "Saving and logging", common=True, hf=True, many=True
    )

    # Hardware
    bf16: bool = option(False, "bfloat16 base; not set: chosen for the hardware", "Hardware", hf=True)
    fp16: bool = option(
        False, "float16 base where the hardware has it, else the best there is", "Hardware", common=True, hf=True
    )
    fp32: bool = option(False, "float32 base", "Hardware", common=True)
    use_cpu: bool = option(False, "stay on the CPU", "Hardware", hf=True)
    fsdp: bool = option(
        False,
        "several processes: each holds a piece of the base's layers, and gathers a layer to run it",
        "Hardware",
        hf=True,
    )
    fsdp_config: str | None = option(
        None, "JSON file with reshard_after_forward and cpu_offload, for --fsdp", "Hardware", hf=True
    )
    deepspeed: str | None = option(
        None,
        "several processes: JSON file of DeepSpeed with ZeRO stage 2 (gradients and optimizer state of the adapter in "
        "pieces) or 3 (the base's layers too)",
        "Hardware",
        hf=True,
    )
    memory_limit: str | None = option(
        None,
        "most memory this process may take, as 8GB: steps are planned to fit; not set: what is free",
        "Hardware",
        common=True,
    )
    dataloader_num_workers: int = option(0, "processes that plan steps ahead", "Hardware", hf=True)

    # All other options of TrainingArguments that the user set, by name.
    training_arguments: dict[str, Any] = field(default_factory=dict, metadata={"help": "", "group": ""})

    @property
    def rows_per_step(self) -> int:
        """Rows of one optimizer step on this process."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    def to_dict(self) -> dict[str, Any]:
        """The options that are set, flat, as a run file holds them."""
        values = {f.name: getattr(self, f.name) for f in options()}
        set_values = {name: value for name, value in values.items() if value is not None and value not in ([], {})}
        return {**set_values, **self.training_arguments}

    def to_yaml(self) -> str:
        """A run file that gives this configuration again."""
        import yaml

        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


def options() -> list[dataclasses.Field[Any]]:
    """The options of RunConfig in the order of the help."""
    fields = [f for f in dataclasses.fields(RunConfig) if f.metadata["group"]]
    return sorted(fields, key=lambda f: GROUPS.index(f.metadata["group"]))
