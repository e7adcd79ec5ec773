"""What several commands share on the command line: their options, and what is made of them. No torch at import."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from espalier.errors import UsageError

if TYPE_CHECKING:
    from espalier.encode.encode import Encoder

Files = Annotated[
    list[str],
    typer.Argument(metavar="FILE", help="Data files, globs, '-' or hub:owner/name[:split].", show_default=False),
]
_MODEL = "Base model: smollm2-135m, a folder, a .gguf file or a hub name"
ModelOption = Annotated[str | None, typer.Option("--model_path", help=f"{_MODEL}.")]
BaseOption = Annotated[str | None, typer.Option("--model_path", help=f"{_MODEL}; else the one that the adapter names.")]
TemplateOption = Annotated[
    str | None, typer.Option("--template", help="Chat template: atom, chatml, plain or a jinja file; else the model's.")
]
TrainedTemplateOption = Annotated[
    str | None, typer.Option("--template", help="Chat template: atom, chatml, plain or a jinja file; else as trained.")
]
FormatOption = Annotated[
    str | None,
    typer.Option("--format", help="alpaca, messages, sharegpt, prompt_completion or text; else recognised."),
]
ColumnsOption = Annotated[str | None, typer.Option("--columns", help="Names of the columns: prompt=q,completion=a.")]
EncodingOption = Annotated[str | None, typer.Option("--encoding", help="Text encoding of the files; else UTF-8.")]
SentenceOption = Annotated[
    str, typer.Option("--input_sentence", help="Between instruction and input: none, en, zh or a text.")
]
LengthOption = Annotated[
    int | None, typer.Option("--max_seq_length", help="Longest row in tokens; else the model's own limit.")
]
OverlengthOption = Annotated[
    Literal["drop", "truncate_prompt", "split", "error"],
    typer.Option("--overlength", metavar="<policy>", help="For longer rows: drop, truncate_prompt, split or error."),
]
TrainOnOption = Annotated[Literal["all", "last"], typer.Option("--train_on", help="Which assistant turns are learnt.")]
TrustOption = Annotated[bool, typer.Option("--trust_remote_code", help="Run code that comes with the model.")]
OutputOption = Annotated[str, typer.Option("--output_dir", help="New folder.", show_default=False)]
AdapterOption = Annotated[str, typer.Option("--adapter", help="Folder of the adapter.", show_default=False)]
CpuOption = Annotated[bool, typer.Option("--use_cpu", help="Stay on the CPU.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
TreeOption = Annotated[Literal["on", "off"], typer.Option("--tree", help="Compute shared beginnings once.")]


class Commands(TyperGroup):
    """The commands, whose usage errors look like all of ours: what is wrong, and what to do."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        prog_name = prog_name or "espalier"  # not "python -m espalier"
        try:
            code = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
            if not standalone_mode:
                return code
        except typer.Abort:
            if not standalone_mode:
                raise
            sys.exit(1)
        except Exception as error:
            # A usage error of Click's, which Typer brings under a name of its own.
            context, what = getattr(error, "ctx", None), getattr(error, "format_message", None)
            if context is None or what is None or not standalone_mode:
                raise
            if type(error).__name__ == "NoArgsIsHelpError":  # the help has been printed
                sys.exit(2)
            usage = " ".join(re.sub(r"[{}]", "", context.get_usage()).split())
            todo = f"{usage}; `{context.command_path} --help` lists the options."
            text = what().replace("Value error, ", "").rstrip(".")
            print(f"error: {UsageError(text, where=context.command_path, todo=todo)}", file=sys.stderr)
            sys.exit(2)
        sys.exit(code or 0)


def format_options(format: str | None, columns: str | None, encoding: str | None, sentence: str) -> Any:
    from espalier.data.formats import FormatOptions
    from espalier.encode.template import input_joiner

    names = column_names(columns) or {}
    return FormatOptions(format=format, columns=names, encoding=encoding, input_joiner=input_joiner(sentence))


def column_names(columns: str | None) -> dict[str, str] | None:
    from espalier.runfile import OptionSpec, convert

    try:
        names: dict[str, str] | None = convert(columns, OptionSpec("columns", dict[str, str])) if columns else None
    except ValueError as error:
        raise UsageError(f"{columns!r} is not {error}", where="--columns") from error
    return names


def encoder_of(
    model_path: str, template: str | None, max_length: int | None, overlength: Any, train_on: Any, trust: bool
) -> Encoder:
    from espalier.encode.encode import Encoder
    from espalier.encode.length import length_limit
    from espalier.encode.template import resolve_template
    from espalier.model.load import load_config, load_tokenizer, resolve_model

    ref = resolve_model(model_path)
    tokenizer = load_tokenizer(ref, trust)
    limit, _ = length_limit(max_length, tokenizer, load_config(ref, trust))
    chat_template = resolve_template(tokenizer, template)
    return Encoder(tokenizer, chat_template, max_length=limit, overlength=overlength, train_on=train_on)
