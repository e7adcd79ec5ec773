"""The command line. One function a command: parse, call one function, print. No torch at import."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from espalier import __version__
from espalier.command_options import (
    AdapterOption,
    BaseOption,
    ColumnsOption,
    Commands,
    CpuOption,
    EncodingOption,
    Files,
    FormatOption,
    JsonOption,
    LengthOption,
    ModelOption,
    OutputOption,
    OverlengthOption,
    SentenceOption,
    TemplateOption,
    TrainedTemplateOption,
    TrainOnOption,
    TreeOption,
    TrustOption,
    column_names,
    encoder_of,
    format_options,
)
from espalier.config import DEFAULT_MODEL
from espalier.errors import EspalierError, UsageError
from espalier.use.serving.options import ServeOptions

if TYPE_CHECKING:
    from espalier.encode.encode import Encoder

app = typer.Typer(
    name="espalier",
    cls=Commands,
    help="LoRA fine-tuning that never computes a prompt twice: from a JSONL file to an adapter.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda name: name.replace("-", "_"),  # --model-path is --model_path
    },
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


@app.command("demo")
def demo_command(
    output_dir: Annotated[
        str | None, typer.Option("--output_dir", help="Folder of the run; else a new runs/demo.")
    ] = None,
    resume: Annotated[
        str | None, typer.Option("--resume_from_checkpoint", help="Go on with a stopped demo: last, or a folder.")
    ] = None,
    tree: TreeOption = "on",
) -> None:
    """Train the default model on the example rows, and show what changed on rows that it has not seen."""
    from espalier.use.demo import run_demo

    run_demo(output_dir, resume_from_checkpoint=resume, tree=tree)


@app.command("check")
def check_command(
    files: Files,
    model_path: ModelOption = None,
    heldout: Annotated[list[str] | None, typer.Option("--eval_dataset_path", help="Held-out rows to compare.")] = None,
    template: TemplateOption = None,
    format: FormatOption = None,
    columns: ColumnsOption = None,
    encoding: EncodingOption = None,
    input_sentence: SentenceOption = "none",
    max_seq_length: LengthOption = None,
    overlength: OverlengthOption = "drop",
    train_on: TrainOnOption = "all",
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 where there are warnings.")] = False,
    fix: Annotated[str | None, typer.Option("--fix", help="Write the kept rows to this JSONL file.")] = None,
    rejects: Annotated[str | None, typer.Option("--rejects", help="Write the left-out rows and reasons here.")] = None,
    as_json: JsonOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Check data files: what is kept, left out and why. Exit 0 clean, 1 warnings with --strict, 2 errors."""
    from espalier.encode.check import run_check

    idle = {
        "--template": template is not None,
        "--max_seq_length": max_seq_length is not None,
        "--overlength": overlength != "drop",
        "--train_on": train_on != "all",
    }
    if model_path is None and any(idle.values()):
        names = ", ".join(name for name, given in idle.items() if given)
        raise UsageError(
            "without a model no token is counted: this changes nothing", where=names, todo="Add --model_path."
        )

    def encoder() -> Encoder:
        assert model_path is not None
        return encoder_of(model_path, template, max_seq_length, overlength, train_on, trust_remote_code)

    code = run_check(
        files,
        heldout=heldout,
        options=format_options(format, columns, encoding, input_sentence),
        encoder_factory=encoder if model_path is not None else None,
        strict=strict,
        fix=fix,
        rejects=rejects,
        as_json=as_json,
    )
    raise typer.Exit(code)


@app.command("inspect")
def inspect_command(
    files: Files,
    model_path: ModelOption = DEFAULT_MODEL,
    row: Annotated[int | None, typer.Option("--row", help="The row of this number, from 1.")] = None,
    line: Annotated[int | None, typer.Option("--line", help="The row on this line of the file, from 1.")] = None,
    random_rows: Annotated[int | None, typer.Option("--random", help="So many rows, chosen at random.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of that choice.")] = 0,
    template: TemplateOption = None,
    format: FormatOption = None,
    columns: ColumnsOption = None,
    encoding: EncodingOption = None,
    input_sentence: SentenceOption = "none",
    max_seq_length: LengthOption = None,
    overlength: OverlengthOption = "drop",
    train_on: TrainOnOption = "all",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a row.")] = False,
    html: Annotated[str | None, typer.Option("--html", help="Write a page that needs nothing else.")] = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Show rows as they will be trained: tokens, ids, what is learnt, what the template added."""
    from espalier.encode.inspect import run_inspect

    code = run_inspect(
        files,
        encoder_of(model_path or DEFAULT_MODEL, template, max_seq_length, overlength, train_on, trust_remote_code),
        format_options(format, columns, encoding, input_sentence),
        row=row,
        line=line,
        random_rows=random_rows,
        seed=seed,
        as_json=as_json,
        html=html,
    )
    raise typer.Exit(code)


@app.command("plan", context_settings=RAW)
def plan_command(context: typer.Context) -> None:
    """Memory and time of a run before it starts; takes train's options, --device "A10 24GB" and --json."""
    from espalier.flags import parse_flags

    argv = list(context.args)
    if not argv or any(token in ("-h", "--help") for token in argv):
        typer.echo(
            "Usage: espalier plan --dataset_path FILE ... [options of train] [--config FILE]\n\n"
            "Predicts the memory and time of a run from its config and rows;\n"
            "loads no weights, writes nothing. Exit 0: it fits; 1: it does not.\n\n"
            '  --device "NAME [SIZE]"  for a graphics card: A10, "A100 40GB", "any 12GB";\n'
            "                          else this machine\n"
            "  --json                  one JSON object, bytes and seconds"
        )
        raise typer.Exit(0 if argv else 2)
    as_json = "--json" in argv
    argv = [part for token in argv if token != "--json" for part in _split(token)]
    device = None
    if "--device" in argv:
        at = argv.index("--device")
        if at + 1 == len(argv):
            raise UsageError("--device takes a card's name", todo='As --device "A10 24GB".')
        device = argv[at + 1]
        del argv[at : at + 2]
    raw, config_file = parse_flags(argv)
    from espalier.runfile import build_config
    from espalier.training.plan_command import run_plan

    raise typer.Exit(run_plan(build_config(raw, config_file), device=device, as_json=as_json))


def _split(token: str) -> list[str]:
    """--device=A10 as two words."""
    return token.split("=", 1) if token.startswith("--device=") else [token]


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


@app.command("chat")
def chat_command(
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="[PROMPT]...", help="Prompts; none: from stdin, or a conversation.")
    ] = None,
    adapter: AdapterOption = ...,  # type: ignore[assignment]
    model_path: BaseOption = None,
    prompts_file: Annotated[
        str | None, typer.Option("--prompts_file", help="One prompt a line, or JSONL rows.")
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Base and adapter side by side.")] = False,
    system: Annotated[str | None, typer.Option("--system", help="A system text before each prompt.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max_new_tokens", help="Longest answer in tokens.")] = 256,
    temperature: Annotated[float, typer.Option("--temperature", help="0: always the likeliest token.")] = 0.0,
    top_p: Annotated[
        float, typer.Option("--top_p", help="With a temperature: the likeliest tokens up to this sum.")
    ] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the sampling.")] = 0,
    template: TrainedTemplateOption = None,
    use_cpu: CpuOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Talk to an adapter, through the template that was trained."""
    from espalier.use.chat import run_chat

    code = run_chat(
        adapter,
        model_path,
        prompts,
        prompts_file,
        compare,
        system,
        max_new_tokens,
        temperature,
        top_p,
        seed,
        trust_remote_code,
        use_cpu,
        template,
    )
    raise typer.Exit(code)


@app.command("serve")
def serve_command(
    adapters: Annotated[
        list[str],
        typer.Option(
            "--adapter", help="Folder of an adapter, or name=folder; several share one base.", show_default=False
        ),
    ] = ...,  # type: ignore[assignment]
    model_path: BaseOption = None,
    host: Annotated[str, typer.Option("--host", help="Address to serve on.")] = ServeOptions.host,
    port: Annotated[int, typer.Option("--port", help="Port; 0: any that is free.")] = ServeOptions.port,
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api_key", envvar="ESPALIER_API_KEY", help="Ask every request for this key.", show_default=False
        ),
    ] = None,
    max_queue: Annotated[
        int, typer.Option("--max_queue", help="Requests that may wait while one is answered.")
    ] = ServeOptions.max_queue,
    max_new_tokens: Annotated[
        int, typer.Option("--max_new_tokens", help="Longest answer in tokens, whatever a request asks.")
    ] = ServeOptions.max_new_tokens,
    template: TrainedTemplateOption = None,
    use_cpu: CpuOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Serve adapters over one base by OpenAI's chat API (/v1/chat/completions). Needs the extra 'serve'."""
    from espalier.use.serving.command import run_serve

    options = ServeOptions(
        adapters=tuple(adapters),
        model_path=model_path,
        host=host,
        port=port,
        api_key=api_key,
        max_queue=max_queue,
        max_new_tokens=max_new_tokens,
        template=template,
        use_cpu=use_cpu,
        trust_remote_code=trust_remote_code,
    )
    raise typer.Exit(run_serve(options))


@app.command("evaluate")
def evaluate_command(
    adapter: AdapterOption = ...,  # type: ignore[assignment]
    files: Annotated[
        list[str] | None,
        typer.Option("--dataset_path", help="Rows that it has not seen; else those that its run held out."),
    ] = None,
    answers: Annotated[bool, typer.Option("--generate", help="Also compare greedy answers.")] = False,
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max_new_tokens", help="Longest answer in tokens; else a little over the longest wanted."),
    ] = None,
    as_json: JsonOption = False,
    html: Annotated[
        str | None, typer.Option("--html", help="Write a page of the rows that got better and worse.")
    ] = None,
    draws: Annotated[int, typer.Option("--draws", help="Draws of the rows for the intervals.")] = 10_000,
    seed: Annotated[int, typer.Option("--seed", help="Seed of those draws.")] = 0,
    model_path: BaseOption = None,
    template: TrainedTemplateOption = None,
    format: FormatOption = None,
    columns: ColumnsOption = None,
    encoding: EncodingOption = None,
    max_seq_length: LengthOption = None,
    on_bad_row: Annotated[
        Literal["error", "skip"] | None, typer.Option("--on_bad_row", help="Rows that cannot be used; else as trained.")
    ] = None,
    tree: TreeOption = "on",
    use_cpu: CpuOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Judge an adapter next to its base on held-out rows: loss, accuracy, answers, and what of it may be chance."""
    from espalier.use.evaluate import run_evaluate

    code = run_evaluate(
        adapter,
        files or [],
        answers=answers,
        max_new_tokens=max_new_tokens,
        as_json=as_json,
        html=html,
        draws=draws,
        seed=seed,
        model_path=model_path,
        use_cpu=use_cpu,
        tree=tree == "on",
        trust_remote_code=trust_remote_code,
        template=template,
        format=format,
        columns=column_names(columns),
        encoding=encoding,
        max_seq_length=max_seq_length,
        on_bad_row=on_bad_row,
    )
    raise typer.Exit(code)


@app.command("verify")
def verify_command(
    path: Annotated[
        str,
        typer.Argument(
            metavar="PATH", help="Folder of an adapter or of a merged model, or a .gguf file.", show_default=False
        ),
    ],
    model_path: BaseOption = None,
    use_cpu: CpuOption = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array.")] = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Check what was trained or merged: files, tensors, base, effect, template; and who serves it, by which command."""
    from espalier.use.verify_command import run_verify

    raise typer.Exit(run_verify(path, model_path, trust_remote_code, use_cpu, as_json))


@app.command("import")
def import_command(
    source: Annotated[
        str,
        typer.Argument(metavar="SOURCE", help="Folder with adapter_model.bin, or the file itself.", show_default=False),
    ],
    output_dir: OutputOption = ...,  # type: ignore[assignment]
    model_path: BaseOption = None,
    lora_alpha: Annotated[
        float | None, typer.Option("--lora_alpha", help="As trained, where no adapter_config.json says it.")
    ] = None,
    use_rslora: Annotated[
        bool, typer.Option("--use_rslora", help="It was trained with the scale alpha / sqrt(rank).")
    ] = False,
    template: TemplateOption = None,
    use_cpu: CpuOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Make LoRA tensors that a script has saved by parameter name (adapter_model.bin) a PEFT folder."""
    from espalier.use.import_adapter import run_import

    code = run_import(
        source,
        output_dir,
        model_path=model_path,
        lora_alpha=lora_alpha,
        use_rslora=use_rslora,
        template=template,
        use_cpu=use_cpu,
        trust_remote_code=trust_remote_code,
    )
    raise typer.Exit(code)


@app.command("merge")
def merge_command(
    adapters: Annotated[
        list[str], typer.Option("--adapter", help="Folder of the adapter; several with --weights.", show_default=False)
    ] = ...,  # type: ignore[assignment]
    output_dir: OutputOption = ...,  # type: ignore[assignment]
    weights: Annotated[
        str | None, typer.Option("--weights", help="Of several adapters, for their sum: 0.7,0.3.")
    ] = None,
    model_path: BaseOption = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(
            "--dtype", metavar="<type>", help="Of the weights: float32, bfloat16 or float16; else the base's own."
        ),
    ] = None,
    format: Annotated[
        Literal["folder", "gguf", "gguf-lora"],
        typer.Option(
            "--format",
            metavar="<format>",
            help="folder (Transformers, vLLM), gguf (llama.cpp) or gguf-lora (the adapter alone, as GGUF).",
        ),
    ] = "folder",
    quantize: Annotated[
        Literal["f32", "f16", "bf16", "q8_0", "q5_0", "q4_0"] | None,
        typer.Option(
            "--quantize",
            metavar="<type>",
            help="Of the matrices in a GGUF: f32, f16, bf16, q8_0, q5_0 or q4_0; else f16.",
        ),
    ] = None,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Unpack a 4- or 8-bit base; else it is refused.")
    ] = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Write base + adapter as one model, read it back, and compare it with base + adapter."""
    from espalier.use.merge_command import run_merge

    code = run_merge(adapters, weights, output_dir, model_path, dtype, format, quantize, trust_remote_code, dequantize)
    raise typer.Exit(code)


def main(command: Callable[[], Any] = app) -> None:
    """The `espalier` command: runs `app`, prints our errors without a traceback, and exits with their code."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a console that cannot write a character must not end the run
            stream.reconfigure(errors="backslashreplace")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        command()
    except EspalierError as error:
        if not error.told_elsewhere:
            print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)
