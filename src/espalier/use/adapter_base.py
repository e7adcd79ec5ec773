"""Base, tokenizer, template and end tokens of an adapter, ours or another tool's: what its folder says, and what fills
in its gaps."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from pathlib import Path
from typing import Any

from espalier.encode.stops import generation_stop_ids
from espalier.encode.template import ChatTemplate, resolve_template
from espalier.errors import AdapterError, ModelError, TemplateError
from espalier.model.load import ModelPath, load_tokenizer, resolve_model, sane_generation_config
from espalier.model.load_adapter import read_record, recorded_base_and_file

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
# What Unsloth and others put behind the name of a model to name its 4-bit copy.
FOUR_BIT = re.compile(r"(-unsloth)?-bnb-4bit$|-4bit$", re.IGNORECASE)


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """What turns a conversation into the ids of training and ends the answer. stop_ids: ascending."""

    tokenizer: Any
    template: ChatTemplate
    stop_ids: tuple[int, ...]


def find_base(folder: Path, model_path: str | None) -> ModelPath:
    """The base to put the adapter on: --model_path, else what the adapter's folder names; `said` tells which and why.

    Raises AdapterError where the folder names none, or one that is not here.
    """
    if model_path is not None:
        return _because(resolve_model(model_path), "--model_path")
    name, file = recorded_base_and_file(folder)
    if name is None:
        raise AdapterError("the adapter does not name its base", where=str(folder), todo="Give it with --model_path.")
    ours = bool(read_record(folder).get("base", {}).get("fingerprint"))
    try:
        return _because(resolve_model(name), f"named in {file}" if ours else f"named in {file}, by another tool")
    except ModelError as error:
        original = FOUR_BIT.sub("", name)
        details = [error.what]
        if original != name:
            details.append(f"it names a 4-bit copy; its 16-bit original, probably {original}, does as well")
        raise AdapterError(
            f"the adapter's base {name!r} is not found here",
            where=str(folder),
            details=details,
            todo="Give the base with --model_path: a folder, a .gguf file or a hub name.",
        ) from error


def adapter_tokenizer(folder: Path, base: ModelPath, trust_remote_code: bool = False) -> tuple[Any, list[str]]:
    """(the tokenizer to use with the adapter, notices): its own, else the base's.

    Tools that save a tokenizer without its chat template leave the base's to be used, if the base has one; not where
    our record says that the adapter was trained in another.
    """
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return load_tokenizer(base, trust_remote_code), [
            f"{folder}: no tokenizer beside the adapter: the base's is used"
        ]
    tokenizer = load_tokenizer(folder, trust_remote_code)
    if tokenizer.chat_template:
        return tokenizer, []
    template = load_tokenizer(base, trust_remote_code).chat_template
    trained = (read_record(folder).get("fingerprints") or {}).get("template")
    if not template or trained not in (None, hashlib.sha256(str(template).encode()).hexdigest()):
        return tokenizer, []
    tokenizer.chat_template = template
    return tokenizer, [f"{folder}: no chat template beside the adapter: the base's is used"]


def adapter_layout(
    folder: Path, base: ModelPath, template_name: str | None = None, trust_remote_code: bool = False
) -> tuple[Layout, list[str]]:
    """(the layout that the adapter was trained in, notices); template_name takes another template.

    Raises TemplateError where neither the adapter nor its base has a template and none is named.
    """
    tokenizer, notices = adapter_tokenizer(folder, base, trust_remote_code)
    if tokenizer.chat_template is None and template_name is None:
        raise TemplateError(
            "neither the adapter's folder nor its base has a chat template",
            where=str(folder),
            todo="Say which layout it was trained in: --template atom, chatml, plain or a jinja file.",
        )
    template = resolve_template(tokenizer, template_name)
    stops = set(read_record(folder).get("stop_ids", []))
    for source in (folder, base) if (folder / "generation_config.json").is_file() else (base,):
        generation, _ = sane_generation_config(source)
        stops.update(generation_stop_ids(tokenizer, template, generation.eos_token_id))
    return Layout(tokenizer, template, tuple(sorted(stops))), [*notices, *template.notices()]


def _because(found: ModelPath, reason: str) -> ModelPath:
    return dataclasses.replace(found, said=f"{found.said} ({reason})")
