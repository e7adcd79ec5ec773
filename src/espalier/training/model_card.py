"""README.md in the run's folder: a model card from the run's own facts. Nothing in it is written by hand or guessed.

The front matter is Hugging Face's (hub documentation, "Model Cards"): base_model, library_name, pipeline_tag, tags. A
licence is not put there, since only its owner can say the adapter's; where the base's is known, the text names it.
"""

from __future__ import annotations

import json
import platform
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from espalier import __version__
from espalier.config import options as own_options

if TYPE_CHECKING:
    from espalier.training.prepare import Prepared
    from espalier.training.trainer import LoraTrainer

CARD = "README.md"
MARK = (
    "<!-- Written by espalier from the run's files; a resumed run writes it again. Take this line out to keep it. -->"
)
REASONS = 10  # kinds of left-out rows that are listed
PATHS = (
    "dataset_path",
    "eval_dataset_path",
    "model_path",
    "template",
    "checkpoint",
    "fsdp_config",
    "deepspeed",
    "probe_prompts",
)
NOT_SHOWN = ("output_dir", "resume_from_checkpoint", "report_to", "run_name", "logging_dir")
PACKAGES = ("torch", "transformers", "peft")


@dataclass(frozen=True)
class CardFacts:
    """What a card is made of. options: what run.yaml holds, without paths; log: the trainer's log_history.

    base: its name; base_id: the hub's name for it or for what it was made of, else None; base_origin: how it was made
    of that, where it is not the same. record: espalier.json. left_out: kind of reason -> rows. best_step: the step
    whose adapter was kept, where that is not the last. vllm: lines for a shell.
    """

    name: str
    base: str
    base_id: str | None
    base_origin: str | None
    base_license: str | None
    record: Mapping[str, Any]
    options: Mapping[str, Any]
    template: str
    stop_tokens: Sequence[str]
    max_length: int | None
    left_out: Mapping[str, int]
    adapter: str
    steps: int
    epochs: float
    best_step: int | None
    skipped_steps: int
    log: Sequence[Mapping[str, Any]]
    precision: str
    hardware: str
    versions: Mapping[str, str]
    vllm: Sequence[str]


def write_model_card(prepared: Prepared, trainer: LoraTrainer, folder: Path) -> list[str]:
    """Write README.md into the run's folder, whole or not at all; returns what has to be said about it.

    A README.md without our mark is the user's, and stays. The run is done and saved, so no fault here ends it.
    """
    from espalier.training.checkpoint_files import replace_text

    file = folder / CARD
    try:
        if file.is_file() and MARK not in file.read_text(encoding="utf-8", errors="replace"):
            return [f"{CARD} was not written by espalier: it is left as it is"]
        replace_text(file, model_card(card_facts(prepared, trainer, folder)))
    except OSError as error:
        return [f"warning: {file} cannot be written: {error.strerror or error}"]
    return []


def card_facts(prepared: Prepared, trainer: LoraTrainer, folder: Path) -> CardFacts:
    """The facts of a finished run."""
    from espalier.model.embedded import EMBEDDED
    from espalier.model.lora import describe_adapter
    from espalier.model.quantized import describe

    base, state = prepared.model, trainer.state
    embedded = EMBEDDED.get(base.name) if base.kind == "embedded" else None
    kept = state.best_global_step if trainer.args.load_best_model_at_end and state.best_model_checkpoint else None
    frozen = [p for p in trainer.model.parameters() if not p.requires_grad and p.is_floating_point()]
    precision = " and ".join(sorted({str(p.dtype).removeprefix("torch.") for p in frozen}))
    if prepared.quantization:
        precision = f"{describe(prepared.quantization)}, computed in {precision}"
    return CardFacts(
        name=folder.resolve().name,
        base=base.name,
        base_id=embedded.hub_name if embedded else base.name if base.kind == "hub" else None,
        base_origin=f"unpacked from {embedded.gguf} of that model" if embedded else None,
        base_license=_license_of(Path(base.path)),
        record=json.loads((folder / "espalier.json").read_text(encoding="utf-8")),
        options=portable_options(prepared.config.to_dict(), base.name),
        template=_file_name(prepared.template.source),
        stop_tokens=[str(t) for t in prepared.tokenizer.convert_ids_to_tokens(prepared.stop_ids)],
        max_length=prepared.encoder.max_length,
        left_out=Counter(row.kind for row in prepared.left_out),
        adapter=str(describe_adapter(trainer.model)),
        steps=state.global_step,
        epochs=float(state.epoch or 0.0),
        best_step=kept if kept != state.global_step else None,
        skipped_steps=trainer.nonfinite.total,
        log=list(state.log_history),
        precision=precision,
        hardware=hardware(trainer.args.device),
        versions={"espalier": __version__, "python": platform.python_version()}
        | {name: version(name) for name in PACKAGES},
        vllm=_vllm_lines(folder, base.name if base.kind == "hub" else f"path/to/{base.name}"),
    )


def portable_options(options: Mapping[str, Any], base: str) -> dict[str, Any]:
    """The options that make the run again elsewhere: files by their names, the base by its name, no folder of here."""
    ours = {field.name for field in own_options()}
    found: dict[str, Any] = {}
    for name, value in options.items():
        if name in NOT_SHOWN or name.endswith("_token"):
            continue
        if name == "model_path":
            value = base
        elif isinstance(value, list):
            value = [_file_name(str(item)) for item in value] if name in PATHS else value
        elif isinstance(value, str) and (name in PATHS or (name not in ours and _is_absolute(value))):
            value = _file_name(value)
        found[name] = value
    return found


def hardware(device: Any) -> str:
    """'NVIDIA H100 80GB HBM3', or 'AMD EPYC 9B14, 2 CPU threads'."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.is_file() else None
    name = found[1].strip() if found else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} CPU threads" if device.type == "cpu" else f"{device.type} on {name}"


def model_card(facts: CardFacts) -> str:
    """The card's text."""
    import yaml

    tags = ["espalier", "lora", *(["dora"] if facts.options.get("use_dora") else [])]
    front = {"base_model": facts.base_id or facts.base, "library_name": "peft", "pipeline_tag": "text-generation"}
    head = yaml.safe_dump({**front, "tags": tags}, sort_keys=False, allow_unicode=True)
    origin = f" ({code(facts.base_id or '')}, {plain(facts.base_origin)})" if facts.base_origin else ""
    base = code(facts.base) + origin
    license = f" The base's licence: {plain(facts.base_license)}." if facts.base_license else ""
    parts = [
        f"---\n{head}---\n{MARK}\n",
        f"# {plain(facts.name)}\n",
        f"A LoRA adapter for {base}, trained by Espalier {facts.versions['espalier']}.{license}\n",
        *_data(facts),
        *_training(facts),
        *_reproduce(facts),
        *_use(facts),
    ]
    return "\n".join(parts).rstrip("\n") + "\n"


def _data(facts: CardFacts) -> list[str]:
    data = facts.record.get("data", {})
    files = [
        f"| {cell(_file_name(str(entry.get('name'))))} | {_number(entry.get('bytes'))} | {entry.get('sha256', '')} |"
        for entry in data.get("files", [])
    ]
    held = f", {data['held_out']:,} held out" if data.get("held_out") else ""
    left = sum(facts.left_out.values())
    if data.get("read") is None:
        rows = f"Rows were read once, while the run went on: {facts.steps * _rows_a_step(facts):,} at most{held}."
    else:
        rows = f"{data['read']:,} rows read, {data['trained']:,} trained{held}, {left:,} left out."
    kinds = sorted(facts.left_out.items(), key=lambda item: (-item[1], item[0]))
    reasons = [f"- {count:,}: {plain(kind)}" for kind, count in kinds[:REASONS]]
    if len(kinds) > REASONS:
        reasons.append(f"- {sum(count for _, count in kinds[REASONS:]):,}: other reasons")
    stops = ", ".join(code(token) for token in facts.stop_tokens)
    longest = f"; rows of up to {facts.max_length:,} tokens" if facts.max_length else ""
    return [
        "## Data\n",
        "\n".join(["| file | bytes | sha256 |", "|---|---|---|", *files]) + "\n",
        "\n".join([rows, *([""] if reasons else []), *reasons]) + "\n",
        f"Chat template: {plain(facts.template)}; an answer ends with {stops}{longest}.\n",
    ]


def _training(facts: CardFacts) -> list[str]:
    losses = [entry for entry in facts.log if "loss" in entry]
    rows = [f"| training, step {entry['step']} | {_measures(entry, '')} |" for entry in _first_and_last(losses)]
    held = [entry for entry in facts.log if "eval_loss" in entry]
    shown = [*_first_and_last(held), *(entry for entry in held if entry["step"] == facts.best_step)]
    rows += [
        f"| held out, step {entry['step']} | {_measures(entry, 'eval_')} |"
        for entry in sorted({entry["step"]: entry for entry in shown}.values(), key=lambda entry: entry["step"])
    ]
    size = f"{facts.steps:,} steps of {_rows_a_step(facts)} rows ({facts.epochs:.2f} epochs)"
    said = [f"{size}. Adapter: {plain(facts.adapter)}."]
    if facts.best_step is not None:
        said.append(f"The adapter is that of step {facts.best_step}, the best evaluation.")
    if facts.skipped_steps:
        said.append(f"{facts.skipped_steps} steps were skipped: their loss or gradient was not finite.")
    if not held:
        said.append("No held-out rows were evaluated in this run.")
    versions = ", ".join(f"{name} {number}" for name, number in facts.versions.items())
    return [
        "## Training\n",
        " ".join(said) + "\n",
        "\n".join(["| rows | loss | perplexity | token accuracy |", "|---|---|---|---|", *rows]) + "\n",
        f"Base in {facts.precision}, adapter in float32, on {plain(facts.hardware)}; {versions}.\n",
    ]


def _reproduce(facts: CardFacts) -> list[str]:
    import yaml

    text = yaml.safe_dump(dict(facts.options), sort_keys=False, allow_unicode=True)
    return [
        "## Make it again\n",
        "With the files above, and this as `run.yaml` (names without their folders):\n",
        fenced(text, "yaml"),
        fenced("espalier train --config run.yaml --output_dir again\n", "sh"),
    ]


def _use(facts: CardFacts) -> list[str]:
    base = facts.base if facts.base == facts.base_id else f"path/to/{facts.base}"
    python = (
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'adapter = "ADAPTER"  # this folder\n'
        f"base = AutoModelForCausalLM.from_pretrained({base!r})\n"
        "model = PeftModel.from_pretrained(base, adapter)\n"
        "tokenizer = AutoTokenizer.from_pretrained(adapter)\n"
    )
    chat = "espalier chat --adapter ADAPTER\nespalier verify ADAPTER\n"
    return [
        "## Use it\n",
        "ADAPTER is this folder. Tokenizer and chat template beside it are those of training.\n",
        fenced(chat, "sh"),
        fenced(python, "python"),
        fenced("".join(f"{line}\n" for line in facts.vllm), "sh"),
    ]


def _rows_a_step(facts: CardFacts) -> int:
    return int(facts.options["per_device_train_batch_size"]) * int(facts.options["gradient_accumulation_steps"])


def _vllm_lines(folder: Path, base: str) -> tuple[str, ...]:
    """How vLLM serves the adapter, as `verify` says it, with ADAPTER for its folder."""
    from espalier.use.verify import servers

    here = folder.resolve()
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    found = [entry for entry in servers(settings, here, base) if entry.text.startswith("vLLM")]
    lines = [f"# {entry.text}" if entry.level == "note" else entry.text.partition(": ")[2] for entry in found]
    return tuple(line.replace(str(here), "ADAPTER") for line in lines)


def _first_and_last(entries: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return list({entry["step"]: entry for entry in (*entries[:1], *entries[-1:])}.values())


def _measures(entry: Mapping[str, Any], prefix: str) -> str:
    """loss | perplexity | token accuracy; '-' for what was not measured."""
    values = [entry.get(f"{prefix}{name}") for name in ("loss", "perplexity", "token_accuracy")]
    return " | ".join("-" if value is None else f"{value:.4f}" for value in values)


def plain(text: str) -> str:
    """A user's text on one line of Markdown, without any meaning of its own there."""
    return re.sub(r"([\\`*\[\]<>|~&$]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split()))


def code(text: str) -> str:
    """A user's text as a code span, whatever backticks are in it (CommonMark 6.1)."""
    line = " ".join(text.split())
    ticks = "`" * (1 + max((len(run) for run in re.findall(r"`+", line)), default=0))
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{ticks}{pad}{line}{pad}{ticks}"


def cell(text: str) -> str:
    """A code span inside a table (GitHub Flavored Markdown: a pipe must be escaped there, even in code)."""
    return code(text).replace("|", "\\|")


def fenced(text: str, language: str) -> str:
    """A code block, with a fence longer than any in the text."""
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{ticks}{language}\n{text}{ticks}\n"


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else ""


def _is_absolute(text: str) -> bool:
    return text.startswith("~") or PurePosixPath(text).is_absolute() or PureWindowsPath(text).is_absolute()


def _file_name(text: str) -> str:
    """The last part of a path; names on the hub, '-' and what is no path stay."""
    if text.startswith("hub:") or not re.search(r"[/\\]", text):
        return text
    return PureWindowsPath(text).name or text


def _license_of(folder: Path) -> str | None:
    """The licence that the base's own card names, where the base is a folder with one."""
    import yaml

    try:
        text = (folder / CARD).read_text(encoding="utf-8")
        front = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else None
    except (OSError, ValueError, yaml.YAMLError, IndexError, RecursionError):
        return None
    named = front.get("license") if isinstance(front, dict) else None
    return named if isinstance(named, str) else None
