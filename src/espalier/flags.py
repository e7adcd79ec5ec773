"""The flags of `espalier train`: argument list -> raw option values, and the help that lists them."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_type_hints

from rich.console import Console
from rich.table import Table
from rich.text import Text

from espalier.config import GROUPS, RunConfig, options
from espalier.errors import UsageError
from espalier.runfile import OptionSpec, choices, nearest_option, own_specs, training_argument_specs

CONFIG = OptionSpec("config", str)


def parse_flags(argv: Sequence[str]) -> tuple[dict[str, Any], str | None]:
    """(raw values by option name, path of the run file or None).

    `--lora-rank 4`, `--lora_rank=4`, `--fp16`, `--fp16 false` and `--no_fp16` are all understood; of a flag that is
    given twice the last one counts. Raises UsageError: unknown flags (with the nearest), missing or stray values.
    """
    argv = [_underscored(token) for token in argv]
    specs = {**own_specs(), "config": CONFIG}
    values, extra = _parse_known(argv, specs)
    if extra:  # not ours: TrainingArguments may know them (a slow import)
        specs = {**training_argument_specs(), **specs}
        values, extra = _parse_known(argv, specs)
    problems = []
    for name in [token[2:].split("=")[0] for token in extra if token.startswith("--")]:
        positive = name.removeprefix("no_")
        if positive != name and positive in specs and specs[positive].is_bool:
            values[positive] = ["false"]
        else:
            problems.append(f"--{name}: there is no such option{nearest_option(name, list(specs))}")
    stray = [token for token in extra if not token.startswith("--")]
    if stray and not problems:
        how = "values follow their --option"
        if all(Path(token).exists() for token in stray):
            how = f"rows are given as --dataset_path {' '.join(stray)}"
        problems.append(f"{' '.join(map(repr, stray))}: no option takes this; {how}")
    raw = {name: _one_value(name, given, specs[name], problems) for name, given in values.items()}
    if problems:
        raise UsageError(
            "the command line is not understood",
            details=problems,
            todo="`espalier train --help` lists the options that matter, `--help-all` all of them.",
        )
    config_file = raw.pop("config", None)
    return raw, config_file


def _underscored(token: str) -> str:
    if not token.startswith("--"):
        return token
    name, equals, value = token.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def _parse_known(argv: Sequence[str], specs: dict[str, OptionSpec]) -> tuple[dict[str, list[str]], list[str]]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in specs:
        parser.add_argument(f"--{name}", nargs="*", default=argparse.SUPPRESS)
    namespace, extra = parser.parse_known_args(list(argv))
    return vars(namespace), extra


def _one_value(name: str, given: list[str], spec: OptionSpec, problems: list[str]) -> Any:
    if spec.many:
        if not given:
            problems.append(f"--{name}: a value is missing")
        return (
            given[0].split(",")
            if len(given) == 1 and name in ("target_modules", "modules_to_save", "report_to")
            else given
        )
    if not given and spec.is_bool:
        return "true"
    if len(given) != 1:
        problems.append(f"--{name}: " + ("a value is missing" if not given else f"takes one value, not {given}"))
        return None
    return given[0]


def print_train_help(console: Console, *, everything: bool) -> None:
    """The options by group with their defaults; everything: the rarer ones and TrainingArguments' too."""
    console.print(
        "Usage: espalier train --dataset_path FILE --output_dir DIR [options]\n", markup=False, highlight=False
    )
    console.print(
        "Trains a LoRA adapter. Every option can also stand in a run file: --config run.yaml (the command line wins).\n"
        "Underscores and dashes are the same: --lora_rank, --lora-rank.",
        markup=False,
        highlight=False,
    )
    hints, defaults = get_type_hints(RunConfig), RunConfig()
    for group in GROUPS:
        table = _help_table(group)
        for f in options():
            if f.metadata["group"] == group and (f.metadata["common"] or everything):
                words = choices(hints[f.name])
                help_text = f.metadata["help"] + (f" ({', '.join(words)})" if words else "")
                table.add_row(f"--{f.name}", help_text, _default_text(getattr(defaults, f.name)))
        console.print(table)
    if everything:
        _print_training_arguments(console)
    else:
        console.print("\n--help-all lists the rest, and all options of transformers' TrainingArguments.", markup=False)


def _print_training_arguments(console: Console) -> None:
    from transformers import TrainingArguments

    from espalier.training.arguments import REFUSED

    table = _help_table("Further options of TrainingArguments")
    own = own_specs()
    for f in dataclasses.fields(TrainingArguments):
        if f.init and f.name not in own:
            default = f.default if f.default is not dataclasses.MISSING else None
            text = f"refused: {REFUSED[f.name].reason}" if f.name in REFUSED else "as in transformers"
            table.add_row(f"--{f.name}", text, _default_text(default))
    console.print(table)


def _help_table(title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(ratio=1)
    table.add_column(justify="right")
    return table


def _default_text(default: Any) -> Text:
    if default is None or default == [] or default == {} or default == "":
        return Text("")
    if isinstance(default, bool):
        return Text(f"[{str(default).lower()}]")
    if isinstance(default, list):
        return Text(f"[{' '.join(map(str, default))}]")
    return Text(f"[{default:g}]" if isinstance(default, float) else f"[{default}]")
