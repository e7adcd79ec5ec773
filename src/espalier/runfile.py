"""Raw option values, from the command line and a run file, to a RunConfig: types, ranges, unknown names."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from espalier.config import RunConfig, options
from espalier.errors import UsageError


@dataclass(frozen=True)
class OptionSpec:
    """What the parser needs to know of an option, whoever declares it."""

    name: str
    type: Any
    many: bool = False

    @property
    def is_bool(self) -> bool:
        return bool in _members(self.type)


def own_specs() -> dict[str, OptionSpec]:
    """Name -> spec of the options declared here."""
    hints = typing.get_type_hints(RunConfig)
    return {f.name: OptionSpec(f.name, hints[f.name], f.metadata["many"]) for f in options()}


def training_argument_specs() -> dict[str, OptionSpec]:
    """Name -> spec of all options of transformers' TrainingArguments (imports transformers: slow)."""
    from transformers import TrainingArguments

    hints = typing.get_type_hints(TrainingArguments)
    fields = {f.name: f for f in dataclasses.fields(TrainingArguments) if f.init}
    return {name: OptionSpec(name, hints[name], list[str] in _members(hints[name])) for name in fields}


# What other tools call an option, where the spelling does not lead to ours.
_ELSEWHERE = {
    **dict.fromkeys(("data", "dataset", "data_path", "dataset_name", "train_file", "train_data"), "dataset_path"),
    **dict.fromkeys(("model", "model_name_or_path", "base_model", "pretrained_model_name_or_path"), "model_path"),
    **dict.fromkeys(("output", "out", "output_path"), "output_dir"),
    **dict.fromkeys(("batch_size", "train_batch_size", "micro_batch_size"), "per_device_train_batch_size"),
    **dict.fromkeys(("epochs", "num_epochs"), "num_train_epochs"),
    **dict.fromkeys(("max_length", "cutoff_len", "max_len", "sequence_len", "model_max_length"), "max_seq_length"),
    **dict.fromkeys(("val_set_size", "val_size", "test_size"), "eval_fraction"),
    **dict.fromkeys(("eval_dataset", "validation_file", "eval_file", "val_file"), "eval_dataset_path"),
    **dict.fromkeys(("rank", "r", "lora_r"), "lora_rank"),
    "alpha": "lora_alpha",
    "lr": "learning_rate",
    "warmup_ratio": "warmup_steps",
    "scheduler": "lr_scheduler_type",
    "resume": "resume_from_checkpoint",
    "optimizer": "optim",
    "chat_template": "template",
}


def nearest_option(name: str, names: Sequence[str]) -> str:
    """The same for an option: as other tools call it, else near one of ours, else near any of `names`."""
    if name in _ELSEWHERE:
        return f" (did you mean {_ELSEWHERE[name]}?)"
    return nearest(name, list(own_specs())) or nearest(name, names)


def nearest(name: str, names: Sequence[str]) -> str:
    """' (did you mean --x?)' or ''."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    return f" (did you mean {close[0]}?)" if close else ""


def _members(type_: Any) -> tuple[Any, ...]:
    """The alternatives of a union, or the type itself."""
    if typing.get_origin(type_) in (typing.Union, types.UnionType):
        return typing.get_args(type_)
    return (type_,)


def choices(type_: Any) -> tuple[str, ...]:
    """The words that an option takes, where it takes a fixed set of them."""
    return tuple(
        w for member in _members(type_) if typing.get_origin(member) is Literal for w in typing.get_args(member)
    )


def convert(value: Any, spec: OptionSpec) -> Any:
    """A value from the command line or a run file as the option's type. Raises ValueError with what was expected."""
    expected = []
    members = _members(spec.type)
    word_for_none = isinstance(value, str) and value.lower() in ("none", "null") and str not in members
    if type(None) in members and (value is None or word_for_none):
        return None
    for member in members:
        try:
            return _convert_one(value, member)
        except ValueError as error:
            expected.append(str(error))
    raise ValueError(" or ".join(dict.fromkeys(text for text in expected if text)))


def _convert_one(value: Any, type_: Any) -> Any:
    origin = typing.get_origin(type_)
    if type_ is type(None):
        raise ValueError("")
    if type_ is Any or (isinstance(type_, type) and type_ not in (bool, int, float, str, list, dict)):
        return value  # enumerations and classes of transformers: TrainingArguments converts and checks them itself
    if type_ is bool:
        booleans = {
            "true": True,
            "false": False,
            "1": True,
            "0": False,
            "yes": True,
            "no": False,
            "on": True,
            "off": False,
        }
        if isinstance(value, bool):
            return value
        if str(value).lower() in booleans:
            return booleans[str(value).lower()]
        raise ValueError("true or false")
    if type_ in (int, float):
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError("a number" if type_ is float else "a whole number")
        try:
            number = float(value)  # YAML 1.1 reads 1e-4 as a text
        except (ValueError, OverflowError):
            raise ValueError("a number" if type_ is float else "a whole number") from None
        if type_ is int and not number.is_integer():
            raise ValueError("a whole number")
        if not math.isfinite(number):
            raise ValueError("a finite number")
        return type_(value) if type_ is int and str(value).strip("+-").isdigit() else type_(number)
    if type_ is str:
        if isinstance(value, (list, dict)):
            raise ValueError("one text")
        return {True: "true", False: "false"}.get(value, str(value)) if isinstance(value, bool) else str(value)
    if origin is Literal:
        words = typing.get_args(type_)
        if isinstance(value, bool):  # YAML 1.1 reads on, off and no as booleans
            value = next((word for word in (("on",) if value else ("off", "no")) if word in words), value)
        if value in words:
            return value
        raise ValueError("one of " + ", ".join(map(str, words)))
    if origin is list:
        items = value if isinstance(value, (list, tuple)) else [value]
        member = typing.get_args(type_)[0]
        return [_convert_one(item, member) if member in (int, float) else str(item) for item in items]
    if origin is dict or type_ is dict:
        return _convert_dict(value)
    return value


def _convert_dict(value: Any) -> dict[str, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            return dict(json.loads(value))
        except json.JSONDecodeError:
            raise ValueError("a JSON object") from None
    pairs = [item.split("=", 1) for item in str(value).split(",")]
    if all(len(pair) == 2 and pair[0] for pair in pairs):
        return dict(pairs)
    raise ValueError("name=value,name=value")


def build_config(command_line: Mapping[str, Any], config_file: str | None = None) -> RunConfig:
    """RunConfig from raw values: the run file's, then the command line's, which win. All problems are told together.

    Raises UsageError for unknown names (with the nearest one) and values of the wrong kind.
    """
    sources: list[tuple[Mapping[str, Any], str]] = [(command_line, "--{name}")]
    if config_file is not None:
        sources.insert(0, (read_run_file(config_file), config_file + ": {name}"))
    specs = own_specs()
    if any(name not in specs for values, _ in sources for name in values):
        specs = {**training_argument_specs(), **specs}
    problems: list[str] = []
    own: dict[str, Any] = {}
    further: dict[str, Any] = {}
    own_names = own_specs()
    for values, place in sources:
        for name, value in values.items():
            where = place.format(name=name)
            if name not in specs:
                problems.append(f"{where}: there is no such option{nearest_option(name, list(specs))}")
                continue
            try:
                converted = convert(value, specs[name])
            except ValueError as error:
                problems.append(f"{where}: {value!r} is not {error}")
                continue
            (own if name in own_names else further)[name] = converted
    problems += check_values(own)
    # The run file of a run that started from an adapter holds continue_training: it can be resumed all the same.
    given = {name.replace("-", "_") for name in command_line}
    if own.get("resume_from_checkpoint") and own.get("continue_training") and "continue_training" in given:
        problems.append(
            "--continue_training starts a new run, --resume_from_checkpoint goes on with one: give one of them"
        )
    if problems:
        raise UsageError(
            f"{len(problems)} option{'s are' if len(problems) > 1 else ' is'} wrong",
            details=problems,
            todo="`espalier train --help` lists the options that matter, `--help-all` all of them.",
        )
    if own.get("max_steps") == -1:
        own["max_steps"] = None  # transformers' way to say not set
    return RunConfig(**own, training_arguments=further)


# The smallest value of an option, and the options that must be above 0.
_LEAST = {
    **dict.fromkeys(("lora_rank", "per_device_train_batch_size", "gradient_accumulation_steps", "max_seq_length"), 1),
    **dict.fromkeys(("max_tokens_per_pack", "min_shared_tokens", "num_encode_workers", "streaming_window"), 1),
    **dict.fromkeys(("save_total_limit", "per_device_eval_batch_size", "early_stopping_patience"), 1),
    **dict.fromkeys(("learning_rate", "warmup_steps", "weight_decay", "max_grad_norm", "seed"), 0),
    **dict.fromkeys(("eval_samples", "dataloader_num_workers"), 0),
}
_ABOVE_0 = ("lora_alpha", "loraplus_lr_ratio", "num_train_epochs", "logging_steps", "save_steps", "eval_steps")
_LARGEST_SEED = 2**32 - 1  # numpy's


def _out_of_range(config: RunConfig) -> list[str]:
    problems = [
        f"--{name}: {value} is not {least} or more"
        for name, least in _LEAST.items()
        if (value := getattr(config, name)) is not None and value < least
    ]
    problems += [
        f"--{name}: {value} is not above 0"
        for name in _ABOVE_0
        if (value := getattr(config, name)) is not None and value <= 0
    ]
    problems += [
        f"--{name}: {value} is not at least 0 and below 1"
        for name in ("lora_dropout", "eval_fraction")
        if not 0 <= (value := getattr(config, name)) < 1
    ]
    if config.seed > _LARGEST_SEED:
        problems.append(f"--seed: {config.seed} is above {_LARGEST_SEED}")
    if config.max_steps is not None and config.max_steps < 1 and config.max_steps != -1:
        problems.append(f"--max_steps: {config.max_steps} is not 1 or more")
    starts = ("true", "false", "gaussian", "pissa", "olora", "orthogonal")
    start = config.init_lora_weights.lower()
    if start not in starts and not re.fullmatch(r"pissa_niter_\d+", start):
        words = ", ".join(starts)
        problems.append(
            f"--init_lora_weights: {start!r} is not one of {words}, pissa_niter_<steps>{nearest(start, starts)}"
        )
    problems += [f"--layers_to_transform: {n} is not 0 or more" for n in config.layers_to_transform if n < 0]
    return problems


def check_values(own: Mapping[str, Any]) -> list[str]:
    """Problems that need no file and no model: ranges, and options that exclude each other."""
    config = RunConfig(**own)
    problems = _out_of_range(config)
    if config.probe_prompts is not None and (config.eval_strategy == "no" or config.eval_samples == 0):
        why = (
            "--eval_samples 0 asks for none" if config.eval_strategy != "no" else "nothing is evaluated during training"
        )
        problems.append(f"--probe_prompts changes nothing: {why}")
    if config.eval_steps is not None and config.eval_strategy != "steps":
        problems.append(f"--eval_steps changes nothing with --eval_strategy {config.eval_strategy}: give steps")
    if sum((config.bf16, config.fp16, config.fp32)) > 1:
        problems.append("--bf16, --fp16 and --fp32 exclude each other: give one, or none to let the hardware decide")
    if config.continue_training and config.checkpoint is None:
        problems.append("--continue_training needs --checkpoint: the adapter folder to start from")
    if config.checkpoint is not None and not config.continue_training:
        problems.append(
            "--checkpoint is used with --continue_training only (to go on with a stopped run: --resume_from_checkpoint)"
        )
    if config.skip_overlength and config.overlength != "drop":
        problems.append(f"--skip_overlength means --overlength drop, but --overlength is {config.overlength}")
    if config.eval_dataset_path and config.eval_fraction:
        problems.append("--eval_dataset_path and --eval_fraction exclude each other")
    has_eval = bool(config.eval_dataset_path or config.eval_fraction)
    for name, on in (
        ("eval_strategy", config.eval_strategy != "no"),
        ("load_best_model_at_end", config.load_best_model_at_end),
        ("early_stopping_patience", config.early_stopping_patience is not None),
    ):
        if on and not has_eval:
            problems.append(f"--{name} needs held-out rows: --eval_dataset_path or --eval_fraction")
    if config.eval_strategy == "no" and (config.load_best_model_at_end or config.early_stopping_patience is not None):
        problems.append("--load_best_model_at_end and --early_stopping_patience need --eval_strategy steps or epoch")
    return problems


def read_run_file(path: str) -> dict[str, Any]:
    """The names and raw values of a YAML run file. Raises UsageError (missing, no YAML, not one flat mapping)."""
    import yaml

    file = Path(path)
    if not file.is_file():
        raise UsageError("there is no such run file", where=path, todo="Give the path of a YAML file to --config.")
    try:
        values = yaml.load(file.read_text(encoding="utf-8-sig"), Loader=_unique_key_loader())
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise UsageError(f"this is no YAML: {' '.join(str(error).split())}", where=path) from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UsageError(
            f"a run file is a mapping of option names to values, this is a {type(values).__name__}",
            where=path,
            todo="Write one line an option, as `lora_rank: 8`.",
        )
    return {str(name).replace("-", "_"): value for name, value in values.items()}


def _unique_key_loader() -> Any:
    """PyYAML's safe loader, which also refuses a key that is given twice (PyYAML keeps the last one silently)."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    def construct_mapping(loader: Any, node: Any) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.YAMLError(f"{key.value!r} is given twice, line {key.start_mark.line + 1}")
            seen.add(key.value)
        return dict(yaml.SafeLoader.construct_mapping(loader, node, deep=True))

    Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, construct_mapping)
    return Loader
