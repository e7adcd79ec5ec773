"""`espalier import`: LoRA tensors that a script has saved under raw parameter names become a PEFT folder.

Such files hold `{k: p for k, p in model.named_parameters() if p.requires_grad}`, pickled by torch: they say neither the
scale nor the base, and PEFT finds none of their names. Everything that can be wrong with them is compared with the
base's own modules first, and told together; then the base's weights are loaded, and the folder appears only when it
loads strictly.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from espalier import __version__
from espalier.encode.stops import generation_stop_ids
from espalier.encode.template import resolve_template
from espalier.errors import AdapterError, UsageError
from espalier.model.adapter_settings import COMPUTED_AGAIN, CONFIG
from espalier.model.adapter_tensors import WHOLE, TensorName, bare_name, parse_name, read_tensors
from espalier.model.load import (
    ModelPath,
    check_causal_lm,
    choose_device,
    choose_dtype,
    load_config,
    load_model,
    load_tokenizer,
    sane_generation_config,
)
from espalier.model.load_adapter import LEGACY_WEIGHTS, RECORD, WEIGHTS, check_base, load_adapter, read_record
from espalier.model.lora import empty_model
from espalier.use.adapter_base import find_base
from espalier.use.new_folder import new_folder
from espalier.use.plain_adapter import as_plain

if TYPE_CHECKING:
    import torch
    from torch import nn

A, B = ("lora_A", "lora_embedding_A"), ("lora_B", "lora_embedding_B")
SHOWN = 5  # names in a list of tensors


@dataclass(frozen=True, slots=True)
class Imported:
    """What `import_adapter` has written. lines: the report, a sentence a line."""

    folder: Path
    rank: int
    alpha: float
    lines: tuple[str, ...]


def import_adapter(
    source: str | Path,
    output_dir: str | Path,
    *,
    model_path: str | None = None,
    lora_alpha: float | None = None,
    use_rslora: bool = False,
    template: str | None = None,
    trust_remote_code: bool = False,
    use_cpu: bool = False,
) -> Imported:
    """Make the adapter in `source` (a folder, or its .bin or .safetensors file) a PEFT folder at `output_dir`.

    The rank is read from the tensors; alpha, where no adapter_config.json lies beside them, must be given. Raises
    AdapterError that lists every fault of one kind (names, pairs, ranks, shapes, values), UsageError where alpha or
    the base is nowhere, and RunFolderError where the folder is taken. Nothing is left behind then. An adapter that
    PiSSA or OLoRA has started becomes a plain one of twice the rank.
    """
    import torch
    from safetensors.torch import save_file

    file = find_weights(Path(source).expanduser())
    with new_folder(Path(output_dir)) as (_, ready):
        tensors = read_tensors(file)
        settings = read_settings(file.parent / CONFIG)
        base = _base(file, settings, model_path)
        config = load_config(base, trust_remote_code)
        check_causal_lm(config, base.said)
        named = name_tensors(tensors, settings, file)
        modules = dict(empty_model(config, trust_remote_code=trust_remote_code).named_modules())
        ranks = check_tensors(named, tensors, modules, file)
        made, said = adapter_settings(named, ranks, settings, modules, lora_alpha, use_rslora, file)
        made["base_model_name_or_path"] = base.name
        found = {name.in_file: tensors[key] for key, name in named.items()}
        start = str(made.get("init_lora_weights")).lower()
        if start in COMPUTED_AGAIN:
            plain = load_model(base, device="cpu", dtype=torch.float32, trust_remote_code=trust_remote_code)
            made, found = as_plain(plain, made, found, str(file))
            del plain
            said.append(f"what {start} took from the base is part of the adapter now: rank {made['r']}, a plain start")
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, ready / WEIGHTS, {"format": "pt"})
        (ready / CONFIG).write_text(json.dumps(made, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        checked = _complete(ready, base, file.parent, template, trust_remote_code, use_cpu)
    lines = (
        f"{len(tensors)} tensors of {file.name}: {describe_modules(ranks, modules)}",
        f"base: {base.said}",
        *said,
        *checked,
        f"written to {output_dir}, and loaded from there: every tensor in its place",
    )
    return Imported(Path(output_dir), made["r"], made["lora_alpha"], lines)


def run_import(source: str, output_dir: str, **options: Any) -> int:
    """The command: imports, prints the report, returns the exit code."""
    from espalier.model.embedded import quiet_transformers

    with quiet_transformers():
        done = import_adapter(source, output_dir, **options)
    for line in done.lines:
        print(line)
    print(f"try it: espalier chat --adapter {done.folder}")
    return 0


def find_weights(source: Path) -> Path:
    """The file that holds the adapter's tensors. Raises AdapterError."""
    if source.is_file():
        return source
    for name in (WEIGHTS, LEGACY_WEIGHTS):
        if (source / name).is_file():
            return source / name
    below = sorted({str(found.parent) for found in source.glob("*/adapter_model.*")}) if source.is_dir() else []
    raise AdapterError(
        f"neither {WEIGHTS} nor {LEGACY_WEIGHTS} is there" if source.is_dir() else "there is no such file or folder",
        where=str(source),
        todo=f"Adapters below it: {', '.join(below[:5])}" if below else "Give the folder, or the file itself.",
    )


def read_settings(file: Path) -> dict[str, Any]:
    """adapter_config.json beside the tensors; empty where there is none. Raises AdapterError."""
    if not file.is_file():
        return {}
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise AdapterError("cannot be read as JSON", where=str(file), todo="Repair it, or take it away.") from error
    if not isinstance(fields, dict) or fields.get("peft_type", "LORA") != "LORA":
        raise AdapterError("these are no settings of a LoRA adapter", where=str(file), todo="Take it away.")
    return fields


def _base(file: Path, settings: Mapping[str, Any], model_path: str | None) -> ModelPath:
    if model_path is not None:
        return find_base(file.parent, model_path)
    name = settings.get("base_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise UsageError("the file does not say which base it belongs to", where=str(file), todo="Give --model_path.")
    return find_base(file.parent, None)


def name_tensors(tensors: Mapping[str, Any], settings: Mapping[str, Any], file: Path) -> dict[str, TensorName]:
    """Key in the file -> what it names. Raises AdapterError: no LoRA tensors, others among them, two adapters."""
    saved = tuple(settings.get(WHOLE) or ())
    named = {key: name for key in tensors if (name := parse_name(key) or _whole(key, saved)) is not None}
    others = [key for key in tensors if key not in named]
    if not any(name.kind in A for name in named.values()):
        raise AdapterError(
            f"none of its {len(tensors)} tensors is one of a LoRA adapter",
            where=str(file),
            details=list(tensors)[:SHOWN],
            todo="LoRA tensors are named ...lora_A... and ...lora_B...; a whole model is given as --model_path.",
        )
    if others:
        raise AdapterError(
            f"{len(others)} of its {len(tensors)} tensors are no LoRA tensors: what they replace is not known",
            where=str(file),
            details=others[:SHOWN],
            todo="Save the trained ones only: {k: p for k, p in model.named_parameters() if p.requires_grad}.",
        )
    adapters = sorted({name.adapter for name in named.values() if name.adapter is not None})
    if len(adapters) > 1:
        raise AdapterError(
            f"the file holds {len(adapters)} adapters: {', '.join(adapters)}",
            where=str(file),
            todo="Save one of them alone: model.save_pretrained(folder, selected_adapters=[name]).",
        )
    twice = [key for key, count in Counter(name.in_file for name in named.values()).items() if count > 1]
    if twice:
        raise AdapterError(f"{len(twice)} tensors are there twice", where=str(file), details=twice[:SHOWN])
    return named


def _whole(key: str, saved: tuple[str, ...]) -> TensorName | None:
    """A tensor of a module that the settings say is saved in full, under PEFT's name for it."""
    module, _, leaf = bare_name(key).rpartition(".")
    if leaf in ("weight", "bias") and any(module == name or module.endswith(f".{name}") for name in saved):
        return TensorName(module, WHOLE, None, leaf == "bias")
    return None


def check_tensors(
    named: Mapping[str, TensorName], tensors: Mapping[str, torch.Tensor], modules: Mapping[str, nn.Module], file: Path
) -> dict[str, int]:
    """Module -> rank. Raises AdapterError for the first kind of fault that there is, with all its tensors.

    modules: the empty base's, by name.
    """
    found: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    keys: dict[tuple[str, str], str] = {}
    strange = [key for key, name in named.items() if name.module not in modules]
    _refuse(strange, len(named), "name a module that this base does not have", file, _near(strange, modules))
    for key, name in named.items():
        if not name.is_bias and name.kind != WHOLE:
            found[name.module][name.kind] = tensors[key]
            keys[name.module, name.kind] = key
    empty = [f"{key}: {list(tensors[key].shape)}" for key in named if not tensors[key].numel()]
    _refuse(empty, len(named), "hold no values", file, "They were saved while ZeRO-3 or FSDP held them in shards.")
    lonely = [
        f"{keys[module, kind]}: no {other} beside it"
        for module, held in found.items()
        for kind, other in (*zip(A, B, strict=True), *zip(B, A, strict=True))
        if kind in held and other not in held
    ]
    _refuse(lonely, len(named), "lack their other half", file, "It was saved in part. Take another checkpoint.")
    pairs = {module: (_half(held, A), _half(held, B)) for module, held in found.items()}
    flat = [
        f"{keys[module, kind]}: {list(tensor.shape)}"
        for module, held in found.items()
        for kind, tensor in held.items()
        if tensor.dim() != 2 and kind in (*A, *B)
    ]
    _refuse(flat, len(named), "are no matrices", file, "Adapters on convolutions cannot be imported.")
    uneven = [
        f"{module}: A {list(a.shape)}, B {list(b.shape)}" for module, (a, b) in pairs.items() if len(a) != b.shape[1]
    ]
    _refuse(uneven, len(pairs), "have another rank in A than in B", file, "A is [rank, in], B is [out, rank].")
    wrong = [
        f"{module}: A {list(a.shape)}, B {list(b.shape)}; {size or 'no linear layer'} in this base"
        for module, (a, b) in pairs.items()
        if (size := in_and_out(modules[module])) != (a.shape[1], b.shape[0])
    ]
    _refuse(wrong, len(pairs), "do not fit this base", file, "Give the base that it was trained on (--model_path).")
    bad = [key for key in named if not tensors[key].isfinite().all()]
    _refuse(bad, len(named), "hold values that are not finite", file, "Take an earlier checkpoint.")
    if not any(b.any() for _, b in pairs.values()):
        zero = [keys[module, kind] for module, held in found.items() for kind in B if kind in held]
        _refuse(zero, len(zero), "are all zero, so the adapter changes nothing", file, "Take a later checkpoint.")
    return {module: len(a) for module, (a, _) in pairs.items()}


def _half(held: Mapping[str, torch.Tensor], kinds: tuple[str, str]) -> torch.Tensor:
    return next(held[kind] for kind in kinds if kind in held)


def _refuse(entries: list[str], total: int, what: str, file: Path, todo: str) -> None:
    if not entries:
        return
    rest = [f"and {len(entries) - SHOWN} more"] if len(entries) > SHOWN else []
    raise AdapterError(
        f"{len(entries)} of {total} {what}", where=str(file), details=[*entries[:SHOWN], *rest], todo=todo
    )


def _near(strange: list[str], modules: Mapping[str, nn.Module]) -> str:
    """What the base has where the first strange name looked for something."""
    if not strange:
        return ""
    parts = bare_name(strange[0]).split(".lora_")[0].split(".")
    while parts and ".".join(parts) not in modules:
        parts.pop()
    inside = ".".join(parts)
    children = [name for name, _ in modules[inside].named_children()]
    return (
        f"This base's {inside or 'top'} has {', '.join(children[:12])}. Give the base it was trained on (--model_path)."
    )


def in_and_out(module: Any) -> tuple[int, int] | None:
    """(in, out) of what an adapter can be on: linear layers, GPT-2's Conv1D, embeddings; None for anything else."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    if isinstance(module, nn.Embedding):
        return module.num_embeddings, module.embedding_dim
    return None


def adapter_settings(
    named: Mapping[str, TensorName],
    ranks: Mapping[str, int],
    settings: Mapping[str, Any],
    modules: Mapping[str, nn.Module],
    lora_alpha: float | None,
    use_rslora: bool,
    file: Path,
) -> tuple[dict[str, Any], list[str]]:
    """(adapter_config.json, sentences about where its values come from). Raises AdapterError and UsageError."""
    patterns = settings.get("rank_pattern") or {}
    sizes = sorted(set(ranks.values()))
    if len(sizes) > 1 and not patterns:
        each = [f"rank {size}: {next(m for m, r in ranks.items() if r == size)}" for size in sizes]
        raise AdapterError(
            f"its modules have ranks {', '.join(map(str, sizes))}, and one alpha means another scale for each",
            where=str(file),
            details=each,
            todo=f"Put the {CONFIG} with its rank_pattern beside it.",
        )
    told = settings.get("r")
    if told is not None and not patterns and told != sizes[0]:
        raise AdapterError(
            f"{CONFIG} says rank {told}, the tensors have rank {sizes[0]}: it belongs to another adapter",
            where=str(file),
            todo=f"Put the right {CONFIG} there, or take it away and give --lora_alpha.",
        )
    alpha = lora_alpha if lora_alpha is not None else settings.get("lora_alpha")
    if alpha is None:
        raise UsageError(
            f"alpha is nowhere: there is no {CONFIG} beside the tensors, and the scale of an adapter is alpha / rank",
            where="--lora_alpha",
            todo="Give what it was trained with (32 in the Atom recipe; look for lora_alpha in the training script).",
        )
    rank = int(told if patterns and told is not None else sizes[0])
    where = "--lora_alpha" if lora_alpha is not None else CONFIG
    if not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
        raise UsageError(f"alpha {alpha!r} is no number above 0", where=where, todo="Give what it was trained with.")
    other = settings.get("lora_alpha")
    if lora_alpha is not None and other is not None and other != lora_alpha:
        where += f"; {CONFIG} says {other}"
    scaled = use_rslora or bool(settings.get("use_rslora"))
    whole = sorted({name.module.rsplit(".", 1)[-1] for name in named.values() if name.kind == WHOLE})
    made = {
        "target_modules": targets(ranks, modules),
        WHOLE: whole or None,
        **settings,
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "use_rslora": scaled,
        "use_dora": any(name.kind == "lora_magnitude_vector" for name in named.values()),
        "lora_bias": any(name.is_bias for name in named.values()),
        "inference_mode": True,
    }
    scale = f"{alpha:g} / {'sqrt of ' if scaled else ''}{rank}"
    return made, [f"rank {', '.join(map(str, sizes))} (from the tensors), alpha {alpha:g} ({where}): scale {scale}"]


def describe_modules(ranks: Mapping[str, int], modules: Mapping[str, nn.Module]) -> str:
    """'60 modules have an adapter: q_proj 30 of 30, v_proj 30 of 30'; what the base has more of is seen at once."""
    have = Counter(name.rsplit(".", 1)[-1] for name in modules)
    counts = Counter(name.rsplit(".", 1)[-1] for name in ranks)
    each = ", ".join(f"{name} {count} of {have[name]}" for name, count in counts.items())
    return f"{len(ranks)} modules have an adapter: {each}"


def targets(ranks: Mapping[str, int], modules: Mapping[str, nn.Module]) -> list[str]:
    """target_modules that mean exactly these modules: last names where those suffice, else full names."""
    last = sorted({module.rsplit(".", 1)[-1] for module in ranks})
    meant = {name for name in modules if name.rsplit(".", 1)[-1] in last}
    return last if meant == set(ranks) else sorted(ranks)


def _complete(
    folder: Path, base: ModelPath, beside: Path, template_name: str | None, trust_remote_code: bool, use_cpu: bool
) -> list[str]:
    """Everything else of an adapter's folder, and the strict load: sentences for the report."""
    from espalier.model.fingerprint import base_fingerprint
    from espalier.use.verify import effect

    own = (beside / "tokenizer.json").is_file()
    tokenizer = load_tokenizer(beside if own else base, trust_remote_code)
    template = resolve_template(tokenizer, template_name)
    tokenizer.save_pretrained(folder)
    generation, _ = sane_generation_config(base)
    generation.eos_token_id = generation_stop_ids(tokenizer, template, generation.eos_token_id)
    generation.save_pretrained(folder)
    device, _ = choose_device(use_cpu)
    model = load_model(base, device=device, dtype=choose_dtype(device)[0], trust_remote_code=trust_remote_code)
    before = read_record(beside)
    if before:  # a run of ours
        check_base(beside, model)
    record: dict[str, Any] = {
        **{name: before[name] for name in ("run", "data") if name in before},
        "espalier_version": __version__,
        "made_by": "espalier import",
        "base": {"name": base.name, "fingerprint": base_fingerprint(model)},
        "template": template.source,
        "stop_ids": generation.eos_token_id,
    }
    (folder / RECORD).write_text(json.dumps(record, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    said: list[str] = []
    adapted = load_adapter(model, folder, notice=said.append)
    text = f"template: {template.source}, tokenizer of {'the adapter' if own else 'the base'}"
    if template_name is None and not own:
        text += "; if it was trained in another layout, say which with --template"
    return [text, *said, effect(adapted, tokenizer, template).text]
