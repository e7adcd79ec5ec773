"""The command line. One function a command: parse, call one function, print. No torch at import."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from espalier import __version__
from espalier.errors import EspalierError

app = typer.Typer(
    name="espalier",
    help="LoRA fine-tuning that never computes a prompt twice: from a JSONL file to an adapter.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RAW = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}


def _version(value: bool) -> None:
    if value:
        typer.echo(f"espalier {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command("train", context_settings=RAW)
def train_command(context: typer.Context) -> None:
    """Train a LoRA adapter. `espalier train --help` lists the options."""
    from espalier.flags import parse_flags, print_train_help

    argv = list(context.args)
    everything = any(token in ("--help-all", "--help_all") for token in argv)
    if everything or not argv or any(token in ("-h", "--help") for token in argv):
        from rich.console import Console

        print_train_help(Console(), everything=everything)
        raise typer.Exit(0 if argv else 2)
    raw, config_file = parse_flags(argv)
    from espalier.runfile import build_config

    config = build_config(raw, config_file)
    from espalier.training.run import train

    train(config)


def main() -> None:
    """The `espalier` command: runs `app`, prints our errors without a traceback, and exits with their code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a console that cannot write a character must not end the run
            stream.reconfigure(errors="backslashreplace")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        app()
    except EspalierError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)
