"""All that is settled before a weight is read: model, template, rows, targets, steps. Bad input ends here."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from espalier.config import RunConfig
from espalier.data.formats import FormatOptions, bad_rows_error, group_bad_rows
from espalier.data.rows import BadRow
from espalier.data.source import expand
from espalier.encode.encode import Encoder
from espalier.encode.length import length_limit
from espalier.encode.stops import check_vocabulary, generation_stop_ids
from espalier.encode.store import EncodedDataset, EncodeResult, encode_files, overlength_report, split_heldout
from espalier.encode.template import ChatTemplate, input_joiner, resolve_template
from espalier.errors import DataError, UsageError
from espalier.model.embedded import cache_root
from espalier.model.load import ModelPath, check_causal_lm, load_config, load_tokenizer, own_code, resolve_model
from espalier.model.lora import check_targets, empty_model, num_embedding_rows
from espalier.model.quantized import Kind, check_quantization
from espalier.model.shard import check_settings
from espalier.training.arguments import check_continued, check_optimizer, check_trackers, refused_options
from espalier.training.ranks import place
from espalier.training.samples import Probe, probes_of
from espalier.training.streaming import StreamedSteps, rows_that_stop, stream_digest
from espalier.training.zero_settings import engine_settings

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from espalier.training.report import Header


@dataclass(frozen=True)
class Prepared:
    """Everything of a run but the weights."""

    config: RunConfig
    model: ModelPath
    model_config: Any
    tokenizer: Any
    template: ChatTemplate
    encoder: Encoder
    train_rows: EncodedDataset | StreamedSteps
    eval_rows: EncodedDataset | None
    sample_ids: npt.NDArray[np.int32]  # of one row, to compare the saved adapter's forward on
    result: EncodeResult | None  # None: a stream, whose rows are counted as they come
    left_out: tuple[BadRow, ...]
    generation: GenerationConfig
    quantization: Kind | None
    stop_ids: list[int]
    max_steps: int
    warmup_steps: float
    steps_of: int  # rows a step that --max_steps and --warmup_steps count in: those that the run was started with
    rows_digest: str
    data_files: tuple[dict[str, Any], ...]
    zero: dict[str, Any] | None = None  # DeepSpeed's settings
    probes: tuple[Probe, ...] = ()  # prompts to answer at every evaluation


def prepare(config: RunConfig, say: Header, steps_of: int | None = None) -> Prepared:
    """Settle a run; every decision is told through `say`. Raises EspalierError for whatever cannot be used.

    steps_of: rows a step that --max_steps and --warmup_steps count in, where a run goes on with others.
    """
    from espalier.model.load import sane_generation_config

    refused = refused_options(config.training_arguments)
    if refused:
        raise UsageError("options that this tool cannot honour", details=refused, todo="Leave them out.")
    zero = engine_settings(config)
    check_optimizer(config)
    check_trackers(config)
    check_continued(config)
    if not config.dataset_path:
        raise UsageError("no rows to train on", where="--dataset_path", todo="Give one or more data files.")
    expand(config.dataset_path + config.eval_dataset_path)  # names that are no file are told at once, all of them
    fsdp_settings(config)
    if "-" in config.dataset_path + config.eval_dataset_path and place().world > 1:
        raise UsageError(
            "standard input can be read by one process, and this run has several",
            where="--dataset_path -",
            todo="Write the rows to a file first.",
        )
    ref = resolve_model(config.model_path)
    say("model", ref.said)
    for line in own_code(ref) if config.trust_remote_code else ():
        say("", f"code that comes with the model is run: {line}")
    model_config = load_config(ref, config.trust_remote_code)
    check_causal_lm(model_config, ref.said)
    quantization = check_quantization(config, model_config)
    skeleton = empty_model(model_config, trust_remote_code=config.trust_remote_code)
    check_targets(skeleton, config.target_modules, config.layers_to_transform, config.modules_to_save)
    tokenizer = load_tokenizer(ref, config.trust_remote_code)
    check_vocabulary(tokenizer, num_embedding_rows(skeleton))
    template = resolve_template(tokenizer, config.template)
    say("template", f"{template.source}: {template.reason}")
    for notice in template.notices():
        say("", notice)
    limit, limit_reason = length_limit(config.max_seq_length, tokenizer, model_config)
    generation, notices = sane_generation_config(ref)
    for notice in notices:
        say("", notice)
    stop_ids = generation_stop_ids(tokenizer, template, generation.eos_token_id)
    generation.eos_token_id = stop_ids
    encoder = Encoder(tokenizer, template, max_length=limit, overlength=config.overlength, train_on=config.train_on)
    result: EncodeResult | None = None
    train_rows: EncodedDataset | StreamedSteps
    eval_rows: EncodedDataset | None = None
    left_out: list[BadRow] = []
    steps_of = steps_of or config.rows_per_step * place().world
    if config.streaming:
        train_rows = streamed_rows(in_steps_of_now(config, steps_of, None), encoder, limit_reason, say)
    else:
        result = encode_rows(config, config.dataset_path, encoder, say)
        say_rows("rows", result, limit_reason, say)
        train_rows = result.dataset
        left_out += result.bad
    if config.eval_dataset_path:
        eval_result = encode_rows(config, config.eval_dataset_path, encoder, say)
        say_rows("held out", eval_result, limit_reason, say)
        eval_rows = eval_result.dataset
        left_out += eval_result.bad
    elif config.eval_fraction and isinstance(train_rows, EncodedDataset) and len(train_rows):
        train_rows, eval_rows = split_heldout(train_rows, config.eval_fraction, config.seed)
        say(
            "held out",
            f"{len(eval_rows)} rows, {len(train_rows)} to train on: split by content, no prompt on both sides",
        )
    if not len(train_rows):
        raise DataError(
            "no row is left to train on",
            where=", ".join(config.dataset_path),
            todo="`espalier check FILE` says why each row was left out.",
        )
    if config.eval_fraction and not (eval_rows and len(eval_rows)):
        raise UsageError(
            f"{config.eval_fraction} of these prompts is no row at all", where="--eval_fraction", todo="Hold out more."
        )
    num_rows = len(train_rows) if isinstance(train_rows, EncodedDataset) else None
    counted = in_steps_of_now(config, steps_of, num_rows)
    prepared = Prepared(
        config=config,
        model=ref,
        model_config=model_config,
        tokenizer=tokenizer,
        template=template,
        encoder=encoder,
        train_rows=train_rows,
        eval_rows=eval_rows,
        sample_ids=train_rows[0].input_ids
        if isinstance(train_rows, EncodedDataset)
        else train_rows.first_rows()[0].input_ids,
        result=result,
        left_out=tuple(left_out),
        generation=generation,
        quantization=quantization,
        stop_ids=stop_ids,
        max_steps=count_steps(counted, num_rows, say),
        warmup_steps=counted.warmup_steps,
        steps_of=steps_of,
        rows_digest=rows_digest(train_rows)
        if isinstance(train_rows, EncodedDataset)
        else stream_digest(config.dataset_path),
        data_files=tuple(describe_file(name, whole=not config.streaming) for name in config.dataset_path),
        zero=zero,
    )
    return dataclasses.replace(prepared, probes=tuple(probes_of(prepared)))


def fsdp_settings(config: RunConfig) -> dict[str, Any]:
    """What --fsdp_config says. Raises UsageError: no --fsdp, one process, a file or a setting that cannot be used."""
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        raise UsageError(
            "accelerate's own sharding does not fit the prompt tree",
            where="accelerate launch --use_fsdp",
            todo="Leave it out there, and add --fsdp here.",
        )
    if config.fsdp and place().world == 1:
        raise UsageError(
            "it shards the base over several processes, and this is one",
            where="--fsdp",
            todo="Start the run with torchrun --nproc_per_node N -m espalier train ...",
        )
    if config.fsdp and (config.load_in_4bit or config.load_in_8bit):
        raise UsageError(
            "a quantized base cannot be sharded here",
            where="--fsdp",
            todo="Leave it out: every process then holds the whole quantized base; or do not quantize.",
        )
    if config.fsdp_config is None:
        return {}
    if not config.fsdp:
        raise UsageError("it says how --fsdp works, which is not given", where="--fsdp_config", todo="Add --fsdp.")
    try:
        settings = json.loads(Path(config.fsdp_config).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{config.fsdp_config} cannot be read: {error}", where="--fsdp_config", todo="Name a JSON file."
        ) from error
    check_settings(settings)
    return dict(settings)


def format_options(config: RunConfig) -> FormatOptions:
    """How the rows' columns are understood."""
    return FormatOptions(
        format=config.format,
        columns=config.columns,
        encoding=config.encoding,
        input_joiner=input_joiner(config.input_sentence),
    )


def encode_rows(config: RunConfig, files: list[str], encoder: Encoder, say: Header) -> EncodeResult:
    """The rows of `files` as tokens. Raises DataError that lists all bad rows, unless they are to be skipped."""
    with say.counting("rows encoded") as progress:
        result = encode_files(
            files,
            encoder,
            format_options(config),
            num_workers=config.num_encode_workers,
            cache_dir=cache_root() / "rows",
            progress=progress,
            notice=_noted(say),
        )
    stopping = rows_that_stop(result.bad, on_bad_row=config.on_bad_row, overlength=config.overlength)
    if stopping:
        raise bad_rows_error(stopping, result.counts.num_read)
    return result


def streamed_rows(config: RunConfig, encoder: Encoder, limit_reason: str, say: Header) -> StreamedSteps:
    """The rows of a stream, whose first ones are tried. Raises UsageError for options that need all rows at once,
    DataError where the first rows cannot be used."""
    problems = []
    if config.max_steps is None:
        problems.append("--max_steps is not set, and how many rows there are is not known")
    if config.num_train_epochs is not None:
        problems.append(f"--num_train_epochs {config.num_train_epochs:g}: a stream is read once")
    if config.eval_fraction:
        problems.append(f"--eval_fraction {config.eval_fraction:g}: give held-out rows with --eval_dataset_path")
    if "-" in config.dataset_path and config.dataloader_num_workers:
        problems.append("--dataset_path -: standard input can be read by one process, --dataloader_num_workers 0")
    if "-" in config.dataset_path and config.resume_from_checkpoint:
        problems.append("--dataset_path -: standard input cannot be read again to the row where the run stopped")
    if problems:
        raise UsageError("these options do not go with --streaming", details=problems)
    assert config.max_steps is not None
    steps = StreamedSteps(
        config.dataset_path,
        encoder,
        format_options(config),
        rows_per_step=config.rows_per_step * place().world,
        num_steps=config.max_steps,
        window_rows=config.streaming_window,
        seed=config.seed,
        group_by_prefix=config.group_by_prefix,
        on_bad_row=config.on_bad_row,
        rank=place().rank,
        world=place().world,
    )
    limit = f"limit {encoder.max_length:,} ({limit_reason})" if encoder.max_length is not None else limit_reason
    window = steps.steps_per_window * steps.rows_per_step
    say("rows", f"read once, as the run goes on; shuffled within {window:,} rows; {limit}")
    steps.first_rows()
    return steps


def say_rows(topic: str, result: EncodeResult, limit_reason: str, say: Header) -> None:
    """Counts, limit, what was left out with its lines, and the longest rows: all before step 1."""
    counts, lengths = result.counts, result.lengths
    longest = f"; longest {int(lengths.max()):,} tokens" if len(lengths) else ""
    limit = f", limit {result.max_length:,}" if result.max_length is not None else ""
    cached = "; encoded before, taken from the cache" if result.cached else ""
    account = f"{counts.num_read:,} read, {counts.num_kept:,} kept, {len(counts.bad):,} left out"
    say(topic, f"{account}{longest}{limit} ({limit_reason}){cached}")
    for line in (*result.notices(), *group_bad_rows(counts.bad), *overlength_report(result).lines()):
        say("", line)


def in_steps_of_now(config: RunConfig, steps_of: int, num_rows: int | None) -> RunConfig:
    """The configuration with --max_steps and --warmup_steps, which count steps of `steps_of` rows, in steps of now:
    as many epochs, or of a stream as many rows."""
    now = config.rows_per_step * place().world
    if steps_of == now:
        return config
    many, few = (steps_of, now) if num_rows is None else (-(-num_rows // now), -(-num_rows // steps_of))

    def counted(steps: float) -> int:
        return -(-int(steps) * many // few)

    return dataclasses.replace(
        config,
        max_steps=None if config.max_steps is None else counted(config.max_steps),
        warmup_steps=config.warmup_steps if config.warmup_steps < 1 else counted(config.warmup_steps),
    )


def count_steps(config: RunConfig, num_rows: int | None, say: Header) -> int:
    """Optimizer steps of the run: by epochs, by --max_steps, or the smaller of both (case C22). None: a stream."""
    if num_rows is None:
        assert config.max_steps is not None
        return _said_steps(config, config.max_steps, "--max_steps, or fewer where the rows end", None, say)
    per_epoch = math.ceil(num_rows / (config.rows_per_step * place().world))
    by_epochs = math.ceil((config.num_train_epochs or 3.0) * per_epoch)
    if config.max_steps is None:
        steps, why = by_epochs, f"{config.num_train_epochs or 3.0:g} epochs x {per_epoch}"
    elif config.num_train_epochs is None:
        steps, why = config.max_steps, f"--max_steps, {config.max_steps / per_epoch:.2f} epochs of {per_epoch}"
    else:
        steps = min(config.max_steps, by_epochs)
        why = f"the smaller of --max_steps {config.max_steps} and {config.num_train_epochs:g} epochs x {per_epoch}"
    return _said_steps(config, steps, why, num_rows, say)


def _said_steps(config: RunConfig, steps: int, why: str, num_rows: int | None, say: Header) -> int:
    world = place().world
    rows = config.rows_per_step * world
    rows = rows if num_rows is None else min(rows, num_rows)
    warmup = math.ceil(config.warmup_steps * steps) if 0 < config.warmup_steps < 1 else int(config.warmup_steps)
    say(
        "steps",
        f"{steps} ({why}) of {rows} rows "
        f"({config.per_device_train_batch_size} x accumulation {config.gradient_accumulation_steps}"
        f"{f' x {world} processes' if world > 1 else ''}); "
        f"learning rate {config.learning_rate:g}, {config.lr_scheduler_type}, warm-up {warmup} steps",
    )
    if warmup >= steps:
        say("", f"warning: the warm-up of {warmup} steps is as long as the run: the learning rate is never reached")
    return steps


def rows_digest(rows: EncodedDataset) -> str:
    """sha256 over ids, labels and weights of all rows in order: what a resumed run must find again."""
    digest = hashlib.sha256()
    for row in rows:
        for array in (row.input_ids, row.labels, *(() if row.weights is None else (row.weights,))):
            digest.update(len(array).to_bytes(8, "little"))
            digest.update(array.tobytes())
    return digest.hexdigest()


def describe_file(name: str, *, whole: bool = True) -> dict[str, Any]:
    """Name, size and (whole) sha256 of a data file; of a pattern, standard input or the hub the name alone."""
    path = Path(name)
    if not path.is_file():
        return {"name": name}
    if not whole:
        return {"name": path.name, "bytes": path.stat().st_size}
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def _noted(say: Header) -> Callable[[str], None]:
    return lambda text: say("", text)
